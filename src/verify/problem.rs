//! A ragged attention problem with its data, and how its tensors are arranged in memory.

use crate::layout::{Layout, Shape};
use crate::quant;
use crate::reference;
use crate::spec::{AttentionSpec, Dtype, Mask, MaskLayout};
use crate::weights::LayerWeights;

/// How a tensor lies in its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// `[tokens, heads, dim]`, dense.
    TokensHeads,
    /// `[heads, tokens, dim]`, dense.
    HeadsTokens,
    /// `[tokens, heads, dim]` with gaps of an odd number of elements before, between heads and between tokens.
    Gaps,
}

impl Arrangement {
    /// The layout of a tensor of `shape`.
    pub fn layout(self, shape: Shape) -> Layout {
        match self {
            Self::TokensHeads => Layout::tokens_heads(shape.heads, shape.dim),
            Self::HeadsTokens => Layout::heads_tokens(shape.tokens, shape.dim),
            Self::Gaps => {
                let head_stride = shape.dim + 3;
                Layout { offset: 5, token_stride: shape.heads * head_stride + 1, head_stride }
            }
        }
    }
}

/// One sequence: `q` is `[q_len][q_heads][head_dim]`, `k` and `v` are `[kv_len][kv_heads][dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ProblemSequence {
    /// Query tokens.
    pub q_len: u32,
    /// Keys.
    pub kv_len: u32,
    /// As in [`crate::Sequence`].
    pub q_start: Option<i32>,
    /// Keys appended by a step of their own, before the step that attends.
    pub history: u32,
    /// Queries, rounded to the spec's `q_dtype`.
    pub q: Vec<f32>,
    /// Keys, rounded to `q_dtype`; the cache rounds them again.
    pub k: Vec<f32>,
    /// Values, as the keys; empty where values lie in keys.
    pub v: Vec<f32>,
    /// As in [`crate::Sequence`].
    pub tree: Option<Vec<u64>>,
    /// As in [`crate::Sequence`].
    pub documents: Option<Vec<u32>>,
}

/// A dense mask of all sequences, `[sequences, q_heads, q_len, kv_len]`; an extent of 1 broadcasts.
#[derive(Debug, Clone, PartialEq)]
pub struct ProblemMask {
    /// Extents.
    pub extents: [u32; 4],
    /// Elements: rounded to `q_dtype` where they are added, 0 or 1 where they hide or keep.
    pub values: Vec<f32>,
    /// Whether they lie apart on the device, with an offset, instead of dense.
    pub gaps: bool,
}

/// What the layer has learned; empty where the spec has none.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Weights {
    /// As in [`LayerWeights`].
    pub sinks: Vec<f32>,
    /// As in [`LayerWeights`].
    pub q_norm: Vec<f32>,
    /// As in [`LayerWeights`].
    pub k_norm: Vec<f32>,
}

impl Weights {
    /// As the library takes them.
    pub fn as_layer(&self) -> LayerWeights<'_> {
        LayerWeights { sinks: &self.sinks, q_norm: &self.q_norm, k_norm: &self.k_norm }
    }
}

/// What a cache holds of a sequence, decoded: `[kv_len][kv_heads][dim]`, rotated where the spec rotates.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stored {
    /// Keys.
    pub k: Vec<f32>,
    /// Values; empty where they lie in keys.
    pub v: Vec<f32>,
}

/// Rows rotated, or rotated back, where the spec rotates.
fn rotated(spec: &AttentionSpec, mut rows: Vec<f64>, dim: u32) -> Vec<f64> {
    if spec.rotated() {
        rows.chunks_mut(dim as usize).for_each(quant::rotate_f64);
    }
    rows
}

/// A ragged problem.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// What is asked.
    pub spec: AttentionSpec,
    /// Of whom.
    pub sequences: Vec<ProblemSequence>,
    /// How `q`, `new_k`, `new_v` lie in memory.
    pub inputs: Arrangement,
    /// How `out` and `lse` lie in memory.
    pub outputs: Arrangement,
    /// Exactly where the spec has a dense mask.
    pub mask: Option<ProblemMask>,
    /// What the layer has learned.
    pub weights: Weights,
}

impl Problem {
    /// Whether what is stored cannot be told to the last bit from what came: a device is asked for it.
    pub fn must_ask(&self) -> bool {
        let spec = &self.spec;
        spec.rope().is_some()
            || spec.qk_norm().is_some()
            || spec.rotated()
            || spec.k_dtype().is_blocked()
            || spec.v_dtype().is_blocked()
    }

    /// The largest magnitude among the values of the `nth` sequence, before they are stored.
    pub fn largest_value(&self, nth: usize) -> f64 {
        let s = &self.sequences[nth];
        let embedded = if self.spec.v_in_k() { self.embedded_keys(nth) } else { Vec::new() };
        let rotated = if self.spec.rotated() { self.expected_values(nth) } else { Vec::new() };
        let others = embedded.iter().chain(&rotated).map(|x| x.abs());
        let values = s.v.iter().map(|v| f64::from(v.abs())).chain(others);
        values.filter(|x| x.is_finite()).fold(0.0, f64::max)
    }

