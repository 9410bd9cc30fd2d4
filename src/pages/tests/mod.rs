//! One test for each rule; random operations are in `model`.

mod model;

use super::*;

/// A pool in one shard, without a window.
fn pool(page: u32, pages: u32) -> PoolShape {
    PoolShape { page, pages, pages_per_shard: pages, window: None }
}

/// A table of `sequences` that only the pages limit.
fn table<const N: usize>(sequences: u32, pools: [PoolShape; N]) -> SequenceTable {
    SequenceTable::new(sequences, u32::MAX >> 1, &pools)
}

/// All that an error must leave as it was.
fn state(table: &SequenceTable) -> (Vec<Entry>, Vec<Pool>) {
    (table.entries.clone(), table.pools.clone())
}

impl SequenceTable {
    /// Extends one sequence, and gives the copies.
    fn grow(&mut self, id: SequenceId, tokens: u32) -> Result<Vec<PageCopy>, Error> {
        let mut copies = Vec::new();
        self.extend(&[(id, tokens)], &mut copies)?;
        self.check().unwrap();
        Ok(copies)
    }

    /// First logical page and pages in pool 0.
    fn list(&self, id: SequenceId) -> (u32, Vec<u32>) {
        let (first, pages) = self.pages(id, 0).unwrap();
        (first, pages.to_vec())
    }

    /// That `call` is refused with a field error, and changes nothing.
    fn refuses<T>(&mut self, field: &str, call: impl FnOnce(&mut Self) -> Result<T, Error>) -> String {
        let before = state(self);
        let Err(Error::Field { field: found, needed, .. }) = call(self) else { panic!("it was not refused") };
        assert_eq!(found, field);
        assert!(state(self) == before);
        needed
    }
}

#[test]
fn extend_is_all_or_nothing() {
    let mut table = SequenceTable::new(2, 10, &[pool(10, 2)]);
    let (a, b) = (table.open().unwrap(), table.open().unwrap());
    let mut copies = Vec::new();
    table.extend(&[(a, 8), (b, 3)], &mut copies).unwrap();
    let before = state(&table);
    let full = table.extend(&[(b, 1), (a, 3)], &mut copies).unwrap_err();
    assert_eq!(full, Error::SequenceFull { sequence: 0, needed: 11, used: 8, capacity: 10 });
    let twice = table.extend(&[(b, 1), (b, 1)], &mut copies);
    assert_eq!(twice, Err(Error::RepeatedSequence { sequence: 1 }));
    assert!(state(&table) == before && copies.is_empty());
    assert_eq!((table.len(a), table.len(b)), (Ok(8), Ok(3)));
    assert_eq!(table.used(), 11);
}

#[test]
fn handles_go_stale() {
    let mut table = SequenceTable::new(1, 10, &[pool(10, 1)]);
    let mut other = SequenceTable::new(1, 10, &[pool(10, 1)]);
    let a = table.open().unwrap();
    assert_eq!(table.open(), Err(Error::NoFreeSequence { capacity: 1 }));
    assert_eq!(table.fork(a), Err(Error::NoFreeSequence { capacity: 1 }));
    table.close(a).unwrap();
    let b = table.open().unwrap();
    assert!(matches!(table.len(a), Err(Error::StaleSequence { .. })));
    assert!(matches!(table.fork(a), Err(Error::StaleSequence { .. })));
    assert!(matches!(other.len(b), Err(Error::StaleSequence { .. })));
    let c = other.open().unwrap();
    assert!(matches!(table.close(c), Err(Error::StaleSequence { .. })));
    assert!(matches!(table.grow(c, 1), Err(Error::StaleSequence { .. })));
}

#[test]
fn truncate_only_shortens() {
    let mut table = SequenceTable::new(1, 10, &[pool(10, 1)]);
    let a = table.open().unwrap();
    table.grow(a, 5).unwrap();
    table.refuses("len", |t| t.truncate(a, 6));
    table.truncate(a, 2).unwrap();
    assert_eq!(table.len(a), Ok(2));
    table.clear();
    assert_eq!(table.len(a), Ok(0));
}

