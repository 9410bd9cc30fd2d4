//! The gradients, in f64: the chain rule line by line. Finite differences of [`attention`](super::attention) prove it below.

use super::{Problem, Seen};
use crate::spec::AttentionSpec;

/// Gradients of a loss with respect to what a sequence's attention was computed from.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Gradients {
    /// `[q_len][q_heads][head_dim]`: of queries as they come, before they turn.
    pub q: Vec<f64>,
    /// `[kv_len][kv_heads][head_dim]`: of keys before they turn.
    pub k: Vec<f64>,
    /// `[kv_len][kv_heads][v_head_dim]`.
    pub v: Vec<f64>,
    /// `[q_heads]`; empty where the spec has no sinks.
    pub sinks: Vec<f64>,
    /// For each of the four, the largest sum of magnitudes that an element was added up from: rounding errors grow with it.
    pub sizes: [f64; 4],
}

/// Gradients of the loss whose gradient by the output is `d_out`, `[q_len][q_heads][v_head_dim]`.
///
/// With weights `p = softmax(s)` and `o = p v` (a sink is one more logit, without a value): `dv = p^T do`,
/// `ds = p (do v^T - do . o)`, then through softcap and scale to the dot products, and from these to queries and keys
/// (FlashAttention-2, arXiv 2307.08691). Rotations turn back.
///
/// For specs without norms of queries and keys, whose values do not lie in keys.
pub fn gradients(spec: &AttentionSpec, problem: &Problem<'_>, d_out: &[f32]) -> Gradients {
    let (q_heads, kv_heads) = (spec.q_heads() as usize, spec.kv_heads() as usize);
    let (dim, v_dim) = (spec.head_dim() as usize, spec.v_head_dim() as usize);
    let rows = problem.kv_len * kv_heads;
    let mut all = Gradients {
        k: vec![0.0; rows * dim],
        v: vec![0.0; rows * v_dim],
        sinks: vec![0.0; if spec.sinks() { q_heads } else { 0 }],
        ..Gradients::default()
    };
    let (mut k_sizes, mut v_sizes) = (vec![0.0; rows * dim], vec![0.0; rows * v_dim]);
    let mut sink_sizes = all.sinks.clone();
    for token in 0..problem.q_len {
        for head in 0..q_heads {
            let seen = Seen::of(spec, problem, [token, head]);
            let d_out = &d_out[(token * q_heads + head) * v_dim..][..v_dim];
            let row = |key: usize| key * kv_heads + head / spec.group() as usize;
            let weights: Vec<f64> = seen.logits.iter().map(|x| (x - seen.lse).exp()).collect();
            // Gradients of the weights, and what they have in common: do . o = sum p dp.
            let products = |key: usize, of: fn(f64) -> f64| -> f64 {
                let v = problem.value(spec, row(key));
                d_out.iter().zip(v).map(|(d, v)| of(f64::from(*d) * f64::from(*v))).sum()
            };
            let d_weights: Vec<f64> = seen.keys.iter().map(|key| products(*key, |x| x)).collect();
            let d_sizes: Vec<f64> = seen.keys.iter().map(|key| products(*key, f64::abs)).collect();
            let sum = |of: &[f64]| -> f64 { weights.iter().zip(of).map(|(p, d)| p * d).sum() };
            let (delta, delta_size) = (sum(&d_weights), sum(&d_sizes));

            let (mut dq, mut dq_sizes) = (vec![0.0; dim], vec![0.0; dim]);
            for (i, &key) in seen.keys.iter().enumerate() {
                let d_dot = weights[i] * (d_weights[i] - delta) * seen.slopes[i];
                let d_size = weights[i] * (d_sizes[i] + delta_size) * seen.slopes[i].abs();
                for element in 0..dim {
                    let at = row(key) * dim + element;
                    let (q, k) = (seen.q[element], f64::from(problem.k[at]));
                    dq[element] += d_dot * k;
                    dq_sizes[element] += d_size * k.abs();
                    all.k[at] += d_dot * q;
                    k_sizes[at] += d_size * q.abs();
                }
                for (element, d) in d_out.iter().enumerate() {
                    let at = row(key) * v_dim + element;
                    all.v[at] += weights[i] * f64::from(*d);
                    v_sizes[at] += weights[i] * f64::from(d.abs());
                }
            }
            if spec.sinks() && !seen.keys.is_empty() {
                let weight = (f64::from(problem.weights.sinks[head]) - seen.lse).exp();
                all.sinks[head] -= weight * delta;
                sink_sizes[head] += weight * delta_size;
            }
            turn_back(spec, &mut dq, problem.query_position(token));
            all.q.extend(dq);
            all.sizes[0] = largest(&dq_sizes).max(all.sizes[0]);
        }
    }
    for (i, row) in all.k.chunks_mut(dim).enumerate() {
        turn_back(spec, row, problem.key_position(i / kv_heads));
    }
    let magnitude = spec.rope().map_or(1.0, |rope| rope.magnitude());
    all.sizes[0] *= magnitude;
    all.sizes[1] = largest(&k_sizes) * magnitude;
    (all.sizes[2], all.sizes[3]) = (largest(&v_sizes), largest(&sink_sizes));
    all
}

fn largest(of: &[f64]) -> f64 {
    of.iter().copied().fold(0.0, f64::max)
}

