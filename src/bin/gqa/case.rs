//! Case files: one attention problem with its expected answer, see `docs/case-format.md`. Pure: bytes in, [`Case`] out.

mod extents;
pub(crate) mod header;
mod mask;
mod metadata;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use gqa::verify::{Arrangement, Problem, ProblemMask, ProblemSequence, Weights};
use gqa::{AttentionSpec, Dtype, Mask};

pub(crate) use extents::Extents;
use header::{Header, MAX_HEADER, Tensor};
use mask::CaseMask;
use metadata::Metadata;

/// Why a file is no case.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum CaseError {
    /// The container itself.
    #[error("not a good safetensors file: {0}")]
    Container(String),
    /// One of its tensors.
    #[error("tensor `{name}` {problem}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong, as the rest of a sentence.
        problem: String,
    },
    /// An entry of `__metadata__`.
    #[error("metadata `{key}` is {found:?}, but {needed}")]
    Metadata {
        /// Its key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be.
        needed: &'static str,
    },
    /// Heads, dims or numbers that the library refuses.
    #[error(transparent)]
    Spec(#[from] gqa::Error),
}

impl CaseError {
    fn tensor(name: &str, problem: impl Into<String>) -> Self {
        Self::Tensor { name: name.to_owned(), problem: problem.into() }
    }
}

/// The expected answer: the rows that exist, sequence after sequence, `[token][head][element]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Expected {
    pub(crate) dtype: Dtype,
    pub(crate) values: Vec<f64>,
}

/// A case: each batch entry is one sequence.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Case {
    pub(crate) extents: Extents,
    /// How the file stores `q`, `k` and `v`.
    pub(crate) stored: [Dtype; 3],
    metadata: Metadata,
    slopes: Option<Vec<f32>>,
    weights: Weights,
    mask: Option<CaseMask>,
    sequences: Vec<ProblemSequence>,
    pub(crate) out: Option<Expected>,
    pub(crate) lse: Option<Expected>,
}

impl Case {
    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// Says what is wrong with the file.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, CaseError> {
        let (header, data) = Header::read(file, MAX_HEADER)?;
        let tensors = header.tensors(data);
        let find =
            |name: &str| tensors.get(name).copied().ok_or_else(|| CaseError::tensor(name, "is missing"));
        let (q, k, v) = (find("q")?, find("k")?, find("v")?);
        let extents = Extents::of(q, k, v)?;
        extents.check_tensors(&tensors)?;
        let metadata = Metadata::read(&header.metadata)?;
        let stored = [q, k, v].map(|t| t.float().unwrap_or(Dtype::F32));
        let q_lens = lengths("q_lens", &tensors, extents.q_len, extents.batch)?;
        let kv_lens = lengths("kv_lens", &tensors, extents.kv_len, extents.batch)?;
        let mut case = Self {
            extents,
            stored,
            slopes: per_head("alibi_slopes", &tensors)?,
            weights: Weights {
                sinks: per_head("sinks", &tensors)?.unwrap_or_default(),
                ..Weights::default()
            },
            mask: None,
            sequences: Vec::new(),
            out: None,
            lse: None,
            metadata,
        };
        case.spec(case.default_dtype(), stored[1])?;
        extents.check_size(file.len(), tensors.get("mask"))?;

