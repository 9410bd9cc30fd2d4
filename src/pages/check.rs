//! That the books are right: everything is counted again from the sequences.

use super::SequenceTable;

impl SequenceTable {
    /// Recounts references, free pages and the pages that each sequence should have.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.entries.iter().enumerate().try_for_each(|(index, _)| self.check_entry(index))?;
        (0..self.pools.len()).try_for_each(|nth| self.check_pool(nth))
    }

    fn check_entry(&self, index: usize) -> Result<(), String> {
        let entry = &self.entries[index];
        if entry.begin > entry.len || entry.len > entry.reserved || entry.reserved > self.capacity {
            return Err(format!("sequence {index} counts wrong: {entry:?}, capacity {}", self.capacity));
        }
        if !entry.open && (entry.reserved > 0 || entry.lists.iter().any(|list| !list.pages.is_empty())) {
            return Err(format!("sequence {index} is closed, but holds pages: {entry:?}"));
        }
        for (nth, (list, pool)) in entry.lists.iter().zip(&self.pools).enumerate() {
            let refuse = |what: &str| Err(format!("sequence {index}, pool {nth}: {what}: {entry:?}"));
            let page = pool.shape.page;
            // Shortened to where all is evicted, the page of the next token waits for that token.
            let waits = list.pages.is_empty()
                && list.first == entry.len / page
                && entry.begin == entry.len
                && entry.reserved == entry.len;
            if list.end() != entry.reserved.div_ceil(page) && !waits {
                return refuse("pages are too few or too many");
            }
            if list.first * page > entry.seen_from(entry.len, pool.shape.window) {
                return refuse("tokens that are still seen have no page");
            }
            if list.blank > entry.seen_from(entry.len, pool.shape.window) {
                return refuse("tokens that are still seen have no content");
            }
            let unseen = (entry.begin / page).saturating_sub(list.first);
            if unseen > 0 {
                return refuse("pages of evicted tokens are held");
            }
            let mut sorted = list.pages.clone();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
                return refuse("a page occurs twice");
            }
            let behind = entry.len.div_ceil(page).saturating_sub(list.first) as usize;
            if list.pages.iter().skip(behind).any(|page| pool.refs(*page) != 1) {
                return refuse("a reserved page is shared");
            }
        }
        Ok(())
    }

    fn check_pool(&self, nth: usize) -> Result<(), String> {
        let pool = &self.pools[nth];
        let mut refs = vec![0; pool.shape.pages as usize];
        for page in self.entries.iter().flat_map(|entry| &entry.lists[nth].pages) {
            refs[*page as usize] += 1;
        }
        if refs != pool.refs {
            return Err(format!("pool {nth}: references are {:?}, but {refs:?} are held", pool.refs));
        }
        let shared = refs.iter().filter(|refs| **refs > 1).count();
        if shared != pool.shared as usize {
            return Err(format!("pool {nth}: {} pages count as shared, but {shared} are", pool.shared));
        }
        let mut free = vec![false; refs.len()];
        for (shard, pages) in pool.free.iter().enumerate() {
            for page in pages {
                if (page / pool.shape.pages_per_shard) as usize != shard {
                    return Err(format!("pool {nth}: page {page} is free in shard {shard}"));
                }
                if refs[*page as usize] > 0 || std::mem::replace(&mut free[*page as usize], true) {
                    return Err(format!("pool {nth}: page {page} is free, but used or free already"));
                }
            }
        }
        match refs.iter().zip(&free).position(|(refs, free)| *refs == 0 && !free) {
            Some(page) => Err(format!("pool {nth}: page {page} is neither used nor free")),
            None => Ok(()),
        }
    }
}
