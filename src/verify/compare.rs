//! Holds results against the reference: `|got - expected| <= atol + rtol * |expected|`.

use super::problem::Problem;
use super::runner::Output;
use crate::spec::{AttentionSpec, Dtype};

/// How far a result may be from the truth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Absolute part.
    pub atol: f64,
    /// Part relative to the expected value.
    pub rtol: f64,
}

impl Tolerance {
    /// For outputs of `spec`, where values are at most `largest` and logits are added up from at most
    /// [`magnitude`](crate::reference::Answer::magnitude): f32 arithmetic, and rounding of the output.
    pub fn of_output(spec: &AttentionSpec, largest: f64, magnitude: f64) -> Self {
        let stored = match spec.q_dtype() {
            Dtype::F32 => 0.0,
            // 1 % more than half a unit: the f32 result may lie on the other side of a tie. 6e-8 is the smallest f16.
            other => other.epsilon() * 1.01,
        };
        Self { atol: (2e-5 + LOGIT * magnitude) * largest.max(1e-3) + stored * 2e-4, rtol: 2e-5 + stored }
    }

    /// For log-sum-exps, which are f32 always.
    pub fn of_lse(magnitude: f64) -> Self {
        Self { atol: 2e-5 + LOGIT * magnitude, rtol: 2e-5 }
    }

    /// For keys and values as they are stored, of at most `largest`.
    fn of_stored(dtype: Dtype, largest: f64) -> Self {
        let stored = dtype.epsilon() * 1.01;
        match dtype {
            // A block's range is at most twice the largest; least and scale are bf16, rounded away from it.
            Dtype::Q8 | Dtype::Q4 => {
                Self { atol: 2.0 * largest * stored * 1.02 + 2e-6 * largest, rtol: 2e-6 }
            }
            // Half of its smallest number; it ends at 448.
            Dtype::Fp8 => Self {
                atol: 2e-6 * largest + stored / 64.0 + (largest - 448.0).max(0.0),
                rtol: 2e-6 + stored,
            },
            _ => Self { atol: 2e-6 * largest + stored * 2e-4, rtol: 2e-6 + stored },
        }
    }
}

/// Error of a logit, relative to the magnitudes that it is added up from: some roundings of f32.
pub(super) const LOGIT: f64 = 5e-7;

/// How a tensor differs from what was expected.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Mismatch {
    /// Largest absolute error.
    pub max_abs: f64,
    /// Largest relative error, where the expected value is at least 1e-3.
    pub max_rel: f64,
    /// Elements beyond the tolerance.
    pub beyond: usize,
    /// The element furthest beyond (or nearest to) its tolerance.
    pub index: usize,
    /// What was there.
    pub got: f64,
    /// What was expected there.
    pub expected: f64,
}

impl Mismatch {
    /// Whether every element lies within the tolerance.
    pub fn passes(&self) -> bool {
        self.beyond == 0
    }
}

/// Compares element by element; infinities must be equal, and NaN is never right.
pub fn compare(got: &[f32], expected: &[f64], tolerance: Tolerance) -> Mismatch {
    let mut result = Mismatch { beyond: got.len().abs_diff(expected.len()), ..Mismatch::default() };
    let mut worst = f64::NEG_INFINITY;
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let got = f64::from(got);
        let error = match (got - expected).abs() {
            _ if got == expected => 0.0,
            error if error.is_nan() => f64::INFINITY,
            error => error,
        };
        let excess = error - (tolerance.atol + tolerance.rtol * expected.abs()).min(f64::MAX);
        result.beyond += usize::from(excess > 0.0);
        result.max_abs = result.max_abs.max(error);
        if expected.abs() >= 1e-3 && error > 0.0 {
            result.max_rel = result.max_rel.max(error / expected.abs());
        }
        if excess > worst {
            worst = excess;
            (result.index, result.got, result.expected) = (index, got, expected);
        }
    }
    result
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { max_abs, max_rel, beyond, index, got, expected } = self;
        write!(f, "max abs {max_abs:.1e}, max rel {max_rel:.1e}")?;
        if *beyond > 0 {
            write!(f, "; {beyond} beyond tolerance, worst at {index}: got {got:e}, expected {expected:e}")?;
        }
        Ok(())
    }
}

