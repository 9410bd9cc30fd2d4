//! Which sequence has which slots of the cache. Pure bookkeeping; `cache` owns the buffers.
//!
//! A cache has a pool of pages for each kind of layers: those that see everything, those with a window. A sequence has a list of
//! pages in each pool. Forks share pages until one of them writes, and whoever writes copies first. Where pages are as long as a
//! sequence may get, and as many as there are sequences, each sequence lies in one piece.

mod changes;
mod check;
mod defragment;
mod grow;
mod pool;
mod sequence;
mod shrink;
#[cfg(test)]
mod tests;
mod usage;

use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Error;
use pool::Pool;
use sequence::Entry;

pub(crate) use changes::{Changes, KnownChanges};
pub use usage::{PoolUsage, Usage};

/// Names an open sequence of one cache. Stale after [`KvCache::close`](crate::KvCache::close), and no use to another cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId {
    table: u32,
    index: u32,
    generation: u32,
}

impl SequenceId {
    /// The sequence's place in its cache.
    pub fn index(self) -> u32 {
        self.index
    }
}

/// The pages of one kind of layers. Every count is at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PoolShape {
    /// Slots of a page.
    pub(crate) page: u32,
    /// Pages, numbered from 0.
    pub(crate) pages: u32,
    /// Pages of a shard, which is one buffer: page `i` lies in shard `i / pages_per_shard`.
    pub(crate) pages_per_shard: u32,
    /// Keys before its own that a query sees; pages before those are given back.
    pub(crate) window: Option<u32>,
}

/// A page whose content must be copied before new tokens are written. The copies of one call may run in any order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageCopy {
    /// The pool of both.
    pub(crate) pool: usize,
    /// The page that others keep.
    pub(crate) from: u32,
    /// The page that is written next.
    pub(crate) to: u32,
}

/// Where a page's content can lie while pages are renumbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A page of the pool.
    Page(u32),
    /// A page outside the pool, for one content at a time.
    Spare,
}

/// A page's content that must move. The moves of one call must run in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageMove {
    /// The pool of both.
    pub(crate) pool: usize,
    /// Where it lies.
    pub(crate) from: Place,
    /// Where it belongs.
    pub(crate) to: Place,
}

/// Lengths and pages of the sequences of one cache.
#[derive(Debug)]
pub(crate) struct SequenceTable {
    id: u32,
    capacity: u32,
    entries: Vec<Entry>,
    pools: Vec<Pool>,
    changes: Changes,
    scratch: Scratch,
}

/// What a call needs for itself: kept, so that calls need not allocate.
#[derive(Debug, Default)]
struct Scratch {
    /// The last call that named each sequence.
    stamps: Vec<u64>,
    /// Calls so far.
    stamp: u64,
    /// Pages whose references were taken away to count with.
    dropped: Vec<u32>,
}

impl SequenceTable {
    /// Room for `sequences` of up to `capacity` tokens each, as far as the pages of every pool suffice. The capacity is below
    /// 2^31, and so are the slots of a page.
    pub(crate) fn new(sequences: u32, capacity: u32, pools: &[PoolShape]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let entries = vec![Entry::new(pools.len()); sequences as usize];
        let scratch = Scratch { stamps: vec![0; sequences as usize], ..Scratch::default() };
        let changes = Changes::new(pools.len(), sequences);
        let pools = pools.iter().copied().map(Pool::new).collect();
        Self { id, capacity, entries, pools, changes, scratch }
    }

    /// Most tokens of one sequence.
    #[cfg(test)]
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The shape of a pool.
    pub(crate) fn shape(&self, pool: usize) -> PoolShape {
        self.pools[pool].shape
    }

    /// Sequences that can be open at once.
    pub(crate) fn sequences(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Tokens of all open sequences. What forks share counts for each, and so does what was evicted.
    pub(crate) fn used(&self) -> u64 {
        self.entries.iter().map(|e| u64::from(e.len)).sum()
    }

    /// Opens an empty sequence.
    ///
    /// # Errors
    /// [`Error::NoFreeSequence`] when all are open.
    pub(crate) fn open(&mut self) -> Result<SequenceId, Error> {
        let capacity = self.sequences();
        let free = self.entries.iter_mut().enumerate().find(|(_, e)| !e.open);
        let (index, entry) = free.ok_or(Error::NoFreeSequence { capacity })?;
        entry.open = true;
        Ok(SequenceId { table: self.id, index: index as u32, generation: entry.generation })
    }

    /// Opens a sequence with the tokens of another, whose pages both share. What is reserved is not shared.
    ///
    /// # Errors
    /// [`Error::StaleSequence`], [`Error::NoFreeSequence`].
    pub(crate) fn fork(&mut self, id: SequenceId) -> Result<SequenceId, Error> {
        let from = self.check_id(id)?;
        let fork = self.open()?;
        let to = fork.index as usize;
        let Entry { len, begin, .. } = self.entries[from];
        for (nth, pool) in self.pools.iter_mut().enumerate() {
            let mut list = std::mem::take(&mut self.entries[to].lists[nth]);
            list.share(&self.entries[from].lists[nth], len, pool);
            self.entries[to].lists[nth] = list;
        }
        let entry = &mut self.entries[to];
        (entry.len, entry.begin, entry.reserved) = (len, begin, len);
        Ok(fork)
    }

    /// Tokens of a sequence, evicted ones too.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn len(&self, id: SequenceId) -> Result<u32, Error> {
        Ok(self.entry(id)?.len)
    }

    /// The first token of a sequence that was not evicted.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn begin(&self, id: SequenceId) -> Result<u32, Error> {
        Ok(self.entry(id)?.begin)
    }

    /// Tokens that a sequence has room for in every pool, in pages that it may write: at least its length.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn reserved(&self, id: SequenceId) -> Result<u32, Error> {
        Ok(self.entry(id)?.reserved)
    }

    /// A sequence's pages in a pool, and which page of the sequence the first of them is.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn pages(&self, id: SequenceId, pool: usize) -> Result<(u32, &[u32]), Error> {
        let list = &self.entry(id)?.lists[pool];
        Ok((list.first, &list.pages))
    }

    /// The first token of a sequence that has a slot in a pool and was not evicted; all after it have slots too.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn live_from(&self, id: SequenceId, pool: usize) -> Result<u32, Error> {
        let entry = self.entry(id)?;
        Ok(entry.begin.max(entry.lists[pool].kept_from(&self.pools[pool])))
    }

    /// Whether another sequence holds the first page of this one: forks share from the front on, so else they share none.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn begins_shared(&self, id: SequenceId, pool: usize) -> Result<bool, Error> {
        let first = self.entry(id)?.lists[pool].pages.first();
        Ok(first.is_some_and(|page| self.pools[pool].refs(*page) > 1))
    }

    /// What steps must know to tell that they are stale.
    pub(crate) fn changes(&self) -> &Changes {
        &self.changes
    }

    /// The entry's index, if the handle is valid.
    fn check_id(&self, id: SequenceId) -> Result<usize, Error> {
        let stale = |reason| Error::StaleSequence { sequence: id.index, reason };
        if id.table != self.id {
            return Err(stale("it belongs to another cache"));
        }
        match self.entries.get(id.index as usize) {
            Some(entry) if entry.open && entry.generation == id.generation => Ok(id.index as usize),
            _ => Err(stale("the sequence was closed")),
        }
    }

    fn entry(&self, id: SequenceId) -> Result<&Entry, Error> {
        self.check_id(id).map(|index| &self.entries[index])
    }
}
