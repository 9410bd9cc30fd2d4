//! Case files: one attention problem with its expected answer, see `docs/case-format.md`. Pure: bytes in, [`Case`] out.

mod header;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use gqa::verify::{Arrangement, Problem, ProblemSequence, Weights};
use gqa::{AttentionSpec, Dtype};

use header::{Header, Tensor};
use safetensors::Dtype as Stored;

/// Most sequences of one case.
const MAX_BATCH: usize = 4096;
/// Elements of output and cache that any file may ask for, whatever its size; beyond, 16 for each of its bytes.
const FREE_ELEMENTS: usize = 1 << 24;

/// Why a file is no case that can be run.
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
    /// Heads, dims or scale that the library refuses.
    #[error(transparent)]
    Spec(#[from] gqa::Error),
    /// A case, but of something that is not built yet.
    #[error("this version has no {0}")]
    Unsupported(String),
}

/// Extents of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extents {
    pub(crate) batch: usize,
    pub(crate) q_heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) q_len: usize,
    pub(crate) kv_len: usize,
    pub(crate) head_dim: usize,
    pub(crate) v_head_dim: usize,
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
    scale: Option<f32>,
    causal: bool,
    sequences: Vec<ProblemSequence>,
    pub(crate) out: Option<Expected>,
    pub(crate) lse: Option<Expected>,
}

impl Case {
    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// Says what is wrong with the file, or what this version cannot do.
    pub(crate) fn parse(file: &[u8]) -> Result<Self, CaseError> {
        let (header, data) = Header::read(file)?;
        let tensors = header.tensors(data);
        let find = |name: &str| {
            let absent = || CaseError::Tensor { name: name.to_owned(), problem: "is missing".to_owned() };
            tensors.get(name).copied().ok_or_else(absent)
        };
        let (q, k, v) = (find("q")?, find("k")?, find("v")?);
        let extents = Extents::of(q, k, v)?;
        extents.check_tensors(&tensors)?;
        let meta = Metadata::read(&header.metadata)?;
        let stored = [q, k, v].map(|t| t.float().unwrap_or(Dtype::F32));
        let q_lens = lengths("q_lens", &tensors, extents.q_len, extents.batch)?;
        let kv_lens = lengths("kv_lens", &tensors, extents.kv_len, extents.batch)?;
        let mut case = Self {
            extents,
            stored,
            scale: meta.scale,
            causal: meta.causal,
            sequences: Vec::new(),
            out: None,
            lse: None,
        };
        case.spec(case.default_dtype(), stored[1])?;
        extents.check_size(file.len())?;
        if let Some(unsupported) = unsupported(&tensors, &header.metadata) {
            return Err(CaseError::Unsupported(unsupported.to_owned()));
        }

        let Extents { q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, .. } = extents;
        let sequence = |(batch, (q_rows, kv_rows)): (usize, (&usize, &usize))| ProblemSequence {
            q_len: *q_rows as u32,
            kv_len: *kv_rows as u32,
            q_start: meta.q_start,
            history: 0,
            q: rows(q, [batch, q_heads, q_len, head_dim], *q_rows),
            k: rows(k, [batch, kv_heads, kv_len, head_dim], *kv_rows),
            v: rows(v, [batch, kv_heads, kv_len, v_head_dim], *kv_rows),
            tree: None,
            documents: None,
        };
        case.sequences = q_lens.iter().zip(&kv_lens).enumerate().map(sequence).collect();
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

    /// The problem, with queries stored as `dtype` and the cache as `kv_dtype`.
    ///
    /// # Errors
    /// [`CaseError::Spec`].
    pub(crate) fn problem(&self, dtype: Dtype, kv_dtype: Dtype) -> Result<Problem, CaseError> {
        let round = |x: &[f32]| x.iter().map(|x| dtype.round(*x)).collect();
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
            mask: None,
            weights: Weights::default(),
        })
    }

    fn spec(&self, dtype: Dtype, kv_dtype: Dtype) -> Result<AttentionSpec, gqa::Error> {
        let Extents { q_heads, kv_heads, head_dim, v_head_dim, .. } = self.extents;
        // What does not fit is beyond every limit.
        let [q_heads, kv_heads, head_dim, v_head_dim] =
            [q_heads, kv_heads, head_dim, v_head_dim].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let builder = AttentionSpec::builder(q_heads, kv_heads, head_dim)
            .v_head_dim(v_head_dim)
            .q_dtype(dtype)
            .kv_dtype(kv_dtype)
            .causal(self.causal);
        match self.scale {
            Some(scale) => builder.scale(scale).build(),
            None => builder.build(),
        }
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
        _ => Err(CaseError::Tensor {
            name: name.to_owned(),
            problem: format!("has {n} at index {i}, but it must lie in 0..={full}"),
        }),
    };
    tensor.ints().enumerate().map(length).collect()
}

