//! What is asked of attention: heads, dims, storage types, masks, logits, positions. Pure data, validated once.

mod alibi;
mod builder;
mod display;
mod dtype;
mod mask;
mod row;

use std::ops::Range;

use crate::rope::Rope;

pub use alibi::alibi_slopes;
pub use builder::{MAX_HEAD_DIM, MAX_HEADS, MAX_V_HEAD_DIM, SpecBuilder};
pub use dtype::Dtype;
pub use mask::{Mask, MaskLayout, hidden_below};
pub use row::RowLayout;

/// A validated attention problem: everything that kernels are compiled for. Made by [`AttentionSpec::builder`].
///
/// Query head `h` reads KV head `h / group` (Ainslie et al., "GQA", arXiv 2305.13245). Of a query at position `i` and a key at
/// position `j` the logit is, in this order:
///
/// 1. `q` and `k` RMS-normalised and turned to their positions, where the spec has [`qk_norm`](Self::qk_norm) and
///    [`rope`](Self::rope);
/// 2. `scale * q k^T`;
/// 3. [`softcap`](Self::softcap): `c * tanh(logit / c)`;
/// 4. bias: ALiBi's `-slope * (i - j)`, a mask that is added;
/// 5. hidden unless causality, window, documents, tree and mask all let `i` see `j`.
///
/// `out = softmax(logits) v` over the visible keys, and one more logit without a value where the head has a
/// [sink](Self::sinks). A row that sees no key gives 0, and LSE -inf.
///
/// ```
/// use gqa::{AttentionSpec, Dtype};
/// let llama = AttentionSpec::builder(32, 8, 128).kv_dtype(Dtype::F16).build()?;
/// assert_eq!(llama.group(), 4);
/// let gemma = AttentionSpec::builder(16, 8, 256).window(4095, None).softcap(50.0).build()?;
/// assert_eq!(gemma.visible(10_000, 10_001), 5905..10_001);
/// # Ok::<(), gqa::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    v_head_dim: u32,
    v_in_k: bool,
    q_dtype: Dtype,
    k_dtype: Dtype,
    v_dtype: Dtype,
    rotated: bool,
    scale: f32,
    softcap: Option<f32>,
    alibi: Option<Vec<f32>>,
    sinks: bool,
    causal: bool,
    window_left: Option<u32>,
    window_right: Option<u32>,
    mask: Mask,
    rope: Option<Rope>,
    qk_norm: Option<f32>,
}

impl AttentionSpec {
    /// Starts a spec: f32 storage, `v_head_dim = head_dim`, scale `1/sqrt(head_dim)`, causal, nothing else.
    pub fn builder(q_heads: u32, kv_heads: u32, head_dim: u32) -> SpecBuilder {
        SpecBuilder(Self {
            q_heads,
            kv_heads,
            head_dim,
            v_head_dim: head_dim,
            v_in_k: false,
            q_dtype: Dtype::F32,
            k_dtype: Dtype::F32,
            v_dtype: Dtype::F32,
            rotated: false,
            scale: (1.0 / f64::from(head_dim.max(1)).sqrt()) as f32,
            softcap: None,
            alibi: None,
            sinks: false,
            causal: true,
            window_left: None,
            window_right: None,
            mask: Mask::None,
            rope: None,
            qk_norm: None,
        })
    }

    /// A builder that starts from this spec.
    pub fn to_builder(&self) -> SpecBuilder {
        SpecBuilder(self.clone())
    }

