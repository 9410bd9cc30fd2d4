//! The definition: attention and its gradients in f64, in plain loops. Every kernel is measured against it.
//!
//! Slices must be as long as their shapes say: on shorter ones these functions panic, as indexing does.

mod backward;

use crate::spec::{AttentionSpec, hidden_below};
use crate::weights::LayerWeights;

pub use backward::{Gradients, gradients};

/// One sequence: queries as they come, keys and values as they are stored, dense.
#[derive(Debug, Clone, Copy, Default)]
pub struct Problem<'a> {
    /// `[q_len][q_heads][head_dim]`, neither normalised nor turned.
    pub q: &'a [f32],
    /// `[kv_len][kv_heads][head_dim]`, as the cache holds them: [`embed`]ded before they were stored.
    pub k: &'a [f32],
    /// `[kv_len][kv_heads][v_head_dim]`; unused where values lie in keys.
    pub v: &'a [f32],
    /// Query tokens.
    pub q_len: usize,
    /// Keys.
    pub kv_len: usize,
    /// Position of the first query among the keys.
    pub q_start: i64,
    /// A dense mask: added to the logits, or hides where it is 0, as the spec says.
    pub mask: Option<DenseMask<'a>>,
    /// As [`Sequence::tree`](crate::Sequence::tree).
    pub tree: Option<&'a [u64]>,
    /// As [`Sequence::documents`](crate::Sequence::documents).
    pub documents: Option<&'a [u32]>,
    /// What the layer has learned.
    pub weights: LayerWeights<'a>,
}

/// The mask of one sequence: element (query head, query token, key) at `head * strides[0] + token * strides[1] + key * strides[2]`.
#[derive(Debug, Clone, Copy)]
pub struct DenseMask<'a> {
    /// Its elements.
    pub values: &'a [f32],
    /// Between heads, tokens, keys; 0 broadcasts.
    pub strides: [usize; 3],
}

/// What attention gives.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// `[q_len][q_heads][v_head_dim]`; 0 where a row sees no key.
    pub out: Vec<f64>,
    /// `[q_len][q_heads]`, natural log; -inf where a row sees no key.
    pub lse: Vec<f64>,
    /// The largest sum of magnitudes that a logit which matters was added up from: rounding errors grow with it.
    pub magnitude: f64,
}

impl Problem<'_> {
    /// The position to which the query of a token turns.
    pub fn query_position(&self, token: usize) -> i64 {
        match self.tree {
            // The depth in a tree: the draft tokens that it sees, itself not counted.
            Some(tree) => self.q_start + i64::from(tree[token].count_ones().max(1) - 1),
            None => self.q_start + token as i64,
        }
    }

    /// The position to which a key turns.
    pub fn key_position(&self, key: usize) -> i64 {
        match self.tree {
            Some(tree) if key + tree.len() >= self.kv_len => {
                self.query_position(key + tree.len() - self.kv_len)
            }
            _ => key as i64,
        }
    }

    /// What is added to the logit of a pair, if the pair is visible.
    fn bias(&self, spec: &AttentionSpec, [token, head, key]: [usize; 3]) -> Option<f64> {
        let (position, j) = (self.q_start + token as i64, key as i64);
        let mut visible = !spec.causal() || j <= position;
        visible &= spec.window_left().is_none_or(|left| j >= position - i64::from(left));
        visible &= spec.window_right().is_none_or(|right| j <= position + i64::from(right));
        if let Some(documents) = self.documents {
            visible &=
                document(documents, j).is_some() && document(documents, j) == document(documents, position);
        }
        if let Some(tree) = self.tree {
            let first = self.kv_len - tree.len();
            visible &= key < first || tree[token] >> (key - first) & 1 == 1;
        }
        let mut bias = 0.0;
        if let Some(slopes) = spec.alibi() {
            bias -= f64::from(slopes[head]) * (position - j) as f64;
        }
        if let Some(DenseMask { values, strides }) = self.mask {
            let value = values[head * strides[0] + token * strides[1] + key * strides[2]];
            match spec.mask() {
                crate::Mask::Keep => visible &= value != 0.0,
                _ => {
                    visible &= value > hidden_below(spec.q_dtype());
                    bias += f64::from(value.min(1e38));
                }
            }
        }
        visible.then_some(bias)
    }
}

/// Which document a position lies in.
fn document(lens: &[u32], position: i64) -> Option<usize> {
    let mut end = 0;
    lens.iter().position(|len| {
        let begin = end;
        end += i64::from(*len);
        (begin..end).contains(&position)
    })
}

/// A query or key as its logits see it: RMS-normalised with `weights`, turned to `position`, where the spec asks for that.
pub fn embed(spec: &AttentionSpec, row: &[f32], weights: &[f32], position: i64) -> Vec<f64> {
    let mut row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
    if let Some(epsilon) = spec.qk_norm() {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + f64::from(epsilon)).sqrt();
        for (x, w) in row.iter_mut().zip(weights) {
            *x *= factor * f64::from(*w);
        }
    }
    if let Some(rope) = spec.rope() {
        rope.rotate(&mut row, position);
    }
    row
}