#[test]
fn pages_come_when_needed_and_go_when_not() {
    let mut table = table(2, [pool(4, 6)]);
    let (a, b) = (table.open().unwrap(), table.open().unwrap());
    assert_eq!(table.list(a), (0, vec![]));
    table.grow(a, 5).unwrap();
    table.grow(b, 1).unwrap();
    table.grow(a, 4).unwrap();
    assert_eq!((table.list(a), table.list(b)), ((0, vec![0, 1, 3]), (0, vec![2])));
    table.truncate(a, 4).unwrap();
    assert_eq!(table.list(a), (0, vec![0]));
    // What was freed last comes first, and in its order.
    table.grow(b, 8).unwrap();
    assert_eq!(table.list(b), (0, vec![2, 1, 3]));
    table.close(b).unwrap();
    table.clear();
    table.check().unwrap();
    assert_eq!((table.list(a), table.used(), table.usage().pools[0].free), ((0, vec![]), 0, 6));
}

#[test]
fn a_full_cache_says_what_would_help() {
    let windowed = PoolShape { window: Some(2), ..pool(4, 2) };
    let mut table = table(3, [pool(4, 3), windowed]);
    let [a, b, c] = [(); 3].map(|()| table.open().unwrap());
    table.grow(a, 5).unwrap();
    let before = state(&table);
    let full = table.extend(&[(b, 4), (c, 1)], &mut Vec::new()).unwrap_err();
    assert!(state(&table) == before);
    assert!(matches!(full, Error::CacheFull { needed: 2, free: 1, slots: 4, .. }));
    assert_eq!(
        full.to_string(),
        "the cache needs 2 more pages of 4 slots, but 1 are free: close, truncate or evict sequences, \
         or create the cache with more pages"
    );
    let full = table.grow(b, 1).unwrap_err();
    assert!(matches!(full, Error::CacheFull { needed: 1, free: 0, .. }));
    assert!(full.to_string().contains("a larger PagedShape::longest_step"), "{full}");
    assert!(state(&table) == before);
    table.close(a).unwrap();
    table.extend(&[(b, 4), (c, 1)], &mut Vec::new()).unwrap();
}

#[test]
fn forks_share_and_copy_on_write() {
    let mut table = table(3, [pool(4, 8)]);
    let a = table.open().unwrap();
    table.grow(a, 6).unwrap();
    table.reserve(&[(a, 8)], &mut Vec::new()).unwrap();
    assert_eq!(table.usage().pools[0].shared, 0);
    let b = table.fork(a).unwrap();
    table.check().unwrap();
    // Not what is reserved.
    assert_eq!((table.list(a), table.list(b)), ((0, vec![0, 1, 2, 3]), (0, vec![0, 1])));
    assert_eq!((table.len(b), table.reserved(b), table.usage().pools[0].shared > 0), (Ok(6), Ok(6), true));
    assert_eq!(table.grow(b, 3).unwrap(), [PageCopy { pool: 0, from: 1, to: 4 }]);
    assert_eq!(table.list(b), (0, vec![0, 4, 5]));
    // Now the first is alone with its last page.
    assert_eq!(table.grow(a, 1).unwrap(), []);
    table.close(b).unwrap();
    assert_eq!(table.usage().pools[0].shared, 0);
    // Full pages are never copied.
    table.truncate(a, 4).unwrap();
    let b = table.fork(a).unwrap();
    assert_eq!((table.grow(a, 1).unwrap(), table.grow(b, 1).unwrap()), (vec![], vec![]));
    // But for those that are shortened.
    table.truncate(b, 3).unwrap();
    assert_eq!(table.grow(b, 1).unwrap().len(), 1);
}

