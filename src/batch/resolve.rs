//! Fills in the defaults of a batch, looks up its lengths, and checks every field.

use super::{Batch, Sequence};
use crate::error::Error;
use crate::layout::Shape;
use crate::pages::SequenceTable;
use crate::params::PackItem;
use crate::plan::{MaskPlace, StepAppend, StepSequence};
use crate::spec::{AttentionSpec, Mask, MaskLayout};

/// Rows of a sequence, tokens of a batch and such stay below: sums of two stay within u32.
const MAX_COUNT: u64 = 1 << 31;
/// Positions stay below where more depends on them than their order: windows reach as far again.
const MAX_POSITION: i64 = 1 << 29;
/// Draft tokens of a tree: the bits of a word.
const MAX_TREE: u32 = 64;

/// A batch with every default filled in and every length looked up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) sequences: Vec<StepSequence>,
    pub(crate) appends: Vec<StepAppend>,
    pub(crate) masks: Masks,
    /// Slots of each sequence in the cache.
    pub(crate) slots: u32,
    /// Tokens that `q`, `out` and `lse` reach.
    pub(crate) tokens: u32,
    /// Tokens that `new_k` and `new_v` reach.
    pub(crate) new_tokens: u32,
}

/// The step's masks: words of every sequence that has one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Masks {
    /// Words in all.
    pub(crate) words: u64,
    /// Dense masks, for `pack`.
    pub(crate) pack: Vec<PackItem>,
    /// Elements that the caller's mask must have.
    pub(crate) extent: u64,
    /// Trees, as they are uploaded.
    pub(crate) trees: Vec<u64>,
}

/// A count of something, below [`MAX_COUNT`].
fn count(field: &'static str, n: u64) -> Result<u32, Error> {
    match n < MAX_COUNT {
        true => Ok(n as u32),
        false => Err(Error::field(field, n, "it must be below 2^31: split the batch")),
    }
}

