//! Who walks what: work lists, held against the step that they are for.

use std::collections::BTreeMap;
use std::ops::Range;

use gqa::params::{CombineItem, LIST_WORDS, NO_LIST, PART_WORDS, WHOLE, WorkItem};
use gqa::plan::{StepInput, StepSequence, WorkLists};
use gqa::{AttentionSpec, Class, Plan};

use crate::world::World;

/// A row: sequence, row.
type RowOf = (usize, u32);

pub(crate) struct Walk<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) world: &'a World,
    /// The world's input after the lists were made.
    pub(crate) input: &'a StepInput,
    pub(crate) lists: &'a WorkLists,
    /// The sequence of each token, and its number there.
    tokens: BTreeMap<u32, (usize, u32)>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(plan: &'a Plan, world: &'a World, input: &'a StepInput, lists: &'a WorkLists) -> Self {
        let mut tokens = BTreeMap::new();
        for (nth, s) in input.sequences.iter().enumerate() {
            tokens.extend((0..s.q_len).map(|i| (s.token + i, (nth, i))));
        }
        Self { plan, world, input, lists, tokens }
    }

    fn spec(&self) -> &AttentionSpec {
        self.plan.spec()
    }

    /// All items, with their shards.
    pub(crate) fn items(&self) -> impl Iterator<Item = (usize, &WorkItem)> {
        let lists = [&self.lists.prefill, &self.lists.decode];
        let shards = lists.into_iter().flat_map(|list| list.iter().enumerate());
        shards.flat_map(|(shard, items)| items.iter().map(move |item| (shard, item)))
    }

    /// A word, as shaders count.
    fn word(&self, at: u32) -> u32 {
        let at = u64::from(at).checked_sub(self.input.dense).expect("a word of a mask");
        self.input.words[at as usize]
    }

    /// The sequence whose first token is `token`.
    fn sequence(&self, token: u32) -> (usize, &StepSequence) {
        let (nth, i) = self.tokens[&token];
        assert_eq!(i, 0);
        (nth, &self.input.sequences[nth])
    }

    /// The rows that an item walks.
    fn rows(&self, item: &WorkItem) -> impl Iterator<Item = RowOf> {
        let group = self.spec().group();
        (item.row_begin..item.row_end).map(move |row| {
            if item.list == NO_LIST {
                return (self.sequence(item.token).0, row);
            }
            let token = self.word(item.list + row / group * LIST_WORDS);
            let (nth, i) = self.tokens[&token];
            (nth, i * group + row % group)
        })
    }

    /// Keys that a row sees.
    fn visible(&self, (nth, row): RowOf) -> Range<u32> {
        let s = &self.input.sequences[nth];
        let keys = self.spec().visible(i64::from(s.q_start) + i64::from(row / self.spec().group()), s.kv_len);
        keys.start.max(s.begin).min(keys.end)..keys.end
    }

    /// Every row walks the keys that it sees once, and others not twice.
    pub(crate) fn check_coverage(&self) {
        let rows = |s: &StepSequence| vec![Vec::new(); (s.q_len * self.spec().group()) as usize];
        let mut walked: Vec<Vec<Vec<Range<u32>>>> = self.input.sequences.iter().map(rows).collect();
        for (_, item) in self.items() {
            assert!(item.key_begin <= item.key_end && item.row_begin < item.row_end);
            for (nth, row) in self.rows(item) {
                walked[nth][row as usize].push(item.key_begin..item.key_end);
            }
        }
        for (nth, rows) in walked.iter_mut().enumerate() {
            for (row, spans) in (0..).zip(rows) {
                spans.retain(|span| !span.is_empty());
                spans.sort_by_key(|span| span.start);
                let apart = spans.windows(2).all(|pair| pair[0].end <= pair[1].start);
                assert!(apart, "sequence {nth}, row {row} walks keys twice: {spans:?}");
                assert!(spans.last().is_none_or(|last| last.end <= self.input.sequences[nth].kv_len));
                assert!(spans.first().is_none_or(|first| first.start >= self.input.sequences[nth].begin));
                let seen = self.visible((nth, row));
                let mut at = seen.start;
                for span in spans.iter() {
                    if span.start <= at {
                        at = at.max(span.end);
                    }
                }
                assert!(at >= seen.end, "sequence {nth}, row {row} misses key {at} of {seen:?}: {spans:?}");
            }
        }
    }

    /// No tile is longer than what its first and last row see, or than what its rows share.
    pub(crate) fn check_tightness(&self) {
        for (_, item) in self.items() {
            let rows: Vec<_> = self.rows(item).collect();
            if item.list != NO_LIST {
                let within = |(begin, end): (u32, u32)| begin <= item.key_begin && item.key_end <= end;
                let shared = self.input.shared.iter().filter(|s| within((s.key_begin, s.key_end)));
                let all = |members: &[u32]| rows.iter().all(|(nth, _)| members.contains(&(*nth as u32)));
                assert!(shared.clone().any(|s| all(self.input.members(s))), "{item:?} is not shared");
                continue;
            }
            let s = self.sequence(item.token).1;
            let [first, last] = [rows[0], rows[rows.len() - 1]].map(|row| self.visible(row));
            assert!(item.key_end <= last.end, "{item:?} is too long");
            assert!(
                item.key_begin >= first.start.max(s.own_from).min(item.key_end),
                "{item:?} begins too early"
            );
        }
    }

    /// Every item reads one shard, where its sequences' pages are, and says of its rows what is true.
    pub(crate) fn check_places(&self) {
        assert_eq!(self.lists.prefill.len(), self.input.shards.max(1) as usize);
        assert_eq!(self.lists.decode.len(), self.lists.prefill.len());
        for (shard, item) in self.items() {
            for (nth, row) in self.rows(item) {
                self.check_row(item, (nth, row));
                if row % self.spec().group() == 0 || row == item.row_begin {
                    self.check_pages(shard, item, nth);
                }
            }
        }
        for lists in [&self.lists.prefill, &self.lists.decode] {
            for list in lists {
                self.check_order(list);
            }
        }
    }

    /// Longest first; on software adapters the shortest lie between them.
    fn check_order(&self, list: &[WorkItem]) {
        let keys = |item: &WorkItem| item.key_end - item.key_begin;
        if self.plan.caps().class != Class::Software {
            assert!(list.is_sorted_by_key(|item| std::cmp::Reverse(keys(item))));
            return;
        }
        let long: Vec<u32> = list.iter().step_by(2).map(keys).collect();
        let short: Vec<u32> = list.iter().skip(1).step_by(2).map(keys).collect();
        assert!(long.is_sorted_by(|a, b| a >= b) && short.is_sorted(), "{long:?}, {short:?}");
        assert!(long.last() >= short.last(), "{long:?}, {short:?}");
    }

    fn check_row(&self, item: &WorkItem, (nth, row): RowOf) {
        let s = &self.input.sequences[nth];
        let i = (row / self.spec().group()) as i32;
        if item.list == NO_LIST {
            let mask = (item.mask, item.mask_head, item.mask_token, item.mask_key);
            assert_eq!(mask, (s.mask.word, s.mask.head, s.mask.token, s.mask.key));
            assert_eq!(
                (item.token, item.q_start, item.pages, item.origin),
                (s.token, s.q_start, s.pages, s.origin)
            );
            return;
        }
        assert!(s.origin == 0 && item.origin == 0);
        // Its mask is about later keys.
        assert!(item.mask_token == 0 && i64::from(item.mask_key) + i64::from(item.key_end) < 0);
        assert!(s.mask.token == 0 || item.key_end as i32 <= -s.mask.key, "it walks draft tokens");
        let own =
            |row: &u32| self.word(item.list + row / self.spec().group() * LIST_WORDS) == s.token + i as u32;
        let listed = (item.row_begin..item.row_end).find(own).unwrap();
        let at = item.list + listed / self.spec().group() * LIST_WORDS;
        let turn = self.world.trees.get(&nth).map_or(s.q_start + i, |turns| turns[i as usize]);
        assert_eq!([self.word(at + 1) as i32, self.word(at + 2) as i32], [s.q_start + i, turn]);
    }

    fn check_pages(&self, shard: usize, item: &WorkItem, nth: usize) {
        let (page, table) = (self.world.page, &self.world.tables[nth]);
        let slots = item.key_begin + item.origin..item.key_end + item.origin;
        if slots.is_empty() {
            return;
        }
        for number in slots.start / page..=(slots.end - 1) / page {
            let (of, local) = table[number as usize];
            assert_eq!(of as usize, shard, "page {number} of sequence {nth} lies in another shard: {item:?}");
            assert_eq!(self.word(item.pages.wrapping_add(number)), local, "page {number} of sequence {nth}");
        }
    }

    /// States lie side by side, each is merged once, into its row; and every row is finished once.
    pub(crate) fn check_states(&self) {
        let kv_heads = self.spec().kv_heads();
        let mut written = vec![None; self.lists.state_rows as usize];
        let mut finished: BTreeMap<RowOf, u32> = BTreeMap::new();
        for (_, item) in self.items() {
            if item.state_stride == WHOLE {
                assert!(!self.spec().rotated(), "a rotated output is not turned back");
                assert_eq!(item.list, NO_LIST, "shared keys are never all that a row sees");
                self.rows(item).for_each(|row| *finished.entry(row).or_default() += 1);
                continue;
            }
            for head in 0..kv_heads {
                for (at, row) in (item.row_begin..).zip(self.rows(item)) {
                    let at = state_row((item.state, item.state_stride), head, at);
                    let before = written[at].replace((row, head));
                    assert_eq!(before, None, "two items write state {at}");
                }
            }
        }
        let mut merged = 0;
        for tile in &self.lists.combine {
            let (nth, s) = self.sequence(tile.token);
            assert!(tile.row_begin < tile.row_end && tile.row_end <= s.q_len * self.spec().group());
            assert!(tile.count > 0 || self.spec().rotated(), "a row without keys writes itself");
            assert!(tile.count > 1 || self.spec().rotated() || s.own_from > 0, "one part writes itself");
            for row in tile.row_begin..tile.row_end {
                *finished.entry((nth, row)).or_default() += 1;
                for head in 0..kv_heads {
                    for part in self.parts(tile) {
                        let at = state_row(part, head, row);
                        assert_eq!(written[at], Some(((nth, row), head)), "state {at} is of another row");
                        merged += 1;
                    }
                }
            }
        }
        // Each state is of one row and head, and a row's tile names a state once: as many merged as written are all.
        assert!(written.iter().all(Option::is_some), "states have gaps");
        assert_eq!(merged, written.len());
        let rows = |tile: &CombineItem| tile.row_end - tile.row_begin;
        assert_eq!(self.lists.combine_rows, self.lists.combine.iter().map(rows).max().unwrap_or(0));
        for (nth, s) in self.input.sequences.iter().enumerate() {
            for row in 0..s.q_len * self.spec().group() {
                assert_eq!(
                    finished.remove(&(nth, row)),
                    Some(1),
                    "sequence {nth}, row {row} is finished once"
                );
            }
        }
        assert!(finished.is_empty());
    }

    /// Base and stride of a tile's parts, each once.
    fn parts(&self, tile: &CombineItem) -> Vec<(u32, u32)> {
        let at = |part: u32| tile.parts + part * PART_WORDS;
        let parts: Vec<_> = (0..tile.count).map(|p| (self.word(at(p)), self.word(at(p) + 1))).collect();
        let mut apart = parts.clone();
        apart.sort_unstable();
        apart.dedup();
        assert_eq!(apart.len(), parts.len(), "a part twice");
        parts
    }

    /// The input's words are still there, and lists and parts fill what lies behind them.
    pub(crate) fn check_words(&self) {
        let before = &self.world.input.words;
        assert_eq!(&self.input.words[..before.len()], before);
        let group = self.spec().group();
        let mut spans: Vec<(u32, u32)> = Vec::new();
        let mut lists: BTreeMap<u32, u32> = BTreeMap::new();
        for (_, item) in self.items().filter(|(_, item)| item.list != NO_LIST) {
            let end = lists.entry(item.list).or_default();
            *end = (*end).max(item.row_end / group * LIST_WORDS);
        }
        spans.extend(lists);
        spans.extend(self.lists.combine.iter().map(|tile| (tile.parts, tile.count * PART_WORDS)));
        spans.sort_unstable();
        let mut next = self.input.dense as u32 + before.len() as u32;
        for (begin, len) in spans {
            assert_eq!(begin, next, "words overlap, or lie idle");
            next += len;
        }
        assert_eq!(u64::from(next), self.input.dense + self.input.words.len() as u64);
    }
}

/// A row of the state buffer.
fn state_row((base, stride): (u32, u32), kv_head: u32, row: u32) -> usize {
    base.wrapping_add(kv_head * stride).wrapping_add(row) as usize
}
