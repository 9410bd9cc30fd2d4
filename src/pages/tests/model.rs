//! Random operations against a model that knows every token, and what lies in every slot.

use super::*;

/// What lies in a slot that nobody should read.
const POISON: u32 = u32::MAX;

/// Xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as u32 % n
    }
    fn chance(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }
}

/// What a sequence should hold.
#[derive(Debug, Clone)]
struct Truth {
    id: SequenceId,
    tokens: Vec<u32>,
    begin: u32,
    /// Written into reserved slots, but not counted yet.
    ahead: Vec<u32>,
}

impl Truth {
    fn len(&self) -> u32 {
        self.tokens.len() as u32
    }
    /// What a query at `len` sees.
    fn seen_from(&self, len: u32, window: Option<u32>) -> u32 {
        self.begin.max(len.saturating_sub(window.unwrap_or(u32::MAX)))
    }
}

struct Model {
    random: Random,
    table: SequenceTable,
    shapes: Vec<PoolShape>,
    /// Of each slot of each page of each pool.
    contents: Vec<Vec<Vec<u32>>>,
    open: Vec<Truth>,
    closed: Option<SequenceId>,
    next: u32,
    /// Operations that were refused, and copies, to see that the test tests something.
    refused: u32,
    copies: u32,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        // The first few of a small seed are much alike.
        for _ in 0..8 {
            random.below(1);
        }
        let (sequences, capacity) = (2 + random.below(5), 20 + random.below(100));
        let contiguous = random.chance(6);
        let shapes: Vec<_> = (0..1 + random.below(2))
            .map(|_| {
                let page = [1, 4, 16][random.below(3) as usize];
                let tokens = sequences * capacity / (1 + random.below(4));
                let pages = (tokens / page).max(1);
                let pages_per_shard = 1 + random.below(pages);
                let window = [None, Some(random.below(40))][random.below(2) as usize];
                match contiguous {
                    true => PoolShape { page: capacity, pages: sequences, pages_per_shard: 1, window },
                    false => PoolShape { page, pages, pages_per_shard, window },
                }
            })
            .collect();
        let contents = |s: &PoolShape| vec![vec![POISON; s.page as usize]; s.pages as usize];
        Self {
            random,
            table: SequenceTable::new(sequences, capacity, &shapes),
            contents: shapes.iter().map(contents).collect(),
            shapes,
            open: Vec::new(),
            closed: None,
            next: 0,
            refused: 0,
            copies: 0,
        }
    }

    fn fresh(&mut self, tokens: u32) -> Vec<u32> {
        self.next += tokens;
        (self.next - tokens..self.next).collect()
    }

    /// Writes a sequence's tokens from `from` on, and what lies ahead, as kernels do.
    fn write(&mut self, which: usize, from: u32) {
        let truth = &self.open[which];
        let all: Vec<_> = truth.tokens.iter().chain(&truth.ahead).collect();
        for (nth, shape) in self.shapes.iter().enumerate() {
            let (first, pages) = self.table.pages(truth.id, nth).unwrap();
            for token in from..all.len() as u32 {
                let page = pages[(token / shape.page - first) as usize];
                self.contents[nth][page as usize][(token % shape.page) as usize] = *all[token as usize];
            }
        }
    }

    /// Whether pages suffice for every pool, and the copies that are made: counted another way than the table does.
    fn fits(&self, growth: &[(usize, u32)]) -> Option<usize> {
        let mut copies = 0;
        for (nth, shape) in self.shapes.iter().enumerate() {
            let mut holders = vec![0; shape.pages as usize];
            let mut writers = vec![0; shape.pages as usize];
            let mut new = 0;
            for (which, truth) in self.open.iter().enumerate() {
                let (first, pages) = self.table.pages(truth.id, nth).unwrap();
                let tokens = growth.iter().find(|(w, _)| *w == which).map_or(0, |(_, tokens)| *tokens);
                for (logical, page) in (first..).zip(pages) {
                    let unseen = (logical + 1) * shape.page <= truth.seen_from(truth.len(), shape.window);
                    holders[*page as usize] += usize::from(tokens == 0 || !unseen);
                    let tail = logical == truth.len() / shape.page && !truth.len().is_multiple_of(shape.page);
                    writers[*page as usize] += usize::from(tokens > 0 && tail);
                }
                let end = (truth.len() + tokens).div_ceil(shape.page);
                new += end.saturating_sub(first + pages.len() as u32) as usize * usize::from(tokens > 0);
            }
            let copied: usize =
                holders.iter().zip(&writers).map(|(h, w): (&usize, _)| h.saturating_sub(1).min(*w)).sum();
            let used = holders.iter().filter(|holders| **holders > 0).count();
            if used + copied + new > shape.pages as usize {
                return None;
            }
            copies += copied;
        }
        Some(copies)
    }

    fn grow(&mut self) {
        let mut growth: Vec<(usize, u32)> = Vec::new();
        for which in 0..self.open.len() {
            if self.random.chance(2) {
                let most = [2, 6, 40][self.random.below(3) as usize];
                growth.push((which, self.random.below(most)));
            }
        }
        let mut request: Vec<_> = growth.iter().map(|(w, tokens)| (self.open[*w].id, *tokens)).collect();
        let spoiled = self.random.chance(10) && !request.is_empty();
        if spoiled {
            request.push((self.closed.filter(|_| self.random.chance(2)).unwrap_or(request[0].0), 1));
        }
        let reserve = self.random.chance(3);
        let overflows = |(w, tokens): &(usize, u32)| self.open[*w].len() + tokens > self.table.capacity();
        let full = growth.iter().any(overflows);
        let expected = self.fits(&growth);
        let firsts: Vec<_> = growth.iter().map(|(w, _)| self.firsts(*w)).collect();
        let mut copies = Vec::new();
        let before = state(&self.table);
        let result = match reserve {
            true => self.table.reserve(&request, &mut copies),
            false => self.table.extend(&request, &mut copies),
        };
        if let Err(error) = result {
            assert!(spoiled || full || expected.is_none(), "{error}");
            assert!(state(&self.table) == before && copies.is_empty());
            self.refused += u32::from(matches!(error, Error::CacheFull { .. }));
            return;
        }
        assert!(!spoiled && !full);
        assert_eq!(expected, Some(copies.len()));
        self.copies += copies.len() as u32;
        // The copies may run in any order.
        for copy in copies.iter().rev() {
            self.contents[copy.pool][copy.to as usize] = self.contents[copy.pool][copy.from as usize].clone();
        }
        for ((which, tokens), firsts) in growth.into_iter().zip(firsts) {
            if tokens > 0 {
                self.check_given_back(which, &firsts);
            }
            let len = self.open[which].len();
            if reserve {
                // Some of what was reserved before may lie ahead already: it must not be lost.
                let more = tokens.saturating_sub(self.open[which].ahead.len() as u32);
                let from = len + self.open[which].ahead.len() as u32;
                let fresh = self.fresh(more);
                self.open[which].ahead.extend(fresh);
                self.write(which, from);
            } else {
                let fresh = self.fresh(tokens);
                let truth = &mut self.open[which];
                truth.tokens.extend(fresh);
                truth.ahead.drain(..truth.ahead.len().min(tokens as usize));
                self.write(which, len);
            }
        }
    }

    fn firsts(&self, which: usize) -> Vec<u32> {
        let first = |nth| self.table.pages(self.open[which].id, nth).unwrap().0;
        (0..self.shapes.len()).map(first).collect()
    }

    /// That a sequence which is about to grow has given back what its window no longer sees, and nothing else.
    fn check_given_back(&self, which: usize, before: &[u32]) {
        let truth = &self.open[which];
        let after = self.firsts(which);
        for (nth, shape) in self.shapes.iter().enumerate() {
            let expected = truth.seen_from(truth.len(), shape.window) / shape.page;
            assert_eq!(after[nth], expected.max(before[nth]));
        }
    }

    fn truncate(&mut self, which: usize) {
        let truth = &self.open[which];
        let full = truth.len();
        let len = match self.random.below(4) {
            0 => 0,
            1 => self.random.below(full + 3),
            _ => full.saturating_sub(self.random.below(8)),
        };
        let lost = (0..self.shapes.len()).any(|nth| {
            let live = self.table.live_from(truth.id, nth).unwrap();
            len > 0 && live > truth.seen_from(len, self.shapes[nth].window)
        });
        let before = state(&self.table);
        match self.table.truncate(truth.id, len) {
            Ok(()) => {
                assert!(len <= full && !lost);
                let truth = &mut self.open[which];
                truth.tokens.truncate(len as usize);
                truth.begin = truth.begin.min(len);
                truth.ahead.clear();
            }
            Err(Error::Field { field: "len", needed, .. }) => {
                assert!((len > full || lost) && state(&self.table) == before);
                // The error names a length that works, and the one before it does not.
                if let Some((_, rest)) = needed.split_once("the least is ") {
                    let least: u32 = rest.split(',').next().unwrap().parse().unwrap();
                    assert!(len < least && least <= full);
                    self.table.refuses("len", |t| t.truncate(truth.id, least - 1));
                    if self.random.chance(2) {
                        self.table.truncate(truth.id, least).unwrap();
                        let truth = &mut self.open[which];
                        truth.tokens.truncate(least as usize);
                        truth.begin = truth.begin.min(least);
                        truth.ahead.clear();
                    }
                }
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn defragment(&mut self) {
        let mut moves = Vec::new();
        let before = state(&self.table);
        self.table.defragment(&mut moves);
        let mut spare = vec![None; self.shapes.len()];
        for PageMove { pool, from, to } in &moves {
            let contents = &mut self.contents[*pool];
            let moved = match from {
                Place::Page(page) => contents[*page as usize].clone(),
                Place::Spare => spare[*pool].take().unwrap(),
            };
            match to {
                Place::Page(page) => contents[*page as usize] = moved,
                Place::Spare => assert_eq!(spare[*pool].replace(moved), None),
            }
        }
        assert!(spare.iter().all(Option::is_none));
        for nth in 0..self.shapes.len() {
            let mut next = 0;
            for page in self.table.entries.iter().flat_map(|entry| &entry.lists[nth].pages) {
                assert!(*page <= next, "pages are not numbered in order");
                next += u32::from(*page == next);
            }
        }
        // A page that stays is not moved, and one that moves is moved once, or twice to break a cycle.
        let old = before.0.iter().flat_map(|entry| &entry.lists);
        let new = self.table.entries.iter().flat_map(|entry| &entry.lists);
        let moving =
            old.zip(new).flat_map(|(a, b)| a.pages.iter().zip(&b.pages)).filter(|(a, b)| a != b).count();
        assert!(moves.len() <= moving + moving / 2);
        let again = moves.len();
        self.table.defragment(&mut moves);
        assert_eq!(moves.len(), again);
    }

    fn step(&mut self) {
        let which = self.random.below(self.open.len().max(1) as u32) as usize;
        let operation = self.random.below(20);
        match operation {
            0 | 1 => match self.table.open() {
                Ok(id) => self.open.push(Truth { id, tokens: vec![], begin: 0, ahead: vec![] }),
                Err(_) => assert_eq!(self.open.len(), self.table.sequences() as usize),
            },
            2 => self.defragment(),
            3 if self.random.chance(20) => {
                self.table.clear();
                for truth in &mut self.open {
                    *truth = Truth { id: truth.id, tokens: vec![], begin: 0, ahead: vec![] };
                }
            }
            _ if self.open.is_empty() => {}
            3 => {
                let truth = self.open.swap_remove(which);
                self.table.close(truth.id).unwrap();
                self.closed = Some(truth.id);
            }
            4 | 5 => match self.table.fork(self.open[which].id) {
                Ok(id) => self.open.push(Truth { id, ahead: vec![], ..self.open[which].clone() }),
                Err(_) => assert_eq!(self.open.len(), self.table.sequences() as usize),
            },
            6 | 7 => self.truncate(which),
            8 => {
                let truth = &mut self.open[which];
                let tokens = self.random.below(truth.len() + 1);
                self.table.evict(truth.id, tokens).unwrap();
                truth.begin = truth.begin.max(tokens);
            }
            9 | 10 => {
                let truth = &mut self.open[which];
                let tokens = self.random.below(truth.ahead.len() as u32 + 1);
                self.table.advance(truth.id, tokens).unwrap();
                truth.tokens.extend(truth.ahead.drain(..tokens as usize));
                let (id, room) = (truth.id, truth.ahead.len() as u32);
                self.table.refuses("tokens", |t| t.advance(id, room + 1));
            }
            _ => self.grow(),
        }
    }

    /// That the books are right, and every token reads back.
    fn check(&mut self) {
        self.table.check().unwrap();
        for (nth, pool) in self.table.pools.iter().enumerate() {
            for (page, slots) in self.contents[nth].iter_mut().enumerate() {
                if pool.refs[page] == 0 {
                    slots.fill(POISON);
                }
            }
        }
        for truth in &self.open {
            let id = truth.id;
            assert_eq!(self.table.len(id), Ok(truth.len()));
            assert_eq!(self.table.begin(id), Ok(truth.begin));
            assert_eq!(self.table.reserved(id), Ok(truth.len() + truth.ahead.len() as u32));
            let all: Vec<_> = truth.tokens.iter().chain(&truth.ahead).collect();
            for (nth, shape) in self.shapes.iter().enumerate() {
                let from = self.table.live_from(id, nth).unwrap();
                assert!(from <= truth.seen_from(truth.len(), shape.window));
                let (first, pages) = self.table.pages(id, nth).unwrap();
                for token in from..all.len() as u32 {
                    let page = pages[(token / shape.page - first) as usize] as usize;
                    let slot = (token % shape.page) as usize;
                    assert_eq!(
                        self.contents[nth][page][slot], *all[token as usize],
                        "token {token} of {truth:?}"
                    );
                }
            }
        }
        assert_eq!(self.table.used(), self.open.iter().map(|truth| u64::from(truth.len())).sum::<u64>());
        for nth in 0..self.shapes.len() {
            assert_eq!(
                self.table.usage().pools[nth].shared > 0,
                self.table.pools[nth].refs.iter().any(|refs| *refs > 1)
            );
        }
    }
}

#[test]
fn random_operations_keep_every_token() {
    let (mut refused, mut copies) = (0, 0);
    for seed in 0..600 {
        let mut model = Model::new(seed);
        for _ in 0..300 {
            model.step();
            model.check();
        }
        (refused, copies) = (refused + model.refused, copies + model.copies);
    }
    assert!(refused > 1000 && copies > 1000, "{refused} calls were refused, {copies} pages copied");
}
