//! The work list of one step: which rows and keys each workgroup takes.

use super::{AppendItem, CombineItem, Params, Plan, WorkItem};
use crate::params::WHOLE;
use crate::spec::AttentionSpec;

/// Keys below which a chunk is not worth a state of its own.
const MIN_CHUNK: u64 = 64;
/// Bytes of states beyond which chunks grow: more would move more than it spreads.
const MAX_STATE_BYTES: u64 = 64 << 20;
/// New tokens that one workgroup appends.
const APPEND_RUN: u32 = 16;

/// One sequence of a batch, resolved: where its tokens are and how much of the cache it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSequence {
    /// First token in queries and outputs.
    pub token: u32,
    /// Query tokens.
    pub q_len: u32,
    /// Position of the first query among the keys.
    pub q_start: i32,
    /// Keys, new ones included.
    pub kv_len: u32,
    /// First token in the new keys and values.
    pub new_token: u32,
    /// How many of the keys are new: the last ones.
    pub new_len: u32,
    /// First row in the cache.
    pub cache_row: u32,
}

impl StepSequence {
    /// Keys that row `row` sees: those before the returned position.
    fn visible_end(&self, spec: &AttentionSpec, row: u32) -> u32 {
        spec.visible_end(i64::from(self.q_start) + i64::from(row / spec.group()), self.kv_len)
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
}

impl WorkLists {
    pub(super) fn new(plan: &Plan, sequences: &[StepSequence]) -> Self {
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
            }
            for sequence in sequences {
                lists.append.extend(append_runs(sequence));
            }
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
            let keys = sequence.visible_end(spec, row_end - 1);
            let chunks = keys.div_ceil(chunk).max(1);
            let whole = WorkItem {
                token: sequence.token,
                row_begin,
                row_end,
                key_begin: 0,
                key_end: keys,
                kv_len: sequence.kv_len,
                q_start: sequence.q_start,
                cache_row: sequence.cache_row,
                state: WHOLE,
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
            let even = keys.div_ceil(chunks);
            for i in 0..chunks {
                list.push(WorkItem {
                    key_begin: keys.min(i * even),
                    key_end: keys.min((i + 1) * even),
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
    let walk = |s: &StepSequence| {
        let tiles = s.rows(spec).div_ceil(s.tile_rows(plan));
        u64::from(tiles) * u64::from(s.kv_len) * u64::from(spec.kv_heads())
    };
    let total: u64 = sequences.iter().map(walk).sum();
    total.div_ceil(u64::from(plan.fill)).max(MIN_CHUNK).min(u64::from(u32::MAX)) as u32
}

fn append_runs(sequence: &StepSequence) -> impl Iterator<Item = AppendItem> {
    let StepSequence { new_token, new_len, kv_len, cache_row, .. } = *sequence;
    (0..new_len).step_by(APPEND_RUN as usize).map(move |at| AppendItem {
        token: new_token + at,
        tokens: APPEND_RUN.min(new_len - at),
        position: kv_len - new_len + at,
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
            let end = |token: u32| u64::from(s.visible_end(spec, token * spec.group()));
            let pairs: u64 = (0..s.q_len).map(end).sum::<u64>() * u64::from(spec.q_heads());
            let keys = if s.q_len == 0 { 0 } else { end(s.q_len - 1) };
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

    /// The bytes of a work list: `params` with the count of `items`, then the items.
    pub fn bytes<T: bytemuck::Pod>(params: Params, items: &[T]) -> Vec<u8> {
        let mut bytes = bytemuck::bytes_of(&Params { items: items.len() as u32, ..params }).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(items));
        bytes
    }
}
