//! One attention shape on one device, ready to be repeated.

use std::sync::Arc;

use super::{Ceilings, Timing};
use crate::attention::{Attention, BackwardIo, BackwardStep, Bindings, Io};
use crate::batch::{Batch, Sequence};
use crate::cache::{CacheShape, KvCache, PagedShape};
use crate::plan::{Options, Traffic};
use crate::quant::encode_row;
use crate::spec::AttentionSpec;
use crate::step::Step;
use crate::verify::Gpu;

/// Which way a shape is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Outputs alone.
    Infer,
    /// Outputs and log-sum-exp, as training needs them.
    Forward,
    /// Gradients of queries, keys and values.
    Backward,
}

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
    /// Which way.
    pub pass: Pass,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { spec, q_len, kv_len, batch, pass } = self;
        write!(f, "{spec}: {batch} x {q_len} queries on {kv_len} keys")?;
        f.write_str(match pass {
            Pass::Infer => "",
            Pass::Forward => ", forward",
            Pass::Backward => ", backward",
        })
    }
}

impl Shape {
    /// Bytes of K and V.
    pub fn cache_bytes(&self) -> u64 {
        self.spec.kv_bytes_per_token() * u64::from(self.kv_len) * u64::from(self.batch)
    }
}

/// A shape with its buffers, prepared and bound.
pub struct Workload {
    attention: Arc<Attention>,
    step: Step,
    work: Work,
    shape: Shape,
    page: Option<u32>,
}

/// What is recorded.
enum Work {
    Attend(Bindings),
    Differentiate(Box<(BackwardStep, Tensors)>),
}

/// Buffers of a layer that trains.
struct Tensors {
    q: wgpu::Buffer,
    out: wgpu::Buffer,
    lse: wgpu::Buffer,
    dq: wgpu::Buffer,
    dk: wgpu::Buffer,
    dv: wgpu::Buffer,
}

/// The sequences of a shape in a cache full of small random numbers: for one workload, or for several that are measured in turn.
pub struct Filled {
    cache: KvCache,
    sequences: Vec<Sequence<'static>>,
    page: Option<u32>,
}

impl Filled {
    /// Makes and fills the cache. Sequences that exceed a storage binding lie in pages, all others contiguous.
    ///
    /// # Errors
    /// What the library refuses: mostly a cache beyond the device's limits.
    pub fn new(gpu: &Gpu, shape: &Shape) -> Result<Self, crate::Error> {
        let spec = &shape.spec;
        let Shape { kv_len, batch, .. } = *shape;
        let contiguous = CacheShape { layers: 1, sequences: batch, capacity: kv_len };
        let (mut cache, page) = match KvCache::new(&gpu.device, spec, contiguous) {
            Err(crate::Error::Limit { .. }) => {
                let page = PagedShape::PAGE;
                let tokens = kv_len.div_ceil(page).saturating_mul(page).saturating_mul(batch);
                let paged = PagedShape { sequences: batch, page, tokens, longest_step: kv_len };
                (KvCache::paged(&gpu.device, &[spec], paged)?, Some(page))
            }
            cache => (cache?, None),
        };
        let mut sequences = Vec::new();
        // Nothing is shared, so nothing is copied.
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        for _ in 0..batch {
            let id = cache.open()?;
            cache.extend(&mut encoder, &[(id, kv_len)])?;
            let new_len = if shape.pass == Pass::Infer { 0 } else { kv_len };
            sequences.push(Sequence { new_len, ..Sequence::new(id, shape.q_len) });
        }
        fill(gpu, &cache, spec);
        Ok(Self { cache, sequences, page })
    }
}

impl Workload {
    /// Compiles and prepares `shape`, and fills a cache for it.
    ///
    /// # Errors
    /// What the library refuses: mostly a cache beyond the device's limits.
    pub fn new(gpu: &Gpu, shape: &Shape, options: Options) -> Result<Self, crate::Error> {
        let attention = Attention::new(&gpu.device, shape.spec.clone(), options)?;
        Self::over(gpu, Arc::new(attention), shape, &Filled::new(gpu, shape)?)
    }

