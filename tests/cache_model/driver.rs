//! A cache on an adapter beside its model, and the attention that reads it.

use fastrand::Rng;
use gqa::reference::Answer;
use gqa::verify::{Gpu, Tolerance, compare};
use gqa::{Attention, AttentionSpec, Batch, Dtype, Error, Io, KvCache, NewKv, Options, PagedShape, Step};
use gqa::{Sequence, SequenceId, wgpu};

use super::model::{Model, Pool, Refusal, Saved};
use super::numbers::{answer, queries, row};

/// What a cache is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) page: u32,
    pub(crate) window: u32,
    pub(crate) kv_dtype: Dtype,
    pub(crate) head_dim: u32,
    pub(crate) group: u32,
}

const KV_HEADS: u32 = 2;
const V_HEAD_DIM: u32 = 8;
/// The kind of each layer: 0 sees everything, 1 has a window.
pub(crate) const KINDS: [usize; 3] = [0, 1, 0];
const SEQUENCES: u32 = 10;
/// Slots of the pool without a window, and of a shard.
const SLOTS: u32 = 800;
const SHARD_SLOTS: u32 = 256;
/// Tokens that a sequence grows by at most, but for now and then; tokens and queries of a batch.
pub(crate) const LONGEST_STEP: u32 = 24;
pub(crate) const MAX_NEW: u32 = 64;
pub(crate) const MAX_QUERIES: u32 = 36;
/// Results that wait until they are read together.
const REGIONS: u64 = 48;

/// A part of a batch: new tokens and queries at the end of a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) nth: usize,
    pub(crate) new_len: u32,
    pub(crate) q_len: u32,
}

/// How often what happened, to see that the test tests something.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) attended: u32,
    /// Of those, where sequences had a prefix in common.
    pub(crate) shared: u32,
    pub(crate) full: u32,
    /// Other refusals.
    pub(crate) refused: u32,
    /// Pages moved by defragmenting.
    pub(crate) moved: u32,
}

/// A result that an adapter owes.
struct Owed {
    step: u32,
    layer: usize,
    region: u64,
    answers: Vec<(Answer, [Tolerance; 2])>,
}

pub(crate) struct Driver {
    pub(crate) gpu: Gpu,
    specs: [AttentionSpec; 2],
    attentions: [Attention; 2],
    steps: [Option<Step>; 2],
    pub(crate) cache: KvCache,
    pub(crate) model: Model,
    /// Handles of the model's open sequences.
    pub(crate) ids: Vec<SequenceId>,
    pub(crate) rng: Rng,
    pub(crate) files: Vec<(Saved, Vec<u8>)>,
    pub(crate) counts: Counts,
    pub(crate) next_token: u32,
    /// The cache was full: something must be closed.
    pub(crate) must_close: bool,
    step: u32,
    owed: Vec<Owed>,
    /// Queries, new keys and values of each layer, results in regions.
    q: wgpu::Buffer,
    new: [[wgpu::Buffer; 2]; 3],
    out: wgpu::Buffer,
    lse: wgpu::Buffer,
}

pub(crate) fn text(error: Error) -> String {
    error.to_string()
}

impl Driver {
    pub(crate) fn new(adapter: &wgpu::Adapter, setup: Setup, seed: u64) -> Result<Self, String> {
        let Setup { page, window, kv_dtype, head_dim, group } = setup;
        // So short a binding that layers have several shards.
        let mut descriptor = gqa::device_descriptor(adapter);
        let row = u64::from(KV_HEADS * head_dim * kv_dtype.bytes());
        descriptor.required_limits.max_storage_buffer_binding_size = u64::from(SHARD_SLOTS) * row;
        let gpu = Gpu::open_with(adapter, &descriptor).map_err(|e| e.to_string())?;
        let global = AttentionSpec::builder(group * KV_HEADS, KV_HEADS, head_dim)
            .v_head_dim(V_HEAD_DIM)
            .kv_dtype(kv_dtype)
            .build()
            .map_err(text)?;
        let local = global.to_builder().window(window, None).build().map_err(text)?;
        let specs = [global, local];
        let shape = PagedShape { sequences: SEQUENCES, page, tokens: SLOTS, longest_step: LONGEST_STEP };
        let cache = KvCache::paged(&gpu.device, &KINDS.map(|kind| &specs[kind]), shape).map_err(text)?;
        for shard in cache.layers().iter().flat_map(|layer| &layer.shards) {
            for buffer in [&shard.k, &shard.v] {
                // NaN, which shows wherever it is read.
                gpu.queue.write_buffer(buffer, 0, &vec![0xff; buffer.size() as usize]);
            }
        }
        if cache.layers().iter().any(|layer| layer.shards.len() < 2) {
            return Err("layers should have several shards".to_owned());
        }
        let per_sequence = (window + LONGEST_STEP).div_ceil(page) + 1;
        let pool = |pages, window| Pool { page, pages, window };
        let pools =
            vec![pool(SLOTS / page, None), pool((per_sequence * SEQUENCES).min(SLOTS / page), Some(window))];
        let attention = |kind: usize| Attention::new(&gpu.device, specs[kind].clone(), Options::default());
        let zeros = |elements: u64| gpu.upload("test", &vec![0; elements as usize * 4]);
        let q_heads = u64::from(specs[0].q_heads());
        let [q_rows, new_rows] = [MAX_QUERIES, MAX_NEW].map(u64::from);
        let dims = [head_dim, V_HEAD_DIM].map(|dim| u64::from(dim * KV_HEADS));
        let mut driver = Self {
            attentions: [attention(0).map_err(text)?, attention(1).map_err(text)?],
            steps: [None, None],
            cache,
            model: Model::new(pools, SEQUENCES as usize),
            ids: Vec::new(),
            rng: Rng::with_seed(seed),
            files: Vec::new(),
            counts: Counts::default(),
            next_token: 0,
            must_close: false,
            step: 0,
            owed: Vec::new(),
            q: zeros(q_rows * q_heads * u64::from(head_dim)),
            new: [(); 3].map(|()| dims.map(|dim| zeros(new_rows * dim))),
            out: zeros(REGIONS * Self::region(&specs[0], V_HEAD_DIM) / 4),
            lse: zeros(REGIONS * Self::region(&specs[0], 1) / 4),
            specs,
            gpu,
        };
        driver.poison();
        Ok(driver)
    }

