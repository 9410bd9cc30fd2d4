//! Work lists of gradients: every visible (row, key) pair once for dQ, and once for the dK and dV of a new token.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use gqa::AttentionSpec;
use gqa::params::WorkItem;
use gqa::plan::{Rounds, StepInput, StepSequence};
use proptest::prelude::*;

use crate::plan;
use crate::world::{World, spec, world};

/// Keys that a row sees.
fn visible(spec: &AttentionSpec, s: &StepSequence, row: u32) -> Range<u32> {
    let keys = spec.visible(i64::from(s.q_start) + i64::from(row / spec.group()), s.kv_len);
    keys.start.max(s.begin).min(keys.end)..keys.end
}

/// All items with their shards.
fn in_turn(rounds: &Rounds) -> impl Iterator<Item = (usize, &WorkItem)> {
    rounds.iter().flat_map(|(shard, items)| items.iter().map(move |item| (shard, item)))
}

/// The sequence of an item: those with queries have tokens of their own.
fn sequence(input: &StepInput, item: &WorkItem) -> (usize, StepSequence) {
    let found = input.sequences.iter().position(|s| s.q_len > 0 && s.token == item.token).unwrap();
    (found, input.sequences[found])
}

/// An item's keys lie in the pages of its shard.
fn check_pages(world: &World, shard: usize, item: &WorkItem, nth: usize) {
    let slots = item.key_begin + item.origin..item.key_end + item.origin;
    for number in slots.start / world.page..=(slots.end - 1) / world.page {
        assert_eq!(world.tables[nth][number as usize].0 as usize, shard, "{item:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_visible_pair_gives_its_gradients_once(
        (spec, world) in world(spec(), false), adapter in 0usize..4, portable: bool,
    ) {
        let spec = spec.to_builder().rotated(false).build().unwrap();
        let backward = plan(&spec, adapter, None, portable).backward().unwrap();
        let input = &world.input;
        let lists = backward.work(input);

        let mut spans: BTreeMap<(usize, u32), Vec<Range<u32>>> = BTreeMap::new();
        for (shard, item) in in_turn(&lists.queries) {
            let (nth, _) = sequence(input, item);
            prop_assert!(item.row_end - item.row_begin <= backward.queries.tile.rows);
            check_pages(&world, shard, item, nth);
            for row in item.row_begin..item.row_end {
                spans.entry((nth, row)).or_default().push(item.key_begin..item.key_end);
            }
        }
        for (nth, s) in input.sequences.iter().enumerate() {
            for row in 0..s.q_len * spec.group() {
                let mut walked = spans.remove(&(nth, row)).unwrap_or_default();
                walked.sort_by_key(|span| span.start);
                prop_assert!(walked.windows(2).all(|pair| pair[0].end <= pair[1].start), "twice: {walked:?}");
                let seen = visible(&spec, s, row);
                let reached = walked.iter().fold(seen.start, |at, span| {
                    if span.start <= at { at.max(span.end) } else { at }
                });
                prop_assert!(reached >= seen.end, "row {row} sees {seen:?}, walks {walked:?}");
            }
        }
        prop_assert!(spans.is_empty());

        for (_, items) in lists.queries.iter() {
            let mut tiles = BTreeSet::new();
            prop_assert!(items.iter().all(|item| tiles.insert((item.token, item.row_begin))), "two items add at once");
        }

        // New token -> the key that it is, and rows that are walked for it.
        let mut rows: BTreeMap<u32, (usize, u32, Range<u32>)> = BTreeMap::new();
        for (shard, item) in in_turn(&lists.keys) {
            let (nth, _) = sequence(input, item);
            prop_assert!((1..=backward.keys.tile.keys).contains(&(item.key_end - item.key_begin)));
            check_pages(&world, shard, item, nth);
            for key in item.key_begin..item.key_end {
                let token = item.state + key - item.key_begin;
                let walked = item.row_begin..item.row_end;
                let all = rows.entry(token).or_insert((nth, key, walked.start..walked.start));
                prop_assert_eq!((all.0, all.1, all.2.end), (nth, key, walked.start), "rows are walked twice, or left out");
                all.2.end = walked.end;
            }
        }
        for (_, items) in lists.keys.iter() {
            let mut tiles = BTreeSet::new();
            prop_assert!(items.iter().all(|item| tiles.insert(item.state)), "two items add at once");
        }
        for new in &input.appends {
            let s = &input.sequences[new.nth as usize];
            for i in 0..new.len {
                let walked = rows.remove(&(new.token + i));
                let Some(key) = (new.slot + i).checked_sub(s.origin).filter(|key| *key < s.kv_len) else {
                    prop_assert_eq!(walked, None);
                    continue;
                };
                let (nth, of, walked) = walked.unwrap_or((new.nth as usize, key, 0..0));
                prop_assert_eq!((nth, of), (new.nth as usize, key));
                for row in (0..s.q_len * spec.group()).filter(|row| visible(&spec, s, *row).contains(&key)) {
                    prop_assert!(walked.contains(&row), "key {key}: row {row} is not among {walked:?}");
                }
            }
        }
        prop_assert!(rows.is_empty());
    }
}
