//! Room for new tokens: pages are taken, and copied where others hold them too.

use super::pool::Pool;
use super::sequence::Entry;
use super::{PageCopy, SequenceId, SequenceTable};
use crate::error::Error;

impl SequenceTable {
    /// Lengthens every sequence of `growth` by its number of tokens, or none. What must be copied is added to `copies`.
    ///
    /// A sequence that grows gives back the pages that none of its new tokens sees. Growing by nothing does nothing.
    ///
    /// # Errors
    /// [`Error::SequenceFull`], [`Error::CacheFull`], [`Error::StaleSequence`], [`Error::RepeatedSequence`]: all is as before.
    pub(crate) fn extend(
        &mut self,
        growth: &[(SequenceId, u32)],
        copies: &mut Vec<PageCopy>,
    ) -> Result<(), Error> {
        self.reserve(growth, copies)?;
        for (id, tokens) in growth {
            self.entries[id.index as usize].len += tokens;
        }
        Ok(())
    }

    /// As [`extend`](Self::extend), but lengths stay until [`advance`](Self::advance).
    ///
    /// # Errors
    /// As `extend`.
    pub(crate) fn reserve(
        &mut self,
        growth: &[(SequenceId, u32)],
        copies: &mut Vec<PageCopy>,
    ) -> Result<(), Error> {
        self.check_growth(growth)?;
        for nth in 0..self.pools.len() {
            self.check_room(nth, growth)?;
        }
        let Self { entries, pools, changes, .. } = self;
        for (nth, pool) in pools.iter_mut().enumerate() {
            // What one sequence gives back, another can take.
            for (index, _) in growing(growth) {
                let seen = entries[index].seen_from(entries[index].len, pool.shape.window);
                if entries[index].lists[nth].release_before(seen, pool) > 0 {
                    changes.add(nth, index);
                }
            }
            for (index, tokens) in growing(growth) {
                let copied = copies.len();
                entries[index].take_pages((nth, pool), tokens, copies)?;
                if copies.len() > copied {
                    changes.add(nth, index);
                }
            }
        }
        for (index, tokens) in growing(growth) {
            let entry = &mut entries[index];
            entry.reserved = entry.reserved.max(entry.len + tokens);
        }
        Ok(())
    }

    /// Lengthens a sequence within what was reserved for it.
    ///
    /// # Errors
    /// [`Error::Field`] when less is reserved, [`Error::StaleSequence`].
    pub(crate) fn advance(&mut self, id: SequenceId, tokens: u32) -> Result<(), Error> {
        let index = self.check_id(id)?;
        let entry = &mut self.entries[index];
        let room = entry.reserved - entry.len;
        if tokens > room {
            let needed = format!("there is room for {room} more: reserve it first");
            return Err(Error::field("tokens", tokens, needed));
        }
        entry.len += tokens;
        Ok(())
    }

    /// Opens a sequence of `len` tokens, of which the first `begin` are evicted and each pool has those from `kept` on: what was saved.
    ///
    /// # Errors
    /// [`Error::Field`] where a pool's window reaches back further, [`Error::SequenceFull`], [`Error::CacheFull`],
    /// [`Error::NoFreeSequence`]: all is as before.
    #[cfg(feature = "safetensors")]
    pub(crate) fn restore(&mut self, (len, begin): (u32, u32), kept: &[u32]) -> Result<SequenceId, Error> {
        let id = self.open()?;
        let mut entry = Entry { len, begin, reserved: len, ..self.entries[id.index as usize].clone() };
        let mut room = || {
            if len > self.capacity {
                let (sequence, capacity) = (id.index, self.capacity);
                return Err(Error::SequenceFull { sequence, needed: len.into(), used: 0, capacity });
            }
            for (nth, (pool, kept)) in self.pools.iter().zip(kept).enumerate() {
                let seen = entry.seen_from(len, pool.shape.window);
                if begin > len || *kept > seen.max(begin) {
                    let needed = format!("layers of this cache see the keys from {seen} on");
                    return Err(Error::field("saved tokens", format!("from {kept} on"), needed));
                }
                let list = &mut entry.lists[nth];
                (list.first, list.blank) = (seen / pool.shape.page, *kept);
                let needed = u64::from(len.div_ceil(pool.shape.page).saturating_sub(list.first));
                if needed > u64::from(pool.free_pages()) {
                    return Err(pool.full(needed));
                }
            }
            Ok(())
        };
        if let Err(error) = room() {
            // Nobody has seen the handle.
            self.entries[id.index as usize].open = false;
            return Err(error);
        }
        for (list, pool) in entry.lists.iter_mut().zip(&mut self.pools) {
            while list.end() < len.div_ceil(pool.shape.page) {
                list.pages.push(pool.take(list.pages.last().copied())?);
            }
        }
        self.entries[id.index as usize] = entry;
        Ok(id)
    }