/// From the gradient of a turned row to that of the row: a rotation's transpose is the rotation back, times the same magnitude.
fn turn_back(spec: &AttentionSpec, row: &mut [f64], position: i64) {
    if let Some(rope) = spec.rope() {
        rope.rotate(row, -position);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DenseMask, attention};
    use super::*;
    use crate::weights::LayerWeights;
    use crate::{Mask, Rope, Scaling, SpecBuilder, alibi_slopes};

    const LENS: [usize; 2] = [5, 7];

    /// Multiples of 1/64 in -1 to 1 from a seed: a step of 2^-12 either way is exact in f32.
    fn numbers(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 25) as f32 / 64.0 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// What is varied: q, k (turned), v and sinks; and what is not.
    struct Inputs<'a> {
        varied: [Vec<f32>; 4],
        mask: Option<&'a [f32]>,
        documents: Option<&'a [u32]>,
    }

    impl Inputs<'_> {
        fn problem(&self) -> Problem<'_> {
            let ([q, k, v, sinks], [q_len, kv_len]) = (&self.varied, LENS);
            Problem {
                q,
                k,
                v,
                q_len,
                kv_len,
                q_start: (kv_len - q_len) as i64,
                mask: self.mask.map(|values| DenseMask { values, strides: [0, kv_len, 1] }),
                documents: self.documents,
                weights: LayerWeights { sinks, ..LayerWeights::default() },
                ..Problem::default()
            }
        }
    }

    /// Gradients against central differences.
    fn check(builder: SpecBuilder, mask: Option<&[f32]>, documents: Option<&[u32]>) {
        let spec = builder.build().unwrap();
        let [q_len, kv_len] = LENS;
        let (heads, kv_heads) = (spec.q_heads() as usize, spec.kv_heads() as usize);
        let (dim, v_dim) = (spec.head_dim() as usize, spec.v_head_dim() as usize);
        let varied = [
            numbers(q_len * heads * dim, 1),
            numbers(kv_len * kv_heads * dim, 2),
            numbers(kv_len * kv_heads * v_dim, 3),
            numbers(if spec.sinks() { heads } else { 0 }, 4),
        ];
        let mut inputs = Inputs { varied, mask, documents };
        let d_out = numbers(q_len * heads * v_dim, 5);
        let mut found = gradients(&spec, &inputs.problem(), &d_out);
        // The keys that are varied are turned ones: so are the gradients to be, and R R^T is the magnitude squared.
        if let Some(rope) = spec.rope() {
            for (i, row) in found.k.chunks_mut(dim).enumerate() {
                rope.rotate(row, (i / kv_heads) as i64);
                row.iter_mut().enumerate().for_each(|(element, x)| {
                    let turns = (rope.first..rope.first + rope.dim).contains(&(element as u32));
                    *x /= if turns { rope.magnitude().powi(2) } else { 1.0 };
                });
            }
        }
        let loss = |inputs: &Inputs<'_>| -> f64 {
            let out = attention(&spec, &inputs.problem()).out;
            out.iter().zip(&d_out).map(|(o, d)| o * f64::from(*d)).sum()
        };
        let step = 1.0 / 4096.0;
        for (which, gradient) in [&found.q, &found.k, &found.v, &found.sinks].into_iter().enumerate() {
            assert_eq!(gradient.len(), inputs.varied[which].len());
            assert!(gradient.is_empty() || gradient.iter().any(|x| *x != 0.0), "input {which} moves nothing");
            for (i, expected) in gradient.iter().enumerate() {
                let here = inputs.varied[which][i];
                let [more, less] = [step, -step].map(|step| {
                    inputs.varied[which][i] = here + step;
                    loss(&inputs)
                });
                inputs.varied[which][i] = here;
                let slope = (more - less) / f64::from(2.0 * step);
                assert!(
                    (slope - expected).abs() < 2e-6,
                    "input {which}, element {i}: {expected}, but differences give {slope} ({spec})"
                );
            }
        }
    }

    fn plain() -> SpecBuilder {
        AttentionSpec::builder(4, 2, 6).v_head_dim(3)
    }

    #[test]
    fn gradients_are_what_finite_differences_say() {
        check(plain(), None, None);
        check(plain().causal(false), None, None);
        check(plain().window(2, 1).causal(false), None, None);
        check(plain().softcap(0.7), None, None);
        check(plain().sinks(true), None, None);
        check(plain().alibi(&alibi_slopes(4)), None, None);
        check(plain(), None, Some(&[3, 4]));
    }

    #[test]
    fn gradients_turn_back() {
        let yarn = Scaling::Yarn {
            factor: 4.0,
            original_context: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Some(1.5),
            truncate: true,
        };
        check(plain().rope(Rope { first: 1, scaling: yarn, ..Rope::new(4) }), None, None);
    }

    #[test]
    fn gradients_pass_masks() {
        let [q_len, kv_len] = LENS;
        let keep: Vec<f32> = (0..q_len * kv_len).map(|i| f32::from(u8::from(i % 3 != 0))).collect();
        check(plain().mask(Mask::Keep).causal(false), Some(&keep), None);
        let add = numbers(q_len * kv_len, 9);
        check(plain().mask(Mask::Add).softcap(2.0).sinks(true), Some(&add), None);
    }
}
