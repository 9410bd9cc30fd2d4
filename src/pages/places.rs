//! Whether the places that a step was prepared with are still those of its sequences.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::Error;

/// For each sequence of a cache, how often it has given places of its tokens back, or got others: shared with the steps that know them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places(Arc<[AtomicU32]>);

impl Places {
    pub(super) fn new(sequences: u32) -> Self {
        Self((0..sequences).map(|_| AtomicU32::new(0)).collect())
    }

    /// Steps that know places of this sequence are stale from here on.
    pub(super) fn changed(&self, sequence: usize) {
        self.0[sequence].fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, sequence: u32) -> u32 {
        self.0.get(sequence as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }
}

/// The places that a step knows.
#[derive(Debug, Default)]
pub(crate) struct KnownPlaces {
    places: Places,
    /// Sequences, with their counts when the step learned where they lie.
    counts: Vec<(u32, u32)>,
}

impl KnownPlaces {
    /// Forgets all, and learns from `places` from here on.
    pub(crate) fn begin(&mut self, places: &Places) {
        self.places = places.clone();
        self.counts.clear();
    }

    /// Learns where a sequence lies now.
    pub(crate) fn learn(&mut self, sequence: u32) {
        self.counts.push((sequence, self.places.count(sequence)));
    }

    /// That all still lie there.
    ///
    /// # Errors
    /// [`Error::StaleStep`] names the first that does not.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.counts.iter().find(|(sequence, count)| self.places.count(*sequence) != *count) {
            Some((sequence, _)) => Err(Error::StaleStep { sequence: *sequence }),
            None => Ok(()),
        }
    }
}
