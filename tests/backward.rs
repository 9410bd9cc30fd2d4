//! Gradients: against the f64 reference, against PyTorch, to the last bit, and with as few reads as promised.
// Helpers of tests: clippy.toml allows it only in the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{FAMILIES, backward_io, gpus, on_each, problem, with};
use gqa::shader::Kernel;
use gqa::verify::{
    Arrangement, PER_SPEC, Problem, ProblemMask, ProblemSequence, Runner, Weights, check_gradients,
    random_gradients, random_setup,
};
use gqa::{Attention, Error};
use gqa::{
    AttentionSpec, BackwardIo, Batch, CacheShape, Dtype, Family, Io, KvCache, LayerWeights, Layout, Mask,
    NewKv, Options, Rope, Sequence,
};
use serde_json::Value;

#[test]
fn random_problems() {
    on_each(gpus(), |gpu| {
        for spec in 100..104 {
            let setup = random_setup(spec * PER_SPEC);
            let mut runner = Runner::new(&gpu, &random_gradients(spec * PER_SPEC).0.spec, &setup).unwrap();
            for seed in spec * PER_SPEC..spec * PER_SPEC + 10 {
                let (problem, d_out) = random_gradients(seed);
                let result = check_gradients(&mut runner, &problem, &d_out).map(drop);
                assert_eq!(result, Ok(()), "{}, seed {seed}, {:?}, {setup:?}", gpu.name(), problem.spec);
            }
        }
    });
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// A case of `backward.json` as a problem, with the gradient of its outputs and what PyTorch found.
fn case(case: &Value) -> (Problem, Vec<f32>, [Vec<f64>; 4]) {
    let integer = |name: &str| u32::try_from(case[name].as_u64().unwrap()).unwrap();
    let optional = |name: &str| Some(numbers(&case[name])).filter(|numbers| !numbers.is_empty());
    let (keep, add, slopes) = (optional("keep"), optional("add"), optional("slopes"));
    let mut builder = AttentionSpec::builder(integer("q_heads"), integer("kv_heads"), integer("head_dim"))
        .v_head_dim(integer("v_head_dim"))
        .causal(case["causal"].as_bool().unwrap())
        .sinks(optional("sinks").is_some());
    if let Some(window) = case["window"].as_array() {
        let side = |i: usize| window[i].as_u64().unwrap() as u32;
        builder = builder.window(side(0), side(1));
    }
    if let Some(cap) = case["softcap"].as_f64() {
        builder = builder.softcap(cap as f32);
    }
    if case["rope"].as_bool().unwrap() {
        builder = builder.rope(Rope::new(integer("head_dim")));
    }
    if let Some(slopes) = slopes {
        builder = builder.alibi(&slopes);
    }
    let (kind, mask) = match (keep, add) {
        (Some(keep), _) => (Mask::Keep, Some(keep)),
        (_, Some(add)) => (Mask::Add, Some(add)),
        _ => (Mask::None, None),
    };
    let (q_len, kv_len) = (integer("q_len"), integer("kv_len"));
    let documents: Option<Vec<u32>> = case["documents"]
        .as_array()
        .map(|lens| lens.iter().map(|len| len.as_u64().unwrap() as u32).collect());
    let [q, k, v] = ["q", "k", "v"].map(|name| numbers(&case[name]));
    let sequence =
        ProblemSequence { q_len, kv_len, q_start: None, history: 0, q, k, v, tree: None, documents };
    let problem = Problem {
        spec: builder.mask(kind).build().unwrap(),
        sequences: vec![sequence],
        inputs: Arrangement::TokensHeads,
        outputs: Arrangement::HeadsTokens,
        mask: mask.map(|values| ProblemMask { extents: [1, 1, q_len, kv_len], values, gaps: false }),
        weights: Weights { sinks: optional("sinks").unwrap_or_default(), ..Weights::default() },
    };
    let expected = ["dq", "dk", "dv", "d_sinks"]
        .map(|name| case[name].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect());
    (problem, numbers(&case["d_out"]), expected)
}

#[test]
fn pytorch_agrees() {
    let cases: Value = serde_json::from_str(include_str!("data/backward.json")).unwrap();
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 11);
    on_each(gpus(), |gpu| {
        for value in cases {
            let (problem, d_out, expected) = case(value);
            let mut runner = Runner::new(&gpu, &problem.spec, &with(Family::Auto)).unwrap();
            let gradients = runner.run_backward(&problem, &d_out).unwrap().gradients.unwrap();
            for (nth, (got, expected)) in gradients.iter().zip(&expected).enumerate() {
                assert_eq!(got.len(), expected.len());
                let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
                    let error = (f64::from(*got) - expected).abs();
                    assert!(
                        error <= 1e-5 * largest,
                        "{}, {}: gradient {nth}, element {i} is {got}, PyTorch has {expected}",
                        gpu.name(),
                        value["name"]
                    );
                }
            }
        }
    });
}