    /// Bytes of a region for the results of one layer.
    fn region(spec: &AttentionSpec, dim: u32) -> u64 {
        u64::from(MAX_QUERIES * spec.q_heads() * dim * 4).next_multiple_of(256)
    }

    fn poison(&mut self) {
        for buffer in [&self.out, &self.lse] {
            self.gpu.queue.write_buffer(buffer, 0, &vec![0xff; buffer.size() as usize]);
        }
    }

    pub(crate) fn spec(&self, layer: usize) -> &AttentionSpec {
        &self.specs[KINDS[layer]]
    }

    pub(crate) fn encoder(&self) -> wgpu::CommandEncoder {
        self.gpu.device.create_command_encoder(&Default::default())
    }

    pub(crate) fn submit(&self, encoder: wgpu::CommandEncoder) {
        self.gpu.queue.submit([encoder.finish()]);
    }

    /// Whether the cache did what it should have.
    pub(crate) fn agree<T>(
        &mut self,
        found: Result<T, Error>,
        expected: Result<(), Refusal>,
    ) -> Result<Option<T>, String> {
        let kind = match (&found, expected) {
            (Ok(_), Ok(())) => return Ok(found.ok()),
            (Err(Error::CacheFull { .. }), Err(Refusal::CacheFull)) => &mut self.counts.full,
            (Err(Error::NoFreeSequence { .. }), Err(Refusal::NoFreeSequence))
            | (Err(Error::Field { .. }), Err(Refusal::Field)) => &mut self.counts.refused,
            (Ok(_), Err(refusal)) => return Err(format!("it should have been refused: {refusal:?}")),
            (Err(error), expected) => return Err(format!("{error} (expected: {expected:?})")),
        };
        *kind += 1;
        self.must_close |= expected == Err(Refusal::CacheFull);
        Ok(None)
    }

    /// One random operation; after it, the cache must be as the model is.
    pub(crate) fn step(&mut self, step: u32) -> Result<(), String> {
        self.step = step;
        let name = self.act()?;
        self.check().map_err(|error| format!("{name}: {error}"))
    }

    fn check(&self) -> Result<(), String> {
        self.cache.check()?;
        self.model.check(&self.cache.usage())?;
        for (id, s) in self.ids.iter().zip(&self.model.open) {
            let found = (self.cache.len(*id).map_err(text)?, self.cache.evicted(*id).map_err(text)?);
            if found != (s.len(), s.begin) {
                return Err(format!("length and eviction are {found:?}, not {:?}", (s.len(), s.begin)));
            }
        }
        Ok(())
    }