    /// Keys as the cache should hold them, but for rounding to its storage type: rotated where it rotates.
    pub fn expected_keys(&self, nth: usize) -> Vec<f64> {
        rotated(&self.spec, self.embedded_keys(nth), self.spec.head_dim())
    }

    /// Values as the cache should hold them, but for rounding.
    pub fn expected_values(&self, nth: usize) -> Vec<f64> {
        if self.spec.v_in_k() {
            return Vec::new();
        }
        let values = self.sequences[nth].v.iter().map(|x| f64::from(*x)).collect();
        rotated(&self.spec, values, self.spec.v_head_dim())
    }

    /// Keys of the `nth` sequence, normalised and turned.
    pub fn embedded_keys(&self, nth: usize) -> Vec<f64> {
        let (s, weights) = (&self.sequences[nth], &self.weights.k_norm);
        let heads = self.spec.kv_heads() as usize;
        let problem = self.reference(nth, (&[], &[]));
        let rows = s.k.chunks(self.spec.head_dim() as usize).enumerate();
        rows.flat_map(|(i, row)| reference::embed(&self.spec, row, weights, problem.key_position(i / heads)))
            .collect()
    }

    /// The reference's answer of every sequence, on what the cache stores: `stored` where a device has been asked, else what it
    /// should store.
    pub fn answers(&self, stored: Option<&[Stored]>) -> Vec<reference::Answer> {
        let (spec, dim, v_dim) = (&self.spec, self.spec.head_dim(), self.spec.v_head_dim());
        let round = |rows: Vec<f64>, dtype: Dtype, dim: u32| -> Vec<f32> {
            let rows: Vec<f32> = rows.iter().map(|x| *x as f32).collect();
            rows.chunks(dim as usize).flat_map(|row| quant::stored(dtype, row)).collect()
        };
        // Rotated back: the products are the same.
        let back = |rows: &[f32], dim: u32| -> Vec<f32> {
            let rows = rows.iter().map(|x| f64::from(*x)).collect();
            rotated(spec, rows, dim).iter().map(|x| *x as f32).collect()
        };
        let answer = |nth: usize| {
            let (k, v) = match stored {
                Some(stored) => (stored[nth].k.clone(), stored[nth].v.clone()),
                None => (
                    round(self.expected_keys(nth), spec.k_dtype(), dim),
                    round(self.expected_values(nth), spec.v_dtype(), v_dim),
                ),
            };
            let (k, v) = (back(&k, dim), back(&v, v_dim));
            reference::attention(spec, &self.reference(nth, (&k, &v)))
        };
        (0..self.sequences.len()).map(answer).collect()
    }

    /// The `nth` sequence as the reference takes it, with stored keys and values.
    pub(super) fn reference<'a>(
        &'a self,
        nth: usize,
        (k, v): (&'a [f32], &'a [f32]),
    ) -> reference::Problem<'a> {
        let s = &self.sequences[nth];
        reference::Problem {
            q: &s.q,
            k,
            v,
            q_len: s.q_len as usize,
            kv_len: s.kv_len as usize,
            q_start: s.q_start.map_or(i64::from(s.kv_len) - i64::from(s.q_len), i64::from),
            mask: self.mask.as_ref().map(|mask| {
                let dense = MaskLayout::dense(mask.extents);
                let MaskLayout { head_stride, token_stride, key_stride, .. } = dense;
                let first = dense.index([nth as u32, 0, 0, 0]) as usize;
                reference::DenseMask {
                    values: &mask.values[first.min(mask.values.len())..],
                    strides: [head_stride, token_stride, key_stride].map(|stride| stride as usize),
                }
            }),
            tree: s.tree.as_deref(),
            documents: s.documents.as_deref(),
            weights: self.weights.as_layer(),
        }
    }
}

impl ProblemMask {
    /// Where its elements lie on the device.
    pub fn layout(&self) -> MaskLayout {
        if !self.gaps {
            return MaskLayout::dense(self.extents);
        }
        let [sequences, heads, tokens, keys] = self.extents;
        let stride = |extent: u32, stride: u32| if extent == 1 { 0 } else { stride };
        let token = 2 * keys + 1;
        let head = token * tokens + 3;
        MaskLayout {
            offset: 5,
            sequence_stride: stride(sequences, head * heads + 1),
            head_stride: stride(heads, head),
            token_stride: stride(tokens, token),
            key_stride: stride(keys, 2),
        }
    }

