//! Fills in the defaults of a batch, looks up its lengths, and checks every field.

use super::share::{Candidate, share};
use super::{Batch, Sequence};
use crate::error::Error;
use crate::layout::Shape;
use crate::pages::{KnownChanges, PoolShape, SequenceTable};
use crate::params::PackItem;
use crate::plan::{Cut, MaskPlace, Plan, Span, StepAppend, StepInput, StepSequence};
use crate::spec::{AttentionSpec, Mask, MaskLayout};

/// Rows of a sequence, tokens of a batch and such stay below: sums of two stay within u32.
const MAX_COUNT: u64 = 1 << 31;
/// Positions stay below where more depends on them than their order: windows reach as far again.
const MAX_POSITION: i64 = 1 << 29;
/// Draft tokens of a tree: the bits of a word.
const MAX_TREE: u32 = 64;

/// A batch with every default filled in and every length looked up. Filled anew for each step; its memory stays.
#[derive(Debug, Default)]
pub(crate) struct Resolved {
    /// What work lists are made from.
    pub(crate) input: StepInput,
    /// Dense masks, for `pack`.
    pub(crate) pack: Vec<PackItem>,
    /// Elements that the caller's mask must have.
    pub(crate) mask_extent: u64,
    /// Tokens that `q`, `out` and `lse` reach.
    pub(crate) tokens: u32,
    /// Tokens that `new_k` and `new_v` reach.
    pub(crate) new_tokens: u32,
    /// What was known of the cache's changes: whether the sequences still lie where they lay.
    pub(crate) changes: KnownChanges,
    /// Scratch: whether a sequence has been named, who may share keys, which output tokens are taken.
    seen: Vec<bool>,
    candidates: Vec<Candidate>,
    spans: Vec<(u32, u32)>,
}

/// The sequences of a cache, as the layers of one kind have them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pool<'a> {
    pub(crate) table: &'a SequenceTable,
    pub(crate) index: usize,
    /// Whether sequences count as long as they can become: for loops on the GPU.
    pub(crate) reserved: bool,
}

/// The first token that lies in two of these spans, none of which is empty.
pub(crate) fn shared_token(spans: &mut [(u32, u32)]) -> Option<u32> {
    spans.sort_unstable();
    spans.windows(2).find(|pair| pair[1].0 < pair[0].1).map(|pair| pair[1].0)
}

/// A count of something, below [`MAX_COUNT`].
fn count(field: &'static str, n: u64) -> Result<u32, Error> {
    match n < MAX_COUNT {
        true => Ok(n as u32),
        false => Err(Error::field(field, n, "it must be below 2^31: split the batch")),
    }
}

