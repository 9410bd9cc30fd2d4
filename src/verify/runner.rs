//! Runs a problem on a device, through the public API: append in two steps, attend, read back.

use super::adapters::Gpu;
use super::gradients::DeviceGradients;
use super::problem::{Problem, ProblemMask, Stored, Tensor};
use crate::attention::{Attention, Io, NewKv};
use crate::batch::{Batch, Sequence};
use crate::cache::{CacheShape, KvCache, PagedShape};
use crate::error::Error;
use crate::layout::Shape;
use crate::pages::SequenceId;
use crate::plan::Options;
use crate::quant::decode_row;
use crate::spec::{AttentionSpec, Dtype};
use crate::step::Step;

/// How a problem is run.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Kernels, chunks, checks.
    pub options: Options,
    /// Slots (or, in a paged cache, pages) of a sequence beyond its tokens, filled with NaN.
    pub slack: u32,
    /// Slots of a page, where the cache is paged.
    pub page: Option<u32>,
}

/// What a device answered, per sequence.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Output {
    /// `[q_len][q_heads][v_head_dim]` per sequence.
    pub out: Vec<Vec<f32>>,
    /// `[q_len][q_heads]` per sequence.
    pub lse: Vec<Vec<f32>>,
    /// Reads of four K or V elements, where they were counted.
    pub fetches: Option<u32>,
    /// What the cache holds of each sequence, where that cannot be told from what came.
    pub stored: Option<Vec<Stored>>,
    /// Gradients, where they were asked for.
    pub gradients: Option<DeviceGradients>,
}

/// Attention compiled on a device, ready to run problems of one spec.
#[derive(Debug)]
pub struct Runner<'a> {
    gpu: &'a Gpu,
    attention: Attention,
    slack: u32,
    page: Option<u32>,
}

/// The layer that problems use, of [`LAYERS`].
pub(super) const LAYER: u32 = 1;
const LAYERS: u32 = 2;

impl<'a> Runner<'a> {
    /// Plans `spec`.
    ///
    /// # Errors
    /// Whatever the library refuses.
    pub fn new(gpu: &'a Gpu, spec: &AttentionSpec, setup: &Setup) -> Result<Self, Error> {
        let attention = Attention::new(&gpu.device, spec.clone(), setup.options.clone())?;
        Ok(Self::of(gpu, attention, setup))
    }

    /// The same with an attention on the same device.
    pub fn of(gpu: &'a Gpu, attention: Attention, setup: &Setup) -> Self {
        Self { gpu, attention, slack: setup.slack, page: setup.page }
    }

    /// What was compiled.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Pages of another size (`None`: a contiguous cache), and another slack, for the problems to come.
    pub fn lay_out(&mut self, page: Option<u32>, slack: u32) {
        (self.page, self.slack) = (page, slack);
    }

    /// Runs `problem`, which must have the runner's spec. Cache slack, gaps of tensors and outputs are NaN before; a write
    /// outside an output is an error.
    ///
    /// # Errors
    /// Whatever the library refuses, as text.
    pub fn run(&mut self, problem: &Problem) -> Result<Output, String> {
        self.run_with(problem, None)
    }