    /// Appends new tokens, which the model and the cache count already, and attends.
    pub(crate) fn forward(
        &mut self,
        mut encoder: wgpu::CommandEncoder,
        parts: &[Part],
    ) -> Result<(), String> {
        let ids = &self.ids;
        let sequence = |part: &Part| Sequence {
            q_len: part.q_len,
            new_len: part.new_len,
            ..Sequence::new(ids[part.nth], 0)
        };
        let sequences: Vec<_> = parts.iter().map(sequence).collect();
        let mut prepared = [false; 2];
        for (kind, prepared) in prepared.iter_mut().enumerate() {
            let kept = parts.iter().all(|part| self.model.sees_kept(part.nth, kind, part.q_len));
            let result = self.prepare(kind, &sequences);
            *prepared = self.agree(result, if kept { Ok(()) } else { Err(Refusal::Field) })?.is_some();
        }
        let tokens: u32 = parts.iter().map(|part| part.q_len).sum();
        let q = queries(self.rng.u64(..), tokens * self.specs[0].q_heads() * self.specs[0].head_dim());
        self.gpu.queue.write_buffer(&self.q, 0, bytemuck::cast_slice(&q));
        for layer in 0..KINDS.len() {
            for side in 0..2 {
                let rows = self.new_rows(parts, layer, side);
                self.gpu.queue.write_buffer(&self.new[layer][side], 0, bytemuck::cast_slice(&rows));
            }
        }
        if tokens > 0 && prepared == [true; 2] {
            self.counts.attended += 1;
            self.counts.shared += u32::from(self.share(parts));
        }
        for (layer, kind) in KINDS.into_iter().enumerate().filter(|(_, kind)| prepared[*kind]) {
            let step = self.steps[kind].as_ref().ok_or("no step")?;
            let [k, v] = self.new[layer].each_ref().map(wgpu::Buffer::as_entire_buffer_binding);
            self.attentions[kind].append(&mut encoder, step, layer as u32, NewKv { k, v }).map_err(text)?;
            if tokens == 0 {
                continue;
            }
            let region = self.owed.len() as u64;
            let place = |buffer, dim| wgpu::BufferBinding {
                buffer,
                offset: region * Self::region(&self.specs[0], dim),
                size: None,
            };
            let io = Io {
                q: self.q.as_entire_buffer_binding(),
                out: place(&self.out, V_HEAD_DIM),
                lse: Some(place(&self.lse, 1)),
            };
            self.attentions[kind].record(&mut encoder, step, layer as u32, io).map_err(text)?;
            let answers = self.answers(parts, layer, &q);
            self.owed.push(Owed { step: self.step, layer, region, answers });
        }
        self.submit(encoder);
        match self.owed.len() as u64 + KINDS.len() as u64 > REGIONS {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Makes a step, mostly in the memory of the last one.
    fn prepare(&mut self, kind: usize, sequences: &[Sequence<'_>]) -> Result<(), Error> {
        let batch = Batch::new(&self.specs[kind], sequences).with_lse(&self.specs[kind]);
        let (attention, gpu) = (&self.attentions[kind], &self.gpu);
        match &mut self.steps[kind] {
            Some(step) if self.rng.u32(..8) > 0 => attention.update(&gpu.queue, &self.cache, &batch, step),
            step => {
                *step = Some(attention.prepare(&gpu.queue, &self.cache, &batch)?);
                Ok(())
            }
        }
    }

    /// Keys or values of the new tokens of a batch.
    fn new_rows(&self, parts: &[Part], layer: usize, side: usize) -> Vec<f32> {
        let mut rows = Vec::new();
        for part in parts {
            let tokens = &self.model.open[part.nth].tokens;
            let new = &tokens[tokens.len() - part.new_len as usize..];
            rows.extend(new.iter().flat_map(|token| row(self.spec(layer), side, *token, layer)));
        }
        rows
    }

    fn answers(&self, parts: &[Part], layer: usize, q: &[f32]) -> Vec<(Answer, [Tolerance; 2])> {
        let spec = self.spec(layer);
        let mut rest = q;
        let mut answers = Vec::new();
        for part in parts {
            let (own, others) = rest.split_at((part.q_len * spec.q_heads() * spec.head_dim()) as usize);
            rest = others;
            answers.push(answer(spec, &self.model.open[part.nth], layer, own));
        }
        answers
    }

    /// Whether two sequences that attend have a prefix that is long enough to be read once.
    fn share(&self, parts: &[Part]) -> bool {
        let attend: Vec<_> = parts.iter().filter(|part| part.q_len > 0).map(|part| part.nth).collect();
        let long = |a: usize, b: usize| {
            let shortest = self.model.open[a].len().min(self.model.open[b].len());
            self.model.common(a, b).min(shortest) >= 32 + self.model.open[a].begin
        };
        attend.iter().enumerate().any(|(i, a)| attend[..i].iter().any(|b| long(*a, *b)))
    }

    /// Reads what adapters owe, and holds it against the reference.
    pub(crate) fn settle(&mut self) -> Result<(), String> {
        if self.owed.is_empty() {
            return Ok(());
        }
        let (out, lse) = (self.gpu.download(&self.out)?, self.gpu.download(&self.lse)?);
        for Owed { step, layer, region, answers } in std::mem::take(&mut self.owed) {
            for (side, (bytes, dim)) in [(&out, V_HEAD_DIM), (&lse, 1)].into_iter().enumerate() {
                let size = Self::region(&self.specs[0], dim) as usize;
                let found: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes[region as usize * size..][..size]);
                let mut rest = &found[..];
                for (nth, (answer, tolerances)) in answers.iter().enumerate() {
                    let expected = if side == 0 { &answer.out } else { &answer.lse };
                    let (own, others) = rest.split_at(expected.len());
                    rest = others;
                    let mismatch = compare(own, expected, tolerances[side]);
                    if !mismatch.passes() {
                        let name = ["out", "lse"][side];
                        return Err(format!(
                            "{name} of part {nth}, layer {layer}, of step {step}: {mismatch}"
                        ));
                    }
                }
                if rest.iter().any(|x| !x.is_nan()) {
                    return Err(format!("something was written behind the results of step {step}"));
                }
            }
        }
        self.poison();
        Ok(())
    }
}