impl Batch<'_> {
    /// Looks up lengths and pages in `pool` and checks every field.
    pub(crate) fn resolve(&self, plan: &Plan, pool: Pool<'_>, resolved: &mut Resolved) -> Result<(), Error> {
        let spec = plan.spec();
        if self.mask.is_some() != spec.mask().is_dense() {
            let found = if self.mask.is_some() { "given" } else { "absent" };
            return Err(Error::field("batch.mask", found, "it goes with a spec whose mask is Keep or Add"));
        }
        resolved.clear(pool.table);
        resolved.changes.begin(pool.table.changes(), pool.index);
        let (mut next, mut next_new) = (0, 0);
        for (nth, s) in self.sequences.iter().enumerate() {
            let len = pool.table.len(s.id)?;
            // Of a loop, new tokens lie in what is reserved beyond the length.
            let (kv_len, most_new) = match pool.reserved {
                true => pool.table.reserved(s.id).map(|reserved| (reserved, reserved - len))?,
                false => (len, len),
            };
            let index = s.id.index();
            if std::mem::replace(&mut resolved.seen[index as usize], true) {
                return Err(Error::RepeatedSequence { sequence: index });
            }
            resolved.changes.learn(index);
            if s.new_len > most_new {
                let needed = match pool.reserved {
                    true => format!(
                        "sequence {index} has room for {most_new} more: call `KvCache::reserve` first"
                    ),
                    false => format!(
                        "sequence {index} has {len} tokens in the cache: call `KvCache::extend` first"
                    ),
                };
                return Err(Error::field("sequence.new_len", s.new_len, needed));
            }
            count("sequence.q_len * q_heads", u64::from(s.q_len) * u64::from(spec.q_heads()))?;
            count("sequence.kv_len + q_len", u64::from(kv_len) + u64::from(s.q_len))?;
            let token = s.token.unwrap_or(next);
            let new_token = s.new_token.unwrap_or(next_new);
            next = count("sequence.token + q_len", u64::from(token) + u64::from(s.q_len))?;
            next_new = count("sequence.new_token + new_len", u64::from(new_token) + u64::from(s.new_len))?;
            resolved.tokens = resolved.tokens.max(next);
            resolved.new_tokens = resolved.new_tokens.max(next_new);
            let (pages, cuts) = resolved.pages(s, pool)?;
            let whole = StepSequence {
                token,
                q_len: s.q_len,
                q_start: s.q_start(spec, kv_len)?,
                kv_len,
                pages,
                begin: pool.table.begin(s.id)?,
                cuts,
                nth: nth as u32,
                ..StepSequence::default()
            };
            s.check_tree(spec, kv_len)?;
            s.check_kept(spec, &whole, pool)?;
            if pool.reserved {
                // A loop begins with the shortest, whose windows reach back furthest.
                let kv_len = len + s.new_len;
                let first = StepSequence { kv_len, q_start: s.q_start(spec, kv_len)?, ..whole };
                s.check_kept(spec, &first, pool)?;
            }
            let mask = match (self.mask, s.tree) {
                (Some(layout), _) => resolved.dense(spec, (nth as u32, &layout), &whole)?,
                (None, Some(tree)) => resolved.tree(tree, whole.q_start),
                (None, None) => MaskPlace { key: -(kv_len as i32), ..MaskPlace::default() },
            };
            let is_small = whole.q_len > 0 && whole.q_len * spec.group() < plan.prefill().tile.rows;
            if is_small && s.documents.is_none() && pool.table.begins_shared(s.id, pool.index)? {
                resolved.candidates.push((resolved.input.sequences.len() as u32, s.id));
            }
            s.pieces(StepSequence { mask, ..whole }, &mut resolved.input.sequences)?;
            let slot = kv_len - s.new_len;
            let new = StepAppend {
                token: new_token,
                len: s.new_len,
                slot,
                position: slot,
                pages,
                cuts,
                nth: nth as u32,
            };
            s.appends(spec, new, &mut resolved.input.appends);
        }
        resolved.behind_masks()?;
        if !spec.mask().is_dense() && !pool.reserved {
            share(&mut resolved.input, spec, pool, &mut resolved.candidates);
        }
        resolved.check_apart()?;
        self.check_layouts(spec, resolved)
    }

    fn check_layouts(&self, spec: &AttentionSpec, resolved: &Resolved) -> Result<(), Error> {
        let [q, out, new_k, new_v, lse] = resolved.shapes(spec);
        self.q.check_reach("q", q)?;
        self.out.check_reach("out", out)?;
        self.out.check_disjoint("out", out)?;
        self.new_k.check_reach("new_k", new_k)?;
        self.new_v.check_reach("new_v", new_v)?;
        if let Some(layout) = self.lse {
            layout.check_reach("lse", lse)?;
            layout.check_disjoint("lse", lse)?;
        }
        Ok(())
    }
}