    /// The same, and backwards from the gradient of the outputs, `[tokens][q_heads][v_head_dim]` of all sequences. What the cache holds
    /// is always asked for.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_backward(&mut self, problem: &Problem, d_out: &[f32]) -> Result<Output, String> {
        self.run_with(problem, Some(d_out))
    }

    fn run_with(&mut self, problem: &Problem, d_out: Option<&[f32]>) -> Result<Output, String> {
        if problem.spec.has_weights() {
            self.attention.set_weights(LAYER, &problem.weights.as_layer()).map_err(text)?;
        }
        let (gpu, attention) = (self.gpu, &self.attention);
        let mut cache = self.cache(problem).map_err(text)?;
        for buffer in cache.layers().iter().flat_map(|layer| &layer.shards).flat_map(|s| [&s.k, &s.v]) {
            // All ones is NaN in every type, as a header too.
            gpu.queue.write_buffer(buffer, 0, &vec![0xff; buffer.size() as usize]);
        }
        let mut ids = Vec::new();
        for _ in &problem.sequences {
            ids.push(cache.open().map_err(text)?);
        }
        let history: Vec<_> = problem.sequences.iter().map(|s| (0, s.history)).collect();
        let rest: Vec<_> = problem.sequences.iter().map(|s| (s.history, s.kv_len)).collect();
        let call = Call { gpu, attention, problem, ids: &ids, d_out };
        if problem.sequences.iter().any(|s| s.history > 0) {
            call.append(&mut cache, &history, false)?;
        }
        let mut output = call.append(&mut cache, &rest, true)?;
        if problem.must_ask() || d_out.is_some() {
            output.stored = Some(call.stored(&cache)?);
        }
        Ok(output)
    }

    /// A cache that fits `problem`; its pages, where it has some, lie in disorder.
    fn cache(&self, problem: &Problem) -> Result<KvCache, Error> {
        let device = &self.gpu.device;
        let sequences = problem.sequences.len().max(1) as u32;
        let Some(page) = self.page else {
            let longest = problem.sequences.iter().map(|s| s.kv_len).max().unwrap_or(0);
            let capacity = (longest + self.slack).max(1);
            return KvCache::new(device, &problem.spec, CacheShape { layers: LAYERS, sequences, capacity });
        };
        // Queries of a problem may look back as far as they like, so no page is let go.
        let spec = problem.spec.to_builder().window(None, None).build()?;
        let pages: u32 = problem.sequences.iter().map(|s| s.kv_len.div_ceil(page) + self.slack).sum();
        let pages = pages.max(1);
        let shape =
            PagedShape { sequences: sequences.max(pages), page, tokens: pages * page, longest_step: 1 };
        let mut cache = KvCache::paged(device, &vec![&spec; LAYERS as usize], shape)?;
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut holders = Vec::new();
        for _ in 0..pages {
            let id = cache.open()?;
            cache.extend(&mut encoder, &[(id, 1)])?;
            holders.push(id);
        }
        // Every third, then the rest: the last to come free are the first to be taken.
        for first in 0..3 {
            for id in holders.iter().skip(first).step_by(3) {
                cache.close(*id)?;
            }
        }
        Ok(cache)
    }
}

/// Compiles and runs `problem` on `gpu`.
///
/// # Errors
/// As [`Runner::new`] and [`Runner::run`].
pub fn run(gpu: &Gpu, problem: &Problem, setup: &Setup) -> Result<Output, String> {
    Runner::new(gpu, &problem.spec, setup).map_err(text)?.run(problem)
}

pub(super) struct Call<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) attention: &'a Attention,
    pub(super) problem: &'a Problem,
    ids: &'a [SequenceId],
    /// Gradients of the outputs, where theirs are wanted.
    pub(super) d_out: Option<&'a [f32]>,
}

/// What a call has on the device, for the way back.
pub(super) struct Bound<'a> {
    pub(super) step: &'a Step,
    pub(super) q: (&'a Tensor, &'a wgpu::Buffer),
    pub(super) out: (&'a Tensor, &'a wgpu::Buffer),
    pub(super) lse: &'a wgpu::Buffer,
    pub(super) new: [&'a Tensor; 2],
}