impl Extents {
    /// From the shapes of `q`, `k` and `v`, which must agree.
    fn of(q: Tensor<'_>, k: Tensor<'_>, v: Tensor<'_>) -> Result<Self, CaseError> {
        let refuse = |name: &str, problem: String| CaseError::Tensor { name: name.to_owned(), problem };
        let four = |name: &str, tensor: Tensor<'_>| match *tensor.shape {
            [a, b, c, d] => Ok([a, b, c, d]),
            _ => Err(refuse(name, format!("has shape {:?}, but it must have 4 dimensions", tensor.shape))),
        };
        let [batch, q_heads, q_len, head_dim] = four("q", q)?;
        let [k_batch, kv_heads, kv_len, k_dim] = four("k", k)?;
        let [v_batch, v_heads, v_len, v_head_dim] = four("v", v)?;
        let same = |name: &str, what: &str, found: usize, needed: usize| match found == needed {
            true => Ok(()),
            false => Err(refuse(name, format!("has {what} {found}, but it must be {needed}"))),
        };
        same("k", "batch", k_batch, batch)?;
        same("v", "batch", v_batch, batch)?;
        same("k", "head_dim", k_dim, head_dim)?;
        same("v", "kv_heads", v_heads, kv_heads)?;
        same("v", "kv_len", v_len, kv_len)?;
        if !(1..=MAX_BATCH).contains(&batch) {
            return Err(refuse("q", format!("has batch {batch}, but it must lie in 1..={MAX_BATCH}")));
        }
        for (name, len) in [("q", q_len), ("k", kv_len)] {
            if i32::try_from(len).is_err() {
                return Err(refuse(name, format!("has {len} tokens, but they must be below 2^31")));
            }
        }
        Ok(Self { batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim })
    }

    /// That there is no unknown tensor, and that each known one has the dtype and shape that go with these extents.
    fn check_tensors(&self, tensors: &BTreeMap<&str, Tensor<'_>>) -> Result<(), CaseError> {
        let Self { batch, q_heads, q_len, kv_len, v_head_dim, .. } = *self;
        let full = [batch, q_heads, q_len, kv_len];
        for (&name, tensor) in tensors {
            let refuse = |problem| Err(CaseError::Tensor { name: name.to_owned(), problem });
            let (dtypes, shape): (&[Stored], &[usize]) = match name {
                "q" | "k" | "v" => (&[Stored::F32, Stored::F16, Stored::BF16], tensor.shape),
                "mask" => (
                    &[Stored::BOOL, Stored::U8, Stored::F32, Stored::F16, Stored::BF16],
                    if broadcasts(tensor.shape, full) { tensor.shape } else { &full },
                ),
                "kv_lens" | "q_lens" => (&[Stored::I32], &[batch]),
                "sinks" | "alibi_slopes" => (&[Stored::F32], &[q_heads]),
                "out" => (&[Stored::F32, Stored::F16], &[batch, q_heads, q_len, v_head_dim]),
                "lse" => (&[Stored::F32], &[batch, q_heads, q_len]),
                _ => return refuse("is not part of the format".to_owned()),
            };
            if !dtypes.contains(&tensor.dtype) {
                let dtypes: Vec<_> = dtypes.iter().map(ToString::to_string).collect();
                return refuse(format!("is {}, but it must be {}", tensor.dtype, dtypes.join(" or ")));
            }
            if tensor.shape != shape {
                return refuse(format!("has shape {:?}, but it must be {shape:?}", tensor.shape));
            }
        }
        Ok(())
    }

    /// That output and cache are not out of proportion to the file: a short row of queries can ask for long rows of output,
    /// and an empty tensor for any number of heads.
    fn check_size(&self, file: usize) -> Result<(), CaseError> {
        let Self { batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim } = *self;
        let product = |factors: [usize; 4]| factors.iter().try_fold(1usize, |n, x| n.checked_mul(*x));
        let out = product([batch, q_heads, q_len, v_head_dim]);
        let cache = product([batch, kv_heads, kv_len + 1, head_dim.max(v_head_dim)]);
        let limit = file.saturating_mul(16).max(FREE_ELEMENTS);
        match out.zip(cache) {
            Some((out, cache)) if out <= limit && cache <= limit => Ok(()),
            _ => Err(CaseError::Tensor {
                name: "v".to_owned(),
                problem: format!(
                    "makes output or cache larger than {limit} elements, too many for this file"
                ),
            }),
        }
    }
}

