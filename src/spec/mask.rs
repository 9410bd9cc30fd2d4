//! Masks that are data. Those that are arithmetic (causal, windows, lengths, documents) need none of this.

use super::Dtype;

/// What decides, besides arithmetic, which keys a query sees: both must let it.
///
/// A key that is hidden from a row still meets it with weight 0 where their tile of 32 keys is visible in part: its value must
/// not be NaN or infinite. (A sequence that ends earlier needs no mask: it has a length.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mask {
    /// Nothing.
    #[default]
    None,
    /// [`Sequence::tree`](crate::Sequence::tree): which of the new tokens see each other (speculative decoding).
    Tree,
    /// A dense boolean mask in GPU memory, a byte for each pair: 0 hides. [`Attention::mask`](crate::Attention::mask) packs it
    /// into bits.
    Keep,
    /// A dense mask in GPU memory, stored as the queries are: added to the logit, where it is at most 1e38. [`hidden_below`] and less
    /// hides the key: -inf, and the least finite number of f16 or f32. A row of nothing else gives 0 and LSE -inf, not a mean.
    Add,
}

impl Mask {
    /// Whether it is a tensor of the caller's, that [`Batch::mask`](crate::Batch::mask) lays out.
    pub const fn is_dense(self) -> bool {
        matches!(self, Self::Keep | Self::Add)
    }
}

/// Added to a logit, this and anything below hides the key, as does NaN: models write `torch.finfo(dtype).min` for -inf.
pub const fn hidden_below(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => -65_504.0,
        _ => -1e38,
    }
}

/// Where the mask of a (sequence, query head, query token, key) lies, in elements; a stride of 0 broadcasts.
///
/// Sequence is the index in [`Batch::sequences`](crate::Batch::sequences), token counts from the sequence's first query, key from
/// its first key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskLayout {
    /// Index of the first element, behind the offset of the buffer binding.
    pub offset: u32,
    /// From a sequence to the next.
    pub sequence_stride: u32,
    /// From a query head to the next.
    pub head_stride: u32,
    /// From a query token to the next.
    pub token_stride: u32,
    /// From a key to the next.
    pub key_stride: u32,
}

impl MaskLayout {
    /// Dense `[sequences, q_heads, q_len, kv_len]`; an extent of 1 broadcasts.
    pub const fn dense([sequences, heads, tokens, keys]: [u32; 4]) -> Self {
        const fn stride(extent: u32, stride: u32) -> u32 {
            if extent == 1 { 0 } else { stride }
        }
        let token = keys;
        let head = token.saturating_mul(tokens);
        Self {
            offset: 0,
            sequence_stride: stride(sequences, head.saturating_mul(heads)),
            head_stride: stride(heads, head),
            token_stride: stride(tokens, token),
            key_stride: stride(keys, 1),
        }
    }

    /// Index of an element.
    pub fn index(&self, [sequence, head, token, key]: [u32; 4]) -> u64 {
        let Self { offset, sequence_stride, head_stride, token_stride, key_stride } = *self;
        [(sequence, sequence_stride), (head, head_stride), (token, token_stride), (key, key_stride)]
            .iter()
            .map(|(index, stride)| u64::from(*index) * u64::from(*stride))
            .sum::<u64>()
            + u64::from(offset)
    }
}
