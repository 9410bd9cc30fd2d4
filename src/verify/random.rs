//! Random problems: awkward shapes on purpose.

use fastrand::Rng;

use super::problem::{Arrangement, Problem, ProblemSequence};
use super::runner::Setup;
use crate::plan::{Family, Options};
use crate::spec::{AttentionSpec, Dtype};

/// Shapes that kernels like to get wrong, and ordinary ones.
const GROUPS: [u32; 12] = [1, 1, 2, 3, 4, 4, 5, 7, 8, 12, 16, 71];
const DIMS: [u32; 16] = [1, 2, 3, 7, 16, 32, 33, 64, 64, 80, 96, 100, 127, 128, 192, 256];
const LENS: [u32; 14] = [0, 1, 2, 3, 7, 8, 15, 31, 32, 33, 64, 65, 127, 200];

/// Problems that share a spec: compiling costs more than running.
const PER_SPEC: u64 = 16;

/// A problem drawn from `seed`: the same seed gives the same problem everywhere. Seeds of one sixteen share a spec.
pub fn random_problem(seed: u64) -> Problem {
    random_problem_of(&random_spec(seed / PER_SPEC), seed)
}

/// A problem of `spec`, drawn from `seed`.
pub fn random_problem_of(spec: &AttentionSpec, seed: u64) -> Problem {
    let mut rng = Rng::with_seed(seed.wrapping_mul(2).wrapping_add(1));
    let spec = spec.clone();
    let sequences = (0..rng.u32(1..=4)).map(|_| random_sequence(&mut rng, &spec)).collect();
    let arrangement = |rng: &mut Rng| {
        [Arrangement::TokensHeads, Arrangement::HeadsTokens, Arrangement::Gaps][rng.usize(..3)]
    };
    Problem { spec, sequences, inputs: arrangement(&mut rng), outputs: arrangement(&mut rng) }
}

fn random_spec(seed: u64) -> AttentionSpec {
    let mut rng = Rng::with_seed(seed.wrapping_mul(2));
    let pick = |rng: &mut Rng, from: &[u32]| from[rng.usize(..from.len())];
    let group = pick(&mut rng, &GROUPS);
    let kv_heads = if group > 16 { 1 } else { rng.u32(1..=3) };
    let dim = |rng: &mut Rng| if rng.bool() { pick(rng, &DIMS) } else { rng.u32(1..=160) };
    let head_dim = dim(&mut rng);
    let v_head_dim = if rng.bool() { head_dim } else { dim(&mut rng) };
    let builder = AttentionSpec::builder(group * kv_heads, kv_heads, head_dim)
        .v_head_dim(v_head_dim)
        .q_dtype(if rng.u32(..3) == 0 { Dtype::F16 } else { Dtype::F32 })
        .kv_dtype([Dtype::F32, Dtype::F16, Dtype::Bf16][rng.usize(..3)])
        .causal(rng.u32(..4) != 0);
    let builder = match rng.u32(..4) {
        0 => builder.scale(rng.f32() - 0.3),
        _ => builder,
    };
    // Every draw is valid; were one not, another seed would do.
    builder.build().unwrap_or_else(|_| random_spec(seed.wrapping_add(1)))
}

fn random_sequence(rng: &mut Rng, spec: &AttentionSpec) -> ProblemSequence {
    let len = |rng: &mut Rng| if rng.bool() { LENS[rng.usize(..LENS.len())] } else { rng.u32(0..80) };
    let kv_len = if rng.u32(..8) == 0 { rng.u32(200..700) } else { len(rng) };
    // Decodes are half of all.
    let q_len = if rng.bool() { rng.u32(..3) } else { len(rng) };
    let q_start = match rng.u32(..4) {
        0 => Some(rng.i32(-5..300)),
        1 => Some(0),
        _ => None,
    };
    let mut data =
        |count: u32, dtype: Dtype| -> Vec<f32> { (0..count).map(|_| dtype.round(normal(rng))).collect() };
    let dtype = spec.q_dtype();
    let q = data(q_len * spec.q_heads() * spec.head_dim(), dtype);
    let k = data(kv_len * spec.kv_heads() * spec.head_dim(), dtype);
    let v = data(kv_len * spec.kv_heads() * spec.v_head_dim(), dtype);
    ProblemSequence { q_len, kv_len, q_start, history: rng.u32(..=kv_len), q, k, v }
}

/// Roughly normal, variance 1: twelve uniforms less six.
pub(crate) fn normal(rng: &mut Rng) -> f32 {
    (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0
}

/// How to run the problems of `seed`'s sixteen: families, chunks and checks take turns.
pub fn random_setup(seed: u64) -> Setup {
    let mut rng = Rng::with_seed((seed / PER_SPEC).wrapping_mul(2).wrapping_add(7));
    Setup {
        options: Options {
            family: if rng.bool() { Family::Auto } else { Family::Portable },
            chunk: [None, None, Some(1), Some(13), Some(64)][rng.usize(..5)],
            checked: rng.u32(..4) == 0,
            count_fetches: false,
        },
        slack: rng.u32(..5),
    }
}
