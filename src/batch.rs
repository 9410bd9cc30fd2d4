//! What one forward call asks: a ragged batch of sequences and the layouts of its tensors. Pure data.

use crate::error::Error;
use crate::layout::{Layout, Shape};
use crate::pages::{SequenceId, SequenceTable};
use crate::plan::StepSequence;
use crate::spec::AttentionSpec;

/// One sequence of a [`Batch`]: a prefill, a decode, a chunk of a prefill or nothing at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Which sequence of the cache; its length there counts the new tokens already.
    pub id: SequenceId,
    /// Query tokens, 0 or more.
    pub q_len: u32,
    /// How many of the sequence's tokens `append` writes: the last ones.
    pub new_len: u32,
    /// Position of the first query among the keys. `None`: the queries are the last tokens (`kv_len - q_len`, bottom-right
    /// aligned); `Some(0)`: they are the first (top-left).
    pub q_start: Option<i32>,
    /// The first query's token in `q`, `out` and `lse`. `None`: behind the sequence before.
    pub token: Option<u32>,
    /// The first new token in `new_k` and `new_v`. `None`: behind the sequence before.
    pub new_token: Option<u32>,
}

impl Sequence {
    /// The last `len` tokens of a sequence are new and are the queries: a prefill, or with 1 a decode.
    pub fn new(id: SequenceId, len: u32) -> Self {
        Self { id, q_len: len, new_len: len, q_start: None, token: None, new_token: None }
    }
}

/// A ragged batch: prefills and decodes mixed, and where the elements of its tensors lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch<'a> {
    /// The sequences.
    pub sequences: &'a [Sequence],
    /// Queries: `(token, q_heads, head_dim)`.
    pub q: Layout,
    /// Outputs: `(token, q_heads, v_head_dim)`.
    pub out: Layout,
    /// Log-sum-exp, natural: `(token, q_heads, 1)` in f32, where wanted.
    pub lse: Option<Layout>,
    /// New keys: `(token, kv_heads, head_dim)`.
    pub new_k: Layout,
    /// New values: `(token, kv_heads, v_head_dim)`.
    pub new_v: Layout,
}

impl<'a> Batch<'a> {
    /// Dense `[tokens, heads, dim]` tensors, no LSE.
    pub fn new(spec: &AttentionSpec, sequences: &'a [Sequence]) -> Self {
        Self {
            sequences,
            q: Layout::tokens_heads(spec.q_heads(), spec.head_dim()),
            out: Layout::tokens_heads(spec.q_heads(), spec.v_head_dim()),
            lse: None,
            new_k: Layout::tokens_heads(spec.kv_heads(), spec.head_dim()),
            new_v: Layout::tokens_heads(spec.kv_heads(), spec.v_head_dim()),
        }
    }

    /// The same with a dense `[tokens, q_heads]` log-sum-exp.
    #[must_use]
    pub fn with_lse(mut self, spec: &AttentionSpec) -> Self {
        self.lse = Some(Layout::tokens_heads(spec.q_heads(), 1));
        self
    }
}

/// A batch with every default filled in and every length looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) sequences: Vec<StepSequence>,
    /// Slots of each sequence in the cache.
    pub(crate) slots: u32,
    /// Tokens that `q`, `out` and `lse` reach.
    pub(crate) tokens: u32,
    /// Tokens that `new_k` and `new_v` reach.
    pub(crate) new_tokens: u32,
}

/// Largest number of rows of a sequence, tokens of a batch and such: sums of two stay within u32.
const MAX_COUNT: u64 = 1 << 31;

impl Batch<'_> {
    /// Looks up lengths in `table` and checks every field.
    pub(crate) fn resolve(&self, spec: &AttentionSpec, table: &SequenceTable) -> Result<Resolved, Error> {
        let mut sequences = Vec::with_capacity(self.sequences.len());
        let mut seen = vec![false; table.sequences() as usize];
        let (mut tokens, mut new_tokens) = (0, 0);
        let (mut next, mut next_new) = (0, 0);
        for s in self.sequences {
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
            let count = |field, n: u64| match n < MAX_COUNT {
                true => Ok(n as u32),
                false => Err(Error::field(field, n, "it must be below 2^31: split the batch")),
            };
            count("sequence.q_len * q_heads", u64::from(s.q_len) * u64::from(spec.q_heads()))?;
            let token = s.token.unwrap_or(next);
            let new_token = s.new_token.unwrap_or(next_new);
            next = count("sequence.token + q_len", u64::from(token) + u64::from(s.q_len))?;
            next_new = count("sequence.new_token + new_len", u64::from(new_token) + u64::from(s.new_len))?;
            let q_start = s.q_start.map_or(i64::from(kv_len) - i64::from(s.q_len), i64::from);
            // Beyond the last key, and before the first by all queries, nothing changes; shaders add rows to it in i32.
            let q_start = q_start.clamp(-i64::from(s.q_len), i64::from(kv_len));
            count("sequence.kv_len + q_len", u64::from(kv_len) + u64::from(s.q_len))?;
            tokens = tokens.max(next);
            new_tokens = new_tokens.max(next_new);
            sequences.push(StepSequence {
                token,
                q_len: s.q_len,
                q_start: q_start as i32,
                kv_len,
                new_token,
                new_len: s.new_len,
                cache_row: index * spec.kv_heads() * table.capacity(),
            });
        }
        check_apart(&sequences)?;
        let resolved = Resolved { sequences, slots: table.capacity(), tokens, new_tokens };
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

impl Resolved {
    /// Shapes of `q`, `out`, `new_k`, `new_v`, `lse`.
    pub(crate) fn shapes(&self, spec: &AttentionSpec) -> [Shape; 5] {
        let shape = |tokens, heads, dim| Shape { tokens, heads, dim };
        [
            shape(self.tokens, spec.q_heads(), spec.head_dim()),
            shape(self.tokens, spec.q_heads(), spec.v_head_dim()),
            shape(self.new_tokens, spec.kv_heads(), spec.head_dim()),
            shape(self.new_tokens, spec.kv_heads(), spec.v_head_dim()),
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
