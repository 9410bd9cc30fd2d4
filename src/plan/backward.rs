//! Kernels and work lists of the backward pass.

use std::cmp::Reverse;
use std::ops::Range;

use super::loops::longest_walk;
use super::work::{cut, fold};
use super::{FLAT_THREADS, Plan, StepInput, StepSequence};
use crate::caps::Class;
use crate::error::Error;
use crate::params::{MAP_KEYS, StoreItem, WorkItem};
use crate::shader::{Kernel, Tile, Variant};
use crate::spec::{Dtype, Mask};

/// Largest `head_dim` and `v_head_dim` that train: beyond, gradients of a tile leave the registers.
const MAX_DIM: u32 = 256;
/// Largest dim of which the subgroup kernels walk two keys, or rows, a step.
const CLOSE_DIM: u32 = 64;
/// Tokens that one workgroup stores.
const STORE_TOKENS: u32 = 16;

/// The kernels of the backward pass. They are compiled where gradients are wanted.
#[derive(Debug, Clone, PartialEq)]
pub struct BackwardPlan {
    /// Packs rows for the others.
    pub rows: Variant,
    /// Gradients of queries.
    pub queries: Variant,
    /// Gradients of keys and values.
    pub keys: Variant,
    /// Gradients of sinks, where the spec has some.
    pub sinks: Option<Variant>,
    /// Gradients to the caller's tensors.
    pub store: Variant,
    /// Keys that an item of `queries` walks at most, and rows that one of `keys` does.
    longest: (u32, u32),
}

impl Plan {
    /// Plans the backward pass.
    ///
    /// # Errors
    /// [`Error::Field`] for a spec that does not train: norms of queries and keys (normalise outside), rotated, blocked or fp8 storage,
    /// trees, values in keys, dims beyond 256.
    pub fn backward(&self) -> Result<BackwardPlan, Error> {
        let spec = self.spec();
        let refuse = |field, found: String, needed: &str| Err(Error::field(field, found, needed));
        if spec.qk_norm().is_some() {
            return refuse("qk_norm", "set".to_owned(), "gradients need it outside of attention");
        }
        if spec.rotated() {
            return refuse("rotated", "true".to_owned(), "gradients need a cache that is not rotated");
        }
        if spec.v_in_k() {
            return refuse("v_in_k", "true".to_owned(), "gradients need values of their own");
        }
        if spec.mask() == Mask::Tree {
            return refuse("mask", "Tree".to_owned(), "trees of draft tokens have no gradients");
        }
        for (field, dtype) in [("k_dtype", spec.k_dtype()), ("v_dtype", spec.v_dtype())] {
            if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
                return refuse(field, dtype.to_string(), "gradients need f32, f16 or bf16");
            }
        }
        for (field, dim) in [("head_dim", spec.head_dim()), ("v_head_dim", spec.v_head_dim())] {
            if dim > MAX_DIM {
                return refuse(field, dim.to_string(), "gradients need at most 256");
            }
        }
        let variant =
            |kernel, tile| Variant { kernel, tile, shuffle: false, pooled: false, ..self.combine().clone() };
        let flat = |kernel| variant(kernel, Tile { rows: 1, keys: 1, threads: FLAT_THREADS });
        let tile = |rows, keys| Tile { rows, keys, threads: rows * 2 };
        // As in backward_q.wgsl: row_part, kv_part (9 groups a row), d_logits.
        let bytes = |rows: u32| rows * 9 * 16 + MAP_KEYS * 9 * 16 + MAP_KEYS * rows * 4;
        let rows =
            if bytes(64) <= self.caps.workgroup_memory && self.caps.invocations >= 128 { 64 } else { 32 };
        // More than four parts of a head.
        let is_long = spec.head_dim().max(spec.v_head_dim()) > 128;
        let rolled = is_long && self.caps.class == Class::Software;
        let staged = |kernel, tile| Variant { rolled, ..variant(kernel, tile) };
        let portable = (
            staged(Kernel::BackwardQ, tile(rows, MAP_KEYS)),
            staged(Kernel::BackwardKv, tile(MAP_KEYS, MAP_KEYS)),
        );
        let (queries, keys) = match self.prefill() {
            Variant { kernel: Kernel::PrefillSubgroup, tile, .. } => {
                // Rows a lane of the one, keys a lane of the other, and what a step walks, found by measuring: a step of two halves what is
                // loaded and stored of gradients, but with long rows its text is longer than caches of instructions, and with few
                // registers it loses, as it does for prefill.
                let lanes = tile.threads;
                let is_close = spec.head_dim().max(spec.v_head_dim()) <= CLOSE_DIM;
                let (rows, keys, step) = match (is_close, tile.keys) {
                    (true, 1) => (2, 2, 1),
                    (true, _) => (3, 3, 2),
                    (false, _) => (3, 2, 1),
                };
                let tile = |rows, keys| Tile { rows, keys, threads: lanes };
                (
                    variant(Kernel::BackwardQSubgroup, tile(lanes * rows, step)),
                    variant(Kernel::BackwardKvSubgroup, tile(step, lanes * keys)),
                )
            }
            _ => portable,
        };
        Ok(BackwardPlan {
            longest: (longest_walk(&queries, &self.caps), longest_walk(&keys, &self.caps)),
            rows: flat(Kernel::BackwardRows),
            queries,
            keys,
            sinks: spec.sinks().then(|| flat(Kernel::BackwardSinks)),
            store: flat(Kernel::BackwardStore),
        })
    }
}

