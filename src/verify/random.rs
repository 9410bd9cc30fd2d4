//! Random problems: awkward shapes on purpose.

use fastrand::Rng;

use super::problem::{Arrangement, Problem, ProblemMask, ProblemSequence, Weights};
use super::runner::Setup;
use crate::plan::{Family, Options};
use crate::quant::stored;
use crate::rope::{Pairing, Rope, Scaling};
use crate::spec::{AttentionSpec, Dtype, Mask, SpecBuilder, alibi_slopes};

/// Shapes that kernels like to get wrong, and ordinary ones.
const GROUPS: [u32; 12] = [1, 1, 2, 3, 4, 4, 5, 7, 8, 12, 16, 71];
const DIMS: [u32; 19] = [1, 2, 3, 7, 16, 32, 33, 64, 64, 80, 96, 100, 127, 128, 192, 256, 320, 512, 576];
const LENS: [u32; 14] = [0, 1, 2, 3, 7, 8, 15, 31, 32, 33, 64, 65, 127, 200];

/// Problems that share a spec, seeds `n * PER_SPEC` on: compiling costs more than running.
pub const PER_SPEC: u64 = 40;

/// A problem drawn from `seed`: the same seed gives the same problem everywhere. Seeds of one [`PER_SPEC`] share a spec.
pub fn random_problem(seed: u64) -> Problem {
    random_problem_of(&random_spec(seed / PER_SPEC), seed)
}

/// A problem of `spec`, drawn from `seed`.
pub fn random_problem_of(spec: &AttentionSpec, seed: u64) -> Problem {
    let mut rng = Rng::with_seed(seed.wrapping_mul(2).wrapping_add(1));
    let sequences = (0..rng.u32(1..=4)).map(|_| random_sequence(&mut rng, spec)).collect();
    random_rest(&mut rng, spec, sequences)
}

/// A problem of one sequence of `q_len` queries, its last tokens, on `kv_len` keys.
pub fn problem_of_lens(spec: &AttentionSpec, (q_len, kv_len): (u32, u32)) -> Problem {
    let mut rng = Rng::with_seed(u64::from(q_len) << 32 | u64::from(kv_len));
    let [q, k, v] = random_tensors(&mut rng, spec, (q_len, kv_len));
    let (tree, documents) = (None, None);
    let history = kv_len.saturating_sub(q_len);
    let sequence = ProblemSequence { q_len, kv_len, q_start: None, history, q, k, v, tree, documents };
    random_rest(&mut rng, spec, vec![sequence])
}

/// What a problem has beside its sequences.
fn random_rest(rng: &mut Rng, spec: &AttentionSpec, sequences: Vec<ProblemSequence>) -> Problem {
    let spec = spec.clone();
    let arrangement = |rng: &mut Rng| {
        [Arrangement::TokensHeads, Arrangement::HeadsTokens, Arrangement::Gaps][rng.usize(..3)]
    };
    let (inputs, outputs) = (arrangement(rng), arrangement(rng));
    let mut problem = Problem { spec, sequences, inputs, outputs, mask: None, weights: Weights::default() };
    problem.mask = random_mask(rng, &problem);
    problem.weights = random_weights(rng, &problem.spec);
    problem
}

