//! Extents of a case, and that its tensors have them.

use std::collections::BTreeMap;

use safetensors::Dtype as Stored;

use super::CaseError;
use super::header::Tensor;

/// Most sequences of one case.
const MAX_BATCH: usize = 4096;
/// Elements of output, cache and mask that any file may ask for, whatever its size; beyond, 16 for each of its bytes.
const FREE_ELEMENTS: usize = 1 << 24;

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

impl Extents {
    /// From the shapes of `q`, `k` and `v`, which must agree.
    pub(super) fn of(q: Tensor<'_>, k: Tensor<'_>, v: Tensor<'_>) -> Result<Self, CaseError> {
        let refuse = |name: &str, problem: String| CaseError::tensor(name, problem);
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
    pub(super) fn check_tensors(&self, tensors: &BTreeMap<&str, Tensor<'_>>) -> Result<(), CaseError> {
        let Self { batch, q_heads, q_len, kv_len, v_head_dim, .. } = *self;
        let full = [batch, q_heads, q_len, kv_len];
        for (&name, tensor) in tensors {
            let refuse = |problem: String| Err(CaseError::tensor(name, problem));
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

    /// That output, cache and mask are not out of proportion to the file: a short row of queries can ask for long rows of
    /// output, an empty tensor for any number of heads, one element of a mask for every pair of query and key.
    pub(super) fn check_size(&self, file: usize, mask: Option<&Tensor<'_>>) -> Result<(), CaseError> {
        let Self { batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim } = *self;
        let product = |factors: [usize; 4]| factors.iter().try_fold(1usize, |n, x| n.checked_mul(*x));
        // The library unpacks a mask that broadcasts, but for its heads.
        let mask_heads = mask.and_then(|mask| mask.shape.get(1)).copied().unwrap_or(0);
        let sizes = [
            ("v", "output", product([batch, q_heads, q_len, v_head_dim])),
            ("v", "cache", product([batch, kv_heads, kv_len + 1, head_dim.max(v_head_dim)])),
            ("mask", "mask", product([batch, mask_heads, q_len, kv_len])),
        ];
        let limit = file.saturating_mul(16).max(FREE_ELEMENTS);
        match sizes.iter().find(|(_, _, size)| size.is_none_or(|size| size > limit)) {
            Some((name, what, _)) => {
                let problem =
                    format!("makes the {what} larger than {limit} elements, too many for this file");
                Err(CaseError::tensor(name, problem))
            }
            None => Ok(()),
        }
    }
}

/// Whether `shape` has four dimensions, each 1 or that of `full`.
fn broadcasts(shape: &[usize], full: [usize; 4]) -> bool {
    shape.len() == 4 && shape.iter().zip(full).all(|(n, full)| *n == 1 || *n == full)
}