#[test]
fn the_last_of_several_forks_keeps_the_page() {
    let mut table = table(3, [pool(4, 3)]);
    let a = table.open().unwrap();
    table.grow(a, 2).unwrap();
    let (b, c) = (table.fork(a).unwrap(), table.fork(a).unwrap());
    let mut copies = Vec::new();
    let before = state(&table);
    // Two copies and a page more than there are.
    let full = table.extend(&[(a, 1), (b, 3), (c, 1)], &mut copies).unwrap_err();
    assert!(matches!(full, Error::CacheFull { needed: 3, free: 2, .. }));
    assert!(state(&table) == before);
    table.extend(&[(a, 1), (b, 1), (c, 1)], &mut copies).unwrap();
    table.check().unwrap();
    assert_eq!(copies, [PageCopy { pool: 0, from: 0, to: 1 }, PageCopy { pool: 0, from: 0, to: 2 }]);
    assert_eq!([a, b, c].map(|id| table.list(id).1), [[1], [2], [0]]);
}

#[test]
fn windows_give_back_what_no_new_token_sees() {
    let mut table = table(2, [PoolShape { window: Some(5), ..pool(4, 4) }, pool(4, 9)]);
    let a = table.open().unwrap();
    table.grow(a, 9).unwrap();
    // The token at 9 sees from 4 on.
    table.grow(a, 7).unwrap();
    assert_eq!(
        (table.list(a), table.live_from(a, 0), table.live_from(a, 1)),
        ((1, vec![1, 2, 0]), Ok(4), Ok(0))
    );
    // Growing by nothing gives nothing back: the last queries may be asked again.
    table.grow(a, 0).unwrap();
    assert_eq!(table.list(a).0, 1);
    // The token at 16 sees from 11 on: what is given back is enough for what is needed.
    table.grow(a, 5).unwrap();
    assert_eq!((table.list(a), table.live_from(a, 0)), ((2, vec![2, 0, 1, 3]), Ok(8)));
    // At 13 a query sees from 8 on, at 12 from 7 on.
    let needed = table.refuses("len", |t| t.truncate(a, 12));
    assert!(needed.contains("the least is 13, or 0"), "{needed}");
    table.truncate(a, 13).unwrap();
    table.check().unwrap();
    table.truncate(a, 0).unwrap();
    assert_eq!((table.list(a), table.usage().pools[1].used), ((0, vec![]), 0));
}

#[test]
fn pages_are_kept_until_all_forks_give_them_back() {
    let mut table = table(2, [PoolShape { window: Some(0), ..pool(4, 4) }]);
    let a = table.open().unwrap();
    table.grow(a, 8).unwrap();
    let b = table.fork(a).unwrap();
    let before = state(&table);
    let full = table.grow(a, 12).unwrap_err();
    assert!(matches!(full, Error::CacheFull { needed: 3, free: 2, .. }));
    assert!(state(&table) == before);
    // Both give back two, which nobody holds then.
    table.extend(&[(a, 8), (b, 8)], &mut Vec::new()).unwrap();
    table.check().unwrap();
    assert_eq!((table.list(a), table.list(b)), ((2, vec![0, 1]), (2, vec![2, 3])));
}

#[test]
fn lengths_may_follow_what_is_reserved() {
    let mut table = table(1, [pool(4, 4), PoolShape { window: Some(1), ..pool(1, 8) }]);
    let a = table.open().unwrap();
    table.grow(a, 3).unwrap();
    table.reserve(&[(a, 4)], &mut Vec::new()).unwrap();
    table.check().unwrap();
    assert_eq!((table.len(a), table.reserved(a), table.list(a).1.len()), (Ok(3), Ok(7), 2));
    table.advance(a, 3).unwrap();
    // Page 1 has a slot more, but it was not asked for.
    table.refuses("tokens", |t| t.advance(a, 2));
    table.advance(a, 1).unwrap();
    table.reserve(&[(a, 5)], &mut Vec::new()).unwrap();
    table.reserve(&[(a, 1)], &mut Vec::new()).unwrap();
    assert_eq!(table.reserved(a), Ok(12));
    table.truncate(a, 7).unwrap();
    table.check().unwrap();
    assert_eq!((table.reserved(a), table.list(a).1.len()), (Ok(7), 2));
    let before = state(&table);
    assert!(matches!(table.reserve(&[(a, 10)], &mut Vec::new()), Err(Error::CacheFull { .. })));
    assert!(state(&table) == before);
}

