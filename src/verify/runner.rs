//! Runs a problem on a device, through the public API: append in two steps, attend, read back.

use super::adapters::Gpu;
use super::problem::{Problem, Tensor};
use crate::attention::{Attention, Io, NewKv};
use crate::batch::{Batch, Sequence};
use crate::cache::{CacheShape, KvCache};
use crate::error::Error;
use crate::layout::Shape;
use crate::pages::SequenceId;
use crate::plan::Options;
use crate::spec::{AttentionSpec, Dtype};

/// How a problem is run.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Kernels, chunks, checks.
    pub options: Options,
    /// Slots of a sequence beyond its tokens, filled with NaN.
    pub slack: u32,
}

/// What a device answered, per sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// `[q_len][q_heads][v_head_dim]` per sequence.
    pub out: Vec<Vec<f32>>,
    /// `[q_len][q_heads]` per sequence.
    pub lse: Vec<Vec<f32>>,
    /// Reads of four K or V elements, where they were counted.
    pub fetches: Option<u32>,
}

/// Attention compiled on a device, ready to run problems of one spec.
#[derive(Debug)]
pub struct Runner<'a> {
    gpu: &'a Gpu,
    attention: Attention,
    slack: u32,
}

impl<'a> Runner<'a> {
    /// Compiles `spec`.
    ///
    /// # Errors
    /// Whatever the library refuses.
    pub fn new(gpu: &'a Gpu, spec: &AttentionSpec, setup: &Setup) -> Result<Self, Error> {
        let attention = Attention::new(&gpu.device, spec.clone(), setup.options.clone())?;
        Ok(Self { gpu, attention, slack: setup.slack })
    }

    /// What was compiled.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Runs `problem`, which must have the runner's spec. Cache slack, gaps of tensors and outputs are NaN before; a write
    /// outside an output is an error.
    ///
    /// # Errors
    /// Whatever the library refuses, as text.
    pub fn run(&self, problem: &Problem) -> Result<Output, String> {
        let (gpu, attention) = (self.gpu, &self.attention);
        let longest = problem.sequences.iter().map(|s| s.kv_len).max().unwrap_or(0);
        let shape = CacheShape {
            layers: 2,
            sequences: problem.sequences.len().max(1) as u32,
            capacity: (longest + self.slack).max(1),
        };
        let mut cache = KvCache::new(&gpu.device, &problem.spec, shape).map_err(text)?;
        for buffer in cache.layers().iter().flat_map(|layer| [&layer.k, &layer.v]) {
            // All ones is NaN in f32, f16 and bf16.
            gpu.queue.write_buffer(buffer, 0, &vec![0xff; buffer.size() as usize]);
        }
        let mut ids = Vec::new();
        for _ in &problem.sequences {
            ids.push(cache.open().map_err(text)?);
        }
        let history: Vec<_> = problem.sequences.iter().map(|s| (0, s.history)).collect();
        let rest: Vec<_> = problem.sequences.iter().map(|s| (s.history, s.kv_len)).collect();
        let call = Call { gpu, attention, problem, ids: &ids };
        if problem.sequences.iter().any(|s| s.history > 0) {
            call.append(&mut cache, 1, &history, false)?;
        }
        call.append(&mut cache, 1, &rest, true)
    }
}

/// Compiles and runs `problem` on `gpu`.
///
/// # Errors
/// As [`Runner::new`] and [`Runner::run`].
pub fn run(gpu: &Gpu, problem: &Problem, setup: &Setup) -> Result<Output, String> {
    Runner::new(gpu, &problem.spec, setup).map_err(text)?.run(problem)
}

struct Call<'a> {
    gpu: &'a Gpu,
    attention: &'a Attention,
    problem: &'a Problem,
    ids: &'a [SequenceId],
}