fn random_spec(seed: u64) -> AttentionSpec {
    let mut rng = Rng::with_seed(seed.wrapping_mul(2));
    let pick = |rng: &mut Rng, from: &[u32]| from[rng.usize(..from.len())];
    let group = pick(&mut rng, &GROUPS);
    let kv_heads = if group > 16 { 1 } else { rng.u32(1..=3) };
    let dim = |rng: &mut Rng| if rng.bool() { pick(rng, &DIMS) } else { rng.u32(1..=160) };
    let head_dim = dim(&mut rng);
    let builder = AttentionSpec::builder(group * kv_heads, kv_heads, head_dim);
    let shape = rng.u32(..8);
    let in_keys = shape == 0;
    let builder = match shape {
        0 => builder.v_in_k(rng.u32(1..=head_dim)),
        1..4 => builder.v_head_dim(dim(&mut rng)),
        _ => builder,
    };
    let builder = builder
        .q_dtype(if rng.u32(..3) == 0 { Dtype::F16 } else { Dtype::F32 })
        .kv_dtype(any_dtype(rng.usize(..12)))
        .causal(rng.u32(..4) != 0);
    let builder = match rng.u32(..8) {
        _ if in_keys => builder,
        0 => builder.v_dtype(any_dtype(rng.usize(..12))),
        1 | 2 => builder.rotated(true),
        3 => builder.v_dtype(any_dtype(rng.usize(..12))).rotated(true),
        _ => builder,
    };
    let builder = match rng.u32(..4) {
        0 => builder.scale(rng.f32() - 0.3),
        _ => builder,
    };
    let builder = random_features(&mut rng, builder, (group * kv_heads, head_dim));
    let builder = match rng.u32(..3) {
        0 => builder.qk_norm(1e-6),
        _ => builder,
    };
    // Every draw is valid; were one not, another seed would do.
    builder.build().unwrap_or_else(|_| random_spec(seed.wrapping_add(1)))
}

/// Half of the time one of the ordinary types.
fn any_dtype(nth: usize) -> Dtype {
    *Dtype::ALL.get(nth).unwrap_or(&[Dtype::F32, Dtype::F16, Dtype::Bf16][nth % 3])
}

/// Each of the features with a chance of its own, so that all pairs of them meet.
fn random_features(rng: &mut Rng, builder: SpecBuilder, (q_heads, head_dim): (u32, u32)) -> SpecBuilder {
    let one_in = |rng: &mut Rng, n: u32| rng.u32(..n) == 0;
    let side = |rng: &mut Rng| [0, 1, 5, 31, 64, 100, i32::MAX as u32][rng.usize(..7)];
    let mut builder = match rng.u32(..6) {
        0 => builder.window(side(rng), None),
        1 => builder.window(None, side(rng)),
        2 => builder.window(side(rng), side(rng)),
        _ => builder,
    };
    if one_in(rng, 3) {
        builder = builder.softcap([0.5, 3.0, 30.0, 50.0][rng.usize(..4)]);
    }
    builder = builder.sinks(one_in(rng, 3));
    if one_in(rng, 3) {
        builder = builder.alibi(&alibi_slopes(q_heads));
    }
    builder = builder.mask([Mask::None, Mask::None, Mask::Tree, Mask::Keep, Mask::Add][rng.usize(..5)]);
    if head_dim >= 2 && one_in(rng, 2) {
        builder = builder.rope(random_rope(rng, head_dim));
    }
    builder
}

/// Of what trains.
pub(super) fn training_spec(seed: u64) -> AttentionSpec {
    let mut rng = Rng::with_seed(seed.wrapping_mul(2).wrapping_add(1));
    let group = GROUPS[rng.usize(..GROUPS.len())];
    let kv_heads = if group > 16 { 1 } else { rng.u32(1..=3) };
    let dim = |rng: &mut Rng| match rng.bool() {
        true => DIMS[rng.usize(..DIMS.len())].min(256),
        false => rng.u32(1..=160),
    };
    let head_dim = dim(&mut rng);
    let dtype = |rng: &mut Rng| [Dtype::F32, Dtype::F16, Dtype::Bf16][rng.usize(..3)];
    let builder = AttentionSpec::builder(group * kv_heads, kv_heads, head_dim)
        .v_head_dim(if rng.bool() { head_dim } else { dim(&mut rng) })
        .q_dtype(if rng.u32(..3) == 0 { Dtype::F16 } else { Dtype::F32 })
        .kv_dtype(dtype(&mut rng))
        .v_dtype(dtype(&mut rng))
        .causal(rng.u32(..4) != 0);
    let spec = random_features(&mut rng, builder, (group * kv_heads, head_dim)).build();
    match spec {
        Ok(spec) if spec.mask() != Mask::Tree => spec,
        // Trees do not train; every other draw is valid.
        _ => training_spec(seed.wrapping_add(1 << 40)),
    }
}

