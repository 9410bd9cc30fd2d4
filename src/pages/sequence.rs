//! One sequence: its length and its pages.

use super::pool::Pool;

/// A sequence, open or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) open: bool,
    /// How often it was closed.
    pub(super) generation: u32,
    /// Tokens.
    pub(super) len: u32,
    /// Tokens before this one were evicted.
    pub(super) begin: u32,
    /// Tokens that it may write without asking again; at least `len`.
    pub(super) reserved: u32,
    /// Its pages in each pool.
    pub(super) lists: Vec<PageList>,
}

impl Entry {
    /// A closed sequence.
    pub(super) fn new(pools: usize) -> Self {
        let lists = vec![PageList::default(); pools];
        Self { open: false, generation: 0, len: 0, begin: 0, reserved: 0, lists }
    }

    /// The first token that a query at position `len` sees.
    pub(super) fn seen_from(&self, len: u32, window: Option<u32>) -> u32 {
        self.begin.max(window.map_or(0, |window| len.saturating_sub(window)))
    }
}

/// Pages of one sequence in one pool, in the order of its tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PageList {
    /// Pages before these that were given back.
    pub(super) first: u32,
    pub(super) pages: Vec<u32>,
    /// Tokens before this one never had content: it was restored without them.
    pub(super) blank: u32,
}

impl PageList {
    /// The first token that has a slot with content.
    pub(super) fn kept_from(&self, pool: &Pool) -> u32 {
        self.blank.max(self.first * pool.shape.page)
    }

    /// One past the last page, counted from the sequence's start.
    pub(super) fn end(&self) -> u32 {
        self.first + self.pages.len() as u32
    }

    /// Which of `pages` lie wholly before a token.
    pub(super) fn before(&self, token: u32, pool: &Pool) -> usize {
        ((token / pool.shape.page).saturating_sub(self.first) as usize).min(self.pages.len())
    }

    /// Which of `pages` the next token after `len` would be written into, where others hold it too.
    pub(super) fn shared_tail(&self, len: u32, pool: &Pool) -> Option<usize> {
        let at = (len / pool.shape.page).checked_sub(self.first)? as usize;
        let page = *self.pages.get(at)?;
        // At a page's start nothing is there to share: the page is reserved, and reserved pages have one holder.
        (!len.is_multiple_of(pool.shape.page) && pool.refs(page) > 1).then_some(at)
    }

    /// Gives back the pages that lie wholly before a token, and says how many they were.
    pub(super) fn release_before(&mut self, token: u32, pool: &mut Pool) -> usize {
        let before = self.before(token, pool);
        self.first += before as u32;
        // The last to be freed is the first to be taken: pages come back in their order.
        self.pages.drain(..before).rev().for_each(|page| pool.release(page));
        before
    }

    /// Gives back the pages that lie wholly behind the first `len` tokens, and says how many they were.
    pub(super) fn shorten(&mut self, len: u32, pool: &mut Pool) -> usize {
        let keep = len.div_ceil(pool.shape.page).saturating_sub(self.first) as usize;
        let keep = keep.min(self.pages.len());
        let behind = self.pages.len() - keep;
        self.pages.drain(keep..).rev().for_each(|page| pool.release(page));
        // Where the page of the next token was given back with evicted ones, it comes again.
        self.first = self.first.min(len / pool.shape.page);
        // Tokens to come have content.
        self.blank = self.blank.min(len);
        behind
    }

    /// Holds the pages of another sequence's first `len` tokens.
    pub(super) fn share(&mut self, from: &Self, len: u32, pool: &mut Pool) {
        let pages = len.div_ceil(pool.shape.page).saturating_sub(from.first) as usize;
        (self.first, self.blank) = (from.first, from.blank);
        self.pages.extend_from_slice(&from.pages[..pages.min(from.pages.len())]);
        self.pages.iter().for_each(|page| pool.hold(*page));
    }
}