/// Holds what a cache stores against what it should, row by row of `dim`. Of a row that is not finite, which a mask may hide, nothing is
/// promised where its elements share something: a block has one scale, and a rotation mixes them all.
fn compare_stored(got: &[f32], expected: &[f64], (dtype, dim): (Dtype, u32), rotated: bool) -> Mismatch {
    let (mut rows, mut wanted) = (Vec::new(), Vec::new());
    let (dim, shares) = (dim.max(1) as usize, dtype.is_blocked() || rotated);
    for (got, expected) in got.chunks(dim).zip(expected.chunks(dim)) {
        if !shares || expected.iter().all(|x| x.is_finite()) {
            rows.extend_from_slice(got);
            wanted.extend_from_slice(expected);
        }
    }
    let largest = wanted.iter().fold(0.0, |m, x| f64::max(m, x.abs()));
    let found = compare(&rows, &wanted, Tolerance::of_stored(dtype, largest));
    Mismatch { beyond: found.beyond + got.len().abs_diff(expected.len()), ..found }
}

/// Holds a device's output against the reference, sequence by sequence.
///
/// # Errors
/// Says which sequence, which tensor and where.
pub fn check(problem: &Problem, output: &Output) -> Result<(), String> {
    let spec = &problem.spec;
    for (i, answer) in problem.answers(output.stored.as_deref()).iter().enumerate() {
        let sequence = &problem.sequences[i];
        // Rotated rows have other products, whose magnitudes add up to more.
        let magnitude = answer.magnitude * if spec.rotated() { 4.0 } else { 1.0 };
        let tolerance = Tolerance::of_output(spec, problem.largest_value(i), magnitude);
        let out = compare(&output.out[i], &answer.out, tolerance);
        let lse = compare(&output.lse[i], &answer.lse, Tolerance::of_lse(magnitude));
        let (mut keys, mut values) = (Mismatch::default(), Mismatch::default());
        if let Some(stored) = &output.stored {
            keys = compare_stored(
                &stored[i].k,
                &problem.expected_keys(i),
                (spec.k_dtype(), spec.head_dim()),
                spec.rotated(),
            );
            values = compare_stored(
                &stored[i].v,
                &problem.expected_values(i),
                (spec.v_dtype(), spec.v_head_dim()),
                spec.rotated(),
            );
        }
        for (name, mismatch) in [("stored keys", keys), ("stored values", values), ("out", out), ("lse", lse)]
        {
            if !mismatch.passes() {
                let (q_len, kv_len) = (sequence.q_len, sequence.kv_len);
                return Err(format!("{name} of sequence {i} (q_len {q_len}, kv_len {kv_len}): {mismatch}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::stored;

    const EXACT: Tolerance = Tolerance { atol: 0.0, rtol: 0.0 };

    #[test]
    fn nan_and_missing_elements_never_pass() {
        assert!(!compare(&[f32::NAN], &[f64::NAN], EXACT).passes());
        assert!(!compare(&[f32::NAN], &[0.0], Tolerance { atol: f64::INFINITY, rtol: 0.0 }).passes());
        assert!(!compare(&[1.0], &[1.0, 2.0], EXACT).passes());
        assert!(compare(&[f32::NEG_INFINITY], &[f64::NEG_INFINITY], EXACT).passes());
        assert!(!compare(&[-1e38], &[f64::NEG_INFINITY], EXACT).passes());
    }

    #[test]
    fn stored_keys_lie_within_their_tolerance() {
        for dtype in Dtype::ALL {
            for size in [1e-3_f32, 1.0, 100.0, 1000.0] {
                let keys: Vec<f32> = (0..640).map(|i| (i as f32 * 0.37).sin() * size).collect();
                let expected: Vec<f64> = keys.iter().map(|x| f64::from(*x)).collect();
                let found =
                    compare(&stored(dtype, &keys), &expected, Tolerance::of_stored(dtype, size.into()));
                assert!(found.passes(), "{dtype}, {size}: {found}");
            }
        }
    }

    #[test]
    fn worst_element_is_named() {
        let m = compare(&[1.0, 2.5, 3.1], &[1.0, 2.0, 3.0], Tolerance { atol: 0.2, rtol: 0.0 });
        assert_eq!((m.beyond, m.index, m.got, m.expected), (1, 1, 2.5, 2.0));
    }
}