    /// As a device takes it: a byte for each element that hides or keeps, else numbers.
    pub(crate) fn bytes(&self, spec: &AttentionSpec) -> Vec<u8> {
        let layout = self.layout();
        let [sequences, heads, tokens, keys] = self.extents;
        let encode = |x: f32| match spec.mask() {
            Mask::Keep => vec![if x == 0.0 { 0 } else { 0x80 }],
            _ => encode(spec.q_dtype(), &[x]),
        };
        let size = encode(0.0).len();
        let mut bytes = Vec::new();
        let mut values = self.values.iter();
        for row in 0..sequences * heads * tokens {
            let (sequence, head, token) = (row / tokens / heads, row / tokens % heads, row % tokens);
            for (key, x) in (0..keys).zip(&mut values) {
                let at = layout.index([sequence, head, token, key]) as usize * size;
                // Between the elements: what would show if it were read.
                bytes.resize(bytes.len().max(at + size), 0xff);
                bytes[at..at + size].copy_from_slice(&encode(*x));
            }
        }
        bytes
    }
}

/// A tensor in memory: bytes of `dtype`, NaN wherever no element lies.
pub(crate) struct Tensor {
    pub(crate) layout: Layout,
    shape: Shape,
    dtype: Dtype,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn new(arrangement: Arrangement, shape: Shape, dtype: Dtype) -> Self {
        let layout = arrangement.layout(shape);
        let elements = layout.extent(shape) as usize;
        let nan = encode(dtype, &[f32::NAN]);
        Self { layout, shape, dtype, bytes: nan.repeat(elements.next_multiple_of(2)) }
    }

    /// Another of the same form, all NaN.
    pub(super) fn blank(&self) -> Self {
        let nan = encode(self.dtype, &[f32::NAN]);
        Self { bytes: nan.repeat(self.bytes.len() / nan.len()), ..*self }
    }

    /// Reads all rows.
    pub(super) fn read_all(&self) -> Vec<f32> {
        self.read(0, self.shape.tokens)
    }

    /// Writes the rows of tokens from `first` on; `rows` is `[tokens][heads][dim]`.
    pub(crate) fn write(&mut self, first: u32, rows: &[f32]) {
        let (dim, heads) = (self.shape.dim as usize, self.shape.heads as usize);
        let size = self.dtype.bytes() as usize;
        for (i, row) in rows.chunks(dim).enumerate() {
            let at = self.index(first as usize + i / heads, i % heads) * size;
            self.bytes[at..at + row.len() * size].copy_from_slice(&encode(self.dtype, row));
        }
    }

    /// Reads the rows of `tokens` tokens from `first` on.
    pub(crate) fn read(&self, first: u32, tokens: u32) -> Vec<f32> {
        let size = self.dtype.bytes() as usize;
        let mut rows = Vec::new();
        for token in first..first + tokens {
            for head in 0..self.shape.heads {
                let at = self.index(token as usize, head as usize) * size;
                let row = &self.bytes[at..at + self.shape.dim as usize * size];
                rows.extend(decode(self.dtype, row));
            }
        }
        rows
    }

    /// Elements outside the tensor that are no longer NaN.
    pub(crate) fn strays(&self) -> usize {
        let mut inside = vec![false; self.bytes.len() / self.dtype.bytes() as usize];
        for token in 0..self.shape.tokens as usize {
            for head in 0..self.shape.heads as usize {
                let at = self.index(token, head);
                inside[at..at + self.shape.dim as usize].fill(true);
            }
        }
        decode(self.dtype, &self.bytes)
            .into_iter()
            .zip(inside)
            .filter(|(x, inside)| !inside && !x.is_nan())
            .count()
    }

    fn index(&self, token: usize, head: usize) -> usize {
        let Layout { offset, token_stride, head_stride } = self.layout;
        offset as usize + token * token_stride as usize + head * head_stride as usize
    }
}

/// Elements of a caller's tensor, which has no blocks, as bytes.
fn encode(dtype: Dtype, row: &[f32]) -> Vec<u8> {
    let (words, _) = quant::encode_row(dtype, row);
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.truncate(row.len() * dtype.bytes() as usize);
    bytes
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    let words: Vec<u32> = bytes.chunks(4).map(word).collect();
    quant::decode_row(dtype, bytes.len() as u32 / dtype.bytes(), &words, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_give_back_what_was_written() {
        for arrangement in [Arrangement::TokensHeads, Arrangement::HeadsTokens, Arrangement::Gaps] {
            for (dtype, dim) in [(Dtype::F32, 1), (Dtype::F32, 5), (Dtype::F16, 1), (Dtype::F16, 7)] {
                let mut tensor = Tensor::new(arrangement, Shape { tokens: 3, heads: 2, dim }, dtype);
                let rows: Vec<f32> = (0..2 * 2 * dim).map(|i| i as f32 - 0.5).collect();
                tensor.write(1, &rows);
                assert_eq!(tensor.read(1, 2), rows);
                assert!(tensor.read(0, 1).iter().all(|x| x.is_nan()));
                assert_eq!(tensor.strays(), 0);
                if arrangement == Arrangement::Gaps {
                    let size = dtype.bytes() as usize;
                    tensor.bytes[size..2 * size].fill(0);
                    assert_eq!(tensor.strays(), 1);
                }
            }
        }
    }
}