impl Sequence<'_> {
    /// The position of the first query, within what shaders can count.
    fn q_start(&self, spec: &AttentionSpec, kv_len: u32) -> Result<i32, Error> {
        let (q_len, kv_len) = (i64::from(self.q_len), i64::from(kv_len));
        let start = self.q_start.map_or(kv_len - q_len, i64::from);
        if !spec.is_positional() {
            // Beyond the last key, and before the first by all queries, nothing changes.
            return Ok(start.clamp(-q_len, kv_len) as i32);
        }
        match -MAX_POSITION <= start && start + q_len <= MAX_POSITION && kv_len <= MAX_POSITION {
            true => Ok(start as i32),
            false => {
                let needed = "with a window, ALiBi or RoPE positions lie within 2^29 of the first key";
                Err(Error::field("sequence.q_start", start, needed))
            }
        }
    }

    fn check_tree(&self, spec: &AttentionSpec, kv_len: u32) -> Result<(), Error> {
        let Some(tree) = self.tree else { return Ok(()) };
        let refuse = |found: String, needed: String| Err(Error::field("sequence.tree", found, needed));
        if spec.mask() != Mask::Tree {
            return refuse("given".to_owned(), "the spec's mask is not Tree".to_owned());
        }
        if self.documents.is_some() {
            return refuse("given".to_owned(), "a sequence with documents has no tree".to_owned());
        }
        if tree.len() != self.q_len as usize || self.q_len > MAX_TREE {
            let needed = format!("it needs a word for each of {} queries, {MAX_TREE} at most", self.q_len);
            return refuse(format!("{} words", tree.len()), needed);
        }
        if self.q_start.is_some() || self.q_len > kv_len {
            let needed = format!("its queries are the last of {kv_len} tokens: leave q_start out");
            return refuse(format!("of {} queries", self.q_len), needed);
        }
        let beyond = if self.q_len == MAX_TREE { 0 } else { u64::MAX << self.q_len };
        match tree.iter().position(|word| word & beyond != 0) {
            Some(i) => {
                refuse(format!("{:#x} in word {i}", tree[i]), format!("there are {} tokens", self.q_len))
            }
            None => Ok(()),
        }
    }

    /// That no query's window reaches back to keys which a pool with a window has let go, and no new token lies among them.
    fn check_kept(&self, spec: &AttentionSpec, whole: &StepSequence, pool: Pool<'_>) -> Result<(), Error> {
        let live = pool.table.live_from(self.id, pool.index)?;
        let slot = whole.kv_len - self.new_len;
        if self.new_len > 0 && slot < live {
            let needed =
                format!("tokens before {live} are evicted, or behind every window: {slot} is no place");
            return Err(Error::field("sequence.new_len", self.new_len, needed));
        }
        if whole.q_len == 0 {
            return Ok(());
        }
        // The first query may see evicted keys only, and those behind it others that are gone: all of them count.
        let keys = whole.visible(spec, 0..whole.q_len * spec.group());
        if keys.start < live.min(keys.end) {
            let needed =
                format!("layers with a window have kept the keys from {live} on: queries see others");
            return Err(Error::field("sequence.q_start", whole.q_start, needed));
        }
        Ok(())
    }

    /// Each document apart, and the queries that lie in none. A sequence without documents is one.
    fn pieces(&self, whole: StepSequence, all: &mut Vec<StepSequence>) -> Result<(), Error> {
        let Some(lens) = self.documents else {
            all.push(whole);
            return Ok(());
        };
        let total: u64 = lens.iter().map(|len| u64::from(*len)).sum();
        if total != u64::from(whole.kv_len) {
            let needed = format!("they must make up the {} tokens of the sequence", whole.kv_len);
            return Err(Error::field("sequence.documents", format!("{total} tokens"), needed));
        }
        // Queries from one position up to another, as a piece that sees the keys of one document.
        let (first, last) = (i64::from(whole.q_start), i64::from(whole.q_start) + i64::from(whole.q_len));
        let piece = |from: i64, to: i64, keys: (u32, u32)| {
            let (from, to) = (from.clamp(first, last), to.clamp(first, last));
            let skipped = (from - first) as u32;
            let (origin, kv_len) = keys;
            StepSequence {
                token: whole.token + skipped,
                q_len: (to - from).max(0) as u32,
                q_start: (from - i64::from(origin)) as i32,
                kv_len,
                pages: whole.pages,
                cuts: whole.cuts,
                nth: whole.nth,
                origin,
                begin: whole.begin.saturating_sub(origin),
                own_from: 0,
                mask: MaskPlace {
                    word: whole.mask.word + skipped * whole.mask.token,
                    key: whole.mask.key + origin as i32,
                    ..whole.mask
                },
            }
        };
        let outside = [piece(first, 0, (0, 0)), piece(i64::from(whole.kv_len), last, (0, 0))];
        let mut begin = 0;
        let documents = lens.iter().map(|len| {
            let from = begin;
            begin += len;
            piece(i64::from(from), i64::from(begin), (from, *len))
        });
        all.extend(outside.into_iter().chain(documents).filter(|piece| piece.q_len > 0));
        Ok(())
    }

    /// The new tokens: in one run, but for those of a tree that turn to positions of their own.
    fn appends(&self, spec: &AttentionSpec, new: StepAppend, all: &mut Vec<StepAppend>) {
        let (Some(tree), Some(_)) = (self.tree, spec.rope()) else {
            all.push(new);
            return;
        };
        let kv_len = new.slot + new.len;
        let first = kv_len - tree.len() as u32;
        let part = |slot: u32, len: u32, position: u32| StepAppend {
            token: new.token + slot - new.slot,
            len,
            slot,
            position,
            ..new
        };
        let before = (new.slot < first).then(|| part(new.slot, first - new.slot, new.slot));
        let depth = |slot: u32| tree[(slot - first) as usize].count_ones().max(1) - 1;
        let drafts = (first.max(new.slot)..kv_len).map(|slot| part(slot, 1, first + depth(slot)));
        all.extend(before.into_iter().chain(drafts));
    }
}

