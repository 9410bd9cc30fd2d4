//! Which sequences of a batch have keys in the same pages, so that these are read once for all of them (cascade attention,
//! FlashInfer, arXiv 2501.01005).

use std::ops::Range;

use super::resolve::Pool;
use crate::pages::{SequenceId, SequenceTable};
use crate::plan::{Shared, Span, StepInput, StepSequence};
use crate::spec::AttentionSpec;

/// Keys below which sharing is not worth a state of every row.
const MIN_SHARED: u32 = 32;

/// A sequence of the batch that may share keys: its index in the step's input, and its handle.
pub(super) type Candidate = (u32, SequenceId);

/// Finds shared keys among `candidates`, which must be sound handles of `table`.
pub(super) fn share(
    input: &mut StepInput,
    spec: &AttentionSpec,
    pool: Pool<'_>,
    candidates: &mut [Candidate],
) {
    let finder =
        Finder { spec, table: pool.table, pool: pool.index, page: pool.table.shape(pool.index).page };
    // Sequences that share pages stand side by side.
    candidates.sort_unstable_by(|a, b| finder.key(a.1).cmp(&finder.key(b.1)));
    let mut rest = 0..candidates.len();
    while !rest.is_empty() {
        let (first, begin, _) = finder.key(candidates[rest.start].1);
        let same = |c: &&Candidate| finder.key(c.1).0 == first && finder.key(c.1).1 == begin;
        let len = candidates[rest.clone()].iter().take_while(same).count();
        finder.level(input, &candidates[rest.start..rest.start + len], 0);
        rest.start += len.max(1);
    }
}

struct Finder<'a> {
    spec: &'a AttentionSpec,
    table: &'a SequenceTable,
    pool: usize,
    page: u32,
}

impl<'a> Finder<'a> {
    /// First page, evicted tokens, and the pages that hold tokens.
    fn key(&self, id: SequenceId) -> (u32, u32, &'a [u32]) {
        let (first, pages) = self.table.pages(id, self.pool).unwrap_or_default();
        let len = self.table.len(id).unwrap_or_default();
        let used = len.div_ceil(self.page).saturating_sub(first) as usize;
        (first, self.table.begin(id).unwrap_or_default(), &pages[..used.min(pages.len())])
    }

    /// Sequences whose first `depth` pages are the same ones: each run of them that shares the next, and then further.
    fn level(&self, input: &mut StepInput, group: &[Candidate], depth: usize) {
        let mut at = 0;
        while at < group.len() {
            let (first, _, pages) = self.key(group[at].1);
            let next = pages.get(depth);
            let same = |c: &&Candidate| next.is_some() && self.key(c.1).2.get(depth) == next;
            let len = group[at..].iter().take_while(same).count();
            let run = &group[at..at + len];
            at += len.max(1);
            let [_, .., last] = run else { continue };
            // Sorted, so what the first and the last share all do.
            let common = pages.iter().zip(self.key(last.1).2).take_while(|(a, b)| a == b).count();
            let keys = self.keys(input, run, (first + common as u32).saturating_mul(self.page));
            if keys.len() as u64 >= u64::from(MIN_SHARED) {
                emit(input, run, keys);
            }
            // Few keys that many share do not keep some of them from sharing more.
            self.level(input, run, common);
        }
    }

    /// Keys in front of `end` that a run shares, behind those that it shares with more.
    fn keys(&self, input: &StepInput, run: &[Candidate], end: u32) -> Range<u32> {
        let sequences = || run.iter().map(|c| &input.sequences[c.0 as usize]);
        // Draft tokens are masked, and rows of several sequences are not.
        let plain = |s: &StepSequence| if input.has_tree(s) { s.q_start.max(0) as u32 } else { s.kv_len };
        let end = sequences().map(plain).min().unwrap_or_default().min(end);
        // What lies in front of every window is read by none, and may be gone.
        let seen = sequences().map(|s| s.visible(self.spec, 0..1).start).min().unwrap_or_default();
        let live = self.table.live_from(run[0].1, self.pool).unwrap_or_default();
        // A level ends within a page where a sequence does; the next one goes on from there.
        input.sequences[run[0].0 as usize].own_from.max(live).max(seen)..end
    }
}

fn emit(input: &mut StepInput, run: &[Candidate], keys: Range<u32>) {
    let members = Span { first: input.members.len() as u32, count: run.len() as u32 };
    input.members.extend(run.iter().map(|c| c.0));
    for (nth, _) in run {
        input.sequences[*nth as usize].own_from = keys.end;
    }
    let any = input.sequences[run[0].0 as usize];
    let (key_begin, key_end) = (keys.start, keys.end);
    input.shared.push(Shared { key_begin, key_end, pages: any.pages, members, cuts: any.cuts });
}
