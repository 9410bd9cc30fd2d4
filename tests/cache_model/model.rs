//! What a cache should be: lists of tokens, and pages with names that are never used twice.

use std::collections::BTreeMap;

use gqa::Usage;

/// What a token is drawn from: its keys and values follow from it.
pub(crate) type Token = u32;

/// The pages of one kind of layers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pool {
    pub(crate) page: u32,
    pub(crate) pages: u32,
    pub(crate) window: Option<u32>,
}

/// A sequence as one kind of layers has it.
#[derive(Debug, Clone, Default)]
struct Held {
    /// The name of each page, by its place in the sequence.
    names: BTreeMap<u32, u64>,
    /// Tokens before this one came without content, from a file.
    blank: u32,
}

/// An open sequence.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<Token>,
    /// Tokens before this one were evicted.
    pub(crate) begin: u32,
    /// Tokens that it has pages for.
    pub(crate) reserved: u32,
    held: Vec<Held>,
}

/// A sequence in a file.
#[derive(Debug, Clone)]
pub(crate) struct Saved {
    pub(crate) tokens: Vec<Token>,
    pub(crate) begin: u32,
    /// The first token that each kind of layers kept.
    pub(crate) kept: Vec<u32>,
}

/// Why the cache should refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    CacheFull,
    NoFreeSequence,
    Field,
}

#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) pools: Vec<Pool>,
    pub(crate) capacity: usize,
    pub(crate) open: Vec<Sequence>,
    /// Names given so far.
    named: u64,
}

impl Sequence {
    pub(crate) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// The first token that a query at position `len` sees.
    fn seen_from(&self, len: u32, pool: Pool) -> u32 {
        self.begin.max(pool.window.map_or(0, |window| len.saturating_sub(window)))
    }

    /// The first token from which a kind of layers has content, were none evicted.
    fn kept_from(&self, nth: usize, pool: Pool) -> u32 {
        let Held { names, blank } = &self.held[nth];
        let first = names.keys().next().copied().unwrap_or(self.len() / pool.page);
        (first * pool.page).max(*blank)
    }

    /// The first token whose keys are there to be seen.
    pub(crate) fn live_from(&self, nth: usize, pool: Pool) -> u32 {
        self.begin.max(self.kept_from(nth, pool))
    }

    fn shorten(&mut self, len: u32, pools: &[Pool]) {
        self.tokens.truncate(len as usize);
        self.begin = self.begin.min(len);
        self.reserved = len;
        for (held, pool) in self.held.iter_mut().zip(pools) {
            held.names.retain(|place, _| *place < len.div_ceil(pool.page));
            held.blank = held.blank.min(len);
        }
    }
}

impl Model {
    pub(crate) fn new(pools: Vec<Pool>, capacity: usize) -> Self {
        Self { pools, capacity, open: Vec::new(), named: 0 }
    }

    /// That one more sequence can be open.
    pub(crate) fn opens(&self) -> Result<(), Refusal> {
        if self.open.len() < self.capacity { Ok(()) } else { Err(Refusal::NoFreeSequence) }
    }

    pub(crate) fn open(&mut self) {
        let held = vec![Held::default(); self.pools.len()];
        self.open.push(Sequence { tokens: Vec::new(), begin: 0, reserved: 0, held });
    }

    pub(crate) fn fork(&mut self, nth: usize) {
        let mut fork = self.open[nth].clone();
        // What is reserved is not shared.
        fork.shorten(fork.len(), &self.pools);
        self.open.push(fork);
    }

    /// What the cache is after growing, if it has the pages.
    pub(crate) fn reserved(&self, growth: &[(usize, u32)]) -> Result<Self, Refusal> {
        let mut next = self.clone();
        let growing = || growth.iter().copied().filter(|(_, tokens)| *tokens > 0);
        for (nth_pool, pool) in self.pools.iter().copied().enumerate() {
            for (nth, _) in growing() {
                let s = &mut next.open[nth];
                let seen = s.seen_from(s.len(), pool);
                s.held[nth_pool].names.retain(|place, _| *place >= seen / pool.page);
            }
            for (nth, tokens) in growing() {
                let len = next.open[nth].len();
                let tail = next.open[nth].held[nth_pool].names.get(&(len / pool.page)).copied();
                if tail.is_some_and(|name| !len.is_multiple_of(pool.page) && next.holders(nth_pool, name) > 1)
                {
                    next.name(nth, nth_pool, len / pool.page);
                }
                let names = &next.open[nth].held[nth_pool].names;
                let first = names.keys().next().copied().unwrap_or(len / pool.page);
                let missing: Vec<_> = (first..(len + tokens).div_ceil(pool.page))
                    .filter(|place| !names.contains_key(place))
                    .collect();
                missing.into_iter().for_each(|place| next.name(nth, nth_pool, place));
            }
        }
        for (nth, tokens) in growing() {
            let s = &mut next.open[nth];
            s.reserved = s.reserved.max(s.len() + tokens);
        }
        next.fits()
    }

    /// Shortens a sequence, unless a query at its end would see what is gone.
    pub(crate) fn truncate(&mut self, nth: usize, len: u32) -> Result<(), Refusal> {
        let s = &self.open[nth];
        let gone = |(nth, pool): (usize, &Pool)| s.kept_from(nth, *pool) > s.seen_from(len, *pool);
        if len > s.len() || len > 0 && self.pools.iter().enumerate().any(gone) {
            return Err(Refusal::Field);
        }
        self.open[nth].shorten(len, &self.pools);
        Ok(())
    }