#[test]
fn evicted_tokens_give_back_whole_pages() {
    let mut table = table(2, [pool(4, 8)]);
    let a = table.open().unwrap();
    table.grow(a, 10).unwrap();
    table.evict(a, 7).unwrap();
    table.evict(a, 2).unwrap();
    assert_eq!((table.begin(a), table.len(a), table.live_from(a, 0)), (Ok(7), Ok(10), Ok(7)));
    assert_eq!(table.list(a), (1, vec![1, 2]));
    table.refuses("tokens", |t| t.evict(a, 11));
    let b = table.fork(a).unwrap();
    assert_eq!((table.begin(b), table.list(b)), (Ok(7), (1, vec![1, 2])));
    // All of them, but the page of the next token stays.
    table.evict(a, 10).unwrap();
    assert_eq!((table.list(a), table.live_from(a, 0)), ((2, vec![2]), Ok(10)));
    // Before what was evicted there is nothing to see: the page of token 5 comes again with it.
    table.truncate(a, 5).unwrap();
    table.check().unwrap();
    assert_eq!((table.begin(a), table.list(a)), (Ok(5), (1, vec![])));
    let c = table.grow(a, 1).unwrap();
    assert_eq!((c, table.begin(a), table.list(a)), (vec![], Ok(5), (1, vec![0])));
    table.truncate(a, 0).unwrap();
    assert_eq!((table.begin(a), table.list(a)), (Ok(0), (0, vec![])));
}

#[test]
#[cfg(feature = "safetensors")]
fn restored_sequences_have_what_was_kept() {
    let mut table = table(2, [PoolShape { window: Some(10), ..pool(4, 8) }, pool(4, 20)]);
    let refused = |kept: [u32; 2], table: &mut SequenceTable| {
        table.refuses("saved tokens", |t| t.restore((50, 0), &kept))
    };
    refused([41, 0], &mut table);
    refused([40, 1], &mut table);
    let a = table.restore((50, 0), &[40, 0]).unwrap();
    table.check().unwrap();
    assert_eq!((table.len(a), table.list(a), table.live_from(a, 0)), (Ok(50), (10, vec![0, 1, 2]), Ok(40)));
    table.refuses("len", |t| t.truncate(a, 49));
    // Behind what was evicted all is new: it counts as there, whatever the file began with.
    table.evict(a, 45).unwrap();
    table.truncate(a, 20).unwrap();
    table.check().unwrap();
    table.grow(a, 7).unwrap();
    assert_eq!((table.begin(a), table.live_from(a, 0)), (Ok(20), Ok(20)));
}

#[test]
fn pages_come_from_the_sequences_shard_then_from_the_emptiest() {
    let mut table = table(4, [PoolShape { pages_per_shard: 3, ..pool(1, 8) }]);
    let [a, b, c, d] = [(); 4].map(|()| table.open().unwrap());
    table.grow(a, 1).unwrap();
    // Shards have 2, 3 and 2 pages now, then 2, 2 and 2.
    table.grow(b, 1).unwrap();
    table.grow(c, 1).unwrap();
    table.grow(b, 2).unwrap();
    assert_eq!([a, b, c].map(|id| table.list(id).1), [vec![0], vec![3, 4, 5], vec![1]]);
    // Its own shard is full: on to the emptiest, and then to what is left.
    table.grow(b, 3).unwrap();
    assert_eq!(table.list(b).1, [3, 4, 5, 6, 7, 2]);
    assert!(matches!(table.grow(d, 1), Err(Error::CacheFull { needed: 1, free: 0, .. })));
}