fn random_rope(rng: &mut Rng, head_dim: u32) -> Rope {
    let dim = if rng.bool() { head_dim / 2 * 2 } else { 2 * rng.u32(1..=head_dim / 2) };
    let pairs = (dim / 2) as usize;
    let (factor, original_context) = (4.0, 64);
    let scaling = match rng.u32(..9) {
        0 => Scaling::Linear { factor },
        // Its exponent has no meaning for two elements.
        1 if dim > 2 => Scaling::DynamicNtk { factor, original_context, context: 200 },
        2 => Scaling::Yarn {
            factor,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: rng.bool().then_some(1.1),
            truncate: rng.bool(),
        },
        3 => Scaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context },
        4 => Scaling::LongRope {
            short: vec![1.0; pairs],
            long: (0..pairs).map(|i| 1.0 + i as f64 / 3.0).collect(),
            original_context,
            context: [64, 500][rng.usize(..2)],
            attention_factor: None,
        },
        _ => Scaling::None,
    };
    Rope {
        pairing: if rng.bool() { Pairing::Half } else { Pairing::Interleaved },
        first: rng.u32(..=head_dim - dim),
        theta: [1e4, 5e5][rng.usize(..2)],
        scaling,
        ..Rope::new(dim)
    }
}

/// A mask that has full, empty and mixed tiles and, added, some -inf; broadcast in any way.
fn random_mask(rng: &mut Rng, problem: &Problem) -> Option<ProblemMask> {
    let spec = &problem.spec;
    if !spec.mask().is_dense() {
        return None;
    }
    let longest = |of: fn(&ProblemSequence) -> u32| problem.sequences.iter().map(of).max().unwrap_or(0);
    let mut extent = |n: u32| if rng.bool() { n } else { 1 };
    // Heads share a mask where there are many: its elements stay few.
    let heads = if spec.q_heads() > 16 { 1 } else { spec.q_heads() };
    let extents = [
        extent(problem.sequences.len() as u32),
        extent(heads),
        extent(longest(|s| s.q_len)),
        longest(|s| s.kv_len),
    ];
    let keys = extents[3].max(1) as usize;
    let mut values = Vec::new();
    for _ in 0..extents[..3].iter().product::<u32>() {
        let mut kind = 0;
        for key in 0..keys {
            if key % 37 == 0 {
                kind = rng.u32(..3);
            }
            let hidden = kind == 0 || kind == 1 && rng.bool();
            values.push(match (spec.mask(), hidden) {
                (Mask::Keep, hidden) => f32::from(u8::from(!hidden)),
                (_, true) => f32::NEG_INFINITY,
                (_, false) if kind == 2 => 0.0,
                _ => normal(rng),
            });
        }
    }
    if spec.mask() == Mask::Add {
        values = stored(spec.q_dtype(), &values);
    }
    Some(ProblemMask { extents, values, gaps: rng.bool() })
}

fn random_weights(rng: &mut Rng, spec: &AttentionSpec) -> Weights {
    let mut numbers = |present: bool, count: u32, mean: f32| -> Vec<f32> {
        let count = if present { count } else { 0 };
        (0..count).map(|_| mean + normal(rng) * 0.3).collect()
    };
    let norm = spec.qk_norm().is_some();
    Weights {
        sinks: numbers(spec.sinks(), spec.q_heads(), 0.5),
        q_norm: numbers(norm, spec.head_dim(), 1.0),
        k_norm: numbers(norm, spec.head_dim(), 1.0),
    }
}