    pub(crate) fn evict(&mut self, nth: usize, tokens: u32) -> Result<(), Refusal> {
        let s = &mut self.open[nth];
        if tokens > s.len() {
            return Err(Refusal::Field);
        }
        s.begin = s.begin.max(tokens);
        for (held, pool) in s.held.iter_mut().zip(&self.pools) {
            held.names.retain(|place, _| *place >= s.begin / pool.page);
        }
        Ok(())
    }

    pub(crate) fn clear(&mut self) {
        self.open.iter_mut().for_each(|s| s.shorten(0, &self.pools));
    }

    pub(crate) fn save(&self, nth: usize) -> Saved {
        let s = &self.open[nth];
        let kept = self.pools.iter().enumerate().map(|(nth, pool)| s.live_from(nth, *pool)).collect();
        Saved { tokens: s.tokens.clone(), begin: s.begin, kept }
    }

    /// What the cache is with a saved sequence opened, if there is room.
    pub(crate) fn loaded(&self, saved: &Saved) -> Result<Self, Refusal> {
        self.opens()?;
        let mut next = self.clone();
        next.open();
        let nth = next.open.len() - 1;
        let s = &mut next.open[nth];
        let len = saved.tokens.len() as u32;
        (s.tokens, s.begin, s.reserved) = (saved.tokens.clone(), saved.begin, len);
        for (nth_pool, pool) in self.pools.iter().copied().enumerate() {
            let seen = next.open[nth].seen_from(len, pool);
            next.open[nth].held[nth_pool].blank = saved.kept[nth_pool];
            (seen / pool.page..len.div_ceil(pool.page)).for_each(|place| next.name(nth, nth_pool, place));
        }
        next.fits()
    }

    /// Whether the last `q_len` queries of a sequence see only what a kind of layers still has.
    pub(crate) fn sees_kept(&self, nth: usize, nth_pool: usize, q_len: u32) -> bool {
        let (s, pool) = (&self.open[nth], self.pools[nth_pool]);
        q_len == 0 || s.seen_from(s.len() - q_len, pool) >= s.live_from(nth_pool, pool)
    }

    /// Leading tokens that two sequences have in the same pages of layers that see everything.
    pub(crate) fn common(&self, a: usize, b: usize) -> u32 {
        let (a, b) = (&self.open[a], &self.open[b]);
        let pages = a.held[0].names.iter().zip(&b.held[0].names).take_while(|(a, b)| a == b).count();
        pages as u32 * self.pools[0].page
    }

    /// Holds what `usage` says against the model.
    pub(crate) fn check(&self, usage: &Usage) -> Result<(), String> {
        let equal = |what: &str, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(format!("{what} is {found}, not {expected}: {usage:?}")),
        };
        equal("open", usage.open.into(), self.open.len() as u64)?;
        equal("tokens", usage.tokens, self.open.iter().map(|s| u64::from(s.len())).sum())?;
        for (nth, (pool, found)) in self.pools.iter().zip(&usage.pools).enumerate() {
            let spans = self.spans(nth);
            let filled = spans.values().map(|(from, to)| u64::from(to.saturating_sub(*from))).sum();
            let shared = spans.keys().filter(|name| self.holders(nth, **name) > 1).count();
            let used = spans.len() as u64;
            equal("pages", found.pages.into(), pool.pages.into())?;
            equal("used", found.used.into(), used)?;
            equal("free", found.free.into(), u64::from(pool.pages) - used)?;
            equal("shared", found.shared.into(), shared as u64)?;
            equal("slots", found.slots, used * u64::from(pool.page))?;
            equal("filled", found.filled, filled)?;
        }
        equal("pools", usage.pools.len() as u64, self.pools.len() as u64)
    }

    /// The slots of each page that are in use.
    fn spans(&self, nth: usize) -> BTreeMap<u64, (u32, u32)> {
        let page = self.pools[nth].page;
        let mut spans = BTreeMap::new();
        for s in &self.open {
            for (place, name) in &s.held[nth].names {
                let slot = |token: u32| token.saturating_sub(place * page).min(page);
                let (from, to) = (slot(s.begin), slot(s.len()));
                let span = spans.entry(*name).or_insert((page, 0));
                if from < to {
                    *span = (span.0.min(from), span.1.max(to));
                }
            }
        }
        spans
    }

    fn holders(&self, nth: usize, name: u64) -> usize {
        let holds = |s: &&Sequence| s.held[nth].names.values().any(|held| *held == name);
        self.open.iter().filter(holds).count()
    }

    /// Gives a page of a sequence a name of its own.
    fn name(&mut self, nth: usize, nth_pool: usize, place: u32) {
        self.named += 1;
        self.open[nth].held[nth_pool].names.insert(place, self.named);
    }

    fn fits(self) -> Result<Self, Refusal> {
        let fits = |(nth, pool): (usize, &Pool)| self.spans(nth).len() <= pool.pages as usize;
        match self.pools.iter().enumerate().all(fits) {
            true => Ok(self),
            false => Err(Refusal::CacheFull),
        }
    }
}
