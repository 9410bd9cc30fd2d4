//! Masks, logits, positions, shapes and states on every adapter: what random problems may not hit on the nose.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{FAMILIES, gpus, on_each, problem, with};
use gqa::quant::stored;
use gqa::verify::{Gpu, Output, Problem, ProblemMask, Runner, Setup, Tolerance, check, compare, merge, run};
use gqa::{AttentionSpec, Dtype, Family, Mask, Pairing, Rope, SpecBuilder, alibi_slopes};

fn plain() -> SpecBuilder {
    AttentionSpec::builder(6, 2, 16)
}

/// Runs problems of one spec in both families and checks them.
fn hold(gpu: &Gpu, problems: &[Problem]) -> Vec<Output> {
    let mut outputs = Vec::new();
    for family in FAMILIES {
        let mut runner = Runner::new(gpu, &problems[0].spec, &with(family)).unwrap();
        for problem in problems {
            let output = runner.run(problem).unwrap();
            assert_eq!(check(problem, &output), Ok(()), "{}, {family:?}, {:?}", gpu.name(), problem.spec);
            outputs.push(output);
        }
    }
    outputs
}

/// Reads of K and V, four elements each.
fn fetches(runner: &mut Runner<'_>, problem: &Problem) -> u32 {
    let output = runner.run(problem).unwrap();
    assert_eq!(check(problem, &output), Ok(()), "{}", runner.attention().plan());
    output.fetches.unwrap()
}

/// Kernels that count them.
fn counting<'a>(gpu: &'a Gpu, spec: &AttentionSpec, family: Family) -> Runner<'a> {
    let mut setup = with(family);
    setup.options.count_fetches = true;
    Runner::new(gpu, spec, &setup).unwrap()
}

/// A skipped tile costs no traffic: a window of W costs W and one key, however long the sequence.
#[test]
fn a_window_costs_its_keys_at_any_length() {
    const LEFT: u32 = 40;
    let spec = plain().window(LEFT, None).build().unwrap();
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            let mut runner = counting(&gpu, &spec, family);
            for kv_len in [41, 300, 2_000] {
                let keys = (LEFT + 1) * spec.kv_heads() * (16 + 16) / 4;
                let found = fetches(&mut runner, &problem(&spec, 1, kv_len));
                assert_eq!(found, keys, "{}, {family:?}, {kv_len}", gpu.name());
            }
            // Prefill: a tile of rows reaches as far as its tokens and the window.
            let q_len = 200;
            let prefill = problem(&spec, q_len, 1_000);
            let rows = runner.attention().plan().prefill().tile.rows;
            let tiles = (q_len * spec.group()).div_ceil(rows);
            let tokens = rows.div_ceil(spec.group()) + 1;
            let most = tiles * (tokens + LEFT + 1) * spec.kv_heads() * (16 + 16) / 4;
            let found = fetches(&mut runner, &prefill);
            assert!(found <= most, "{}, {family:?}: {found} fetches, at most {most}", gpu.name());
        }
    });
}

/// A dense mask is asked by tiles: those that no row of the tile sees are not read.
#[test]
fn hidden_tiles_of_a_dense_mask_are_not_read() {
    let (q_len, kv_len) = (2, 320);
    on_each(gpus(), |gpu| {
        for kind in [Mask::Keep, Mask::Add] {
            let spec = plain().mask(kind).causal(false).build().unwrap();
            let mut problem = problem(&spec, q_len, kv_len);
            let hides = if kind == Mask::Keep { 0.0 } else { f32::NEG_INFINITY };
            let shows = 1.0 - f32::from(u8::from(kind == Mask::Add));
            // Keys 64 to 127, wholly, and one key of the last tile, for one of the tokens.
            let value = |i: u32| match (i / kv_len, i % kv_len) {
                (_, 64..128) | (1, 319) => shows,
                _ => hides,
            };
            let values = (0..q_len * kv_len).map(value).collect();
            problem.mask = Some(ProblemMask { extents: [1, 1, q_len, kv_len], values, gaps: false });
            for family in FAMILIES {
                let mut runner = counting(&gpu, &spec, family);
                let rows = runner.attention().plan().prefill().tile.rows;
                assert!(q_len * spec.group() <= rows, "both tokens in one tile");
                // The tiles of keys that some row of the tile sees: 64 to 95, 96 to 127, 288 to 319.
                let read = 3 * 32 * spec.kv_heads() * (16 + 16) / 4;
                assert_eq!(fetches(&mut runner, &problem), read, "{}, {family:?}, {kind:?}", gpu.name());
            }
        }
    });
}

