//! Pages of one pool: how often each is held, and which are free.

use super::PoolShape;
use crate::error::Error;

/// References and free pages of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    pub(super) shape: PoolShape,
    /// How many sequences hold each page.
    pub(super) refs: Vec<u32>,
    /// Free pages of each shard; the last is taken next.
    pub(super) free: Vec<Vec<u32>>,
    /// Pages that more than one sequence holds.
    pub(super) shared: u32,
}

impl Pool {
    /// All pages are free.
    pub(super) fn new(shape: PoolShape) -> Self {
        let shards = shape.pages.div_ceil(shape.pages_per_shard);
        // All the room that a free list ever needs.
        let room = shape.pages.min(shape.pages_per_shard) as usize;
        let free = (0..shards).map(|_| Vec::with_capacity(room)).collect();
        let mut pool = Self { shape, refs: Vec::new(), free, shared: 0 };
        pool.refill(vec![0; shape.pages as usize]);
        pool
    }

    /// Takes new references, and frees all pages without, the lowest to be taken first.
    pub(super) fn refill(&mut self, refs: Vec<u32>) {
        self.free.iter_mut().for_each(Vec::clear);
        for page in (0..self.shape.pages).rev().filter(|page| refs[*page as usize] == 0) {
            self.free[(page / self.shape.pages_per_shard) as usize].push(page);
        }
        self.refs = refs;
    }

    /// How many pages are free.
    pub(super) fn free_pages(&self) -> u32 {
        self.free.iter().map(|shard| shard.len() as u32).sum()
    }

    /// How many sequences hold a page.
    pub(super) fn refs(&self, page: u32) -> u32 {
        self.refs[page as usize]
    }

    /// Takes a free page: from the shard of the page `near` if it has one, else from the emptiest shard.
    ///
    /// # Errors
    /// [`Error::CacheFull`] when no page is free.
    pub(super) fn take(&mut self, near: Option<u32>) -> Result<u32, Error> {
        let near = near.map(|page| (page / self.shape.pages_per_shard) as usize);
        let shard = near.filter(|shard| !self.free[*shard].is_empty()).or_else(|| {
            // `max_by_key` gives the last of equals.
            (0..self.free.len()).rev().max_by_key(|shard| self.free[*shard].len())
        });
        let page = shard.and_then(|shard| self.free[shard].pop()).ok_or_else(|| self.full(1))?;
        self.refs[page as usize] = 1;
        Ok(page)
    }

    /// Holds a page once more.
    pub(super) fn hold(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs += 1;
        self.shared += u32::from(*refs == 2);
    }

    /// Holds a page once less; the last to let go frees it.
    pub(super) fn release(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        self.shared -= u32::from(*refs == 1);
        if *refs == 0 {
            self.free[(page / self.shape.pages_per_shard) as usize].push(page);
        }
    }

    /// Why `needed` pages cannot be had.
    pub(super) fn full(&self, needed: u64) -> Error {
        let hint = match self.shape.window {
            None => "close, truncate or evict sequences, or create the cache with more pages",
            Some(_) => {
                "close or truncate sequences, append fewer tokens at once, or create the cache with a larger \
                 PagedShape::longest_step, which layers with a window are sized by"
            }
        };
        Error::CacheFull { needed, free: u64::from(self.free_pages()), slots: self.shape.page, hint }
    }
}
