//! Texts in caches: every token is a number that its keys, values and queries follow from.

use fastrand::Rng;
use gqa::quant::{decode_row, encode_row, stored};
use gqa::verify::{
    Arrangement, Gpu, Output, Problem, ProblemSequence, Weights, check, random_problem_of, same,
};
use gqa::{
    Attention, AttentionSpec, Batch, CacheShape, Dtype, Error, Io, KvCache, NewKv, Options, PagedShape,
};
use gqa::{Sequence, SequenceId, wgpu};

/// Layers of a cache; texts are written into the last one.
const LAYERS: usize = 2;
/// Sequences, and slots of each in a contiguous cache; slots of a paged cache.
const SEQUENCES: u32 = 10;
const CAPACITY: u32 = 200;
const SLOTS: u32 = 2048;
/// Slots of a shard, where a binding holds no more; shards then, and slots of each that are left to texts.
pub(crate) const SHARD: u32 = 600;
const SHARDS: u32 = 14;
const LEFT: u32 = 100;

/// Attention compiled for a spec on an adapter.
pub(crate) struct Lab<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) spec: AttentionSpec,
    pub(crate) attention: Attention,
    weights: Weights,
}

/// A sequence of a cache, and the tokens that it should hold.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    pub(crate) id: SequenceId,
    pub(crate) tokens: Vec<u32>,
}

/// What a text goes on with, and how many of its last tokens ask.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) nth: usize,
    pub(crate) new: &'a [u32],
    pub(crate) q_len: u32,
    pub(crate) tree: Option<&'a [u64]>,
}

/// A cache and its texts.
pub(crate) struct World<'a> {
    pub(crate) lab: &'a Lab<'a>,
    pub(crate) cache: KvCache,
    pub(crate) texts: Vec<Text>,
    /// Reads of four K or V elements by the last call, and its workgroups, where the lab counts.
    pub(crate) fetches: Option<u32>,
    pub(crate) workgroups: [u64; 4],
}

pub(crate) fn text(error: Error) -> String {
    error.to_string()
}

impl Part<'_> {
    pub(crate) fn new(nth: usize, new: &[u32]) -> Part<'_> {
        Part { nth, new, q_len: new.len() as u32, tree: None }
    }
    pub(crate) fn silent(nth: usize, new: &[u32]) -> Part<'_> {
        Part { nth, new, q_len: 0, tree: None }
    }
}

impl<'a> Lab<'a> {
    pub(crate) fn new(gpu: &'a Gpu, spec: &AttentionSpec, options: Options) -> Result<Self, String> {
        let mut attention = Attention::new(&gpu.device, spec.clone(), options).map_err(text)?;
        let weights = random_problem_of(spec, 3).weights;
        if spec.has_weights() {
            attention.set_weights(LAYERS as u32 - 1, &weights.as_layer()).map_err(text)?;
        }
        Ok(Self { gpu, spec: spec.clone(), attention, weights })
    }

    /// A paged cache that lets nothing go. Where it is in shards, most of each is taken, so that texts go on from one to the next.
    pub(crate) fn paged(&self, page: u32) -> Result<World<'_>, String> {
        let spec = self.spec.to_builder().window(None, None).build().map_err(text)?;
        let cache = |sequences, tokens| {
            let shape = PagedShape { sequences, page, tokens, longest_step: 1 };
            KvCache::paged(&self.gpu.device, &[&spec; LAYERS], shape).map_err(text)
        };
        let mut world = World::new(self, cache(SEQUENCES, SLOTS)?)?;
        if world.cache.layers()[0].shards.len() > 1 {
            let pages = SHARD / page;
            world = World::new(self, cache(SEQUENCES + SHARDS, SHARDS * pages * page)?)?;
            let mut encoder = world.encoder();
            for _ in 0..SHARDS {
                let id = world.cache.open().map_err(text)?;
                let taken = (pages - (LEFT / page).max(1)) * page;
                world.cache.extend(&mut encoder, &[(id, taken)]).map_err(text)?;
            }
        }
        Ok(world)
    }

    pub(crate) fn contiguous(&self) -> Result<World<'_>, String> {
        let shape = CacheShape { layers: LAYERS as u32, sequences: SEQUENCES, capacity: CAPACITY };
        World::new(self, KvCache::new(&self.gpu.device, &self.spec, shape).map_err(text)?)
    }

    /// Rows of tokens: `[tokens][heads][dim]`. Queries are side 2.
    fn rows(&self, tokens: &[u32], side: u64) -> Vec<f32> {
        let spec = &self.spec;
        let count = match side {
            0 => spec.kv_heads() * spec.head_dim(),
            1 if spec.v_in_k() => 0,
            1 => spec.kv_heads() * spec.v_head_dim(),
            _ => spec.q_heads() * spec.head_dim(),
        };
        let row = |token: &u32| {
            let mut rng = Rng::with_seed((u64::from(*token) << 2 | side).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            (0..count).map(move |_| rng.f32() * 3.0 - 1.5)
        };
        stored(spec.q_dtype(), &tokens.iter().flat_map(row).collect::<Vec<_>>())
    }
}