/// Documents are cut apart before any work is handed out: no key of another is read.
#[test]
fn documents_read_their_own_keys_only() {
    let spec = plain().causal(false).build().unwrap();
    on_each(gpus(), |gpu| {
        let mut problem = problem(&spec, 90, 90);
        problem.sequences[0].documents = Some(vec![30, 0, 50, 10]);
        for family in FAMILIES {
            let mut runner = counting(&gpu, &spec, family);
            let rows = runner.attention().plan().prefill().tile.rows;
            let tiles = |len: u32| (len * spec.group()).div_ceil(rows) * len;
            let most = (tiles(30) + tiles(50) + tiles(10)) * spec.kv_heads() * (16 + 16) / 4;
            let found = fetches(&mut runner, &problem);
            assert!(found <= most, "{}, {family:?}: {found} fetches, at most {most}", gpu.name());
        }
    });
}

/// Whatever hides all keys of a row: output 0, LSE -inf, with a sink, too.
#[test]
fn rows_that_see_nothing() {
    on_each(gpus(), |gpu| {
        for mask in [Mask::Keep, Mask::Add, Mask::Tree] {
            let spec = plain().mask(mask).sinks(true).softcap(5.0).qk_norm(1e-6).window(3, None);
            let spec = spec.alibi(&alibi_slopes(6)).rope(Rope::new(16)).build().unwrap();
            let mut problem = problem(&spec, 4, 40);
            problem.weights.sinks = vec![0.5; 6];
            problem.weights.q_norm = vec![1.0; 16];
            problem.weights.k_norm = vec![1.0; 16];
            problem.sequences[0].history = 36;
            let rows_seen = match mask {
                Mask::Tree => {
                    // Every draft sees the past; the window hides it from the last.
                    problem.sequences[0].tree = Some(vec![1, 1, 0, 0]);
                    [true, true, true, false]
                }
                _ => {
                    let hides = if mask == Mask::Keep { 0.0 } else { f32::MIN };
                    let shows = if mask == Mask::Keep { 1.0 } else { 0.0 };
                    let values = (0..160).map(|i| if i / 40 == 1 { hides } else { shows }).collect();
                    problem.mask = Some(ProblemMask { extents: [1, 1, 4, 40], values, gaps: false });
                    [true, false, true, true]
                }
            };
            for output in hold(&gpu, &[problem]) {
                for (token, seen) in rows_seen.into_iter().enumerate() {
                    let (lse, out) = (&output.lse[0][token * 6..][..6], &output.out[0][token * 96..][..96]);
                    assert!(lse.iter().all(|x| x.is_finite() == seen), "{}, {mask:?}: {lse:?}", gpu.name());
                    assert!(out.iter().all(|x| (*x != 0.0) == seen), "{}, {mask:?}", gpu.name());
                }
            }
        }
    });
}

/// The column of the values that has outliers.
const OUTLIERS: usize = 5;

/// Logits of +-1e4 by the data, values with outliers of 1e3, a scale of 1e-30: no NaN, and within tolerance.
#[test]
fn extremes_with_every_feature() {
    on_each(gpus(), |gpu| {
        let all = || plain().kv_dtype(Dtype::F16).sinks(true).alibi(&alibi_slopes(6)).window(100, None);
        let specs = [
            (plain(), 50.0),
            (all().softcap(20.0), 50.0),
            (all().scale(1e-30), 1.0),
            (all().softcap(1e4).mask(Mask::Add), 50.0),
            (all().rope(Rope::new(16)), 20.0),
        ];
        for (builder, magnitude) in specs {
            let spec = builder.build().unwrap();
            let problems = [1, 30].map(|q_len| {
                let mut problem = problem(&spec, q_len, 150);
                let s = &mut problem.sequences[0];
                // Elements of up to 2 * 50: logits of up to 16 * 1e4 / 4.
                for numbers in [&mut s.q, &mut s.k] {
                    numbers.iter_mut().for_each(|x| *x *= magnitude);
                    *numbers = stored(Dtype::F16, numbers);
                }
                // Outliers in one column: the others are held to their own size.
                for value in s.v.chunks_mut(16).step_by(7) {
                    value[OUTLIERS] = 1e3;
                }
                if spec.sinks() {
                    problem.weights.sinks = vec![1e4, -1e4, 0.0, 3.0, 1e30, -1e30];
                }
                if spec.mask() == Mask::Add {
                    let values = (0..150).map(|i| [1e4, -1e4, 0.0, -1e30][i % 4]).collect();
                    problem.mask = Some(ProblemMask { extents: [1, 1, 1, 150], values, gaps: false });
                }
                problem
            });
            let outputs = hold(&gpu, &problems);
            for (problem, output) in problems.iter().cycle().zip(&outputs) {
                let answer = &problem.answers(output.stored.as_deref())[0];
                let ordinary = |i: &usize| i % 16 != OUTLIERS;
                let places: Vec<usize> = (0..answer.out.len()).filter(ordinary).collect();
                let got: Vec<f32> = places.iter().map(|i| output.out[0][*i]).collect();
                let expected: Vec<f64> = places.iter().map(|i| answer.out[*i]).collect();
                let tolerance = Tolerance::of_output(&spec, 2.0, answer.magnitude);
                let mismatch = compare(&got, &expected, tolerance);
                assert!(mismatch.passes(), "{}, {spec}: {mismatch}", gpu.name());
            }
        }
    });
}