impl BackwardPlan {
    /// All variants, each once.
    pub fn variants(&self) -> Vec<&Variant> {
        let Self { rows, queries, keys, sinks, store, .. } = self;
        [rows, queries, keys, store].into_iter().chain(sinks).collect()
    }

    /// The work of one step. Keys that several sequences share are read by each: gradients of their rows are not merged.
    pub fn work(&self, input: &StepInput) -> BackwardLists {
        let shards = input.shards.max(1) as usize;
        let rounds = Rounds { shards, lists: vec![Vec::new(); shards] };
        let mut lists = BackwardLists { queries: rounds.clone(), keys: rounds, ..BackwardLists::default() };
        for s in &input.sequences {
            self.walk_queries(input, s, &mut lists.queries);
            lists.queries_stored.extend(runs(s.token, s.q_len, s.origin as i32 + s.q_start));
        }
        for new in &input.appends {
            for s in input.sequences.iter().filter(|s| s.nth == new.nth) {
                let slots = new.slot.max(s.origin)..(new.slot + new.len).min(s.origin + s.kv_len);
                for (span, shard) in cut(input.cuts(new.cuts), slots) {
                    // What the first key's gradient is of.
                    let token = new.token.wrapping_sub(new.slot);
                    self.walk_keys(s, (span, token, shard), &mut lists.keys);
                }
            }
            lists.keys_stored.extend(runs(new.token, new.len, new.position as i32));
        }
        let mut spare = Vec::new();
        for list in lists.queries.lists.iter_mut().chain(&mut lists.keys.lists) {
            let pairs = |item: &WorkItem| {
                u64::from(item.row_end - item.row_begin) * u64::from(item.key_end - item.key_begin)
            };
            list.sort_by_key(|item| Reverse(pairs(item)));
            if self.keys.uses_subgroups() {
                fold(list, &mut spare);
            }
        }
        lists
    }

    /// Tiles of rows, each with all keys that it sees.
    fn walk_queries(&self, input: &StepInput, s: &StepSequence, lists: &mut Rounds) {
        let (spec, tile) = (&self.queries.spec, self.queries.tile.rows);
        let rows = s.rows(spec);
        for row in (0..rows).step_by(tile as usize) {
            let rows = row..rows.min(row + tile);
            let keys = s.visible(spec, rows.clone());
            // Rounds that each shard has had: its keys may lie between those of others.
            let mut rounds = vec![0; lists.shards];
            for (span, shard) in cut(input.cuts(s.cuts), keys.start + s.origin..keys.end + s.origin) {
                for keys in pieces(span.start - s.origin..span.end - s.origin, self.longest.0) {
                    let round = &mut rounds[shard as usize];
                    lists.push((*round, shard), s.item(rows.clone(), keys));
                    *round += 1;
                }
            }
        }
    }