    /// The same for an `attention` and a cache that were made before, with the spec of `shape` and for it.
    ///
    /// # Errors
    /// What the library refuses.
    pub fn over(
        gpu: &Gpu,
        attention: Arc<Attention>,
        shape: &Shape,
        filled: &Filled,
    ) -> Result<Self, crate::Error> {
        let (spec, Filled { cache, sequences, page }) = (&shape.spec, filled);
        let Shape { kv_len, batch, .. } = *shape;
        let mut rng = fastrand::Rng::with_seed(2);
        let mut call = Batch::new(spec, sequences);
        if shape.pass != Pass::Infer {
            call = call.with_lse(spec);
        }
        let step = attention.prepare(&gpu.queue, cache, &call)?;
        let bytes = |(tokens, heads, dim): (u32, u32, u32)| {
            let elements = u64::from(batch) * u64::from(tokens) * u64::from(heads) * u64::from(dim);
            elements * u64::from(spec.q_dtype().bytes())
        };
        let (q_row, out_row) = (
            (shape.q_len, spec.q_heads(), spec.head_dim()),
            (shape.q_len, spec.q_heads(), spec.v_head_dim()),
        );
        let found = gpu.caps.binding_size.min(gpu.caps.buffer_size);
        for (what, needed) in [("queries", bytes(q_row)), ("outputs", bytes(out_row))] {
            if needed > found {
                let (what, limit) = (what.to_owned(), "max_storage_buffer_binding_size");
                return Err(crate::Error::Limit {
                    what,
                    limit,
                    needed,
                    found,
                    hint: "measure fewer query tokens",
                });
            }
        }
        let zeros = |label, bytes: u64| gpu.upload(label, &vec![0; bytes as usize]);
        let q = gpu.upload("gqa.bench.q", &small_numbers(&mut rng, spec.q_dtype(), bytes(q_row)));
        let out = zeros("gqa.bench.out", bytes(out_row));
        let lse = zeros("gqa.bench.lse", u64::from(batch * shape.q_len * spec.q_heads()) * 4);
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        let io = Io { q: whole(&q), out: whole(&out), lse: call.lse.map(|_| whole(&lse)) };
        let work = match shape.pass {
            Pass::Infer | Pass::Forward => Work::Attend(attention.bind(&step, 0, io)?),
            Pass::Backward => {
                // What the way back needs of the way there; the gradient of the outputs is the outputs.
                let mut encoder = gpu.device.create_command_encoder(&Default::default());
                attention.record(&mut encoder, &step, 0, io)?;
                gpu.queue.submit([encoder.finish()]);
                let dq = zeros("gqa.bench.dq", bytes(q_row));
                let dk = zeros("gqa.bench.dk", bytes((kv_len, spec.kv_heads(), spec.head_dim())));
                let dv = zeros("gqa.bench.dv", bytes((kv_len, spec.kv_heads(), spec.v_head_dim())));
                let tensors = Tensors { q, out, lse, dq, dk, dv };
                Work::Differentiate(Box::new((attention.prepare_backward(&step)?, tensors)))
            }
        };
        Ok(Self { attention, step, work, shape: shape.clone(), page: *page })
    }

    /// Records one call of one layer.
    ///
    /// # Errors
    /// What the library refuses: nothing, since bindings, tensors and step were made for each other.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) -> Result<(), crate::Error> {
        match &self.work {
            Work::Attend(bindings) => {
                let mut pass = encoder.begin_compute_pass(&Default::default());
                self.attention.dispatch(&mut pass, &self.step, bindings)
            }
            Work::Differentiate(both) => {
                let (gradients, Tensors { q, out, lse, dq, dk, dv }) = &**both;
                let whole = wgpu::Buffer::as_entire_buffer_binding;
                let io = BackwardIo {
                    q: whole(q),
                    out: whole(out),
                    lse: whole(lse),
                    d_out: whole(out),
                    dq: whole(dq),
                    dk: whole(dk),
                    dv: whole(dv),
                    d_sinks: None,
                };
                self.attention.backward(encoder, (&self.step, gradients), 0, io)
            }
        }
    }

    /// What it is.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What must be moved and computed.
    pub fn traffic(&self) -> Traffic {
        match self.shape.pass {
            Pass::Infer | Pass::Forward => self.step.traffic(),
            Pass::Backward => self.step.traffic().backward(&self.shape.spec),
        }
    }

    /// The row of the table for a measured time, still without ceilings.
    pub fn row(&self, section: &'static str, timing: Timing) -> Row {
        let Traffic { bytes, flops } = self.traffic();
        let [_, decodes, ..] = self.step.workgroups();
        let plan = self.attention.plan();
        let variant = if decodes > 0 { plan.decode() } else { plan.prefill() };
        let spec = &self.shape.spec;
        Row {
            section,
            spec: spec.to_string(),
            kernel: match self.shape.pass {
                Pass::Infer => variant.kernel.name(),
                Pass::Forward => "forward",
                Pass::Backward => "backward",
            },
            q_heads: spec.q_heads(),
            kv_heads: spec.kv_heads(),
            head_dim: spec.head_dim(),
            q_len: self.shape.q_len,
            kv_len: self.shape.kv_len,
            batch: self.shape.batch,
            kv_dtype: spec.k_dtype().name(),
            v_dtype: spec.v_dtype().name(),
            rotated: spec.rotated(),
            page: self.page,
            timing,
            bytes,
            flops,
            ceiling: "",
            fraction: f64::NAN,
            kv_bytes_per_token: spec.kv_bytes_per_token(),
        }
    }
}

