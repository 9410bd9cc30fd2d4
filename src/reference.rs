//! The definition: attention in f64, in plain loops. Every kernel is measured against it.

use crate::spec::AttentionSpec;

/// One sequence: queries, keys and values as they are stored, dense.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// `[q_len][q_heads][head_dim]`.
    pub q: &'a [f32],
    /// `[kv_len][kv_heads][head_dim]`.
    pub k: &'a [f32],
    /// `[kv_len][kv_heads][v_head_dim]`.
    pub v: &'a [f32],
    /// Query tokens.
    pub q_len: usize,
    /// Keys.
    pub kv_len: usize,
    /// Position of the first query among the keys.
    pub q_start: i64,
}

/// What attention gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// `[q_len][q_heads][v_head_dim]`; 0 where a row sees no key.
    pub out: Vec<f64>,
    /// `[q_len][q_heads]`, natural log; -inf where a row sees no key.
    pub lse: Vec<f64>,
}

/// `out = softmax(scale * q k^T + mask) v` for every query head, in f64.
pub fn attention(spec: &AttentionSpec, problem: &Problem<'_>) -> Answer {
    let (q_heads, kv_heads) = (spec.q_heads() as usize, spec.kv_heads() as usize);
    let (dim, v_dim) = (spec.head_dim() as usize, spec.v_head_dim() as usize);
    let mut answer = Answer { out: Vec::new(), lse: Vec::new() };
    for token in 0..problem.q_len {
        let end = spec.visible_end(problem.q_start + token as i64, problem.kv_len as u32) as usize;
        for head in 0..q_heads {
            let kv_head = head / spec.group() as usize;
            let q = &problem.q[(token * q_heads + head) * dim..][..dim];
            let logit = |key: usize| -> f64 {
                let k = &problem.k[(key * kv_heads + kv_head) * dim..][..dim];
                let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                f64::from(spec.scale()) * dot
            };
            let logits: Vec<f64> = (0..end).map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
            let mut out = vec![0.0; v_dim];
            for (key, x) in logits.iter().enumerate() {
                let weight = (x - max).exp() / sum;
                let v = &problem.v[(key * kv_heads + kv_head) * v_dim..][..v_dim];
                for (o, &v) in out.iter_mut().zip(v) {
                    *o += weight * f64::from(v);
                }
            }
            answer.out.extend(out);
            answer.lse.push(if end == 0 { f64::NEG_INFINITY } else { max + sum.ln() });
        }
    }
    answer
}
