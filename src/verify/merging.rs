//! Merges two results of a device on the device, through the public API.

use super::adapters::Gpu;
use super::problem::{Arrangement, Tensor};
use super::runner::Output;
use crate::layout::Shape;
use crate::merge::{Merge, MergeLayout, Partial};
use crate::spec::{AttentionSpec, Dtype};

/// Merges partial results of the same rows. Gaps between rows are NaN before; a write there is an error.
///
/// # Errors
/// Whatever the library refuses, as text.
pub fn merge(gpu: &Gpu, spec: &AttentionSpec, a: &Output, b: &Output) -> Result<Output, String> {
    let merge = Merge::new(&gpu.device, spec).map_err(|e| e.to_string())?;
    let heads = spec.q_heads();
    let lens: Vec<u32> = a.lse.iter().map(|lse| lse.len() as u32 / heads).collect();
    let tokens = lens.iter().sum();
    let tensor = |rows: &[Vec<f32>], dim, dtype| {
        let mut tensor = Tensor::new(Arrangement::Gaps, Shape { tokens, heads, dim }, dtype);
        tensor.write(0, &rows.concat());
        tensor
    };
    let outs = [a, b].map(|part| tensor(&part.out, spec.v_head_dim(), spec.q_dtype()));
    let lses = [a, b].map(|part| tensor(&part.lse, 1, Dtype::F32));
    let layout = MergeLayout { tokens, out: outs[0].layout, lse: lses[0].layout };
    let step = merge.prepare(&layout).map_err(|e| e.to_string())?;
    let buffers = [&outs[0], &outs[1], &lses[0], &lses[1]].map(|t| gpu.upload("gqa.verify", &t.bytes));
    let [out_a, out_b, lse_a, lse_b] = &buffers;
    let part = |out, lse| Partial {
        out: wgpu::Buffer::as_entire_buffer_binding(out),
        lse: wgpu::Buffer::as_entire_buffer_binding(lse),
    };
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    merge.record(&mut encoder, &step, &part(out_b, lse_b), &part(out_a, lse_a)).map_err(|e| e.to_string())?;
    gpu.finish(encoder)?;
    let mut merged = Output::default();
    let [mut out, _] = outs;
    let [mut lse, _] = lses;
    for (tensor, buffer) in [(&mut out, out_a), (&mut lse, lse_a)] {
        let len = tensor.bytes.len();
        tensor.bytes = gpu.download(buffer)?;
        tensor.bytes.truncate(len);
        if tensor.strays() > 0 {
            return Err(format!("{} elements outside the results were written", tensor.strays()));
        }
    }
    let mut token = 0;
    for len in lens {
        merged.out.push(out.read(token, len));
        merged.lse.push(lse.read(token, len));
        token += len;
    }
    Ok(merged)
}