/// Two runs, and a run among other sequences, give the same bits: no sum depends on who comes first.
#[test]
fn gradients_are_the_same_bits() {
    on_each(gpus(), |gpu| {
        let spec = AttentionSpec::builder(12, 2, 40).sinks(true).rope(Rope::new(40)).build().unwrap();
        let mut runner = Runner::new(&gpu, &spec, &with(Family::Auto)).unwrap();
        let problem = problem(&spec, 150, 150);
        let d_out = vec![0.25; 150 * 12 * 40];
        let [first, second] =
            [(); 2].map(|()| runner.run_backward(&problem, &d_out).unwrap().gradients.unwrap());
        let bits = |gradients: &[Vec<f32>; 4]| -> Vec<u32> {
            gradients.iter().flatten().map(|x| x.to_bits()).collect()
        };
        assert!(first.iter().flatten().any(|x| *x != 0.0));
        assert_eq!(bits(&first), bits(&second), "{}", gpu.name());
    });
}

/// Where a driver ends loops, several dispatches add to one gradient.
#[test]
fn walks_in_pieces_give_the_same_gradients() {
    on_each(gpus(), |gpu| {
        let spec = AttentionSpec::builder(12, 2, 40).softcap(20.0).build().unwrap();
        let problem = problem(&spec, 70, 150);
        let d_out: Vec<f32> = (0..70 * 12 * 40).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut families = vec![Family::Portable];
        families.extend(gpu.caps.fixed_subgroup().filter(|n| [4, 8].contains(n)).map(|_| Family::Subgroup));
        for family in families {
            let mut setup = with(family);
            setup.options.loop_iterations = Some(2_000);
            let mut runner = Runner::new(&gpu, &spec, &setup).unwrap();
            let result = check_gradients(&mut runner, &problem, &d_out).map(drop);
            assert_eq!(result, Ok(()), "{}, {family:?}", gpu.name());
        }
    });
}

/// K and V are read once for all query heads of a group: by each tile of packed rows for dQ, and for dK and dV by the one workgroup
/// that owns the key (on software adapters once, elsewhere once for each 32 rows that it stages).
#[test]
fn keys_are_not_expanded() {
    let (len, dim) = (9, 32);
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            for group in [1, 8] {
                let spec = AttentionSpec::builder(group * 2, 2, dim).causal(false).build().unwrap();
                let mut setup = with(family);
                setup.options.count_fetches = true;
                let mut runner = Runner::new(&gpu, &spec, &setup).unwrap();
                let mut problem = problem(&spec, len, len);
                problem.sequences[0].history = 0;
                let d_out = vec![1.0; (len * group * 2 * dim) as usize];
                assert_eq!(check_gradients(&mut runner, &problem, &d_out).map(drop), Ok(()));
                let fetches = runner.run_backward(&problem, &d_out).unwrap().fetches;
                let plan = runner.attention().plan().backward().unwrap();
                // A fetch brings four elements.
                let once = len * 2 * (dim / 4);
                let rows = len * group;
                let row_tiles = rows.div_ceil(plan.queries.tile.rows);
                let expected = match plan.keys.kernel {
                    Kernel::BackwardKvSubgroup => row_tiles * 2 * once + 2 * once,
                    // K once more for dQ.
                    _ => row_tiles * 3 * once + rows.div_ceil(plan.keys.tile.rows) * 2 * once,
                };
                assert_eq!(fetches, Some(expected), "{}, {family:?}, group {group}", gpu.name());
                if group == 8 {
                    let per_head = group * len.div_ceil(plan.queries.tile.rows) * 2 * once + group * 2 * once;
                    assert!(expected < per_head, "sharing must pay");
                }
            }
        }
    });
}

