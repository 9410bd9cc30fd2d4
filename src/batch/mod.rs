//! What one forward call asks: a ragged batch of sequences and the layouts of its tensors. Pure data.

mod resolve;
mod share;
#[cfg(test)]
mod tests;

use crate::layout::Layout;
use crate::pages::SequenceId;
use crate::spec::{AttentionSpec, MaskLayout};

pub(crate) use resolve::{Pool, Resolved, shared_token};

/// One sequence of a [`Batch`]: a prefill, a decode, a chunk of a prefill or nothing at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence<'a> {
    /// Which sequence of the cache; its length there counts the new tokens already.
    pub id: SequenceId,
    /// Query tokens, 0 or more.
    pub q_len: u32,
    /// How many of the sequence's tokens `append` writes: the last ones. All that [`KvCache::extend`](crate::KvCache::extend) has added
    /// since the last step must be among them, or queries see slots that nothing was written into.
    pub new_len: u32,
    /// Position of the first query among the keys. `None`: the queries are the last tokens (`kv_len - q_len`, bottom-right
    /// aligned); `Some(0)`: they are the first (top-left).
    pub q_start: Option<i32>,
    /// The first query's token in `q`, `out` and `lse`. `None`: behind the sequence before.
    pub token: Option<u32>,
    /// The first new token in `new_k` and `new_v`. `None`: behind the sequence before.
    pub new_token: Option<u32>,
    /// With [`Mask::Tree`](crate::Mask::Tree), a tree of draft tokens (speculative decoding): the queries are the last `q_len`
    /// tokens, at most 64, and bit `j` of word `i` says whether query `i` sees the `j`-th of them; it sees all keys before.
    /// Causality, windows and ALiBi go by place in the sequence, as ever. Where the spec turns queries and keys, a token's position is
    /// that of the first draft token plus its depth: the number of draft tokens that it sees, itself not counted.
    pub tree: Option<&'a [u64]>,
    /// Lengths of the documents that the sequence is packed from, in order, all its tokens together: a query sees keys of its
    /// own document only. Positions go on from one document to the next.
    pub documents: Option<&'a [u32]>,
}

impl Sequence<'_> {
    /// The last `len` tokens of a sequence are new and are the queries: a prefill, or with 1 a decode.
    pub fn new(id: SequenceId, len: u32) -> Self {
        Self {
            id,
            q_len: len,
            new_len: len,
            q_start: None,
            token: None,
            new_token: None,
            tree: None,
            documents: None,
        }
    }
}

/// A ragged batch: prefills and decodes mixed, and where the elements of its tensors lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch<'a> {
    /// The sequences.
    pub sequences: &'a [Sequence<'a>],
    /// Queries: `(token, q_heads, head_dim)`.
    pub q: Layout,
    /// Outputs: `(token, q_heads, v_head_dim)`.
    pub out: Layout,
    /// Log-sum-exp, natural: `(token, q_heads, 1)` in f32, where wanted. It counts the sink; -inf where a row sees no key.
    pub lse: Option<Layout>,
    /// New keys: `(token, kv_heads, head_dim)`.
    pub new_k: Layout,
    /// New values: `(token, kv_heads, v_head_dim)`.
    pub new_v: Layout,
    /// The dense mask, exactly where the spec has one.
    pub mask: Option<MaskLayout>,
}

impl<'a> Batch<'a> {
    /// Dense `[tokens, heads, dim]` tensors, no LSE, no dense mask.
    pub fn new(spec: &AttentionSpec, sequences: &'a [Sequence<'a>]) -> Self {
        Self {
            sequences,
            q: Layout::tokens_heads(spec.q_heads(), spec.head_dim()),
            out: Layout::tokens_heads(spec.q_heads(), spec.v_head_dim()),
            lse: None,
            new_k: Layout::tokens_heads(spec.kv_heads(), spec.head_dim()),
            new_v: Layout::tokens_heads(spec.kv_heads(), spec.v_head_dim()),
            mask: None,
        }
    }

    /// The same with a dense `[tokens, q_heads]` log-sum-exp.
    #[must_use]
    pub fn with_lse(mut self, spec: &AttentionSpec) -> Self {
        self.lse = Some(Layout::tokens_heads(spec.q_heads(), 1));
        self
    }

    /// The same with a dense mask.
    #[must_use]
    pub fn with_mask(mut self, layout: MaskLayout) -> Self {
        self.mask = Some(layout);
        self
    }
}
