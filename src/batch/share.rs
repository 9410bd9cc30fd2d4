//! Which sequences of a batch have keys in the same pages, so that these are read once for all of them (cascade attention,
//! FlashInfer, arXiv 2501.01005).

use std::ops::Range;

use super::resolve::Pool;
use crate::pages::{SequenceId, SequenceTable};
use crate::plan::{Shared, Span, StepInput};
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
    let finder = Finder { spec, table: pool.table, pool: pool.index, page: pool.table.shape(pool.index).page };
    // Sequences that share pages stand side by side.
    candidates.sort_unstable_by(|a, b| finder.key(a.1).cmp(&finder.key(b.1)));
    let mut rest = 0..candidates.len();
    while !rest.is_empty() {
        let (first, begin, _) = finder.key(candidates[rest.start].1);
        let same = |c: &&Candidate| finder.key(c.1).0 == first && finder.key(c.1).1 == begin;
        let len = candidates[rest.clone()].iter().take_while(same).count();
        finder.level(input, &candidates[rest.start..rest.start + len], (0, 0));
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

    /// Sequences whose first `depth` pages are the same ones, and whose keys before `shared` are shared already: each run of them that
    /// has the next page in common, and then further.
    fn level(&self, input: &mut StepInput, group: &[Candidate], (depth, shared): (usize, u32)) {
        let mut at = 0;
        while at < group.len() {
            let (first, begin, pages) = self.key(group[at].1);
            let next = pages.get(depth);
            let same = |c: &&Candidate| next.is_some() && self.key(c.1).2.get(depth) == next;
            let len = group[at..].iter().take_while(same).count();
            let run = &group[at..at + len];
            at += len.max(1);
            let [_, .., last] = run else { continue };
            // Sorted, so what the first and the last share all do.
            let common = pages.iter().zip(self.key(last.1).2).take_while(|(a, b)| a == b).count();
            let of = |page: usize| (first + page as u32).saturating_mul(self.page);
            let sequence = |c: &Candidate| &input.sequences[c.0 as usize];
            // A tree hides some of the last keys from some rows.
            let shortest = run.iter().map(|c| sequence(c).unmasked()).min().unwrap_or_default();
            // What lies in front of every window is read by none.
            let first_seen = |c: &Candidate| sequence(c).visible(self.spec, 0..1).start;
            let seen = run.iter().map(first_seen).min().unwrap_or_default();
            let keys = shared.max(begin).max(seen)..of(common).min(shortest);
            let is_worth_it = keys.len() as u64 >= u64::from(MIN_SHARED);
            // The shortest may end within a page that the others go on in. And where this is too little for all, some of them may
            // share more.
            let shared = if is_worth_it { keys.end } else { shared };
            if is_worth_it {
                emit(input, run, keys);
            }
            self.level(input, run, (common, shared));
        }
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
