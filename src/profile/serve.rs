//! A server's mixed batch against the same work done sequence by sequence, in pages against contiguous, and its memory.

use super::Timing;
use super::workload::{fill, small_numbers};
use crate::attention::{Attention, Io, NewKv};
use crate::batch::{Batch, Sequence};
use crate::cache::{CacheShape, KvCache, PagedShape};
use crate::error::Error;
use crate::pages::SequenceId;
use crate::plan::Options;
use crate::spec::{AttentionSpec, Dtype};
use crate::step::Step;
use crate::verify::Gpu;

/// A mixed batch: conversations that decode one token each, and chunks of prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct ServeShape {
    /// The attention.
    pub spec: AttentionSpec,
    /// Keys of each prompt that is being answered.
    pub prompts: Vec<u32>,
    /// Answers to each prompt, decoded at once: forks that share it.
    pub answers: u32,
    /// Tokens that each answer has by itself.
    pub own: u32,
    /// Chunks of prompts: query tokens, and keys with those before them.
    pub chunks: Vec<(u32, u32)>,
    /// Slots of a page.
    pub page: u32,
}

impl ServeShape {
    /// 64 decodes of 200 to 8,000 tokens (as many short as long ones, on a logarithmic scale), and the first 512 tokens of two prompts.
    /// With `answers` above 1 there are fewer prompts with as many answers each, which share all but their last 40 tokens.
    pub fn mixed(spec: AttentionSpec, answers: u32) -> Self {
        let count = 64 / answers.max(1);
        let step = (8000.0f64 / 200.0).powf(1.0 / f64::from(count.max(2) - 1));
        let own = if answers > 1 { 40 } else { 0 };
        let prompts = (0..count).map(|i| (200.0 * step.powi(i as i32)) as u32 - own);
        Self { spec, prompts: prompts.collect(), answers, own, chunks: vec![(512, 512); 2], page: 16 }
    }

    /// Query tokens and keys of every sequence.
    fn sequences(&self) -> Vec<(u32, u32)> {
        let answers = |keys: &u32| std::iter::repeat_n((1, keys + self.own), self.answers as usize);
        let decodes = self.prompts.iter().flat_map(answers);
        decodes.chain(self.chunks.iter().copied()).collect()
    }
}

/// Most that an output may differ by between manners, for the largest of its row: f16 is rounded to 2^-11 of a number, and sums go in
/// another order.
const TOLERANCE: f32 = 1e-3;

/// How the work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// One `update`, one set of dispatches, one submission for all.
    Batched,
    /// An `update`, a submission and a wait for each sequence.
    OneByOne,
}

/// A mixed batch with its cache and tensors.
pub struct Serve {
    attention: Attention,
    cache: KvCache,
    sequences: Vec<Sequence<'static>>,
    tensors: [wgpu::Buffer; 4],
    batched: Step,
    alone: Step,
}

