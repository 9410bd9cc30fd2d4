//! Steps of a random cache, resolved: what sequences share is found, and found rightly. Rows and keys are held against page tables.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::caps::Caps;
use crate::error::Error;
use crate::pages::{PoolShape, SequenceTable};
use crate::params::{LIST_WORDS, NO_LIST, WorkItem};
use crate::plan::{Options, Plan, StepSequence};
use crate::rope::Rope;
use crate::spec::Mask;

const PAGE: u32 = 16;

/// Something that happens to a cache; numbers count modulo what there is.
#[derive(Debug, Clone, Copy)]
enum Op {
    Extend(usize, u32),
    Fork(usize),
    Truncate(usize, u32),
    Evict(usize, u32),
}

fn op() -> impl Strategy<Value = Op> {
    let which = || 0usize..8;
    prop_oneof![
        3 => (which(), 1u32..90).prop_map(|(s, tokens)| Op::Extend(s, tokens)),
        4 => which().prop_map(Op::Fork),
        2 => (which(), 1u32..60).prop_map(|(s, tokens)| Op::Truncate(s, tokens)),
        1 => (which(), 1u32..40).prop_map(|(s, tokens)| Op::Evict(s, tokens)),
    ]
}

/// A table after `ops`, and its sequences.
fn cache(ops: &[Op], shape: PoolShape) -> (SequenceTable, Vec<SequenceId>) {
    let mut table = SequenceTable::new(12, u32::MAX >> 1, &[shape]);
    let mut ids = vec![table.open().unwrap()];
    table.extend(&[(ids[0], 50)], &mut Vec::new()).unwrap();
    for op in ops {
        let of = |s: usize| ids[s % ids.len()];
        // What the cache refuses does not happen.
        let _ = match *op {
            Op::Extend(s, tokens) => table.extend(&[(of(s), tokens)], &mut Vec::new()),
            Op::Truncate(s, tokens) => {
                table.truncate(of(s), table.len(of(s)).unwrap().saturating_sub(tokens).max(1))
            }
            Op::Evict(s, tokens) => {
                let begin = table.begin(of(s)).unwrap();
                table.evict(of(s), (begin + tokens).min(table.len(of(s)).unwrap()))
            }
            Op::Fork(s) => table.fork(of(s)).map(|fork| ids.push(fork)),
        };
    }
    table.check().unwrap();
    (table, ids)
}

/// A spec, and whether its pool forgets what lies behind its window.
fn spec() -> impl Strategy<Value = (AttentionSpec, bool)> {
    (1u32..5, 0u32..4, prop::option::of(0u32..150), any::<(bool, bool)>()).prop_map(
        |(group, kind, window, (rotated, forgets))| {
            let builder = AttentionSpec::builder(group * 2, 2, 8).window(window, None).rope(Rope::new(8));
            let spec = match kind {
                0 => builder.mask(Mask::Tree),
                1 => builder.causal(false).rotated(rotated),
                _ => builder.rotated(rotated),
            };
            (spec.build().unwrap(), forgets)
        },
    )
}

struct Walked<'a> {
    spec: &'a AttentionSpec,
    table: &'a SequenceTable,
    shape: PoolShape,
    resolved: &'a Resolved,
}

