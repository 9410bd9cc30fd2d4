//! The work list of one step: which rows and keys each workgroup takes.

use std::ops::Range;

use super::input::{Cut, StepAppend, StepInput, StepSequence};
use super::{AppendItem, CombineItem, Plan, WorkItem};
use crate::caps::Class;
use crate::params::{LIST_WORDS, MAP_KEYS, MAP_TILES, NO_LIST, PART_WORDS, WHOLE};

/// Keys below which a chunk is not worth a state of its own.
pub(super) const MIN_CHUNK: u32 = 64;
/// Bytes of states beyond which chunks grow: more would move more than it spreads.
const MAX_STATE_BYTES: u64 = 64 << 20;
/// In front of the mask of a list's rows lie all keys: those that are shared are older than any tree.
const BEFORE_MASK: i32 = i32::MIN / 2;

/// Items of every kernel for one step, by the shard of the cache that they read or write, and what they need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkLists {
    /// For the prefill kernel, longest first; on software adapters in turns with the shortest.
    pub prefill: Vec<Vec<WorkItem>>,
    /// For the decode kernel, in the same order.
    pub decode: Vec<Vec<WorkItem>>,
    /// Tiles whose parts are to be merged.
    pub combine: Vec<CombineItem>,
    /// Runs of new tokens.
    pub append: Vec<Vec<AppendItem>>,
    /// Rows of the state buffer.
    pub state_rows: u64,
    /// Rows of the largest tile in `combine`.
    pub combine_rows: u32,
    /// Words of the maps of dense masks.
    pub map_words: u64,
    /// Parts of each sequence's rows that it shares with others, kept for its own tiles: base and stride.
    shared: Vec<Vec<[u32; 2]>>,
    /// Where a list is while it is put in order; empty otherwise.
    spare: Vec<WorkItem>,
}

impl WorkLists {
    /// Fills the lists anew for `input`, whose words grow by lists and parts. Allocates only where it has never been as large.
    pub(crate) fn fill(&mut self, plan: &Plan, input: &mut StepInput) {
        let mut words = std::mem::take(&mut input.words);
        let tables = words.len();
        let step = plan.chunk_step();
        let first = fair_chunk(plan, input);
        // Chunks as long as every sequence, or as the driver lets a kernel walk, are as few as there can be.
        let whole = input.sequences.iter().map(|s| s.kv_len).max().unwrap_or(0).next_multiple_of(step);
        let longest = whole.min(plan.longest_chunk);
        let (mut chunk, mut most) = (first, plan.caps.binding_size.min(MAX_STATE_BYTES));
        loop {
            self.clear(input);
            words.truncate(tables);
            let mut filler = Filler { plan, input, lists: self, words: &mut words, chunk, step };
            filler.fill();
            let bytes = self.state_rows * plan.state_row_bytes();
            if bytes <= most {
                break;
            }
            if chunk < longest {
                chunk = chunk.saturating_mul(2).min(longest);
            } else if most < plan.caps.binding_size {
                // Many rows have as many states however long chunks are: twice of them spread the batch all the same.
                (chunk, most) = (first, bytes.saturating_mul(2).min(plan.caps.binding_size));
            } else if !input.shared.is_empty() {
                // What is shared has states of its own, at every branch: rather none is shared than the batch refused.
                input.share_nothing();
                (chunk, most) = (fair_chunk(plan, input), plan.caps.binding_size.min(MAX_STATE_BYTES));
            } else {
                break;
            }
        }
        input.words = words;
        for list in self.prefill.iter_mut().chain(&mut self.decode) {
            list.sort_unstable_by_key(|item| {
                (std::cmp::Reverse(item.key_end - item.key_begin), item.token, item.row_begin, item.key_begin)
            });
            if plan.caps.class == Class::Software {
                fold(list, &mut self.spare);
            }
            if plan.spec.mask().is_dense() {
                self.map_words = place_maps(list, plan.spec.kv_heads(), self.map_words);
            }
        }
        self.append_all(plan, input);
    }

    /// Room for `items` items and `merges` tiles to be merged, in one list: for what a kernel fills in.
    pub(crate) fn reserve(&mut self, is_decode: bool, (items, merges): (usize, usize)) {
        self.clear(&StepInput::default());
        let list = if is_decode { &mut self.decode } else { &mut self.prefill };
        list[0].resize(items, WorkItem::default());
        self.combine.resize(merges, CombineItem::default());
    }

    /// The runs of new tokens.
    pub(crate) fn append_all(&mut self, plan: &Plan, input: &StepInput) {
        let run = plan.append.tile.rows;
        for new in &input.appends {
            for (span, shard) in cut(input.cuts(new.cuts), new.slot..new.slot + new.len) {
                self.append[shard as usize].extend(append_runs(new, span, run));
            }
        }
    }