impl Serve {
    /// Prepares `shape` in a paged cache, or in a contiguous one, where every sequence has room for the longest and nothing is shared.
    ///
    /// # Errors
    /// What the library refuses: mostly a cache beyond the device's limits.
    pub fn new(gpu: &Gpu, shape: &ServeShape, paged: bool) -> Result<Self, Error> {
        let spec = &shape.spec;
        let attention = Attention::new(&gpu.device, spec.clone(), Options::default())?;
        let all = shape.sequences();
        let longest = all.iter().map(|(_, keys)| *keys).max().unwrap_or(1);
        let mut cache = match paged {
            true => {
                let pages = |keys: u32| keys.div_ceil(shape.page) + 1;
                let own = if shape.answers > 1 { pages(shape.own) + 1 } else { 0 };
                let pages = shape.prompts.iter().map(|keys| pages(*keys) + shape.answers * own).sum::<u32>()
                    + shape.chunks.iter().map(|(_, keys)| pages(*keys)).sum::<u32>();
                let sequences = (all.len() + shape.prompts.len()) as u32;
                let tokens = pages * shape.page;
                let shape = PagedShape { sequences, page: shape.page, tokens, longest_step: longest };
                KvCache::paged(&gpu.device, &[spec], shape)?
            }
            false => {
                let shape = CacheShape { layers: 1, sequences: all.len() as u32, capacity: longest };
                KvCache::new(&gpu.device, spec, shape)?
            }
        };
        fill(gpu, &cache, spec);
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let ids = open(&mut cache, &mut encoder, shape, paged)?;
        gpu.queue.submit([encoder.finish()]);
        // A sequence has its place in the tensors, whether it is alone in a step or not.
        let mut tokens = 0;
        let sequences: Vec<_> = ids
            .iter()
            .zip(&all)
            .map(|(id, (q_len, _))| {
                let first = Some(tokens);
                tokens += q_len;
                Sequence { token: first, new_token: first, ..Sequence::new(*id, *q_len) }
            })
            .collect();
        let mut rng = fastrand::Rng::with_seed(2);
        let mut tensor = |name, heads: u32, dim: u32| {
            let bytes = u64::from(tokens * heads) * u64::from(dim * spec.q_dtype().bytes());
            gpu.upload(name, &small_numbers(&mut rng, spec.q_dtype(), bytes))
        };
        let tensors = [
            tensor("gqa.bench.q", spec.q_heads(), spec.head_dim()),
            tensor("gqa.bench.k", spec.kv_heads(), spec.head_dim()),
            tensor("gqa.bench.v", spec.kv_heads(), spec.v_head_dim()),
            tensor("gqa.bench.out", spec.q_heads(), spec.v_head_dim()),
        ];
        let batched = attention.prepare(&gpu.queue, &cache, &Batch::new(spec, &sequences))?;
        let alone = attention.prepare(&gpu.queue, &cache, &Batch::new(spec, &sequences))?;
        Ok(Self { attention, cache, sequences, tensors, batched, alone })
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.size()
    }

    /// Does the work once, host included, and waits for it.
    ///
    /// # Errors
    /// What the library refuses, or when the device is lost.
    pub fn run(&mut self, gpu: &Gpu, manner: Manner) -> Result<(), String> {
        let Self { attention, cache, sequences, tensors, batched, alone } = self;
        let text = |e: Error| e.to_string();
        let [q, k, v, out] = tensors.each_ref().map(wgpu::Buffer::as_entire_buffer_binding);
        let call = |sequences: &[Sequence<'_>], step: &mut Step| {
            let batch = Batch::new(attention.plan().spec(), sequences);
            attention.update(&gpu.queue, cache, &batch, step).map_err(text)?;
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            attention.append(&mut encoder, step, 0, NewKv { k: k.clone(), v: v.clone() }).map_err(text)?;
            let io = Io { q: q.clone(), out: out.clone(), lse: None };
            attention.record(&mut encoder, step, 0, io).map_err(text)?;
            gpu.finish(encoder)
        };
        match manner {
            Manner::Batched => call(sequences, batched),
            Manner::OneByOne => sequences.iter().try_for_each(|s| call(std::slice::from_ref(s), alone)),
        }
    }

    /// Whether the batch has the outputs that its sequences have one by one, where they share nothing.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn check(&mut self, gpu: &Gpu) -> Result<(), ServeError> {
        let together = self.outputs(gpu, Manner::Batched).map_err(ServeError::Failed)?;
        let alone = self.outputs(gpu, Manner::OneByOne).map_err(ServeError::Failed)?;
        let dim = self.attention.plan().spec().v_head_dim() as usize;
        let differs = |(alone, together): (&[f32], &[f32])| {
            let largest = alone.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            // What is no number is not near either, and zeros were not written.
            let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * largest;
            largest == 0.0 || !alone.iter().zip(together).all(is_near)
        };
        match alone.chunks(dim).zip(together.chunks(dim)).position(differs) {
            None => Ok(()),
            Some(row) => Err(ServeError::Mismatch(format!(
                "row {row} of the outputs is not the same in the batch and where its sequence is by itself"
            ))),
        }
    }

    /// What the work brings, into a tensor that holds nothing of the run before.
    fn outputs(&mut self, gpu: &Gpu, manner: Manner) -> Result<Vec<f32>, String> {
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        encoder.clear_buffer(&self.tensors[3], 0, None);
        gpu.finish(encoder)?;
        self.run(gpu, manner)?;
        let bytes = gpu.download(&self.tensors[3])?;
        Ok(match self.attention.plan().spec().q_dtype() {
            Dtype::F16 => {
                bytes.chunks_exact(2).map(|x| half::f16::from_le_bytes([x[0], x[1]]).to_f32()).collect()
            }
            _ => bytemuck::pod_collect_to_vec(&bytes),
        })
    }
}

