//! Whether sequences still lie where a step knows them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Error;

/// For each pool and sequence of a cache, how often the sequence has given pages of the pool back, got others in their stead, or
/// forgotten tokens: shared with the steps that know its pages.
#[derive(Debug, Clone, Default)]
pub(crate) struct Changes {
    counts: Arc<[AtomicU32]>,
    sequences: u32,
}

impl Changes {
    pub(super) fn new(pools: usize, sequences: u32) -> Self {
        let counts = (0..pools * sequences as usize).map(|_| AtomicU32::new(0)).collect();
        Self { counts, sequences }
    }

    /// Steps that know pages of this sequence in this pool are stale from here on.
    pub(super) fn add(&self, pool: usize, sequence: usize) {
        self.counts[pool * self.sequences as usize + sequence].fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, pool: usize, sequence: u32) -> u32 {
        let count = self.counts.get(pool * self.sequences as usize + sequence as usize);
        count.map_or(0, |count| count.load(Ordering::Relaxed))
    }
}

/// What a step knows: the counts as they were when it learned where its sequences lie.
#[derive(Debug, Default)]
pub(crate) struct KnownChanges {
    changes: Changes,
    pool: usize,
    counts: Vec<(u32, u32)>,
}

impl KnownChanges {
    /// Forgets all, and learns of this pool from here on.
    pub(crate) fn begin(&mut self, changes: &Changes, pool: usize) {
        (self.changes, self.pool) = (changes.clone(), pool);
        self.counts.clear();
    }

    /// Learns where a sequence lies now.
    pub(crate) fn learn(&mut self, sequence: u32) {
        self.counts.push((sequence, self.changes.count(self.pool, sequence)));
    }

    /// That all still lie there.
    ///
    /// # Errors
    /// [`Error::StaleStep`] names the first that does not.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.counts.iter().find(|(sequence, known)| self.changes.count(self.pool, *sequence) != *known)
        {
            Some((sequence, _)) => Err(Error::StaleStep { sequence: *sequence }),
            None => Ok(()),
        }
    }
}