/// On a device with the least that WebGPU grants.
#[test]
fn without_any_optional_feature() {
    on_each(gqa::verify::adapters(), |adapter| {
        let gpu = gqa::verify::Gpu::open_minimal(&adapter).unwrap();
        for (q_dtype, kv_dtype, dim) in [(Dtype::F16, Dtype::F16, 256), (Dtype::F32, Dtype::Bf16, 127)] {
            let spec = AttentionSpec::builder(6, 2, dim).q_dtype(q_dtype).kv_dtype(kv_dtype).build().unwrap();
            let mut runner = Runner::new(&gpu, &spec, &with(Family::Auto)).unwrap();
            let problem = problem(&spec, 21, 40);
            let d_out: Vec<f32> = (0..21 * 6 * dim).map(|i| f32::from(i as u8) / 64.0 - 2.0).collect();
            assert_eq!(
                check_gradients(&mut runner, &problem, &d_out).map(drop),
                Ok(()),
                "{}, {spec:?}",
                gpu.name()
            );
        }
    });
}

/// A sink of any size weighs nothing in a token that no sequence has.
#[test]
fn gradients_of_sinks_pass_over_gaps() {
    on_each(gpus(), |gpu| {
        let (heads, dim, tokens) = (2, 8, 3);
        let spec = AttentionSpec::builder(heads, 1, dim).sinks(true).build().unwrap();
        let mut attention = Attention::new(&gpu.device, spec.clone(), Options::default()).unwrap();
        attention.set_weights(0, &LayerWeights { sinks: &[0.5, 200.0], ..LayerWeights::default() }).unwrap();
        let shape = CacheShape { layers: 1, sequences: 1, capacity: 16 };
        let of_gap = |gap: u32| {
            let mut cache = KvCache::new(&gpu.device, &spec, shape).unwrap();
            let id = cache.open().unwrap();
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            cache.extend(&mut encoder, &[(id, tokens)]).unwrap();
            let sequences = [Sequence { token: Some(gap), ..Sequence::new(id, tokens) }];
            let batch = Batch::new(&spec, &sequences).with_lse(&spec);
            let step = attention.prepare(&gpu.queue, &cache, &batch).unwrap();
            let gradients = attention.prepare_backward(&step).unwrap();
            let tensor = |gap: u32, width: u32| {
                let mut row = vec![7.0_f32; (gap * width) as usize];
                row.extend((0..tokens * width).map(|i| (i as f32 * 0.7).sin()));
                gpu.upload("test", bytemuck::cast_slice(&row))
            };
            let [q, out, d_out, dq] = [(); 4].map(|()| tensor(gap, heads * dim));
            let [k, v, dk, dv] = [(); 4].map(|()| tensor(0, dim));
            let (lse, d_sinks) = (tensor(gap, heads), tensor(0, heads));
            let whole = wgpu::Buffer::as_entire_buffer_binding;
            attention.append(&mut encoder, &step, 0, NewKv { k: whole(&k), v: whole(&v) }).unwrap();
            let io = Io { q: whole(&q), out: whole(&out), lse: Some(whole(&lse)) };
            attention.record(&mut encoder, &step, 0, io).unwrap();
            let io = backward_io([&q, &out, &lse, &d_out, &dq, &dk, &dv], Some(&d_sinks));
            attention.backward(&mut encoder, (&step, &gradients), 0, io).unwrap();
            gpu.finish(encoder).unwrap();
            let found: Vec<f32> = bytemuck::pod_collect_to_vec(&gpu.download(&d_sinks).unwrap());
            found[..heads as usize].to_vec()
        };
        let (without, with) = (of_gap(0), of_gap(5));
        assert!(without[0].abs() > 1e-3 && without[1].is_finite(), "{}: {without:?}", gpu.name());
        for (a, b) in without.iter().zip(&with) {
            assert!((a - b).abs() <= 1e-5 * a.abs().max(1.0), "{}: {without:?}, {with:?}", gpu.name());
        }
    });
}