/// Sequences of every answer and chunk, as long as they are.
fn open(
    cache: &mut KvCache,
    encoder: &mut wgpu::CommandEncoder,
    shape: &ServeShape,
    paged: bool,
) -> Result<Vec<SequenceId>, Error> {
    let mut ids = Vec::new();
    let mut new = |cache: &mut KvCache, keys: u32| {
        let id = cache.open()?;
        cache.extend(encoder, &[(id, keys)])?;
        Ok::<_, Error>(id)
    };
    let mut forks = Vec::new();
    for keys in &shape.prompts {
        if shape.answers == 1 || !paged {
            for _ in 0..shape.answers {
                ids.push(new(cache, keys + shape.own)?);
            }
            continue;
        }
        let prompt = new(cache, *keys)?;
        for _ in 0..shape.answers {
            let fork = cache.fork(prompt)?;
            forks.push((fork, shape.own));
            ids.push(fork);
        }
        cache.close(prompt)?;
    }
    for (_, keys) in &shape.chunks {
        ids.push(new(cache, *keys)?);
    }
    cache.extend(encoder, &forks)?;
    Ok(ids)
}

/// What a server's batch costs, in the words of the JSON output.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ServeReport {
    /// What was served.
    pub what: String,
    /// Median seconds of the whole batch at once, with the host's part.
    pub batched_s: f64,
    /// Median seconds of the same sequence by sequence.
    pub one_by_one_s: f64,
    /// How many times as fast the batch is: the median of ratios of neighbouring runs.
    pub speedup: f64,
    /// Time of the batch in pages over its time in a contiguous cache, likewise.
    pub paged_over_contiguous: f64,
    /// Bytes of the paged cache.
    pub cache_bytes: u64,
    /// Bytes of a cache where every sequence has room for the longest.
    pub padded_bytes: u64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The kernels are wrong: what [`Serve::check`] says.
    #[error("{0}")]
    Mismatch(String),
    /// What the library refuses, or the device is lost.
    #[error("{0}")]
    Failed(String),
}

/// Measures a mixed batch, all manners in turn, once they are known to agree.
///
/// # Errors
/// [`ServeError`].
pub fn serve(gpu: &Gpu, shape: &ServeShape, samples: usize) -> Result<ServeReport, ServeError> {
    let refused = |e: Error| ServeError::Failed(e.to_string());
    let mut paged = Serve::new(gpu, shape, true).map_err(refused)?;
    let mut contiguous = Serve::new(gpu, shape, false).map_err(refused)?;
    for serve in [&mut paged, &mut contiguous] {
        serve.check(gpu)?;
    }
    let (mut batched, mut alone, mut dense) = (Vec::new(), Vec::new(), Vec::new());
    for sample in 0..samples {
        // Each goes first by turns; what the processor's caches hold of the run before still differs a little from manner to manner.
        for at in 0..3 {
            let (serve, manner, times) = match (sample + at) % 3 {
                0 => (&mut paged, Manner::Batched, &mut batched),
                1 => (&mut contiguous, Manner::Batched, &mut dense),
                _ => (&mut paged, Manner::OneByOne, &mut alone),
            };
            let start = std::time::Instant::now();
            serve.run(gpu, manner).map_err(ServeError::Failed)?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let median = |times: Vec<f64>| Timing::of(times).median_s;
    let ratio = |a: &[f64], b: &[f64]| median(a.iter().zip(b).map(|(a, b)| a / b).collect());
    let decodes = shape.prompts.len() as u32 * shape.answers;
    let sharing = match shape.answers {
        1 => String::new(),
        answers => format!(" ({} prompts, {answers} answers each)", shape.prompts.len()),
    };
    Ok(ServeReport {
        what: format!("{decodes} decodes{sharing} and {} chunks of prompts", shape.chunks.len()),
        speedup: ratio(&alone, &batched),
        paged_over_contiguous: ratio(&batched, &dense),
        batched_s: median(batched),
        one_by_one_s: median(alone),
        cache_bytes: paged.cache_bytes(),
        padded_bytes: contiguous.cache_bytes(),
    })
}
