//! Renumbering pages, so that those of a sequence lie together.

use super::{PageMove, Place, SequenceTable};

/// No page: what has no new number, or gets no content.
const NONE: u32 = u32::MAX;

impl SequenceTable {
    /// Renumbers the used pages from 0, sequence by sequence, a shared page with its first holder. Contents must follow `moves`.
    pub(crate) fn defragment(&mut self, moves: &mut Vec<PageMove>) {
        for (nth, pool) in self.pools.iter_mut().enumerate() {
            // The old number of each new one, and the new number of each old one.
            let mut sources = Vec::new();
            let mut numbers = vec![NONE; pool.refs.len()];
            for (index, entry) in self.entries.iter_mut().enumerate() {
                let mut has_moved = false;
                for page in &mut entry.lists[nth].pages {
                    let number = &mut numbers[*page as usize];
                    if *number == NONE {
                        *number = sources.len() as u32;
                        sources.push(*page);
                    }
                    has_moved |= page != number;
                    *page = *number;
                }
                if has_moved {
                    self.changes.add(nth, index);
                }
            }
            let mut refs: Vec<_> = sources.iter().map(|old| pool.refs(*old)).collect();
            refs.resize(pool.refs.len(), 0);
            let is_free = |page: u32| numbers[page as usize] == NONE;
            let pages = order(sources, is_free);
            moves.extend(pages.into_iter().map(|(from, to)| PageMove { pool: nth, from, to }));
            pool.refill(refs);
        }
    }
}

/// Moves, none onto a content that is still needed, that bring each page's content from `sources[page]`.
fn order(mut sources: Vec<u32>, is_free: impl Fn(u32) -> bool) -> Vec<(Place, Place)> {
    let mut moves = Vec::new();
    for page in 0..sources.len() as u32 {
        if is_free(page) {
            follow(page, &mut sources, &mut moves);
        }
    }
    // What is left stays, or goes round: then the first to be overwritten waits in the spare page.
    for page in 0..sources.len() as u32 {
        if sources[page as usize] != NONE && sources[page as usize] != page {
            moves.push((Place::Page(page), Place::Spare));
            follow(page, &mut sources, &mut moves);
            if let Some((from, _)) = moves.last_mut() {
                *from = Place::Spare;
            }
        }
    }
    moves
}

/// Fills a page, then the one that its content came from, and so on until one that needs no content or has got it.
fn follow(mut to: u32, sources: &mut [u32], moves: &mut Vec<(Place, Place)>) {
    while let Some(from) = sources.get_mut(to as usize).filter(|from| **from != NONE) {
        let from = std::mem::replace(from, NONE);
        moves.push((Place::Page(from), Place::Page(to)));
        to = from;
    }
}
