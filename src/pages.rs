//! Which sequence has which slots of the cache, and how many are in use. Pure bookkeeping; `cache` owns the buffers.
//!
//! A sequence has one page, as long as its capacity. Smaller, shared pages come later behind the same calls.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Error;

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

#[derive(Debug, Clone, Default)]
struct Entry {
    open: bool,
    generation: u32,
    len: u32,
}

/// Lengths of the sequences of one cache.
#[derive(Debug)]
pub(crate) struct SequenceTable {
    id: u32,
    capacity: u32,
    entries: Vec<Entry>,
}

impl SequenceTable {
    /// Room for `sequences` of up to `capacity` tokens each.
    pub(crate) fn new(sequences: u32, capacity: u32) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { id, capacity, entries: vec![Entry::default(); sequences as usize] }
    }

    /// Slots of each sequence.
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Sequences that can be open at once.
    pub(crate) fn sequences(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Slots in use, over all open sequences.
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
        entry.len = 0;
        Ok(SequenceId { table: self.id, index: index as u32, generation: entry.generation })
    }

    /// Closes a sequence; its slots are free and its handles are stale.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn close(&mut self, id: SequenceId) -> Result<(), Error> {
        let entry = self.entry_mut(id)?;
        entry.open = false;
        entry.len = 0;
        entry.generation = entry.generation.wrapping_add(1);
        Ok(())
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn len(&self, id: SequenceId) -> Result<u32, Error> {
        Ok(self.entry(id)?.len)
    }

    /// Lengthens every sequence of `growth` by its number of tokens, or none.
    ///
    /// # Errors
    /// [`Error::SequenceFull`], [`Error::StaleSequence`], [`Error::RepeatedSequence`]: all lengths are as before.
    pub(crate) fn extend(&mut self, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
        for &(id, tokens) in growth {
            let used = self.entry(id)?.len;
            let needed = u64::from(used) + u64::from(tokens);
            if needed > u64::from(self.capacity) {
                return Err(Error::SequenceFull {
                    sequence: id.index,
                    needed,
                    used,
                    capacity: self.capacity,
                });
            }
        }
        let mut indices: Vec<_> = growth.iter().map(|(id, _)| id.index).collect();
        indices.sort_unstable();
        if let Some(pair) = indices.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::RepeatedSequence { sequence: pair[0] });
        }
        for &(id, tokens) in growth {
            self.entry_mut(id)?.len += tokens;
        }
        Ok(())
    }

    /// Shortens a sequence to its first `len` tokens.
    ///
    /// # Errors
    /// [`Error::Field`] when it is shorter than that, [`Error::StaleSequence`].
    pub(crate) fn truncate(&mut self, id: SequenceId, len: u32) -> Result<(), Error> {
        let entry = self.entry_mut(id)?;
        if len > entry.len {
            return Err(Error::field(
                "len",
                len,
                format!("the sequence has {} tokens; truncate only shortens", entry.len),
            ));
        }
        entry.len = len;
        Ok(())
    }

    /// Shortens every open sequence to nothing.
    pub(crate) fn clear(&mut self) {
        for entry in &mut self.entries {
            entry.len = 0;
        }
    }

    fn check(&self, id: SequenceId) -> Result<usize, Error> {
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
        self.check(id).map(|index| &self.entries[index])
    }

    fn entry_mut(&mut self, id: SequenceId) -> Result<&mut Entry, Error> {
        self.check(id).map(|index| &mut self.entries[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extend_is_all_or_nothing() {
        let mut table = SequenceTable::new(2, 10);
        let (a, b) = (table.open().unwrap(), table.open().unwrap());
        table.extend(&[(a, 8), (b, 3)]).unwrap();
        let full = table.extend(&[(b, 1), (a, 3)]).unwrap_err();
        assert_eq!(full, Error::SequenceFull { sequence: 0, needed: 11, used: 8, capacity: 10 });
        assert!(matches!(table.extend(&[(b, 1), (b, 1)]), Err(Error::RepeatedSequence { sequence: 1 })));
        assert_eq!((table.len(a), table.len(b)), (Ok(8), Ok(3)));
        assert_eq!(table.used(), 11);
    }

    #[test]
    fn handles_go_stale() {
        let mut table = SequenceTable::new(1, 10);
        let mut other = SequenceTable::new(1, 10);
        let a = table.open().unwrap();
        assert_eq!(table.open(), Err(Error::NoFreeSequence { capacity: 1 }));
        table.close(a).unwrap();
        let b = table.open().unwrap();
        assert!(matches!(table.len(a), Err(Error::StaleSequence { .. })));
        assert!(matches!(other.len(b), Err(Error::StaleSequence { .. })));
        let c = other.open().unwrap();
        assert!(matches!(table.close(c), Err(Error::StaleSequence { .. })));
    }

    #[test]
    fn truncate_only_shortens() {
        let mut table = SequenceTable::new(1, 10);
        let a = table.open().unwrap();
        table.extend(&[(a, 5)]).unwrap();
        assert!(matches!(table.truncate(a, 6), Err(Error::Field { field: "len", .. })));
        table.truncate(a, 2).unwrap();
        assert_eq!(table.len(a), Ok(2));
        table.clear();
        assert_eq!(table.len(a), Ok(0));
    }
}