/// Angles are exact at any position, before the first key and hundreds of millions behind the last; and the norm's epsilon counts.
#[test]
fn queries_turn_at_any_position() {
    on_each(gpus(), |gpu| {
        for pairing in [Pairing::Half, Pairing::Interleaved] {
            let rope = Rope { pairing, first: 2, ..Rope::new(12) };
            let spec = plain().causal(false).rope(rope).qk_norm(0.5).build().unwrap();
            let problems = [-3, 70_000, 100_000, 1 << 28].map(|q_start| {
                let mut problem = problem(&spec, 5, 40);
                problem.sequences[0].q_start = Some(q_start);
                // A row of nothing: only epsilon keeps it from being divided by zero.
                problem.sequences[0].q[..16].fill(0.0);
                problem.sequences[0].k[32..48].fill(0.0);
                problem.weights.q_norm = (0..16).map(|i| 1.0 + i as f32 / 16.0).collect();
                problem.weights.k_norm = (0..16).map(|i| 2.0 - i as f32 / 16.0).collect();
                problem
            });
            hold(&gpu, &problems);
        }
    });
}

/// Long heads, values of another length, values that are a part of the keys.
#[test]
fn shapes_of_real_models() {
    let rope = |first, dim| Rope { first, pairing: Pairing::Interleaved, ..Rope::new(dim) };
    let models = [
        // DeepSeek: 128 + 64 turning elements; absorbed, 512 + 64 on one KV head.
        AttentionSpec::builder(4, 4, 192).v_head_dim(128).rope(rope(128, 64)),
        AttentionSpec::builder(16, 1, 576).v_in_k(512).rope(rope(512, 64)).kv_dtype(Dtype::Bf16),
        AttentionSpec::builder(2, 1, 512),
        // A group that is cut into tiles.
        AttentionSpec::builder(71, 1, 64).kv_dtype(Dtype::F16),
    ];
    on_each(gpus(), |gpu| {
        for model in &models {
            let spec = model.clone().build().unwrap();
            hold(&gpu, &[problem(&spec, 1, 70), problem(&spec, 9, 40)]);
        }
    });
}

/// Merging is associative to rounding, agrees with all keys at once, and ignores who has seen nothing.
#[test]
fn merging_is_associative() {
    on_each(gpus(), |gpu| {
        for dtype in [Dtype::F32, Dtype::F16] {
            let spec = AttentionSpec::builder(6, 2, 20).v_head_dim(7).q_dtype(dtype).causal(false);
            let spec = spec.build().unwrap();
            let whole = problem(&spec, 5, 60);
            let part = |from: usize, to: usize| {
                let mut part = whole.clone();
                let s = &mut part.sequences[0];
                s.k = s.k[from * 40..to * 40].to_vec();
                s.v = s.v[from * 14..to * 14].to_vec();
                (s.kv_len, s.history) = ((to - from) as u32, 0);
                run(&gpu, &part, &Setup::default()).unwrap()
            };
            let (a, b, c, none) = (part(0, 11), part(11, 45), part(45, 60), part(0, 0));
            let both = |x: &Output, y: &Output| merge(&gpu, &spec, x, y).unwrap();
            let left = both(&both(&a, &b), &c);
            let right = both(&a, &both(&b, &c));
            let swapped = both(&both(&c, &a), &both(&none, &b));
            // Each merge of f16 outputs rounds them once more.
            let once = Tolerance::of_output(&spec, 2.0, 1.0);
            let tolerance = Tolerance { atol: 3.0 * once.atol, rtol: 3.0 * once.rtol };
            let answer = &whole.answers(None)[0];
            for merged in [&left, &right, &swapped] {
                let out = compare(&merged.out[0], &answer.out, tolerance);
                let lse = compare(&merged.lse[0], &answer.lse, Tolerance::of_lse(1.0));
                assert!(out.passes() && lse.passes(), "{}, {dtype}: {out}; {lse}", gpu.name());
            }
            let empty = both(&none, &none);
            assert!(empty.out[0].iter().all(|x| *x == 0.0), "{}", gpu.name());
            assert!(empty.lse[0].iter().all(|x| *x == f32::NEG_INFINITY), "{}", gpu.name());
            assert_eq!((&both(&a, &none).out, &both(&none, &a).lse), (&a.out, &a.lse), "{}", gpu.name());
        }
    });
}
