//! The work list of one step: which rows and keys each workgroup takes.

use std::ops::Range;

use super::{AppendItem, CombineItem, Plan, WorkItem};
use crate::params::{MAP_KEYS, MAP_TILES, WHOLE};
use crate::spec::AttentionSpec;

/// Keys below which a chunk is not worth a state of its own.
const MIN_CHUNK: u64 = 64;
/// Bytes of states beyond which chunks grow: more would move more than it spreads.
const MAX_STATE_BYTES: u64 = 64 << 20;
/// New tokens that one workgroup appends.
pub(super) const APPEND_RUN: u32 = 16;

/// Where the mask of a sequence lies in the step's masks, in words.
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

/// One sequence of a batch, or one document of it, resolved: where its tokens are and how much of the cache it sees.
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
    /// First row in the cache.
    pub cache_row: u32,
    /// Position of its first key in the sequence.
    pub origin: u32,
    /// Its mask.
    pub mask: MaskPlace,
}

/// New tokens of one sequence, resolved.
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
    /// The sequence's first row in the cache.
    pub cache_row: u32,
}

impl StepSequence {
    /// Keys that arithmetic lets the rows `begin..end` see: both ends grow with the row.
    fn visible(&self, spec: &AttentionSpec, rows: Range<u32>) -> Range<u32> {
        let of =
            |row: u32| spec.visible(i64::from(self.q_start) + i64::from(row / spec.group()), self.kv_len);
        let end = of(rows.end - 1).end;
        of(rows.start).start.min(end)..end
    }

    fn rows(&self, spec: &AttentionSpec) -> u32 {
        self.q_len * spec.group()
    }

    /// Whether its rows are few: one token, or as many as a decode tile holds.
    fn is_decode(&self, plan: &Plan) -> bool {
        self.rows(&plan.spec) <= plan.decode.tile.rows.max(plan.spec.group())
    }

    /// Rows of the tiles that its rows are cut into.
    fn tile_rows(&self, plan: &Plan) -> u32 {
        if self.is_decode(plan) { plan.decode.tile.rows } else { plan.prefill.tile.rows }
    }
}

/// Items of every kernel for one step, and what they need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkLists {
    /// For the prefill kernel, longest first.
    pub prefill: Vec<WorkItem>,
    /// For the decode kernel, longest first.
    pub decode: Vec<WorkItem>,
    /// Tiles whose chunks are to be merged.
    pub combine: Vec<CombineItem>,
    /// Runs of new tokens.
    pub append: Vec<AppendItem>,
    /// Rows of the state buffer.
    pub state_rows: u64,
    /// Rows of the largest tile in `combine`.
    pub combine_rows: u32,
    /// Words of the maps of dense masks.
    pub map_words: u64,
}

impl WorkLists {
    pub(super) fn new(plan: &Plan, sequences: &[StepSequence], appends: &[StepAppend]) -> Self {
        let mut chunk = plan.chunk.unwrap_or_else(|| fair_chunk(plan, sequences));
        loop {
            let mut lists = Self::default();
            for sequence in sequences {
                lists.attend(plan, sequence, chunk);
            }
            // With whole rows there are no states, so this ends.
            if lists.state_rows * plan.state_row_bytes() > plan.binding_size.min(MAX_STATE_BYTES) {
                chunk = chunk.saturating_mul(2);
                continue;
            }
            for list in [&mut lists.prefill, &mut lists.decode] {
                list.sort_by_key(|item| std::cmp::Reverse(item.key_end - item.key_begin));
                if plan.spec.mask().is_dense() {
                    lists.map_words = place_maps(list, plan.spec.kv_heads(), lists.map_words);
                }
            }
            lists.append.extend(appends.iter().flat_map(append_runs));
            return lists;
        }
    }

