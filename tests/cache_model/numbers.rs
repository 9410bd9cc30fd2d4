//! Keys, values and queries that follow from tokens, and what attention over them gives.

use fastrand::Rng;
use gqa::reference::{self, Answer};
use gqa::verify::Tolerance;
use gqa::{AttentionSpec, quant};

use super::model::{Sequence, Token};

/// Keys or values of a token in a layer: `[kv_heads][dim]`.
pub(crate) fn row(spec: &AttentionSpec, side: usize, token: Token, layer: usize) -> Vec<f32> {
    let dim = if side == 0 { spec.head_dim() } else { spec.v_head_dim() };
    let seed =
        (u64::from(token) << 3 | (layer as u64) << 1 | side as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    queries(seed, spec.kv_heads() * dim)
}

/// `count` numbers from -1 to 1.
pub(crate) fn queries(seed: u64, count: u32) -> Vec<f32> {
    let mut rng = Rng::with_seed(seed);
    (0..count).map(|_| rng.f32() * 2.0 - 1.0).collect()
}

/// A row as the cache stores it, in bytes.
pub(crate) fn stored(spec: &AttentionSpec, side: usize, token: Token, layer: usize) -> Vec<u8> {
    let (dim, dtype) = match side {
        0 => (spec.head_dim(), spec.k_dtype()),
        _ => (spec.v_head_dim(), spec.v_dtype()),
    };
    let row = row(spec, side, token, layer);
    let words = row.chunks(dim as usize).flat_map(|head| quant::encode_row(dtype, head).0);
    words.flat_map(u32::to_le_bytes).collect()
}

/// What a layer answers to queries that are the last tokens of a sequence, and how far from that an adapter may be.
pub(crate) fn answer(
    spec: &AttentionSpec,
    sequence: &Sequence,
    layer: usize,
    q: &[f32],
) -> (Answer, [Tolerance; 2]) {
    let tokens = &sequence.tokens[sequence.begin as usize..];
    let rows = |side, dtype| -> Vec<f32> {
        tokens.iter().flat_map(|token| quant::stored(dtype, &row(spec, side, *token, layer))).collect()
    };
    let (k, v) = (rows(0, spec.k_dtype()), rows(1, spec.v_dtype()));
    let q_len = q.len() / (spec.q_heads() * spec.head_dim()) as usize;
    // What was evicted is as if it had never been: nothing here depends on absolute positions.
    let q_start = tokens.len() as i64 - q_len as i64;
    let problem =
        reference::Problem { q, k: &k, v: &v, q_len, kv_len: tokens.len(), q_start, ..Default::default() };
    let answer = reference::attention(spec, &problem);
    let tolerances = [Tolerance::of_output(spec, 1.0, answer.magnitude), Tolerance::of_lse(answer.magnitude)];
    (answer, tolerances)
}