fn random_sequence(rng: &mut Rng, spec: &AttentionSpec) -> ProblemSequence {
    let len = |rng: &mut Rng| if rng.bool() { LENS[rng.usize(..LENS.len())] } else { rng.u32(0..80) };
    let kv_len = if rng.u32(..8) == 0 { rng.u32(200..700) } else { len(rng) };
    // Decodes are half of all.
    let q_len = if rng.bool() { rng.u32(..3) } else { len(rng) };
    let tree = random_tree(rng, spec, q_len.min(kv_len).min(64));
    let q_len = tree.as_ref().map_or(q_len, |tree| tree.len() as u32);
    let q_start = match rng.u32(..4) {
        _ if tree.is_some() => None,
        0 => Some(rng.i32(-5..300)),
        1 => Some(0),
        _ => None,
    };
    let [q, k, v] = random_tensors(rng, spec, (q_len, kv_len));
    let history = match &tree {
        // Draft tokens have their positions only in the step that knows their tree.
        Some(tree) => rng.u32(..=kv_len - tree.len() as u32),
        None => rng.u32(..=kv_len),
    };
    let documents = match rng.u32(..4) {
        0 if tree.is_none() => Some(random_parts(rng, kv_len)),
        _ => None,
    };
    ProblemSequence { q_len, kv_len, q_start, history, q, k, v, tree, documents }
}

/// Queries, keys and values.
fn random_tensors(rng: &mut Rng, spec: &AttentionSpec, (q_len, kv_len): (u32, u32)) -> [Vec<f32>; 3] {
    let mut data = |count: u32| stored(spec.q_dtype(), &(0..count).map(|_| normal(rng)).collect::<Vec<_>>());
    let values = if spec.v_in_k() { 0 } else { spec.v_head_dim() };
    [
        data(q_len * spec.q_heads() * spec.head_dim()),
        data(kv_len * spec.kv_heads() * spec.head_dim()),
        data(kv_len * spec.kv_heads() * values),
    ]
}

/// Each draft token sees itself, a parent before it, and what the parent sees; now and then something arbitrary.
fn random_tree(rng: &mut Rng, spec: &AttentionSpec, drafts: u32) -> Option<Vec<u64>> {
    if spec.mask() != Mask::Tree || rng.u32(..4) == 0 {
        return None;
    }
    let mut tree: Vec<u64> = Vec::new();
    for i in 0..drafts {
        let ancestors = match i {
            0 => 0,
            n => tree[rng.usize(..n as usize)],
        };
        let stray = if rng.u32(..8) == 0 { rng.u64(..) & (u64::MAX >> (64 - drafts)) } else { 0 };
        tree.push(ancestors | 1 << i | stray);
    }
    Some(tree)
}

/// Lengths that add up to `total`.
fn random_parts(rng: &mut Rng, total: u32) -> Vec<u32> {
    let (mut parts, mut rest) = (Vec::new(), total);
    while rest > 0 {
        let part = rng.u32(..=rest.min(60));
        parts.push(part);
        rest -= part;
    }
    parts
}

/// Roughly normal, variance 1: twelve uniforms less six.
pub(crate) fn normal(rng: &mut Rng) -> f32 {
    (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0
}

/// How to run the problems that share `seed`'s spec: families, chunks and checks take turns.
pub fn random_setup(seed: u64) -> Setup {
    let mut rng = Rng::with_seed((seed / PER_SPEC).wrapping_mul(2).wrapping_add(7));
    let mut setup = Setup {
        options: Options {
            family: if rng.bool() { Family::Auto } else { Family::Portable },
            chunk: [None, None, Some(1), Some(13), Some(64)][rng.usize(..5)],
            checked: rng.u32(..4) == 0,
            ..Options::default()
        },
        slack: rng.u32(..5),
        page: [None, Some(1), Some(16), Some(64), Some(8)][rng.usize(..5)],
    };
    // Tiles that every adapter has room for.
    setup.options.prefill_rows = [None, None, Some(8), Some(16)][rng.usize(..4)];
    setup.options.decode_rows = [None, None, Some(1), Some(3)][rng.usize(..4)];
    setup.options.fill = [None, None, Some(1), Some(100)][rng.usize(..4)];
    setup.options.loop_iterations = [None, None, None, Some(2_000)][rng.usize(..4)];
    setup
}