    fn clear(&mut self, input: &StepInput) {
        let shards = input.shards.max(1) as usize;
        self.prefill.resize_with(shards, Vec::new);
        self.decode.resize_with(shards, Vec::new);
        self.append.resize_with(shards, Vec::new);
        let of_items = self.prefill.iter_mut().chain(&mut self.decode);
        of_items.for_each(Vec::clear);
        self.append.iter_mut().for_each(Vec::clear);
        self.combine.clear();
        if self.shared.len() < input.sequences.len() {
            self.shared.resize_with(input.sequences.len(), Vec::new);
        }
        self.shared.iter_mut().for_each(Vec::clear);
        (self.state_rows, self.combine_rows, self.map_words) = (0, 0, 0);
    }

    /// Dispatch dimensions for `items` items: x and z hold the items, y the KV heads.
    pub fn grid(items: usize, kv_heads: u32, workgroups: u32) -> [u32; 3] {
        let items = items as u32;
        [items.min(workgroups), kv_heads, items.div_ceil(workgroups)]
    }
}

/// What one pass over the input needs.
struct Filler<'a> {
    plan: &'a Plan,
    input: &'a StepInput,
    lists: &'a mut WorkLists,
    words: &'a mut Vec<u32>,
    /// Keys of a chunk.
    chunk: u32,
    /// Keys that the kernels take at a time.
    step: u32,
}

impl Filler<'_> {
    fn fill(&mut self) {
        for nth in 0..self.input.shared.len() {
            self.share(nth);
        }
        for nth in 0..self.input.sequences.len() {
            self.attend(nth);
        }
    }

    /// The word that comes next, as shaders count.
    fn next_word(&self) -> u32 {
        self.input.dense.wrapping_add(self.words.len() as u64) as u32
    }

    /// Rows of several sequences over the keys that they share.
    fn share(&mut self, nth: usize) {
        let Self { plan, input, .. } = *self;
        let (spec, shared) = (&plan.spec, &input.shared[nth]);
        let list = self.next_word();
        let mut rows = 0;
        for member in input.members(shared) {
            let s = &input.sequences[*member as usize];
            for token in 0..s.q_len {
                let place = s.q_start + token as i32;
                let turn = input.turn(s, token, self.words);
                self.words.extend([s.token + token, place as u32, turn as u32]);
            }
            rows += s.rows(spec);
        }
        debug_assert_eq!(self.next_word(), list + rows / spec.group() * LIST_WORDS);
        let (is_decode, tile_rows) = plan.tile_of(rows);
        for (span, shard) in cut(input.cuts(shared.cuts), shared.keys()) {
            for keys in chunks(span, (self.chunk, self.step)) {
                let state = self.lists.state_rows as u32;
                self.lists.state_rows += u64::from(rows) * u64::from(spec.kv_heads());
                for row_begin in (0..rows).step_by(tile_rows as usize) {
                    let item = WorkItem {
                        row_begin,
                        row_end: rows.min(row_begin + tile_rows),
                        key_begin: keys.start,
                        key_end: keys.end,
                        pages: shared.pages,
                        state,
                        state_stride: rows,
                        mask_key: BEFORE_MASK,
                        list,
                        ..WorkItem::default()
                    };
                    self.lists.push(is_decode, shard, item);
                }
                let mut first = 0;
                for member in input.members(shared) {
                    self.lists.shared[*member as usize].push([state + first, rows]);
                    first += input.sequences[*member as usize].rows(spec);
                }
            }
        }
    }

    /// Rows of one sequence over the keys that it has for itself.
    fn attend(&mut self, nth: usize) {
        let Self { plan, input, .. } = *self;
        let (spec, s) = (&plan.spec, &input.sequences[nth]);
        let rows = s.rows(spec);
        let (is_decode, tile_rows) = plan.tile_of(rows);
        for row_begin in (0..rows).step_by(tile_rows as usize) {
            let row_end = rows.min(row_begin + tile_rows);
            let visible = s.visible(spec, row_begin..row_end);
            let keys = visible.start.max(s.own_from).min(visible.end)..visible.end;
            let item = s.item(row_begin..row_end, keys.clone());
            let slots = keys.start + s.origin..keys.end + s.origin;
            let mut spans = cut(input.cuts(s.cuts), slots);
            let first = spans.next();
            let shared = self.lists.shared[nth].len();
            let is_one = spans.next().is_none() && keys.len() as u64 <= u64::from(self.chunk);
            if is_one && shared == 0 && !spec.rotated() {
                self.lists.push(is_decode, first.map_or(0, |(_, shard)| shard), item);
                continue;
            }
            self.split(nth, item, is_decode);
        }
    }

    /// An item's keys in chunks, each with states, and what merges them with those of shared keys.
    fn split(&mut self, nth: usize, item: WorkItem, is_decode: bool) {
        let (input, spec) = (self.input, &self.plan.spec);
        let s = &input.sequences[nth];
        let rows = item.row_end - item.row_begin;
        let parts = self.next_word();
        self.words.extend(self.lists.shared[nth].iter().flatten());
        let slots = item.key_begin + s.origin..item.key_end + s.origin;
        for (span, shard) in cut(input.cuts(s.cuts), slots) {
            for slots in chunks(span, (self.chunk, self.step)) {
                let state = (self.lists.state_rows as u32).wrapping_sub(item.row_begin);
                self.lists.state_rows += u64::from(rows) * u64::from(spec.kv_heads());
                self.words.extend([state, rows]);
                let (key_begin, key_end) = (slots.start - s.origin, slots.end - s.origin);
                let item = WorkItem { key_begin, key_end, state, state_stride: rows, ..item };
                self.lists.push(is_decode, shard, item);
            }
        }
        let count = (self.next_word() - parts) / PART_WORDS;
        let WorkItem { token, row_begin, row_end, .. } = item;
        self.lists.combine.push(CombineItem { token, row_begin, row_end, parts, count });
        self.lists.combine_rows = self.lists.combine_rows.max(rows);
    }
}