    fn attend(&mut self, plan: &Plan, sequence: &StepSequence, chunk: u32) {
        let spec = &plan.spec;
        let rows = sequence.rows(spec);
        let tile_rows = sequence.tile_rows(plan);
        let list = match sequence.is_decode(plan) {
            true => &mut self.decode,
            false => &mut self.prefill,
        };
        for row_begin in (0..rows).step_by(tile_rows as usize) {
            let row_end = rows.min(row_begin + tile_rows);
            let keys = sequence.visible(spec, row_begin..row_end);
            let chunks = (keys.end - keys.start).div_ceil(chunk).max(1);
            let whole = WorkItem {
                token: sequence.token,
                row_begin,
                row_end,
                key_begin: keys.start,
                key_end: keys.end,
                kv_len: sequence.kv_len,
                q_start: sequence.q_start,
                cache_row: sequence.cache_row,
                state: WHOLE,
                origin: sequence.origin,
                mask: sequence.mask.word,
                mask_head: sequence.mask.head,
                mask_token: sequence.mask.token,
                mask_key: sequence.mask.key,
                map: 0,
            };
            if chunks == 1 {
                list.push(whole);
                continue;
            }
            let tile_states = u64::from(spec.kv_heads()) * u64::from(row_end - row_begin);
            let state = self.state_rows;
            self.combine.push(CombineItem {
                token: sequence.token,
                row_begin,
                row_end,
                state: state as u32,
                chunks,
            });
            self.combine_rows = self.combine_rows.max(row_end - row_begin);
            // Chunks of equal length, so that none is a short remainder.
            let even = (keys.end - keys.start).div_ceil(chunks);
            for i in 0..chunks {
                list.push(WorkItem {
                    key_begin: keys.end.min(keys.start + i * even),
                    key_end: keys.end.min(keys.start + (i + 1) * even),
                    state: (state + u64::from(i) * tile_states) as u32,
                    ..whole
                });
            }
            self.state_rows += u64::from(chunks) * tile_states;
        }
    }
}

/// Keys of a chunk such that the device is just filled: all (tile, KV head) walks, shared out evenly.
fn fair_chunk(plan: &Plan, sequences: &[StepSequence]) -> u32 {
    let spec = &plan.spec;
    // Every tile counted as long as the last one, which is the longest of a causal sequence.
    let walk = |s: &StepSequence| {
        let (rows, tile) = (s.rows(spec), s.tile_rows(plan));
        let tiles = rows.div_ceil(tile);
        let keys = match tiles {
            0 => 0..0,
            n => s.visible(spec, (n - 1) * tile..rows),
        };
        u64::from(tiles) * keys.len() as u64 * u64::from(spec.kv_heads())
    };
    let total: u64 = sequences.iter().map(walk).sum();
    total.div_ceil(u64::from(plan.fill)).max(MIN_CHUNK).min(u64::from(u32::MAX)) as u32
}

/// Gives each item a map behind `words` words, and returns how many there are then.
fn place_maps(list: &mut [WorkItem], kv_heads: u32, mut words: u64) -> u64 {
    for item in list {
        item.map = words as u32;
        let tiles = (item.key_end - item.key_begin).div_ceil(MAP_KEYS);
        words += u64::from(tiles.div_ceil(MAP_TILES)) * u64::from(kv_heads);
    }
    words
}

fn append_runs(new: &StepAppend) -> impl Iterator<Item = AppendItem> {
    let StepAppend { token, len, slot, position, cache_row } = *new;
    (0..len).step_by(APPEND_RUN as usize).map(move |at| AppendItem {
        token: token + at,
        tokens: APPEND_RUN.min(len - at),
        slot: slot + at,
        position: (position + at) as i32,
        cache_row,
    })
}

/// What a step must move and compute at least: the work that a benchmark divides by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes of visible K/V (each element once per sequence), queries and outputs.
    pub bytes: u64,
    /// Two operations for each multiply-add of `q k^T` and of `p v` on visible pairs.
    pub flops: u64,
}

impl Traffic {
    /// Counts `sequences`.
    pub fn of(spec: &AttentionSpec, sequences: &[StepSequence]) -> Self {
        let dims = u64::from(spec.head_dim() + spec.v_head_dim());
        let mut traffic = Self::default();
        for s in sequences {
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
        traffic
    }
}

impl WorkLists {
    /// Dispatch dimensions for `items` items: x and z hold the items, y the KV heads.
    pub fn grid(items: usize, kv_heads: u32, workgroups: u32) -> [u32; 3] {
        let items = items as u32;
        [items.min(workgroups), kv_heads, items.div_ceil(workgroups)]
    }

    /// The bytes of a work list: its head, then the items.
    pub fn bytes<H: bytemuck::Pod, T: bytemuck::Pod>(head: &H, items: &[T]) -> Vec<u8> {
        let mut bytes = bytemuck::bytes_of(head).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(items));
        bytes
    }
}