        let Extents { q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, .. } = extents;
        let sequence = |(batch, (q_rows, kv_rows)): (usize, (&usize, &usize))| ProblemSequence {
            q_len: *q_rows as u32,
            kv_len: *kv_rows as u32,
            q_start: case.metadata.q_start,
            history: 0,
            q: rows(q, [batch, q_heads, q_len, head_dim], *q_rows),
            k: rows(k, [batch, kv_heads, kv_len, head_dim], *kv_rows),
            v: rows(v, [batch, kv_heads, kv_len, v_head_dim], *kv_rows),
            tree: None,
            documents: None,
        };
        case.sequences = q_lens.iter().zip(&kv_lens).enumerate().map(sequence).collect();
        if let Some(mask) = tensors.get("mask") {
            case.mask = Some(CaseMask::read(*mask, case.metadata.mask_kind, &case.sequences)?);
        }
        let expected = |name: &str, dim: usize| {
            let tensor = *tensors.get(name)?;
            let of = |(batch, len): (usize, &usize)| rows(tensor, [batch, q_heads, q_len, dim], *len);
            let values = q_lens.iter().enumerate().flat_map(of).map(f64::from).collect();
            Some(Expected { dtype: tensor.float()?, values })
        };
        case.out = expected("out", v_head_dim);
        case.lse = expected("lse", 1);
        Ok(case)
    }

    /// How queries and outputs are stored unless the user says otherwise: as in the file, but bf16, which shaders cannot
    /// write, as f32.
    pub(crate) fn default_dtype(&self) -> Dtype {
        match self.stored[0] {
            Dtype::Bf16 => Dtype::F32,
            other => other,
        }
    }

    /// How the file stores a mask that is added.
    pub(crate) fn stored_mask(&self) -> Option<Dtype> {
        self.mask.as_ref().filter(|mask| mask.kind == Mask::Add)?.stored
    }

    /// The problem, with queries stored as `dtype` and the cache as `kv_dtype`.
    ///
    /// # Errors
    /// [`CaseError::Spec`].
    pub(crate) fn problem(&self, dtype: Dtype, kv_dtype: Dtype) -> Result<Problem, CaseError> {
        let round = |x: &[f32]| gqa::quant::stored(dtype, x);
        let mask = |mask: &CaseMask| ProblemMask { values: round(&mask.mask.values), ..mask.mask.clone() };
        let sequence = |s: &ProblemSequence| ProblemSequence {
            q: round(&s.q),
            k: round(&s.k),
            v: round(&s.v),
            q_len: s.q_len,
            kv_len: s.kv_len,
            q_start: s.q_start,
            history: s.history,
            tree: None,
            documents: None,
        };
        Ok(Problem {
            spec: self.spec(dtype, kv_dtype)?,
            sequences: self.sequences.iter().map(sequence).collect(),
            inputs: Arrangement::HeadsTokens,
            outputs: Arrangement::HeadsTokens,
            mask: self.mask.as_ref().map(mask),
            weights: self.weights.clone(),
        })
    }

    fn spec(&self, dtype: Dtype, kv_dtype: Dtype) -> Result<AttentionSpec, gqa::Error> {
        let Extents { q_heads, kv_heads, head_dim, v_head_dim, .. } = self.extents;
        // What does not fit is beyond every limit.
        let [q_heads, kv_heads, head_dim, v_head_dim] =
            [q_heads, kv_heads, head_dim, v_head_dim].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let meta = &self.metadata;
        let mut builder = AttentionSpec::builder(q_heads, kv_heads, head_dim)
            .v_head_dim(v_head_dim)
            .q_dtype(dtype)
            .kv_dtype(kv_dtype)
            .causal(meta.causal)
            .window(meta.window_left, meta.window_right)
            .sinks(!self.weights.sinks.is_empty())
            .mask(self.mask.as_ref().map_or(Mask::None, |mask| mask.kind));
        if let Some(scale) = meta.scale {
            builder = builder.scale(scale);
        }
        if let Some(softcap) = meta.softcap {
            builder = builder.softcap(softcap);
        }
        if let Some(slopes) = &self.slopes {
            builder = builder.alibi(slopes);
        }
        builder.build()
    }

    /// Query rows of each sequence.
    pub(crate) fn q_lens(&self) -> impl Iterator<Item = usize> {
        self.sequences.iter().map(|s| s.q_len as usize)
    }

    /// The largest finite magnitude among the values that exist.
    pub(crate) fn largest_value(&self) -> f64 {
        let values = self.sequences.iter().flat_map(|s| &s.v).filter(|x| x.is_finite());
        values.map(|x| f64::from(x.abs())).fold(0.0, f64::max)
    }

    /// `[batch, head, token, element]` of an index among the rows that exist, each of `dim` elements.
    pub(crate) fn position(&self, index: usize, dim: usize) -> [usize; 4] {
        let mut row = index / dim.max(1);
        let heads = self.extents.q_heads;
        for (batch, q_len) in self.q_lens().enumerate() {
            if row < q_len * heads {
                return [batch, row % heads, row / heads, index % dim.max(1)];
            }
            row -= q_len * heads;
        }
        [self.extents.batch, 0, 0, 0]
    }
}

/// The first `len` tokens of a batch entry, from `[batch, heads, tokens, dim]` to `[token][head][dim]`.
fn rows(tensor: Tensor<'_>, [batch, heads, tokens, dim]: [usize; 4], len: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(len * heads * dim);
    for token in 0..len {
        for head in 0..heads {
            rows.extend(tensor.floats(((batch * heads + head) * tokens + token) * dim, dim));
        }
    }
    rows
}

/// Lengths of every sequence: those of the file, or `full`.
fn lengths(
    name: &str,
    tensors: &BTreeMap<&str, Tensor<'_>>,
    full: usize,
    batch: usize,
) -> Result<Vec<usize>, CaseError> {
    let Some(tensor) = tensors.get(name) else { return Ok(vec![full; batch]) };
    let length = |(i, n): (usize, i32)| match usize::try_from(n) {
        Ok(n) if n <= full => Ok(n),
        _ => Err(CaseError::tensor(name, format!("has {n} at index {i}, but it must lie in 0..={full}"))),
    };
    tensor.ints().enumerate().map(length).collect()
}

/// A number for each query head, where the file has them; -inf is for the library to judge.
fn per_head(name: &str, tensors: &BTreeMap<&str, Tensor<'_>>) -> Result<Option<Vec<f32>>, CaseError> {
    let Some(tensor) = tensors.get(name) else { return Ok(None) };
    let numbers: Vec<_> = tensor.floats(0, tensor.shape.iter().product()).collect();
    match numbers.iter().position(|x| x.is_nan() || *x == f32::INFINITY) {
        Some(i) => Err(CaseError::tensor(
            name,
            format!("has {} at index {i}, but it must be a finite number", numbers[i]),
        )),
        None => Ok(Some(numbers)),
    }
}