    /// That handles are valid and named once, and no sequence outgrows its capacity.
    fn check_growth(&mut self, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
        self.scratch.stamp += 1;
        for &(id, tokens) in growth {
            let index = self.check_id(id)?;
            if std::mem::replace(&mut self.scratch.stamps[index], self.scratch.stamp) == self.scratch.stamp {
                return Err(Error::RepeatedSequence { sequence: id.index });
            }
            let (used, capacity) = (self.entries[index].len, self.capacity);
            let needed = u64::from(used) + u64::from(tokens);
            if needed > u64::from(capacity) {
                return Err(Error::SequenceFull { sequence: id.index, needed, used, capacity });
            }
        }
        Ok(())
    }

    /// That a pool has the pages for `growth`. Does to the references what growing would do, and undoes it.
    fn check_room(&mut self, nth: usize, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
        let Self { entries, pools, scratch, .. } = self;
        let pool = &mut pools[nth];
        let mut drop = |page: u32, pool: &mut Pool| {
            scratch.dropped.push(page);
            pool.refs[page as usize] -= 1;
            pool.refs[page as usize]
        };
        let (mut taken, mut freed) = (0, 0);
        for (index, _) in growing(growth) {
            let (entry, list) = (&entries[index], &entries[index].lists[nth]);
            let before = list.before(entry.seen_from(entry.len, pool.shape.window), pool);
            for page in &list.pages[..before] {
                freed += u64::from(drop(*page, pool) == 0);
            }
        }
        for (index, tokens) in growing(growth) {
            let (entry, list) = (&entries[index], &entries[index].lists[nth]);
            if let Some(at) = list.shared_tail(entry.len, pool) {
                drop(list.pages[at], pool);
                taken += 1;
            }
            let end = (entry.len + tokens).div_ceil(pool.shape.page);
            // What is given back at the front does not move the end.
            taken += u64::from(end.saturating_sub(list.end()));
        }
        for page in scratch.dropped.drain(..) {
            pool.refs[page as usize] += 1;
        }
        match taken.saturating_sub(freed) {
            needed if needed > u64::from(pool.free_pages()) => Err(pool.full(needed)),
            _ => Ok(()),
        }
    }
}

impl Entry {
    /// Takes pages of the pool of this number for `tokens` more, and one in place of a shared page that they would be written into.
    fn take_pages(
        &mut self,
        (nth, pool): (usize, &mut Pool),
        tokens: u32,
        copies: &mut Vec<PageCopy>,
    ) -> Result<(), Error> {
        let list = &mut self.lists[nth];
        if let Some(at) = list.shared_tail(self.len, pool) {
            let from = list.pages[at];
            let to = pool.take(list.pages.last().copied())?;
            pool.release(from);
            list.pages[at] = to;
            copies.push(PageCopy { pool: nth, from, to });
        }
        while list.end() < (self.len + tokens).div_ceil(pool.shape.page) {
            list.pages.push(pool.take(list.pages.last().copied())?);
        }
        Ok(())
    }
}

/// Sequences that grow, by index.
fn growing(growth: &[(SequenceId, u32)]) -> impl Iterator<Item = (usize, u32)> {
    growth.iter().filter(|(_, tokens)| *tokens > 0).map(|(id, tokens)| (id.index as usize, *tokens))
}