impl<'a> World<'a> {
    pub(crate) fn new(lab: &'a Lab<'a>, cache: KvCache) -> Result<Self, String> {
        for shard in cache.layers().iter().flat_map(|layer| &layer.shards) {
            for buffer in [&shard.k, &shard.v].into_iter().filter(|buffer| buffer.size() < 16 << 20) {
                // NaN, which shows wherever it is read.
                lab.gpu.queue.write_buffer(buffer, 0, &vec![0xff; buffer.size() as usize]);
            }
        }
        Ok(Self { lab, cache, texts: Vec::new(), fetches: None, workgroups: [0; 4] })
    }

    pub(crate) fn open(&mut self) -> Result<usize, String> {
        let id = self.cache.open().map_err(text)?;
        self.texts.push(Text { id, tokens: Vec::new() });
        Ok(self.texts.len() - 1)
    }

    pub(crate) fn encoder(&self) -> wgpu::CommandEncoder {
        self.lab.gpu.device.create_command_encoder(&Default::default())
    }

    /// Texts go on, and ask.
    pub(crate) fn say(&mut self, parts: &[Part<'_>]) -> Result<Output, String> {
        let Lab { gpu, spec, attention, .. } = self.lab;
        let growth: Vec<_> =
            parts.iter().map(|part| (self.texts[part.nth].id, part.new.len() as u32)).collect();
        let mut encoder = self.encoder();
        self.cache.extend(&mut encoder, &growth).map_err(text)?;
        let (mut q, mut new) = (Vec::new(), Vec::new());
        let mut sequences = Vec::new();
        for part in parts {
            let Text { id, tokens } = &mut self.texts[part.nth];
            tokens.extend_from_slice(part.new);
            new.extend_from_slice(part.new);
            q.extend_from_slice(&tokens[tokens.len() - part.q_len as usize..]);
            let new_len = part.new.len() as u32;
            sequences.push(Sequence { q_len: part.q_len, new_len, tree: part.tree, ..Sequence::new(*id, 0) });
        }
        let batch = Batch::new(spec, &sequences).with_lse(spec);
        let step = attention.prepare(&gpu.queue, &self.cache, &batch).map_err(text)?;
        let upload = |rows: &[f32]| {
            let (words, _) = encode_row(spec.q_dtype(), rows);
            gpu.upload("test", bytemuck::cast_slice(&words))
        };
        let [k, v] = [0, 1].map(|side| upload(&self.lab.rows(&new, side)));
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        let layer = self.cache.layers().len() as u32 - 1;
        attention.append(&mut encoder, &step, layer, NewKv { k: whole(&k), v: whole(&v) }).map_err(text)?;
        let mut output = Output::default();
        if q.is_empty() {
            gpu.finish(encoder)?;
            return Ok(output);
        }
        let asked = q.len() * spec.q_heads() as usize;
        let size = asked * spec.v_head_dim() as usize;
        let [out, lse] =
            [size, asked].map(|elements| gpu.upload("test", &vec![0xff; elements.next_multiple_of(2) * 4]));
        if let Some(counter) = attention.fetch_counter() {
            encoder.clear_buffer(counter, 0, None);
        }
        let q = upload(&self.lab.rows(&q, 2));
        let io = Io { q: whole(&q), out: whole(&out), lse: Some(whole(&lse)) };
        attention.record(&mut encoder, &step, layer, io).map_err(text)?;
        gpu.finish(encoder)?;
        self.workgroups = step.workgroups();
        self.fetches = match attention.fetch_counter() {
            Some(counter) => gpu.download(counter)?.get(..4).map(bytemuck::pod_read_unaligned),
            None => None,
        };
        let read = |buffer, dtype, elements: usize| -> Result<Vec<f32>, String> {
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(&gpu.download(buffer)?);
            Ok(decode_row(dtype, elements as u32, &words, &[]))
        };
        let (out, lse) = (read(&out, spec.q_dtype(), size)?, read(&lse, Dtype::F32, asked)?);
        let (mut out, mut lse) = (out.into_iter(), lse.into_iter());
        for part in parts {
            let rows = (part.q_len * spec.q_heads()) as usize;
            output.out.push(out.by_ref().take(rows * spec.v_head_dim() as usize).collect());
            output.lse.push(lse.by_ref().take(rows).collect());
        }
        Ok(output)
    }

    /// What was asked last, for the reference.
    pub(crate) fn problem(&self, parts: &[Part<'_>]) -> Problem {
        let sequence = |part: &Part<'_>| {
            let tokens = &self.texts[part.nth].tokens;
            ProblemSequence {
                q_len: part.q_len,
                kv_len: tokens.len() as u32,
                q_start: None,
                history: 0,
                q: self.lab.rows(&tokens[tokens.len() - part.q_len as usize..], 2),
                k: self.lab.rows(tokens, 0),
                v: self.lab.rows(tokens, 1),
                tree: part.tree.map(<[u64]>::to_vec),
                documents: None,
            }
        };
        Problem {
            spec: self.lab.spec.clone(),
            sequences: parts.iter().map(sequence).collect(),
            inputs: Arrangement::TokensHeads,
            outputs: Arrangement::TokensHeads,
            mask: None,
            weights: self.lab.weights.clone(),
        }
    }

    /// A text in a file.
    pub(crate) fn save(&self, id: SequenceId) -> Result<Vec<u8>, String> {
        let mut encoder = self.encoder();
        let snapshot = self.cache.snapshot(&mut encoder, id).map_err(text)?;
        self.lab.gpu.queue.submit([encoder.finish()]);
        snapshot.buffer().map_async(wgpu::MapMode::Read, .., |_| {});
        self.lab.gpu.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| e.to_string())?;
        let mapped = snapshot.buffer().get_mapped_range(..).map_err(|e| e.to_string())?;
        snapshot.to_bytes(&mapped).map_err(text)
    }
}