/// Whether `shape` has four dimensions, each 1 or that of `full`.
fn broadcasts(shape: &[usize], full: [usize; 4]) -> bool {
    shape.len() == 4 && shape.iter().zip(full).all(|(n, full)| *n == 1 || *n == full)
}

/// What the file asks for that this version cannot do.
fn unsupported(
    tensors: &BTreeMap<&str, Tensor<'_>>,
    metadata: &BTreeMap<String, String>,
) -> Option<&'static str> {
    let tensor = ["mask", "sinks", "alibi_slopes"].into_iter().find(|name| tensors.contains_key(name));
    tensor.or_else(|| {
        ["window_left", "window_right", "softcap"].into_iter().find(|key| metadata.contains_key(*key))
    })
}

/// The entries of `__metadata__` that are used.
#[derive(Debug, Default)]
struct Metadata {
    scale: Option<f32>,
    causal: bool,
    q_start: Option<i32>,
}

impl Metadata {
    /// Reads every entry; those of features that are not built are checked and dropped.
    fn read(entries: &BTreeMap<String, String>) -> Result<Self, CaseError> {
        let mut meta = Self::default();
        for (key, value) in entries {
            let refuse = |needed| CaseError::Metadata { key: key.clone(), found: value.clone(), needed };
            let real = || value.parse::<f32>().ok().filter(|x| x.is_finite());
            match key.as_str() {
                "scale" => meta.scale = Some(real().ok_or_else(|| refuse("it must be a finite number"))?),
                "causal" => {
                    meta.causal = value.parse().map_err(|_| refuse("it must be true or false"))?;
                }
                "q_start" => {
                    let within = |n: &i32| *n > i32::MIN;
                    let start = value.parse().ok().filter(within);
                    meta.q_start =
                        Some(start.ok_or_else(|| refuse("it must be a whole number within +-2^31"))?);
                }
                "window_left" | "window_right" => {
                    let needed = "it must be a whole number, at least 0 and below 2^31";
                    value.parse().ok().filter(|n: &i32| *n >= 0).ok_or_else(|| refuse(needed))?;
                }
                "softcap" => {
                    real().filter(|x| *x > 0.0).ok_or_else(|| refuse("it must be a positive number"))?;
                }
                "mask_kind" if ["keep", "add"].contains(&value.as_str()) => {}
                "mask_kind" => return Err(refuse("it must be keep or add")),
                "source" => {}
                _ => return Err(refuse("the format has no such key")),
            }
        }
        Ok(meta)
    }
}