impl Batch<'_> {
    /// Looks up lengths in `table` and checks every field.
    pub(crate) fn resolve(&self, spec: &AttentionSpec, table: &SequenceTable) -> Result<Resolved, Error> {
        if self.mask.is_some() != spec.mask().is_dense() {
            let found = if self.mask.is_some() { "given" } else { "absent" };
            return Err(Error::field("batch.mask", found, "it goes with a spec whose mask is Keep or Add"));
        }
        let mut resolved = Resolved { slots: table.capacity(), ..Resolved::default() };
        let mut seen = vec![false; table.sequences() as usize];
        let (mut next, mut next_new) = (0, 0);
        for (nth, s) in self.sequences.iter().enumerate() {
            let kv_len = table.len(s.id)?;
            let index = s.id.index();
            if std::mem::replace(&mut seen[index as usize], true) {
                return Err(Error::RepeatedSequence { sequence: index });
            }
            if s.new_len > kv_len {
                let needed = format!(
                    "sequence {index} has {kv_len} tokens in the cache: call `KvCache::extend` first"
                );
                return Err(Error::field("sequence.new_len", s.new_len, needed));
            }
            count("sequence.q_len * q_heads", u64::from(s.q_len) * u64::from(spec.q_heads()))?;
            count("sequence.kv_len + q_len", u64::from(kv_len) + u64::from(s.q_len))?;
            let page = table.pages(s.id, 0)?.1.first().copied().unwrap_or(0);
            let token = s.token.unwrap_or(next);
            let new_token = s.new_token.unwrap_or(next_new);
            next = count("sequence.token + q_len", u64::from(token) + u64::from(s.q_len))?;
            next_new = count("sequence.new_token + new_len", u64::from(new_token) + u64::from(s.new_len))?;
            resolved.tokens = resolved.tokens.max(next);
            resolved.new_tokens = resolved.new_tokens.max(next_new);
            let whole = StepSequence {
                token,
                q_len: s.q_len,
                q_start: s.q_start(spec, kv_len)?,
                kv_len,
                cache_row: page * spec.kv_heads() * table.capacity(),
                ..StepSequence::default()
            };
            s.check_tree(spec, kv_len)?;
            let mask = match (self.mask, s.tree) {
                (Some(layout), _) => resolved.masks.dense(spec, (nth as u32, &layout), &whole)?,
                (None, Some(tree)) => resolved.masks.tree(tree, whole.q_start),
                (None, None) => MaskPlace { key: -(kv_len as i32), ..MaskPlace::default() },
            };
            resolved.sequences.extend(s.pieces(StepSequence { mask, ..whole })?);
            let new = StepAppend {
                token: new_token,
                len: s.new_len,
                slot: kv_len - s.new_len,
                position: kv_len - s.new_len,
                cache_row: whole.cache_row,
            };
            resolved.appends.extend(s.appends(spec, new));
        }
        check_apart(&resolved.sequences)?;
        self.check_layouts(spec, &resolved)?;
        Ok(resolved)
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

    /// Each document apart, and the queries that lie in none. A sequence without documents is one.
    fn pieces(&self, whole: StepSequence) -> Result<Vec<StepSequence>, Error> {
        let Some(lens) = self.documents else { return Ok(vec![whole]) };
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
                cache_row: whole.cache_row + origin,
                origin,
                mask: MaskPlace {
                    word: whole.mask.word + skipped * whole.mask.token,
                    key: whole.mask.key + origin as i32,
                    ..whole.mask
                },
            }
        };
        let mut pieces = vec![piece(first, 0, (0, 0)), piece(i64::from(whole.kv_len), last, (0, 0))];
        let mut begin = 0;
        for len in lens {
            pieces.push(piece(i64::from(begin), i64::from(begin) + i64::from(*len), (begin, *len)));
            begin += len;
        }
        pieces.retain(|piece| piece.q_len > 0);
        Ok(pieces)
    }

    /// The new tokens: in one run, but for those of a tree that turn to positions of their own.
    fn appends(&self, spec: &AttentionSpec, new: StepAppend) -> Vec<StepAppend> {
        let (Some(tree), Some(_)) = (self.tree, spec.rope()) else { return vec![new] };
        let kv_len = new.slot + new.len;
        let first = kv_len - tree.len() as u32;
        let part = |slot: u32, len: u32, position: u32| StepAppend {
            token: new.token + slot - new.slot,
            len,
            slot,
            position,
            cache_row: new.cache_row,
        };
        let before = (new.slot < first).then(|| part(new.slot, first - new.slot, new.slot));
        let depth = |slot: u32| tree[(slot - first) as usize].count_ones().max(1) - 1;
        let drafts = (first.max(new.slot)..kv_len).map(|slot| part(slot, 1, first + depth(slot)));
        before.into_iter().chain(drafts).collect()
    }
}

impl Masks {
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
        let word = self.words;
        // One row where all tokens share it.
        let rows = if layout.token_stride == 0 { q_len.min(1) } else { q_len };
        let plane = u64::from(rows) * u64::from(pitch);
        self.words += u64::from(heads) * plane;
        if q_len > 0 && kv_len > 0 {
            self.extent = self.extent.max(layout.index([nth, heads - 1, q_len - 1, kv_len - 1]) + 1);
        }
        if self.words > u64::from(u32::MAX) || self.extent > u64::from(u32::MAX) {
            let found = format!("{} elements long, {} words packed", self.extent, self.words);
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

    /// Makes room for a tree whose first token lies at `first`.
    fn tree(&mut self, tree: &[u64], first: i32) -> MaskPlace {
        let word = self.words as u32;
        self.trees.extend_from_slice(tree);
        self.words = 2 * self.trees.len() as u64;
        MaskPlace { word, head: 0, token: 2, key: -first }
    }
}

impl Resolved {
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

/// That no two sequences write the same output token.
fn check_apart(sequences: &[StepSequence]) -> Result<(), Error> {
    let mut spans: Vec<_> =
        sequences.iter().filter(|s| s.q_len > 0).map(|s| (s.token, s.token + s.q_len)).collect();
    spans.sort_unstable();
    match spans.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => {
            let needed = format!("token {} is an output of another sequence already", pair[1].0);
            Err(Error::field("sequence.token", pair[1].0, needed))
        }
        None => Ok(()),
    }
}