/// What a row sees: the keys, and their logits.
struct Seen {
    /// The query, normalised and turned.
    q: Vec<f64>,
    keys: Vec<usize>,
    logits: Vec<f64>,
    /// Derivatives of the logits by the dot products.
    slopes: Vec<f64>,
    /// Sums of magnitudes that the logits were added up from.
    sizes: Vec<f64>,
    /// Log-sum-exp, the sink included; -inf where no key is seen.
    lse: f64,
}

impl Seen {
    fn of(spec: &AttentionSpec, problem: &Problem<'_>, [token, head]: [usize; 2]) -> Self {
        let (q_heads, kv_heads) = (spec.q_heads() as usize, spec.kv_heads() as usize);
        let (dim, kv_head) = (spec.head_dim() as usize, head / spec.group() as usize);
        let q = &problem.q[(token * q_heads + head) * dim..][..dim];
        let q = embed(spec, q, problem.weights.q_norm, problem.query_position(token));
        let (logits, slopes, sizes) = (Vec::new(), Vec::new(), Vec::new());
        let mut seen = Self { q, keys: Vec::new(), logits, slopes, sizes, lse: f64::NEG_INFINITY };
        for key in 0..problem.kv_len {
            let Some(bias) = problem.bias(spec, [token, head, key]) else { continue };
            let k = &problem.k[(key * kv_heads + kv_head) * dim..][..dim];
            let (mut dot, mut size) = (0.0, 0.0);
            for (&q, &k) in seen.q.iter().zip(k) {
                let product = q * f64::from(k);
                dot += product;
                size += product.abs();
            }
            let scale = f64::from(spec.scale());
            let (mut logit, mut slope) = (scale * dot, scale);
            size *= scale.abs();
            if let Some(cap) = spec.softcap().map(f64::from) {
                // An error before the cap counts as much as the slope there.
                let bent = (logit / cap).tanh();
                size = size * (1.0 - bent * bent) + cap * bent.abs();
                slope *= 1.0 - bent * bent;
                logit = cap * bent;
            }
            seen.keys.push(key);
            seen.logits.push(logit + bias);
            seen.slopes.push(slope);
            seen.sizes.push(size + bias.abs());
        }
        if !seen.keys.is_empty() {
            let sink = match spec.sinks() {
                true => f64::from(problem.weights.sinks[head]),
                false => f64::NEG_INFINITY,
            };
            let max = seen.logits.iter().copied().fold(sink, f64::max);
            let sum: f64 = seen.logits.iter().map(|x| (x - max).exp()).sum::<f64>() + (sink - max).exp();
            seen.lse = max + sum.ln();
        }
        seen
    }
}

impl Problem<'_> {
    /// The value of a key.
    fn value(&self, spec: &AttentionSpec, row: usize) -> &[f32] {
        let (dim, v_dim) = (spec.head_dim() as usize, spec.v_head_dim() as usize);
        match spec.v_in_k() {
            true => &self.k[row * dim..][..v_dim],
            false => &self.v[row * v_dim..][..v_dim],
        }
    }
}

/// Attention of one sequence, as [`AttentionSpec`] defines it, in f64.
pub fn attention(spec: &AttentionSpec, problem: &Problem<'_>) -> Answer {
    let (q_heads, kv_heads) = (spec.q_heads() as usize, spec.kv_heads() as usize);
    let mut answer = Answer::default();
    for token in 0..problem.q_len {
        for head in 0..q_heads {
            let seen = Seen::of(spec, problem, [token, head]);
            let mut out = vec![0.0; spec.v_head_dim() as usize];
            for ((key, x), size) in seen.keys.iter().zip(&seen.logits).zip(&seen.sizes) {
                let weight = (x - seen.lse).exp();
                let v = problem.value(spec, key * kv_heads + head / spec.group() as usize);
                for (o, &v) in out.iter_mut().zip(v) {
                    *o += weight * f64::from(v);
                }
                if weight > 1e-7 {
                    answer.magnitude = answer.magnitude.max(*size);
                }
            }
            answer.out.extend(out);
            answer.lse.push(seen.lse);
        }
    }
    answer
}

/// Two partial results of the same rows over different keys, merged: `lse = ln(exp(a) + exp(b))`, outputs weighted by
/// `exp(a - lse)` and `exp(b - lse)` (FlashInfer, arXiv 2501.01005). A row with LSE -inf has seen no key and weighs nothing.
pub fn merge(a: &Answer, b: &Answer) -> Answer {
    let mut merged = Answer { magnitude: a.magnitude.max(b.magnitude), ..Answer::default() };
    let v_dim = a.out.len() / a.lse.len().max(1);
    for (row, (&x, &y)) in a.lse.iter().zip(&b.lse).enumerate() {
        let max = x.max(y);
        let [wx, wy] = [x, y].map(|l| if l == f64::NEG_INFINITY { 0.0 } else { (l - max).exp() });
        let sum = wx + wy;
        for i in row * v_dim..(row + 1) * v_dim {
            // No part of either where neither has seen a key.
            let out = if sum == 0.0 { 0.0 } else { (a.out[i] * wx + b.out[i] * wy) / sum };
            merged.out.push(out);
        }
        merged.lse.push(if sum == 0.0 { f64::NEG_INFINITY } else { max + sum.ln() });
    }
    merged
}