impl Walked<'_> {
    /// The row of a sequence that is the `row`-th of an item: first token of the sequence, row there.
    fn row_of(&self, item: &WorkItem, row: u32) -> (u32, u32) {
        if item.list == NO_LIST {
            return (item.token, row);
        }
        let group = self.spec.group();
        let token = self.resolved.input.words[(item.list + row / group * LIST_WORDS) as usize];
        let of = |s: &&StepSequence| (s.token..s.token + s.q_len).contains(&token);
        let s = self.resolved.input.sequences.iter().find(of).unwrap();
        (s.token, (token - s.token) * group + row % group)
    }

    /// That an item's keys lie in the pages of the sequence `id`.
    fn check_pages(&self, shard: usize, item: &WorkItem, id: SequenceId) {
        let (first, pages) = self.table.pages(id, 0).unwrap();
        for key in item.key_begin..item.key_end {
            let page = pages[(key / PAGE - first) as usize];
            assert_eq!((page / self.shape.pages_per_shard) as usize, shard);
            let word = self.resolved.input.words[item.pages.wrapping_add(key / PAGE) as usize];
            assert_eq!(word, page % self.shape.pages_per_shard, "key {key} lies elsewhere");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn forks_walk_their_own_keys_once(
        (spec, forgets) in spec(), ops in prop::collection::vec(op(), 0..24), sharded: bool,
        queries in prop::collection::vec((0u32..20, any::<u64>(), any::<bool>()), 12),
    ) {
        let window = spec.window_left().filter(|_| forgets);
        let shape = PoolShape { page: PAGE, pages: 96, pages_per_shard: if sharded { 32 } else { 96 }, window };
        let (table, ids) = cache(&ops, shape);
        let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
        let lens: Vec<_> = ids.iter().map(|id| table.len(*id).unwrap()).collect();
        let trees: Vec<Vec<u64>> = queries.iter().map(|(q_len, bits, _)| {
            (0..*q_len).map(|i| bits.rotate_left(i) & ((1 << i) - 1) | 1 << i).collect()
        }).collect();
        let is_tree = |nth: usize| spec.mask() == Mask::Tree && queries[nth].2 && queries[nth].0 <= lens[nth];
        let sequences: Vec<_> = ids.iter().enumerate().map(|(nth, id)| Sequence {
            new_len: 0,
            tree: is_tree(nth).then_some(&trees[nth][..]),
            ..Sequence::new(*id, queries[nth].0)
        }).collect();
        let mut resolved = Resolved::default();
        let batch = Batch::new(&spec, &sequences);
        match batch.resolve(&plan, Pool { table: &table, index: 0, reserved: false }, &mut resolved) {
            Ok(()) => {}
            // Queries that see what a window has let go.
            Err(Error::Field { field: "sequence.q_start", .. }) => return Ok(()),
            Err(error) => panic!("{error}"),
        }
        let mut lists = plan.work(&mut resolved.input);
        let walked = Walked { spec: &spec, table: &table, shape, resolved: &resolved };
        let mut keys: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
        let shards = lists.prefill.iter().enumerate().chain(lists.decode.iter().enumerate());
        for (shard, item) in shards.flat_map(|(shard, items)| items.iter().map(move |item| (shard, item))) {
            for (token, row) in (item.row_begin..item.row_end).map(|row| walked.row_of(item, row)) {
                let nth = sequences.iter().enumerate().position(|(nth, s)| {
                    resolved.input.sequences[nth].token == token && s.q_len > 0
                }).unwrap();
                if row % spec.group() == 0 {
                    walked.check_pages(shard, item, ids[nth]);
                }
                let draft = lens[nth] - queries[nth].0.min(lens[nth]);
                prop_assert!(item.list == NO_LIST || !is_tree(nth) || item.key_end <= draft, "a shared key has a mask");
                keys.entry((token, row)).or_default().extend(item.key_begin..item.key_end);
            }
        }
        for (nth, s) in resolved.input.sequences.iter().enumerate() {
            for row in 0..s.q_len * spec.group() {
                let found = keys.entry((s.token, row)).or_default();
                found.sort_unstable();
                prop_assert!(found.is_sorted_by(|a, b| a < b), "sequence {nth}, row {row} walks a key twice");
                let seen = s.visible(&spec, row..row + 1);
                prop_assert!(seen.clone().all(|key| found.binary_search(&key).is_ok()), "sequence {nth}, row {row} misses keys");
                prop_assert!(found.iter().all(|key| (s.begin..s.kv_len).contains(key)));
            }
        }
        // A smaller step in the memory of this one is as if it were made anew.
        let smaller = Batch { sequences: &sequences[..sequences.len() / 2], ..batch };
        let pool = Pool { table: &table, index: 0, reserved: false };
        smaller.resolve(&plan, pool, &mut resolved).unwrap();
        lists.fill(&plan, &mut resolved.input);
        let mut anew = Resolved::default();
        smaller.resolve(&plan, pool, &mut anew).unwrap();
        let new_lists = plan.work(&mut anew.input);
        prop_assert_eq!(&resolved.input, &anew.input);
        prop_assert_eq!((&lists.prefill, &lists.decode), (&new_lists.prefill, &new_lists.decode));
        prop_assert_eq!((&lists.combine, &lists.append), (&new_lists.combine, &new_lists.append));
        prop_assert_eq!((lists.state_rows, lists.combine_rows), (new_lists.state_rows, new_lists.combine_rows));
    }
}

/// Groups of a step in which every sequence has one query: shared keys, and how many sequences share them.
fn shared(table: &SequenceTable, ids: &[SequenceId]) -> Vec<(std::ops::Range<u32>, u32)> {
    let spec = AttentionSpec::builder(2, 2, 8).build().unwrap();
    let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
    let sequences: Vec<_> = ids.iter().map(|id| Sequence::new(*id, 1)).collect();
    let mut resolved = Resolved::default();
    Batch::new(&spec, &sequences)
        .resolve(&plan, Pool { table, index: 0, reserved: false }, &mut resolved)
        .unwrap();
    resolved.input.shared.iter().map(|s| (s.keys(), s.members.count)).collect()
}

fn table() -> SequenceTable {
    SequenceTable::new(8, 10_000, &[PoolShape { page: PAGE, pages: 300, pages_per_shard: 300, window: None }])
}

#[test]
fn a_sequence_that_ends_within_a_shared_page_leaves_the_rest_to_the_others() {
    let mut table = table();
    let short = table.open().unwrap();
    table.extend(&[(short, 100)], &mut Vec::new()).unwrap();
    let (long, same) = (table.fork(short).unwrap(), table.fork(short).unwrap());
    table.truncate(short, 35).unwrap();
    // The second group goes on where the first has ended: within the third page.
    assert_eq!(shared(&table, &[short, long, same]), [(0..35, 3), (35..100, 2)]);
}

#[test]
fn a_short_prefix_does_not_hide_longer_ones() {
    let mut table = table();
    let root = table.open().unwrap();
    table.extend(&[(root, PAGE)], &mut Vec::new()).unwrap();
    let ids: Vec<_> = (0..2).map(|_| table.fork(root).unwrap()).collect();
    table.extend(&[(ids[0], 100), (ids[1], 5)], &mut Vec::new()).unwrap();
    let twin = table.fork(ids[0]).unwrap();
    // All three share 16 keys, which is not worth a state; two of them share all.
    assert_eq!(shared(&table, &[ids[0], ids[1], twin]), [(0..116, 2)]);
}

#[test]
fn a_dense_mask_is_no_tree() {
    let mut table = table();
    let ids = [table.open().unwrap(), table.open().unwrap()];
    table.extend(&[(ids[0], 100), (ids[1], 70)], &mut Vec::new()).unwrap();
    let spec =
        AttentionSpec::builder(2, 2, 8).mask(Mask::Keep).rope(Rope::new(8)).rotated(true).build().unwrap();
    let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
    let sequences = ids.map(|id| Sequence::new(id, 5));
    let batch = Batch::new(&spec, &sequences).with_mask(MaskLayout::dense([2, 1, 5, 100]));
    let mut resolved = Resolved::default();
    batch.resolve(&plan, Pool { table: &table, index: 0, reserved: false }, &mut resolved).unwrap();
    let input = &resolved.input;
    for s in &input.sequences {
        let turns: Vec<_> = (0..5).map(|token| input.turn(s, token, &input.words)).collect();
        assert_eq!(turns, (s.q_start..s.q_start + 5).collect::<Vec<_>>());
    }
}

#[test]
fn no_query_sees_what_a_window_has_let_go() {
    let spec = AttentionSpec::builder(2, 2, 8).window(10, None).build().unwrap();
    let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
    let shape = PoolShape { page: PAGE, pages: 300, pages_per_shard: 300, window: Some(10) };
    let mut table = SequenceTable::new(1, 10_000, &[shape]);
    let id = table.open().unwrap();
    table.extend(&[(id, 150)], &mut Vec::new()).unwrap();
    table.extend(&[(id, 50)], &mut Vec::new()).unwrap();
    assert_eq!(table.live_from(id, 0), Ok(128));
    let resolve = |q_start, q_len| {
        let sequences = [Sequence { new_len: 0, q_start: Some(q_start), ..Sequence::new(id, q_len) }];
        let batch = Batch::new(&spec, &sequences);
        batch.resolve(&plan, Pool { table: &table, index: 0, reserved: false }, &mut Resolved::default())
    };
    assert_eq!(resolve(138, 62), Ok(()));
    // In front of the first key there is nothing to see.
    assert_eq!(resolve(-5, 5), Ok(()));
    for (q_start, q_len) in [(137, 1), (-5, 6), (-5, 200)] {
        let refused = resolve(q_start, q_len);
        assert!(matches!(refused, Err(Error::Field { field: "sequence.q_start", .. })), "{refused:?}");
    }
}

#[test]
fn no_token_is_appended_where_a_sequence_has_no_page() {
    let spec = AttentionSpec::builder(2, 2, 8).build().unwrap();
    let plan = Plan::new(&spec, &Caps::minimal(), &Options::default()).unwrap();
    let mut table = table();
    let id = table.open().unwrap();
    table.extend(&[(id, 100)], &mut Vec::new()).unwrap();
    table.evict(id, 40).unwrap();
    let resolve = |new_len| {
        let sequences = [Sequence { new_len, ..Sequence::new(id, 1) }];
        let batch = Batch::new(&spec, &sequences);
        batch.resolve(&plan, Pool { table: &table, index: 0, reserved: false }, &mut Resolved::default())
    };
    assert_eq!(resolve(60), Ok(()));
    assert!(matches!(resolve(61), Err(Error::Field { field: "sequence.new_len", .. })));
}