#[test]
fn what_does_not_train_is_refused_by_name() {
    let plain = || AttentionSpec::builder(8, 2, 64);
    let caps = gqa::Caps::minimal();
    let refusals = [
        ("qk_norm", plain().qk_norm(1e-6)),
        ("rotated", plain().rotated(true)),
        ("v_in_k", plain().v_in_k(32)),
        ("mask", plain().mask(Mask::Tree)),
        ("k_dtype", plain().kv_dtype(Dtype::Q8)),
        ("v_dtype", plain().v_dtype(Dtype::Fp8)),
        ("head_dim", AttentionSpec::builder(8, 2, 320).v_head_dim(64)),
        ("v_head_dim", plain().v_head_dim(257)),
    ];
    for (name, builder) in refusals {
        let plan = gqa::Plan::new(&builder.build().unwrap(), &caps, &Options::default()).unwrap();
        match plan.backward() {
            Err(Error::Field { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn stale_and_incomplete_steps_are_refused() {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let spec = AttentionSpec::builder(4, 2, 16).sinks(true).build().unwrap();
    let attention = Attention::new(&device, spec.clone(), Options::default()).unwrap();
    let mut cache =
        KvCache::new(&device, &spec, CacheShape { layers: 1, sequences: 2, capacity: 64 }).unwrap();
    let (id, other) = (cache.open().unwrap(), cache.open().unwrap());
    let mut encoder = device.create_command_encoder(&Default::default());
    cache.extend(&mut encoder, &[(id, 5), (other, 5)]).unwrap();
    let sequences = [Sequence::new(id, 5)];
    let batch = Batch::new(&spec, &sequences);
    let step = attention.prepare(&queue, &cache, &batch).unwrap();
    let field = |error: Error| match error {
        Error::Field { field, .. } => field,
        Error::Buffer { name, .. } => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(attention.prepare_backward(&step).unwrap_err()), "batch.lse");
    let batch = batch.with_lse(&spec);
    // Queries that lie in one place may be read there, but their gradients cannot be written there.
    let broadcast = Batch { q: Layout { token_stride: 0, ..batch.q }, ..batch };
    let step = attention.prepare(&queue, &cache, &broadcast).unwrap();
    assert_eq!(field(attention.prepare_backward(&step).unwrap_err()), "q");
    // So may new tokens that sequences share.
    let shared = [id, other].map(|id| Sequence { new_token: Some(0), ..Sequence::new(id, 5) });
    let step = attention.prepare(&queue, &cache, &Batch { sequences: &shared, ..batch }).unwrap();
    assert_eq!(field(attention.prepare_backward(&step).unwrap_err()), "sequence.new_token");
    let mut step = attention.prepare(&queue, &cache, &batch).unwrap();
    let gradients = attention.prepare_backward(&step).unwrap();
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 1 << 16,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let whole = || buffer.as_entire_buffer_binding();
    let io = || BackwardIo {
        q: whole(),
        out: whole(),
        lse: whole(),
        d_out: whole(),
        dq: whole(),
        dk: whole(),
        dv: whole(),
        d_sinks: None,
    };
    let mut refused =
        |step: &gqa::Step, io| attention.backward(&mut encoder, (step, &gradients), 0, io).unwrap_err();
    assert_eq!(field(refused(&step, io())), "d_sinks");
    let sinks = BackwardIo { d_sinks: Some(whole()), ..io() };
    // The layer's sinks are not set.
    assert_eq!(field(refused(&step, sinks.clone())), "weights");
    attention.update(&queue, &cache, &batch, &mut step).unwrap();
    assert_eq!(field(refused(&step, sinks)), "gradients");
}