impl Resolved {
    /// Forgets all but the memory.
    fn clear(&mut self, table: &SequenceTable) {
        self.input.clear();
        self.pack.clear();
        self.candidates.clear();
        self.seen.clear();
        self.seen.resize(table.sequences() as usize, false);
        (self.mask_extent, self.tokens, self.new_tokens) = (0, 0, 0);
    }

    /// Writes the page table of a sequence, in numbers of its shard, and where it goes from shard to shard.
    fn pages(&mut self, s: &Sequence<'_>, pool: Pool<'_>) -> Result<(u32, Span), Error> {
        let (first, pages) = pool.table.pages(s.id, pool.index)?;
        let PoolShape { page, pages: all, pages_per_shard: per_shard, .. } = pool.table.shape(pool.index);
        let input = &mut self.input;
        let at = (input.words.len() as u32).wrapping_sub(first);
        input.shards = all.div_ceil(per_shard);
        let mut cuts = Span { first: input.cuts.len() as u32, count: 0 };
        if input.shards > 1 {
            for (nth, id) in (first + 1..).zip(pages) {
                let (end, shard) = (nth.saturating_mul(page), id / per_shard);
                match input.cuts[cuts.first as usize..].last_mut() {
                    Some(last) if last.shard == shard => last.end = end,
                    _ => input.cuts.push(Cut { end, shard }),
                }
            }
            cuts.count = input.cuts.len() as u32 - cuts.first;
        }
        // Most caches are one shard: then the numbers are the same, and copying them is all.
        match input.shards {
            1 => input.words.extend_from_slice(pages),
            _ => input.words.extend(pages.iter().map(|id| id % per_shard)),
        }
        // Without a page there is nothing to read; the index stays in range all the same.
        if pages.is_empty() {
            input.words.push(0);
        }
        Ok((at, cuts))
    }

