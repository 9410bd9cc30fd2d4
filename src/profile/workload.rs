//! One attention shape on one device, ready to be repeated.

use super::Ceilings;
use crate::attention::{Attention, Bindings, Io};
use crate::batch::{Batch, Sequence};
use crate::cache::{CacheShape, KvCache};
use crate::plan::{Options, Traffic};
use crate::quant::encode_row;
use crate::spec::AttentionSpec;
use crate::step::Step;
use crate::verify::Gpu;

/// What is measured: `batch` sequences of equal lengths.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// The attention.
    pub spec: AttentionSpec,
    /// Query tokens of each sequence: 1 is a decode.
    pub q_len: u32,
    /// Keys of each sequence.
    pub kv_len: u32,
    /// Sequences.
    pub batch: u32,
}

/// A shape with its buffers, prepared and bound.
pub struct Workload {
    attention: Attention,
    step: Step,
    bindings: Bindings,
    shape: Shape,
}

impl Workload {
    /// Compiles and prepares `shape`, and fills the cache with small random numbers.
    ///
    /// # Errors
    /// What the library refuses: mostly a cache beyond the device's limits.
    pub fn new(gpu: &Gpu, shape: &Shape, options: Options) -> Result<Self, crate::Error> {
        let spec = &shape.spec;
        let attention = Attention::new(&gpu.device, spec.clone(), options)?;
        let cache_shape = CacheShape { layers: 1, sequences: shape.batch, capacity: shape.kv_len };
        let mut cache = KvCache::new(&gpu.device, spec, cache_shape)?;
        let mut sequences = Vec::new();
        // Nothing is shared, so nothing is copied.
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        for _ in 0..shape.batch {
            let id = cache.open()?;
            cache.extend(&mut encoder, &[(id, shape.kv_len)])?;
            sequences.push(Sequence { new_len: 0, ..Sequence::new(id, shape.q_len) });
        }
        fill(gpu, &cache, spec);
        let mut rng = fastrand::Rng::with_seed(2);
        let step = attention.prepare(&gpu.queue, &cache, &Batch::new(spec, &sequences))?;
        let tokens = u64::from(shape.batch) * u64::from(shape.q_len) * u64::from(spec.q_heads());
        let bytes = |dim: u32| tokens * u64::from(dim) * u64::from(spec.q_dtype().bytes());
        let q = gpu.upload("gqa.bench.q", &small_numbers(&mut rng, spec.q_dtype(), bytes(spec.head_dim())));
        let out = gpu.upload("gqa.bench.out", &vec![0; bytes(spec.v_head_dim()) as usize]);
        let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
        let bindings = attention.bind(&step, 0, io)?;
        Ok(Self { attention, step, bindings, shape: shape.clone() })
    }

    /// Records one forward call of one layer.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        // Bindings and step were made for each other.
        let bound = self.attention.dispatch(&mut pass, &self.step, &self.bindings);
        debug_assert!(bound.is_ok());
    }

    /// The row of the table for a measured time.
    pub fn row(&self, (median_s, min_s): (f64, f64), ceilings: &Ceilings) -> Row {
        let Traffic { bytes, flops } = self.step.traffic();
        let read = bytes as f64 / ceilings.read_bytes_per_s;
        let fma = flops as f64 / ceilings.fma_flops_per_s;
        let [_, decodes, ..] = self.step.workgroups();
        let plan = self.attention.plan();
        let variant = if decodes > 0 { plan.decode() } else { plan.prefill() };
        let spec = &self.shape.spec;
        Row {
            kernel: variant.kernel.name(),
            q_heads: spec.q_heads(),
            kv_heads: spec.kv_heads(),
            head_dim: spec.head_dim(),
            q_len: self.shape.q_len,
            kv_len: self.shape.kv_len,
            batch: self.shape.batch,
            kv_dtype: spec.k_dtype().name(),
            median_s,
            min_s,
            bytes,
            flops,
            ceiling: if read >= fma { "read" } else { "fma" },
            fraction: read.max(fma) / median_s,
            kv_bytes_per_token: spec.kv_bytes_per_token(),
        }
    }
}

/// One measurement, in the words of the JSON output.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The kernel that did the work; chunks are merged by `combine`, whose time is included.
    pub kernel: &'static str,
    /// Query heads.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Query tokens of a sequence.
    pub q_len: u32,
    /// Keys of a sequence.
    pub kv_len: u32,
    /// Sequences.
    pub batch: u32,
    /// Storage of K and V.
    pub kv_dtype: &'static str,
    /// Median seconds of one forward call of one layer.
    pub median_s: f64,
    /// Least seconds.
    pub min_s: f64,
    /// Bytes that must be moved: each K/V element once per sequence, queries and outputs.
    pub bytes: u64,
    /// Operations that must be done.
    pub flops: u64,
    /// The nearer ceiling: `read` or `fma`.
    pub ceiling: &'static str,
    /// Least time by that ceiling over median time.
    pub fraction: f64,
    /// Bytes that a token takes in one layer of the cache.
    pub kv_bytes_per_token: u64,
}

/// Fills a cache with small numbers.
pub(super) fn fill(gpu: &Gpu, cache: &KvCache, spec: &AttentionSpec) {
    let mut rng = fastrand::Rng::with_seed(1);
    for shard in cache.layers().iter().flat_map(|layer| &layer.shards) {
        for (buffer, dtype) in [(&shard.k, spec.k_dtype()), (&shard.v, spec.v_dtype())] {
            gpu.queue.write_buffer(buffer, 0, &small_numbers(&mut rng, dtype, buffer.size()));
        }
    }
}

/// Numbers of about +-0.5 in `dtype`, `bytes` bytes of them.
fn small_numbers(rng: &mut fastrand::Rng, dtype: crate::Dtype, bytes: u64) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < bytes {
        let words = match dtype.is_blocked() {
            // Good as quants and as a header: 2^-9 times a quant, less a half.
            true => vec![0xbf00_3b00 | (rng.u32(..) & 0x007f_007f)],
            false => encode_row(dtype, &[(); 64].map(|()| rng.f32() - 0.5)).0,
        };
        all.extend_from_slice(bytemuck::cast_slice(&words));
    }
    all.truncate(bytes as usize);
    all
}
