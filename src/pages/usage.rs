//! How full a cache is.

use super::SequenceTable;

/// How full a cache is; its `Display` is a table.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Open sequences.
    pub open: u32,
    /// Sequences that can be open at once.
    pub sequences: u32,
    /// Tokens of all open sequences. What forks share counts for each, and so does what was evicted.
    pub tokens: u64,
    /// The pages of each kind of layers.
    pub pools: Vec<PoolUsage>,
}

/// How full the pages of one kind of layers are.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolUsage {
    /// Slots of a page.
    pub page: u32,
    /// Keys before its own that a query sees, where the layers have a window.
    pub window: Option<u32>,
    /// Pages in all.
    pub pages: u32,
    /// Pages that sequences hold.
    pub used: u32,
    /// Pages that none holds.
    pub free: u32,
    /// Pages that more than one sequence holds.
    pub shared: u32,
    /// Slots in use. Those of a shared page count once, from the first to the last that a sequence uses.
    pub filled: u64,
    /// Slots of the used pages: what is not filled is reserved, evicted, or the rest of a last page.
    pub slots: u64,
}

impl SequenceTable {
    /// How full the cache is.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            open: self.entries.iter().filter(|entry| entry.open).count() as u32,
            sequences: self.sequences(),
            tokens: self.used(),
            pools: (0..self.pools.len()).map(|nth| self.pool_usage(nth)).collect(),
        }
    }

    fn pool_usage(&self, nth: usize) -> PoolUsage {
        let pool = &self.pools[nth];
        let (shape, free) = (pool.shape, pool.free_pages());
        // Slots in use of each page, as a span.
        let mut spans = vec![(shape.page, 0); shape.pages as usize];
        for entry in &self.entries {
            let list = &entry.lists[nth];
            for (logical, page) in (list.first..).zip(&list.pages) {
                let start = logical * shape.page;
                let slot = |token: u32| token.saturating_sub(start).min(shape.page);
                let (from, to) = (slot(entry.begin), slot(entry.len));
                if from < to {
                    let span = &mut spans[*page as usize];
                    *span = (span.0.min(from), span.1.max(to));
                }
            }
        }
        PoolUsage {
            page: shape.page,
            window: shape.window,
            pages: shape.pages,
            used: shape.pages - free,
            free,
            shared: pool.shared,
            filled: spans.iter().map(|(from, to)| u64::from(to.saturating_sub(*from))).sum(),
            slots: u64::from(shape.pages - free) * u64::from(shape.page),
        }
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} of {} sequences open, {} tokens", self.open, self.sequences, self.tokens)?;
        write!(f, "{:>10} {:>8}", "window", "page")?;
        write!(f, " {:>8} {:>8} {:>8} {:>8}", "pages", "used", "free", "shared")?;
        write!(f, " {:>12} {:>12} {:>7}", "slots", "filled", "full")?;
        for pool in &self.pools {
            let window = pool.window.map_or("-".to_owned(), |window| window.to_string());
            let full = pool.filled as f64 / pool.slots.max(1) as f64 * 100.0;
            write!(f, "\n{window:>10} {:>8}", pool.page)?;
            write!(f, " {:>8} {:>8} {:>8} {:>8}", pool.pages, pool.used, pool.free, pool.shared)?;
            write!(f, " {:>12} {:>12} {full:>5.1} %", pool.slots, pool.filled)?;
        }
        Ok(())
    }
}