impl WorkLists {
    fn push(&mut self, is_decode: bool, shard: u32, item: WorkItem) {
        let lists = if is_decode { &mut self.decode } else { &mut self.prefill };
        lists[shard as usize].push(item);
    }
}

impl StepSequence {
    /// Some of its rows over some of its keys, whole.
    pub(super) fn item(&self, rows: Range<u32>, keys: Range<u32>) -> WorkItem {
        WorkItem {
            token: self.token,
            row_begin: rows.start,
            row_end: rows.end,
            key_begin: keys.start,
            key_end: keys.end,
            q_start: self.q_start,
            pages: self.pages,
            state: 0,
            state_stride: WHOLE,
            origin: self.origin,
            mask: self.mask.word,
            mask_head: self.mask.head,
            mask_token: self.mask.token,
            mask_key: self.mask.key,
            map: 0,
            list: NO_LIST,
        }
    }
}

/// `slots` cut where they go from one shard to another, with the shard of each span; without cuts all lie in shard 0. Empty slots are
/// no span.
pub(super) fn cut(cuts: &[Cut], slots: Range<u32>) -> impl Iterator<Item = (Range<u32>, u32)> + '_ {
    let whole = (cuts.is_empty() && !slots.is_empty()).then(|| (slots.clone(), 0));
    let mut begin = slots.start;
    let spans = cuts.iter().filter_map(move |cut| {
        let span = begin..cut.end.min(slots.end);
        begin = begin.max(cut.end.min(slots.end));
        (!span.is_empty()).then_some((span, cut.shard))
    });
    whole.into_iter().chain(spans)
}

/// `keys` in chunks of at most `chunk`, of equal length so that none is a short remainder, but rounded up to whole `step`s.
fn chunks(keys: Range<u32>, (chunk, step): (u32, u32)) -> impl Iterator<Item = Range<u32>> {
    let len = keys.end - keys.start;
    let even = len.div_ceil(len.div_ceil(chunk).max(1)).max(1).next_multiple_of(step);
    (keys.start..keys.end).step_by(even as usize).map(move |at| at..keys.end.min(at + even))
}

/// Keys of a chunk: fixed, or such that the device is just filled, all (tile, KV head) walks shared out evenly.
fn fair_chunk(plan: &Plan, input: &StepInput) -> u32 {
    let longest = input.sequences.iter().map(|s| s.kv_len).max().unwrap_or(0);
    let (least, most) = plan.chunk_bounds(longest);
    if least == most {
        return least;
    }
    let spec = &plan.spec;
    let tiles = |rows: u32| u64::from(rows.div_ceil(plan.tile_of(rows).1));
    // Every tile counted as long as the last one, which is the longest of a causal sequence.
    let walk = |s: &StepSequence| {
        let (rows, tile) = (s.rows(spec), plan.tile_of(s.rows(spec)).1);
        if rows == 0 {
            return 0;
        }
        let keys = s.visible(spec, (tiles(rows) as u32 - 1) * tile..rows);
        tiles(rows) * u64::from(keys.end.saturating_sub(keys.start.max(s.own_from)))
    };
    let own: u64 = input.sequences.iter().map(walk).sum();
    let shared = input.shared.iter().map(|shared| {
        let rows = input.members(shared).iter().map(|m| input.sequences[*m as usize].rows(spec)).sum();
        tiles(rows) * u64::from(shared.key_end - shared.key_begin)
    });
    let total = (own + shared.sum::<u64>()) * u64::from(spec.kv_heads());
    total.div_ceil(u64::from(plan.fill)).clamp(least.into(), most.into()) as u32
}

/// From longest first to longest, shortest, second longest, second shortest ... Software adapters give each of their threads as many
/// workgroups as the others, one behind the other: so these take about as long.
pub(super) fn fold(list: &mut [WorkItem], spare: &mut Vec<WorkItem>) {
    spare.extend_from_slice(list);
    for (nth, item) in list.iter_mut().enumerate() {
        *item = spare[if nth % 2 == 0 { nth / 2 } else { spare.len() - 1 - nth / 2 }];
    }
    spare.clear();
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

/// The new tokens whose slots lie in `span`, in runs of at most `run`.
fn append_runs(new: &StepAppend, span: Range<u32>, run: u32) -> impl Iterator<Item = AppendItem> {
    let StepAppend { token, slot, position, pages, .. } = *new;
    span.clone().step_by(run as usize).map(move |at| AppendItem {
        token: token + at - slot,
        tokens: run.min(span.end - at),
        slot: at,
        position: (position + at - slot) as i32,
        pages,
    })
}
