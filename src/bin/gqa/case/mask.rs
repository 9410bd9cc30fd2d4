//! The dense mask of a case.

use gqa::verify::{ProblemMask, ProblemSequence};
use gqa::{Dtype, Mask};

use super::CaseError;
use super::header::Tensor;

/// The tensor `mask`, and what it is for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CaseMask {
    pub(super) kind: Mask,
    /// How the file stores it, where it is of floats.
    pub(super) stored: Option<Dtype>,
    pub(super) mask: ProblemMask,
}

impl CaseMask {
    /// Reads a tensor whose shape is good: what the file says it is, or what its dtype makes it. Elements that no sequence is
    /// long enough for may be anything and become 0.
    pub(super) fn read(
        tensor: Tensor<'_>,
        kind: Option<Mask>,
        sequences: &[ProblemSequence],
    ) -> Result<Self, CaseError> {
        let stored = tensor.float();
        let kind = match (kind, stored) {
            (Some(Mask::Add), None) => {
                return Err(CaseError::Metadata {
                    key: "mask_kind".to_owned(),
                    found: "add".to_owned(),
                    needed: "only a mask of floats can be added",
                });
            }
            (Some(kind), _) => kind,
            (None, None) => Mask::Keep,
            (None, Some(_)) => Mask::Add,
        };
        let &[batch, heads, tokens, keys] = tensor.shape else {
            return Err(CaseError::tensor("mask", "must have 4 dimensions"));
        };
        let mut values = Vec::with_capacity(batch * heads * tokens * keys);
        for sequence in 0..batch {
            let readers = if batch == 1 { sequences } else { &sequences[sequence..=sequence] };
            let read: Vec<_> = (0..tokens).map(|token| keys_read(readers, token)).collect();
            for (head, token) in (0..heads).flat_map(|head| (0..tokens).map(move |token| (head, token))) {
                let row = tensor.floats(values.len(), keys).enumerate();
                for (key, x) in row {
                    let x = if key < read[token] { x } else { 0.0 };
                    if let Some(needed) = flaw(kind, x) {
                        let at = [sequence, head, token, key];
                        let problem = format!("has {x} at {at:?}, but it must be {needed}");
                        return Err(CaseError::tensor("mask", problem));
                    }
                    values.push(x);
                }
            }
        }
        let extents = [batch, heads, tokens, keys].map(|n| n as u32);
        Ok(Self { kind, stored, mask: ProblemMask { extents, values, gaps: false } })
    }
}

/// What an element must be, where it is not.
fn flaw(kind: Mask, x: f32) -> Option<&'static str> {
    match kind {
        Mask::Keep if x != 0.0 && x != 1.0 => Some("0 or 1"),
        Mask::Add if x.is_nan() || x == f32::INFINITY => Some("a finite number or -inf"),
        _ => None,
    }
}

/// How many keys of a token's row the longest of its readers has.
fn keys_read(readers: &[ProblemSequence], token: usize) -> usize {
    let readers = readers.iter().filter(|s| token < s.q_len as usize);
    readers.map(|s| s.kv_len as usize).max().unwrap_or(0)
}