    /// Query heads.
    pub fn q_heads(&self) -> u32 {
        self.q_heads
    }
    /// Key/value heads, a divisor of [`Self::q_heads`].
    pub fn kv_heads(&self) -> u32 {
        self.kv_heads
    }
    /// Query heads that share one KV head: 1 is MHA, `q_heads` is MQA.
    pub fn group(&self) -> u32 {
        self.q_heads / self.kv_heads
    }
    /// Elements of a query or key.
    pub fn head_dim(&self) -> u32 {
        self.head_dim
    }
    /// Elements of a value and of an output row.
    pub fn v_head_dim(&self) -> u32 {
        self.v_head_dim
    }
    /// Whether a value is the first [`Self::v_head_dim`] elements of its key, as the cache stores it: there are no values then
    /// (the absorbed form of MLA, DeepSeek-V2, arXiv 2405.04434).
    pub fn v_in_k(&self) -> bool {
        self.v_in_k
    }
    /// Storage of queries, new keys and values, outputs, and masks that are added: f32 or f16.
    pub fn q_dtype(&self) -> Dtype {
        self.q_dtype
    }
    /// Storage of keys in the cache.
    pub fn k_dtype(&self) -> Dtype {
        self.k_dtype
    }
    /// Storage of values in the cache; that of keys where values lie in keys.
    pub fn v_dtype(&self) -> Dtype {
        self.v_dtype
    }
    /// Whether keys and values are rotated before they are stored, queries like the keys, and outputs back: products stay what they
    /// are, and outliers spread over the elements of a row, which halves the error of few bits (QuaRot, arXiv 2404.00456).
    pub fn rotated(&self) -> bool {
        self.rotated
    }
    /// What multiplies `q k^T`.
    pub fn scale(&self) -> f32 {
        self.scale
    }
    /// `c` of `c * tanh(logit / c)` (Gemma 2, arXiv 2408.00118).
    pub fn softcap(&self) -> Option<f32> {
        self.softcap
    }
    /// ALiBi's slope of each query head.
    pub fn alibi(&self) -> Option<&[f32]> {
        self.alibi.as_deref()
    }
    /// Whether each query head has a logit without a key ([`LayerWeights::sinks`](crate::LayerWeights::sinks); gpt-oss).
    pub fn sinks(&self) -> bool {
        self.sinks
    }
    /// Whether key `j` is visible to a query at position `i` only where `j <= i`.
    pub fn causal(&self) -> bool {
        self.causal
    }
    /// Key `j` is visible to a query at position `i` only where `j >= i - window_left`.
    pub fn window_left(&self) -> Option<u32> {
        self.window_left
    }
    /// Key `j` is visible to a query at position `i` only where `j <= i + window_right`.
    pub fn window_right(&self) -> Option<u32> {
        self.window_right
    }
    /// What decides, besides arithmetic, which keys a query sees.
    pub fn mask(&self) -> Mask {
        self.mask
    }
    /// How queries and keys turn with their positions.
    pub fn rope(&self) -> Option<&Rope> {
        self.rope.as_ref()
    }
    /// The epsilon of the RMS normalisation of queries and keys, before they turn (Qwen 3, Gemma 3).
    pub fn qk_norm(&self) -> Option<f32> {
        self.qk_norm
    }

    /// Keys that arithmetic lets the query at `position` see among `kv_len`: causality and windows.
    pub fn visible(&self, position: i64, kv_len: u32) -> Range<u32> {
        let within = |n: i64| n.clamp(0, i64::from(kv_len)) as u32;
        let begin = self.window_left.map_or(0, |left| within(position - i64::from(left)));
        let causal = if self.causal { within(position + 1) } else { kv_len };
        let window = self.window_right.map_or(kv_len, |right| within(position + i64::from(right) + 1));
        let end = causal.min(window);
        begin.min(end)..end
    }

    /// Whether more depends on a query's position than how many keys lie before it.
    pub fn is_positional(&self) -> bool {
        self.window_left.is_some()
            || self.window_right.is_some()
            || self.alibi.is_some()
            || self.rope.is_some()
    }

    /// Whether every layer has [`LayerWeights`](crate::LayerWeights).
    pub fn has_weights(&self) -> bool {
        self.sinks || self.qk_norm.is_some()
    }

    /// How a key lies in the cache.
    pub fn k_row(&self) -> RowLayout {
        RowLayout::of(self.k_dtype, self.head_dim)
    }
    /// How a value lies in the cache; of no words where values lie in keys.
    pub fn v_row(&self) -> RowLayout {
        RowLayout::of(self.v_dtype, if self.v_in_k { 0 } else { self.v_head_dim })
    }

    /// Bytes that one token takes in one layer of the cache, headers of blocks and padding to whole words included.
    pub fn kv_bytes_per_token(&self) -> u64 {
        u64::from(self.kv_heads) * u64::from(self.k_row().bytes() + self.v_row().bytes())
    }
}
