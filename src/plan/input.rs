//! What one step asks, resolved: the input of work lists. Pure numbers; kernels and plans do not know where they come from.

use std::ops::Range;

use super::Plan;
use crate::spec::AttentionSpec;

/// Where the mask of a sequence lies in the step's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MaskPlace {
    /// The first query token's, of query head 0.
    pub word: u32,
    /// From a query head to the next; 0 where heads share it.
    pub head: u32,
    /// From a query token to the next; 0 where there is no mask.
    pub token: u32,
    /// Its column of the first key: negative where it begins at a later key.
    pub key: i32,
}

/// Some of the entries of a list of [`StepInput`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// The first.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Span {
    fn of<T>(self, all: &[T]) -> &[T] {
        let first = self.first as usize;
        all.get(first..first + self.count as usize).unwrap_or_default()
    }
}

/// One sequence of a batch, or one document of it: where its tokens are and how much of the cache it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepSequence {
    /// First token in queries and outputs.
    pub token: u32,
    /// Query tokens.
    pub q_len: u32,
    /// Position of the first query among the keys.
    pub q_start: i32,
    /// Keys, new ones included.
    pub kv_len: u32,
    /// Its page table in the step's words, less the pages that it no longer has in front (modulo 2^32).
    pub pages: u32,
    /// Position of its first key in the sequence.
    pub origin: u32,
    /// Keys before this one were evicted.
    pub begin: u32,
    /// Keys before this one are [`Shared`] with others and walked there.
    pub own_from: u32,
    /// Its mask.
    pub mask: MaskPlace,
    /// Where its slots go from shard to shard; none where the cache is one shard.
    pub cuts: Span,
    /// Which sequence of the batch: documents of one share it.
    pub nth: u32,
}

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepAppend {
    /// First token in the new keys and values.
    pub token: u32,
    /// Tokens.
    pub len: u32,
    /// Place of the first in the sequence.
    pub slot: u32,
    /// Position that the first is turned to; the others follow.
    pub position: u32,
    /// The sequence's page table, as [`StepSequence::pages`].
    pub pages: u32,
    /// As [`StepSequence::cuts`].
    pub cuts: Span,
    /// As [`StepSequence::nth`].
    pub nth: u32,
}

/// Keys that several sequences have in the same pages: read once for all of their rows (cascade attention).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shared {
    /// First key.
    pub key_begin: u32,
    /// Past the last key.
    pub key_end: u32,
    /// The page table of any of them.
    pub pages: u32,
    /// Which sequences, in [`StepInput::members`].
    pub members: Span,
    /// As [`StepSequence::cuts`].
    pub cuts: Span,
}

impl Shared {
    /// Its keys.
    pub fn keys(&self) -> Range<u32> {
        self.key_begin..self.key_end
    }
}

/// Slots up to `end` (from the cut before on) lie in this shard of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cut {
    /// Past the last slot.
    pub end: u32,
    /// The shard.
    pub shard: u32,
}

/// What one step asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepInput {
    /// Sequences, or documents of them.
    pub sequences: Vec<StepSequence>,
    /// New tokens.
    pub appends: Vec<StepAppend>,
    /// Shared keys: of each sequence those in front of [`StepSequence::own_from`].
    pub shared: Vec<Shared>,
    /// Indices of sequences.
    pub members: Vec<u32>,
    /// Where slots go from shard to shard.
    pub cuts: Vec<Cut>,
    /// Shards of the cache; 0 counts as 1.
    pub shards: u32,
    /// Words of dense masks, which come first among the step's words.
    pub dense: u64,
    /// The words behind them: page tables and trees, later lists and parts.
    pub words: Vec<u32>,
}

impl StepInput {
    /// Forgets all but the memory.
    pub(crate) fn clear(&mut self) {
        self.sequences.clear();
        self.appends.clear();
        self.shared.clear();
        self.members.clear();
        self.cuts.clear();
        self.words.clear();
        (self.shards, self.dense) = (0, 0);
    }

    /// Leaves every sequence all of its keys.
    pub(super) fn share_nothing(&mut self) {
        self.shared.clear();
        self.members.clear();
        self.sequences.iter_mut().for_each(|s| s.own_from = 0);
    }