/// The same texts twice: in a cache where something happens to them, and in a contiguous one, each written for itself.
pub(crate) struct Pair<'a> {
    pub(crate) a: World<'a>,
    pub(crate) b: World<'a>,
}

impl<'a> Pair<'a> {
    pub(crate) fn new(a: World<'a>) -> Result<Self, String> {
        let b = a.lab.contiguous()?;
        Ok(Self { a, b })
    }

    pub(crate) fn open(&mut self) -> Result<usize, String> {
        self.b.open()?;
        self.a.open()
    }

    /// Both go on and ask, and must be answered the same.
    pub(crate) fn say(&mut self, parts: &[Part<'_>]) -> Result<(), String> {
        let (a, b) = (self.a.say(parts)?, self.b.say(parts)?);
        self.a.cache.check()?;
        if a.out.is_empty() {
            return Ok(());
        }
        let problem = self.a.problem(parts);
        same(&problem, &a, &b)?;
        if problem.must_ask() { Ok(()) } else { check(&problem, &a) }
    }

    pub(crate) fn fork(&mut self, nth: usize) -> Result<usize, String> {
        let Text { id, tokens } = self.a.texts[nth].clone();
        let id = self.a.cache.fork(id).map_err(text)?;
        self.a.texts.push(Text { id, tokens: tokens.clone() });
        self.write(&tokens)?;
        Ok(self.a.texts.len() - 1)
    }

    pub(crate) fn truncate(&mut self, nth: usize, len: usize) -> Result<(), String> {
        self.a.cache.truncate(self.a.texts[nth].id, len as u32).map_err(text)?;
        self.a.texts[nth].tokens.truncate(len);
        let tokens = self.a.texts[nth].tokens.clone();
        // The others need not be written again.
        self.b.cache.close(self.b.texts[nth].id).map_err(text)?;
        self.write(&tokens)?;
        let written = self.b.texts.pop().ok_or("no text")?;
        self.b.texts[nth] = written;
        Ok(())
    }

    /// Writes a text into the second cache, at once.
    fn write(&mut self, tokens: &[u32]) -> Result<(), String> {
        let nth = self.b.open()?;
        self.b.say(&[Part::silent(nth, tokens)]).map(drop)
    }
}