    /// Tiles of keys of a shard, each with all rows that see some of it. `token` is what is added to a slot to give its new token.
    fn walk_keys(&self, s: &StepSequence, (slots, token, shard): (Range<u32>, u32, u32), lists: &mut Rounds) {
        let (spec, tile) = (&self.keys.spec, self.keys.tile.keys);
        for slot in slots.clone().step_by(tile as usize) {
            let keys = slot - s.origin..slots.end.min(slot + tile) - s.origin;
            let tokens = seers(s.q_len, |nth| {
                let seen = spec.visible(i64::from(s.q_start) + i64::from(nth), s.kv_len);
                (seen.end <= keys.start, seen.start < keys.end)
            });
            let rows = tokens.start * spec.group()..tokens.end * spec.group();
            let item = WorkItem { state: token.wrapping_add(slot), ..s.item(rows.clone(), keys) };
            for (round, rows) in pieces(rows, self.longest.1).enumerate() {
                lists.push((round, shard), WorkItem { row_begin: rows.start, row_end: rows.end, ..item });
            }
        }
    }
}

/// Of `count` tokens, whose visible keys move on from token to token, those from the first that is not `before` some keys up to the
/// last that is not behind them (`reaches`).
fn seers(count: u32, of: impl Fn(u32) -> (bool, bool)) -> Range<u32> {
    let partition = |is_left: &dyn Fn(u32) -> bool| {
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            if is_left(middle) { low = middle + 1 } else { high = middle }
        }
        low
    };
    let begin = partition(&|nth| of(nth).0);
    begin..partition(&|nth| of(nth).1).max(begin)
}

/// `tokens` tokens in runs that one workgroup stores.
fn runs(token: u32, tokens: u32, position: i32) -> impl Iterator<Item = StoreItem> {
    (0..tokens).step_by(STORE_TOKENS as usize).map(move |at| StoreItem {
        token: token + at,
        tokens: STORE_TOKENS.min(tokens - at),
        position: position + at as i32,
    })
}

/// A walk in pieces of at most `longest`, of equal length.
fn pieces(walk: Range<u32>, longest: u32) -> impl Iterator<Item = Range<u32>> {
    let len = walk.end.saturating_sub(walk.start);
    let even = len.div_ceil(len.div_ceil(longest).max(1)).max(1);
    walk.clone().step_by(even as usize).map(move |at| at..walk.end.min(at + even))
}

/// Lists of items that are dispatched one behind the other, because items of several add to one gradient.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rounds {
    shards: usize,
    /// First one for each shard, then the next for each ..., longest items first.
    lists: Vec<Vec<WorkItem>>,
}

impl Rounds {
    fn push(&mut self, (round, shard): (usize, u32), item: WorkItem) {
        let nth = round * self.shards + shard as usize;
        if nth >= self.lists.len() {
            self.lists.resize((round + 1) * self.shards, Vec::new());
        }
        self.lists[nth].push(item);
    }

    /// Each list with its shard, in order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &[WorkItem])> {
        self.lists.iter().enumerate().map(|(nth, list)| (nth % self.shards, list.as_slice()))
    }
}

/// Items of the backward kernels for one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackwardLists {
    /// For gradients of queries, by the shard whose keys they read.
    pub queries: Rounds,
    /// For gradients of keys and values, by shard; [`WorkItem::state`] is the new token that the first key is.
    pub keys: Rounds,
    /// Runs of query tokens.
    pub queries_stored: Vec<StoreItem>,
    /// Runs of new tokens.
    pub keys_stored: Vec<StoreItem>,
}
