//! What fewer K/V heads are for: time and memory of decoding with the same shapes.

use std::time::Instant;

use gqa_burn::gqa::{Attention, Batch, Io, wgpu};
use gqa_burn::{AttentionSpec, CacheShape, Dtype, KvCache, Options, Sequence, WgpuSetup};

use crate::Result;
use crate::bert::Config;

/// Tokens that the cache holds.
pub(crate) const CONTEXT: u32 = 8192;
/// Steps that are timed, behind two that are not.
const STEPS: usize = 21;

/// Of one kind of attention, all layers of the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decode {
    /// Median, of the attention of one token.
    pub(crate) milliseconds: f64,
    /// Of a token's keys and values in f16.
    pub(crate) bytes_per_token: u64,
}

/// Times decoding one token with `kv_heads` and [`CONTEXT`] tokens in an f16 cache. MiniLM reads sentences whole and decodes nothing: these
/// are the times of a decoder of its shape.
pub(crate) fn measure(config: &Config, kv_heads: usize, setup: &WgpuSetup) -> Result<Decode> {
    let (heads, dim) = (config.heads as u32, config.head_dim() as u32);
    let spec = AttentionSpec::builder(heads, kv_heads as u32, dim).kv_dtype(Dtype::F16).build()?;
    let attention = Attention::new(&setup.device, spec.clone(), Options::default())?;
    let layers = config.layers as u32;
    let shape = CacheShape { layers, sequences: 1, capacity: CONTEXT };
    let mut cache = KvCache::new(&setup.device, &spec, shape)?;
    let text = cache.open()?;
    let mut encoder = setup.device.create_command_encoder(&Default::default());
    // Its numbers do not matter to the time, so it is left as it came.
    cache.extend(&mut encoder, &[(text, CONTEXT)])?;
    setup.queue.submit([encoder.finish()]);
    let sequences = [Sequence { new_len: 0, ..Sequence::new(text, 1) }];
    let step = attention.prepare(&setup.queue, &cache, &Batch::new(&spec, &sequences))?;
    let tensor = || {
        let size = u64::from(heads * dim) * 4;
        let usage = wgpu::BufferUsages::STORAGE;
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        setup.device.create_buffer(&descriptor)
    };
    let (q, out) = (tensor(), tensor());
    let whole = wgpu::Buffer::as_entire_buffer_binding;
    let mut times = Vec::new();
    for _ in 0..STEPS + 2 {
        let mut encoder = setup.device.create_command_encoder(&Default::default());
        for layer in 0..layers {
            let io = Io { q: whole(&q), out: whole(&out), lse: None };
            attention.record(&mut encoder, &step, layer, io)?;
        }
        let start = Instant::now();
        setup.queue.submit([encoder.finish()]);
        setup.device.poll(wgpu::PollType::wait_indefinitely())?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let mut times = times.split_off(2);
    times.sort_by(f64::total_cmp);
    let bytes_per_token = u64::from(layers * kv_heads as u32 * dim) * 2 * 2;
    Ok(Decode { milliseconds: times[STEPS / 2], bytes_per_token })
}