    /// The words of dense masks come first: all others move behind them.
    fn behind_masks(&mut self) -> Result<(), Error> {
        let words = self.input.dense + self.input.words.len() as u64;
        if words > u64::from(u32::MAX) {
            let needed = "a shader index has 32 bits: broadcast what is the same, or split the batch";
            return Err(Error::field("batch", format!("{words} words of masks and pages"), needed));
        }
        let dense = self.input.dense as u32;
        for s in &mut self.input.sequences {
            s.pages = s.pages.wrapping_add(dense);
        }
        for new in &mut self.input.appends {
            new.pages = new.pages.wrapping_add(dense);
        }
        Ok(())
    }

    /// That no two sequences write the same output token.
    fn check_apart(&mut self) -> Result<(), Error> {
        self.spans.clear();
        let queries = self.input.sequences.iter().filter(|s| s.q_len > 0);
        self.spans.extend(queries.map(|s| (s.token, s.token + s.q_len)));
        match shared_token(&mut self.spans) {
            Some(token) => {
                let needed = format!("token {token} is an output of another sequence already");
                Err(Error::field("sequence.token", token, needed))
            }
            None => Ok(()),
        }
    }

    /// Makes room for the dense mask of the `nth` sequence.
    fn dense(
        &mut self,
        spec: &AttentionSpec,
        (nth, layout): (u32, &MaskLayout),
        sequence: &StepSequence,
    ) -> Result<MaskPlace, Error> {
        let StepSequence { q_len, kv_len, .. } = *sequence;
        let heads = if layout.head_stride == 0 { 1 } else { spec.q_heads() };
        let pitch = match spec.mask() {
            Mask::Keep => kv_len.div_ceil(32),
            _ => kv_len,
        };
        let word = self.input.dense;
        // One row where all tokens share it.
        let rows = if layout.token_stride == 0 { q_len.min(1) } else { q_len };
        let plane = u64::from(rows) * u64::from(pitch);
        self.input.dense += u64::from(heads) * plane;
        if q_len > 0 && kv_len > 0 {
            self.mask_extent =
                self.mask_extent.max(layout.index([nth, heads - 1, q_len - 1, kv_len - 1]) + 1);
        }
        let (extent, packed) = (self.mask_extent, self.input.dense);
        if packed > u64::from(u32::MAX) || extent > u64::from(u32::MAX) {
            let found = format!("{extent} elements long, {packed} words packed");
            let needed = "a shader index has 32 bits: broadcast what is the same, or split the batch";
            return Err(Error::field("batch.mask", found, needed));
        }
        if plane > 0 {
            let source = layout.index([nth, 0, 0, 0]) as u32;
            self.pack.push(PackItem { word: word as u32, pitch, heads, q_len: rows, kv_len, source });
        }
        let head = if heads == 1 { 0 } else { plane as u32 };
        let token = if layout.token_stride == 0 { 0 } else { pitch };
        Ok(MaskPlace { word: word as u32, head, token, key: 0 })
    }

    /// Writes a tree whose first token lies at `first`. A step has trees or dense masks, so these words do not move.
    fn tree(&mut self, tree: &[u64], first: i32) -> MaskPlace {
        let word = self.input.words.len() as u32;
        self.input.words.extend(tree.iter().flat_map(|bits| [*bits as u32, (bits >> 32) as u32]));
        MaskPlace { word, head: 0, token: 2, key: -first }
    }

    /// Shapes of `q`, `out`, `new_k`, `new_v`, `lse`.
    pub(crate) fn shapes(&self, spec: &AttentionSpec) -> [Shape; 5] {
        let shape = |tokens, heads, dim| Shape { tokens, heads, dim };
        let new_values = if spec.v_in_k() { 0 } else { self.new_tokens };
        [
            shape(self.tokens, spec.q_heads(), spec.head_dim()),
            shape(self.tokens, spec.q_heads(), spec.v_head_dim()),
            shape(self.new_tokens, spec.kv_heads(), spec.head_dim()),
            shape(new_values, spec.kv_heads(), spec.v_head_dim()),
            shape(self.tokens, spec.q_heads(), 1),
        ]
    }
}
