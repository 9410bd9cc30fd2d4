//! Less room: sequences close, lose tokens at their end or at their start.

use super::{SequenceId, SequenceTable};
use crate::error::Error;

impl SequenceTable {
    /// Closes a sequence; its pages are given back and its handles are stale.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub(crate) fn close(&mut self, id: SequenceId) -> Result<(), Error> {
        let index = self.check_id(id)?;
        self.shorten(index, 0);
        let entry = &mut self.entries[index];
        entry.open = false;
        entry.generation = entry.generation.wrapping_add(1);
        Ok(())
    }

    /// Shortens every open sequence to nothing.
    pub(crate) fn clear(&mut self) {
        (0..self.entries.len()).for_each(|index| self.shorten(index, 0));
    }

    /// Shortens a sequence to its first `len` tokens, and gives back what was reserved.
    ///
    /// # Errors
    /// [`Error::Field`] when it is shorter than that, or when a query there would see keys that a window has given back;
    /// [`Error::StaleSequence`]. A length of 0 is always possible, and makes the sequence as new.
    pub(crate) fn truncate(&mut self, id: SequenceId, len: u32) -> Result<(), Error> {
        let index = self.check_id(id)?;
        let entry = &self.entries[index];
        if len > entry.len {
            let needed = format!("the sequence has {} tokens; truncate only shortens", entry.len);
            return Err(Error::field("len", len, needed));
        }
        let least = entry.lists.iter().zip(&self.pools).filter_map(|(list, pool)| {
            let (window, from) = (pool.shape.window, list.kept_from(pool));
            (from > entry.seen_from(len, window)).then(|| from + window.unwrap_or(0))
        });
        if let Some(least) = least.max().filter(|_| len > 0) {
            let needed = format!(
                "keys that a query there sees are given back, for layers have windows: the least is {least}, or 0"
            );
            return Err(Error::field("len", len, needed));
        }
        self.shorten(index, len);
        Ok(())
    }

    /// Forgets the first `tokens` tokens of a sequence, and gives back pages that hold none but those. Positions stay.
    ///
    /// # Errors
    /// [`Error::Field`] when it has fewer, [`Error::StaleSequence`].
    pub(crate) fn evict(&mut self, id: SequenceId, tokens: u32) -> Result<(), Error> {
        let index = self.check_id(id)?;
        let entry = &mut self.entries[index];
        if tokens > entry.len {
            return Err(Error::field("tokens", tokens, format!("the sequence has {}", entry.len)));
        }
        entry.begin = entry.begin.max(tokens);
        for (nth, (list, pool)) in entry.lists.iter_mut().zip(&mut self.pools).enumerate() {
            if list.release_before(entry.begin, pool) > 0 {
                self.changes.add(nth, index);
            }
        }
        Ok(())
    }

    /// Shortens a sequence to `len` tokens, whatever was evicted or reserved.
    fn shorten(&mut self, index: usize, len: u32) {
        let entry = &mut self.entries[index];
        let forgets = len < entry.len;
        (entry.len, entry.begin, entry.reserved) = (len, entry.begin.min(len), len);
        for (nth, (list, pool)) in entry.lists.iter_mut().zip(&mut self.pools).enumerate() {
            // Other tokens come to the places of those that it forgets.
            if list.shorten(len, pool) > 0 || forgets {
                self.changes.add(nth, index);
            }
        }
    }
}