    pub(crate) fn cuts(&self, span: Span) -> &[Cut] {
        span.of(&self.cuts)
    }

    /// The sequences that share some keys.
    pub fn members(&self, shared: &Shared) -> &[u32] {
        shared.members.of(&self.members)
    }

    /// Whether a sequence has a tree: a step has trees or dense masks, never both.
    pub(crate) fn has_tree(&self, s: &StepSequence) -> bool {
        s.mask.token != 0 && self.dense == 0
    }

    /// The position that a query token turns to: in a tree its depth, else its place.
    pub(crate) fn turn(&self, s: &StepSequence, token: u32, words: &[u32]) -> i32 {
        if !self.has_tree(s) {
            return s.q_start + token as i32;
        }
        let at = (s.mask.word + token * s.mask.token) as usize;
        let seen: u32 = words.iter().skip(at).take(2).map(|word| word.count_ones()).sum();
        s.q_start + seen.max(1) as i32 - 1
    }
}

impl StepSequence {
    /// Keys that arithmetic lets the rows `begin..end` see: both ends grow with the row.
    pub(crate) fn visible(&self, spec: &AttentionSpec, rows: Range<u32>) -> Range<u32> {
        let of =
            |row: u32| spec.visible(i64::from(self.q_start) + i64::from(row / spec.group()), self.kv_len);
        let end = of(rows.end - 1).end;
        of(rows.start).start.max(self.begin).min(end)..end
    }
    /// Its rows: tokens times heads of a group.
    pub(super) fn rows(&self, spec: &AttentionSpec) -> u32 {
        self.q_len * spec.group()
    }
}

impl Plan {
    /// Whether `rows` rows are few, so that the decode kernel takes them, and the rows of the tiles that they are cut into.
    pub(crate) fn tile_of(&self, rows: u32) -> (bool, u32) {
        // One token, or as many as a decode tile holds.
        let is_decode = rows <= self.decode.tile.rows.max(self.spec.group());
        (is_decode, if is_decode { self.decode.tile.rows } else { self.prefill.tile.rows })
    }
}

/// What a step must move and compute at least: the work that a benchmark divides by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes of visible K/V (each element once per sequence, shared ones once for all), queries and outputs.
    pub bytes: u64,
    /// Two operations for each multiply-add of `q k^T` and of `p v` on visible pairs.
    pub flops: u64,
}

impl Traffic {
    /// What the way back takes at least: five products where the way there has two (`q k^T`, dq and dk of the length of a key, `dO v^T` and
    /// dv of that of a value), and each tensor with its gradient.
    #[must_use]
    pub fn backward(self, spec: &AttentionSpec) -> Self {
        let [k, v] = [spec.head_dim(), spec.v_head_dim()].map(u64::from);
        Self { bytes: 2 * self.bytes, flops: self.flops / (k + v) * (3 * k + 2 * v) }
    }

    /// Counts `input`.
    pub fn of(spec: &AttentionSpec, input: &StepInput) -> Self {
        let dims = u64::from(spec.head_dim() + spec.v_head_dim());
        let mut traffic = Self::default();
        for s in &input.sequences {
            let visible = |tokens: Range<u32>| {
                s.visible(spec, tokens.start * spec.group()..tokens.end * spec.group()).len() as u64
            };
            let pairs: u64 = (0..s.q_len).map(|i| visible(i..i + 1)).sum::<u64>() * u64::from(spec.q_heads());
            let keys = if s.q_len == 0 { 0 } else { visible(0..s.q_len) };
            let q_elements = u64::from(s.q_len) * u64::from(spec.q_heads()) * dims;
            traffic.flops += 2 * pairs * dims;
            traffic.bytes +=
                keys * spec.kv_bytes_per_token() + q_elements * u64::from(spec.q_dtype().bytes());
        }
        for shared in &input.shared {
            // A window may hide some of the keys from some: then less is saved, and this is below what must be moved.
            let saved = shared.keys().len() as u64 * u64::from(shared.members.count.saturating_sub(1));
            traffic.bytes = traffic.bytes.saturating_sub(saved * spec.kv_bytes_per_token());
        }
        traffic
    }
}