/// One measurement, in the words of the JSON output.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The part of the measured set that it belongs to.
    pub section: &'static str,
    /// The attention in words.
    pub spec: String,
    /// The kernel that did the work (chunks are merged by `combine`, whose time is included); of training `forward` or `backward`.
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
    /// Storage of K, and of V where nothing else is said.
    pub kv_dtype: &'static str,
    /// Storage of V.
    pub v_dtype: &'static str,
    /// Whether K and V are rotated before they are stored.
    pub rotated: bool,
    /// Slots of a page, where a sequence exceeds a storage binding and so lies in pages.
    pub page: Option<u32>,
    /// Seconds of one forward call of one layer.
    #[serde(flatten)]
    pub timing: Timing,
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

impl Row {
    /// Least seconds that the ceilings allow.
    pub fn least_s(&self, ceilings: &Ceilings) -> f64 {
        let read = self.bytes as f64 / ceilings.read_bytes_per_s;
        read.max(self.flops as f64 / ceilings.fma_flops_per_s)
    }

    /// Measures the row against `ceilings`.
    pub fn compare_to(&mut self, ceilings: &Ceilings) {
        let is_read = self.bytes as f64 / ceilings.read_bytes_per_s >= self.least_s(ceilings);
        self.ceiling = if is_read { "read" } else { "fma" };
        self.fraction = self.least_s(ceilings) / self.timing.median_s;
    }
}

/// Bytes of numbers that are made; longer buffers repeat them, since making gigabytes takes longer than measuring them.
const RANDOM_BYTES: u64 = 1 << 20;

/// Fills a cache with small numbers.
pub(super) fn fill(gpu: &Gpu, cache: &KvCache, spec: &AttentionSpec) {
    let mut rng = fastrand::Rng::with_seed(1);
    let numbers = [spec.k_dtype(), spec.v_dtype()]
        .map(|dtype| gpu.upload("gqa.bench.numbers", &small_numbers(&mut rng, dtype, RANDOM_BYTES)));
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    for shard in cache.layers().iter().flat_map(|layer| &layer.shards) {
        for (buffer, numbers) in [&shard.k, &shard.v].into_iter().zip(&numbers) {
            for at in (0..buffer.size()).step_by(RANDOM_BYTES as usize) {
                let size = RANDOM_BYTES.min(buffer.size() - at);
                encoder.copy_buffer_to_buffer(numbers, 0, buffer, at, size);
            }
        }
    }
    gpu.queue.submit([encoder.finish()]);
}

/// Numbers of about +-0.5 in `dtype`, `bytes` bytes of them, which repeat.
pub(super) fn small_numbers(rng: &mut fastrand::Rng, dtype: crate::Dtype, bytes: u64) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < bytes.min(RANDOM_BYTES) {
        let words = match dtype.is_blocked() {
            // Good as quants and as a header: 2^-9 times a quant, less a half.
            true => vec![0xbf00_3b00 | (rng.u32(..) & 0x007f_007f)],
            false => encode_row(dtype, &[(); 64].map(|()| rng.f32() - 0.5)).0,
        };
        all.extend_from_slice(bytemuck::cast_slice(&words));
    }
    all.into_iter().cycle().take(bytes as usize).collect()
}