impl Call<'_> {
    /// Appends the given span of keys of every sequence, and attends where `queries`.
    fn append(
        &self,
        cache: &mut KvCache,
        layer: u32,
        spans: &[(u32, u32)],
        queries: bool,
    ) -> Result<Output, String> {
        let Self { gpu, attention, problem, ids } = self;
        let spec = &problem.spec;
        let growth: Vec<_> = ids.iter().zip(spans).map(|(id, (from, to))| (*id, to - from)).collect();
        cache.extend(&growth).map_err(text)?;
        let sequences: Vec<_> = problem
            .sequences
            .iter()
            .zip(&growth)
            .map(|(s, (id, new_len))| Sequence {
                q_len: if queries { s.q_len } else { 0 },
                new_len: *new_len,
                q_start: s.q_start,
                ..Sequence::new(*id, 0)
            })
            .collect();
        let tokens = sequences.iter().map(|s| s.q_len).sum();
        let new_tokens = sequences.iter().map(|s| s.new_len).sum();
        let tensor = |arrangement, tokens, heads, dim, dtype| {
            Tensor::new(arrangement, Shape { tokens, heads, dim }, dtype)
        };
        let (inputs, outputs, dtype) = (problem.inputs, problem.outputs, spec.q_dtype());
        let mut q = tensor(inputs, tokens, spec.q_heads(), spec.head_dim(), dtype);
        let mut new_k = tensor(inputs, new_tokens, spec.kv_heads(), spec.head_dim(), dtype);
        let mut new_v = tensor(inputs, new_tokens, spec.kv_heads(), spec.v_head_dim(), dtype);
        let mut out = tensor(outputs, tokens, spec.q_heads(), spec.v_head_dim(), dtype);
        let mut lse = tensor(outputs, tokens, spec.q_heads(), 1, Dtype::F32);
        let (mut token, mut new_token) = (0, 0);
        for (s, (from, to)) in problem.sequences.iter().zip(spans) {
            if queries {
                q.write(token, &s.q);
                token += s.q_len;
            }
            let rows = |x: &[f32], dim: u32| {
                let row = (spec.kv_heads() * dim) as usize;
                x[*from as usize * row..*to as usize * row].to_vec()
            };
            new_k.write(new_token, &rows(&s.k, spec.head_dim()));
            new_v.write(new_token, &rows(&s.v, spec.v_head_dim()));
            new_token += to - from;
        }
        let batch = Batch {
            sequences: &sequences,
            q: q.layout,
            out: out.layout,
            lse: Some(lse.layout),
            new_k: new_k.layout,
            new_v: new_v.layout,
        };

        let [q, new_k, new_v, out_buffer, lse_buffer] =
            [&q, &new_k, &new_v, &out, &lse].map(|t| gpu.upload("gqa.verify", &t.bytes));
        let step = attention.prepare(&gpu.queue, cache, &batch).map_err(text)?;
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        attention
            .append(&mut encoder, &step, layer, NewKv { k: whole(&new_k), v: whole(&new_v) })
            .map_err(text)?;
        if let Some(counter) = attention.fetch_counter() {
            encoder.clear_buffer(counter, 0, None);
        }
        let io = Io { q: whole(&q), out: whole(&out_buffer), lse: Some(whole(&lse_buffer)) };
        attention.record(&mut encoder, &step, layer, io).map_err(text)?;
        gpu.finish(encoder)?;
        let fetches = match attention.fetch_counter() {
            Some(counter) => gpu.download(counter)?.get(..4).map(bytemuck::pod_read_unaligned),
            None => None,
        };
        for (tensor, buffer) in [(&mut out, &out_buffer), (&mut lse, &lse_buffer)] {
            let len = tensor.bytes.len();
            tensor.bytes = gpu.download(buffer)?;
            tensor.bytes.truncate(len);
        }
        if out.strays() + lse.strays() > 0 {
            return Err(format!("{} elements outside out and lse were written", out.strays() + lse.strays()));
        }
        let mut output = Output { out: Vec::new(), lse: Vec::new(), fetches };
        let mut token = 0;
        for s in &sequences {
            output.out.push(out.read(token, s.q_len));
            output.lse.push(lse.read(token, s.q_len));
            token += s.q_len;
        }
        Ok(output)
    }
}

fn text(error: Error) -> String {
    error.to_string()
}