#[test]
fn contiguous_sequences_have_one_page() {
    let mut table = SequenceTable::new(2, 100, &[pool(100, 2)]);
    let a = table.open().unwrap();
    table.grow(a, 60).unwrap();
    let b = table.fork(a).unwrap();
    assert_eq!(table.grow(a, 40).unwrap(), [PageCopy { pool: 0, from: 0, to: 1 }]);
    assert_eq!((table.list(a), table.list(b)), ((0, vec![1]), (0, vec![0])));
}

#[test]
fn defragmenting_breaks_cycles_and_leaves_what_lies_right() {
    let mut table = table(3, [pool(1, 6)]);
    let [a, b, c] = [(); 3].map(|()| table.open().unwrap());
    // Sequences hold pages [0], [3, 1] and [5, 4].
    table.grow(a, 1).unwrap();
    table.entries[b.index as usize].lists[0].pages = vec![3, 1];
    table.entries[c.index as usize].lists[0].pages = vec![5, 4];
    for id in [b, c] {
        let entry = &mut table.entries[id.index as usize];
        (entry.len, entry.reserved) = (2, 2);
    }
    table.pools[0].refill(vec![1, 1, 0, 1, 1, 1]);
    table.check().unwrap();
    let mut moves = Vec::new();
    table.defragment(&mut moves);
    table.check().unwrap();
    let page = |from, to| PageMove { pool: 0, from: Place::Page(from), to: Place::Page(to) };
    assert_eq!(moves, [page(1, 2), page(3, 1), page(5, 3)]);
    assert_eq!([a, b, c].map(|id| table.list(id).1), [vec![0], vec![1, 2], vec![3, 4]]);
    moves.clear();
    table.defragment(&mut moves);
    assert_eq!(moves, []);
    table.entries[b.index as usize].lists[0].pages = vec![2, 1];
    table.defragment(&mut moves);
    let spare = |from, to| PageMove { pool: 0, from, to };
    assert_eq!(moves, [spare(Place::Page(1), Place::Spare), page(2, 1), spare(Place::Spare, Place::Page(2))]);
}

#[test]
fn usage_counts_what_is_shared_once() {
    let mut table = table(4, [pool(4, 8), PoolShape { window: Some(3), ..pool(16, 10) }]);
    let a = table.open().unwrap();
    table.grow(a, 6).unwrap();
    let b = table.fork(a).unwrap();
    table.grow(b, 1).unwrap();
    table.evict(b, 2).unwrap();
    let usage = table.usage();
    assert_eq!((usage.open, usage.sequences, usage.tokens), (2, 4, 13));
    let PoolUsage { used, free, shared, filled, slots, .. } = usage.pools[0];
    assert_eq!((used, free, shared, filled, slots), (3, 5, 1, 4 + 2 + 3, 12));
    let text = usage.to_string();
    let expected = [
        "2 of 4 sequences open, 13 tokens",
        "    window     page    pages     used     free   shared        slots       filled    full",
        "         -        4        8        3        5        1           12            9  75.0 %",
        "         3       16       10        2        8        0           32           11  34.4 %",
    ];
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn growing_does_not_allocate_once_warm() {
    let mut table = table(2, [PoolShape { window: Some(4), ..pool(2, 8) }]);
    let (a, b) = (table.open().unwrap(), table.open().unwrap());
    let room = |table: &SequenceTable| {
        let lists: Vec<_> = table.entries.iter().map(|e| e.lists[0].pages.as_ptr()).collect();
        (lists, table.scratch.dropped.as_ptr(), table.pools[0].free[0].as_ptr())
    };
    let mut copies = Vec::new();
    let mut warm = None;
    for step in 0..40 {
        table.extend(&[(a, 1), (b, 1)], &mut copies).unwrap();
        if step == 20 {
            warm = Some(room(&table));
        }
    }
    assert_eq!(warm, Some(room(&table)));
}