impl Call<'_> {
    /// Appends the given span of keys of every sequence, and attends where `queries`.
    fn append(&self, cache: &mut KvCache, spans: &[(u32, u32)], queries: bool) -> Result<Output, String> {
        let Self { gpu, attention, problem, ids, .. } = self;
        let spec = &problem.spec;
        let growth: Vec<_> = ids.iter().zip(spans).map(|(id, (from, to))| (*id, to - from)).collect();
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        cache.extend(&mut encoder, &growth).map_err(text)?;
        let sequences: Vec<_> = problem
            .sequences
            .iter()
            .zip(&growth)
            .map(|(s, (id, new_len))| match queries {
                true => Sequence {
                    q_len: s.q_len,
                    new_len: *new_len,
                    q_start: s.q_start,
                    tree: s.tree.as_deref(),
                    documents: s.documents.as_deref(),
                    ..Sequence::new(*id, 0)
                },
                false => Sequence { new_len: *new_len, ..Sequence::new(*id, 0) },
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
        let new_values = if spec.v_in_k() { 0 } else { new_tokens };
        let mut new_v = tensor(inputs, new_values, spec.kv_heads(), spec.v_head_dim(), dtype);
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
            if !spec.v_in_k() {
                new_v.write(new_token, &rows(&s.v, spec.v_head_dim()));
            }
            new_token += to - from;
        }
        let batch = Batch {
            sequences: &sequences,
            q: q.layout,
            out: out.layout,
            lse: Some(lse.layout),
            new_k: new_k.layout,
            new_v: new_v.layout,
            mask: problem.mask.as_ref().map(ProblemMask::layout),
        };

        let [q_buffer, k_buffer, v_buffer, out_buffer, lse_buffer] =
            [&q, &new_k, &new_v, &out, &lse].map(|t| gpu.upload("gqa.verify", &t.bytes));
        let step = attention.prepare(&gpu.queue, cache, &batch).map_err(text)?;
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        attention
            .append(&mut encoder, &step, LAYER, NewKv { k: whole(&k_buffer), v: whole(&v_buffer) })
            .map_err(text)?;
        if let Some(mask) = &problem.mask {
            let bytes = mask.bytes(spec);
            // Another mask first, as of the layer before: nothing of it may remain.
            for bytes in [vec![0; bytes.len()], bytes] {
                let mask = gpu.upload("gqa.verify.mask", &bytes);
                attention.mask(&mut encoder, &step, whole(&mask)).map_err(text)?;
            }
        }
        if let Some(counter) = attention.fetch_counter() {
            encoder.clear_buffer(counter, 0, None);
        }
        let io = Io { q: whole(&q_buffer), out: whole(&out_buffer), lse: Some(whole(&lse_buffer)) };
        attention.record(&mut encoder, &step, LAYER, io).map_err(text)?;
        gpu.finish(encoder)?;
        let gradients = match self.d_out.filter(|_| queries) {
            Some(d_out) => {
                let (q, out, new) = ((&q, &q_buffer), (&out, &out_buffer), [&new_k, &new_v]);
                let bound = Bound { step: &step, q, out, lse: &lse_buffer, new };
                Some(self.backward(&bound, d_out)?)
            }
            None => None,
        };
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
        let mut output = Output { fetches, gradients, ..Output::default() };
        let mut token = 0;
        for s in &sequences {
            output.out.push(out.read(token, s.q_len));
            output.lse.push(lse.read(token, s.q_len));
            token += s.q_len;
        }
        Ok(output)
    }

    /// What the cache holds of every sequence.
    fn stored(&self, cache: &KvCache) -> Result<Vec<Stored>, String> {
        let spec = &self.problem.spec;
        let v_dim = if spec.v_in_k() { 0 } else { spec.v_head_dim() };
        let k = self.decoded(cache, 0, (spec.k_dtype(), spec.head_dim()))?;
        let v = self.decoded(cache, 1, (spec.v_dtype(), v_dim))?;
        Ok(k.into_iter().zip(v).map(|(k, v)| Stored { k, v }).collect())
    }

    /// Keys (side 0) or values (1) of every sequence, by token and head.
    fn decoded(
        &self,
        cache: &KvCache,
        side: usize,
        (dtype, dim): (Dtype, u32),
    ) -> Result<Vec<Vec<f32>>, String> {
        let (layer, heads) = (&cache.layers()[LAYER as usize], self.problem.spec.kv_heads());
        let kind = cache.kind(layer.kind as usize).ok_or("no such kind")?;
        let (pool, row) = (kind.pool, kind.rows()[side]);
        if dim == 0 {
            return Ok(vec![Vec::new(); self.ids.len()]);
        }
        let mut shards: Vec<Vec<u32>> = Vec::new();
        for shard in &layer.shards {
            let bytes = self.gpu.download(if side == 0 { &shard.k } else { &shard.v })?;
            shards.push(bytemuck::pod_collect_to_vec(&bytes));
        }
        let mut all = Vec::new();
        for (id, s) in self.ids.iter().zip(&self.problem.sequences) {
            let (_, pages) = cache.table().pages(*id, layer.kind as usize).map_err(text)?;
            let mut rows = Vec::new();
            for (key, head) in (0..s.kv_len).flat_map(|key| (0..heads).map(move |head| (key, head))) {
                let page = pages[(key / pool.page) as usize];
                let (shard, local) = ((page / pool.pages_per_shard) as usize, page % pool.pages_per_shard);
                let at =
                    ((head * kind.pages_of(shard as u32) + local) * pool.page + key % pool.page) as usize;
                let headers_at = kind.headers_at(shard as u32)[side] as usize + at * row.headers as usize;
                let words = &shards[shard];
                rows.extend(decode_row(dtype, dim, &words[at * row.words as usize..], &words[headers_at..]));
            }
            all.push(rows);
        }
        Ok(all)
    }
}

pub(super) fn text(error: Error) -> String {
    error.to_string()
}
