//! Kernels against the reference, on every adapter of this machine. No adapter is a failure, not a pass.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{FAMILIES, gpus, on_each, problem, with};
use gqa::verify::{
    Arrangement, Gpu, LAWS, Output, PER_SPEC, Problem, ProblemMask, Runner, Tolerance, adapters, check,
    compare, merge, random_problem, random_setup, run,
};
use gqa::{AttentionSpec, Dtype, Family, Mask};

#[test]
fn random_problems() {
    on_each(gpus(), |gpu| {
        for spec in 0..6 {
            let setup = random_setup(spec * PER_SPEC);
            let mut runner = Runner::new(&gpu, &random_problem(spec * PER_SPEC).spec, &setup).unwrap();
            for seed in spec * PER_SPEC..spec * PER_SPEC + 16 {
                let problem = random_problem(seed);
                let result = runner.run(&problem).and_then(|output| check(&problem, &output));
                assert_eq!(result, Ok(()), "{}, seed {seed}, {:?}, {setup:?}", gpu.name(), problem.spec);
            }
        }
    });
}

#[test]
fn laws() {
    on_each(gpus(), |gpu| {
        for (i, (name, law)) in LAWS.iter().enumerate() {
            let seed = (25 + i as u64) * PER_SPEC;
            assert_eq!(law(&gpu, seed), Ok(()), "{}: {name}, seed {seed}", gpu.name());
        }
    });
}

#[test]
fn without_any_optional_feature() {
    let all = adapters();
    assert!(!all.is_empty());
    on_each(all, |adapter| {
        let gpu = Gpu::open_minimal(&adapter).unwrap();
        assert!(gpu.caps.subgroup.is_none() && !gpu.caps.f16 && gpu.caps.workgroup_memory <= 16 << 10);
        for (q_dtype, kv_dtype, dim) in [(Dtype::F16, Dtype::F16, 256), (Dtype::F32, Dtype::Bf16, 127)] {
            let spec =
                AttentionSpec::builder(34, 2, dim).q_dtype(q_dtype).kv_dtype(kv_dtype).build().unwrap();
            let mut runner = Runner::new(&gpu, &spec, &with(Family::Auto)).unwrap();
            for (q_len, kv_len) in [(1, 300), (5, 70)] {
                let problem = problem(&spec, q_len, kv_len);
                let result = runner.run(&problem).and_then(|output| check(&problem, &output));
                assert_eq!(result, Ok(()), "{}, {spec:?}", gpu.name());
            }
        }
    });
}

/// Lanes load units of 32-bit words where an adapter, or its owner, has no 64-bit integers; of each width, whole and in part.
#[test]
fn without_64_bit_integers() {
    on_each(adapters(), |adapter| {
        let mut descriptor = gqa::device_descriptor(&adapter);
        descriptor.required_features.remove(wgpu::Features::SHADER_INT64);
        let gpu = Gpu::open_with(&adapter, &descriptor).unwrap();
        assert!(!gpu.caps.int64);
        let (wide, narrow, partial) = ((128, 64), (72, 40), (112, 33));
        for (dtype, (head_dim, v_head_dim)) in [
            (Dtype::F32, wide),
            (Dtype::F16, wide),
            (Dtype::F16, narrow),
            (Dtype::Bf16, partial),
            (Dtype::Fp8, wide),
            (Dtype::Q8, wide),
            (Dtype::Q8, narrow),
            (Dtype::Q4, wide),
        ] {
            let spec = AttentionSpec::builder(8, 2, head_dim).v_head_dim(v_head_dim).kv_dtype(dtype);
            let spec = spec.build().unwrap();
            let mut runner = Runner::new(&gpu, &spec, &with(Family::Auto)).unwrap();
            for (q_len, kv_len) in [(1, 75), (5, 70)] {
                let problem = problem(&spec, q_len, kv_len);
                let result = runner.run(&problem).and_then(|output| check(&problem, &output));
                assert_eq!(result, Ok(()), "{}, {spec:?}", gpu.name());
            }
        }
    });
}

/// Tiles up to half full have a walk of their own where 8 lanes own rows: one row a lane (16 rows a tile) and two (32), around either end.
#[test]
fn tiles_that_are_half_empty() {
    on_each(gpus(), |gpu| {
        let has_both = gpu.caps.fixed_subgroup() == Some(8);
        for (prefill_rows, dim) in [(None, 128), (None, 40), (Some(if has_both { 32 } else { 16 }), 64)] {
            let spec = AttentionSpec::builder(2, 2, dim).kv_dtype(Dtype::F16).build().unwrap();
            let mut setup = with(Family::Auto);
            setup.options.prefill_rows = prefill_rows;
            let mut runner = Runner::new(&gpu, &spec, &setup).unwrap();
            for q_len in [2, 7, 8, 9, 15, 16, 17, 24, 25, 33, 48, 49] {
                let problem = problem(&spec, q_len, 75);
                let result = runner.run(&problem).and_then(|output| check(&problem, &output));
                assert_eq!(result, Ok(()), "{}, {q_len} rows, {prefill_rows:?}, {spec:?}", gpu.name());
            }
        }
    });
}

/// The point of GQA: a K/V element is read once for all query heads of its group.
#[test]
fn decode_fetches_each_key_once_per_group() {
    let kv_len = 133;
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            for (kv_heads, group) in [(2, 1), (2, 3), (2, 4), (1, 8), (1, 13), (2, 16)] {
                let spec =
                    AttentionSpec::builder(group * kv_heads, kv_heads, 36).v_head_dim(20).build().unwrap();
                let mut setup = with(family);
                setup.options.count_fetches = true;
                let problem = problem(&spec, 1, kv_len);
                let output = run(&gpu, &problem, &setup).unwrap();
                assert_eq!(check(&problem, &output), Ok(()), "{}, group {group}", gpu.name());
                // A fetch brings four elements.
                let once = kv_len * kv_heads * (36 + 20) / 4;
                assert_eq!(output.fetches, Some(once), "{}, {family:?}, group {group}", gpu.name());
            }
        }
    });
}

/// Beyond one tile of rows: once per tile, and only what causality lets the tile see.
#[test]
fn prefill_fetches_visible_keys_once_per_tile() {
    let (q_len, kv_len) = (45, 70);
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            let spec = AttentionSpec::builder(12, 2, 32).build().unwrap();
            let mut setup = with(family);
            setup.options.count_fetches = true;
            let mut runner = Runner::new(&gpu, &spec, &setup).unwrap();
            let problem = problem(&spec, q_len, kv_len);
            let output = runner.run(&problem).unwrap();
            assert_eq!(check(&problem, &output), Ok(()), "{}", gpu.name());
            let tile = runner.attention().plan().prefill().tile.rows;
            let rows = q_len * spec.group();
            let visible = |row: u32| kv_len - q_len + row / spec.group() + 1;
            let keys: u32 =
                (0..rows).step_by(tile as usize).map(|row| visible(rows.min(row + tile) - 1)).sum();
            let fetches = keys * spec.kv_heads() * (32 + 32) / 4;
            assert_eq!(output.fetches, Some(fetches), "{}, {family:?}", gpu.name());
            let per_head = q_len * spec.q_heads() * kv_len * (32 + 32) / 4;
            assert!(fetches * 10 < per_head, "sharing must pay");
        }
    });
}

#[test]
fn rows_that_see_nothing_give_zero_and_minus_infinity() {
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            for (q_len, kv_len, q_start) in
                [(3, 0, None), (9, 4, None), (40, 8, Some(-20)), (2, 5, Some(-1)), (20, 9, Some(i32::MIN))]
            {
                let spec = AttentionSpec::builder(6, 2, 24).q_dtype(Dtype::F16).build().unwrap();
                let mut problem = problem(&spec, q_len, kv_len);
                problem.sequences[0].q_start = q_start;
                let output = run(&gpu, &problem, &with(family)).unwrap();
                assert_eq!(check(&problem, &output), Ok(()), "{}, {family:?}", gpu.name());
                assert_eq!(output.lse[0][0], f32::NEG_INFINITY);
                assert!(output.out[0][..24].iter().all(|x| *x == 0.0));
            }
        }
    });
}

#[test]
fn positions_far_behind_the_keys_see_all() {
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            let spec = AttentionSpec::builder(4, 2, 8).build().unwrap();
            for (q_len, q_start) in [(1, i32::MAX), (20, i32::MAX - 7), (40, 30)] {
                let mut problem = problem(&spec, q_len, 30);
                problem.sequences[0].q_start = Some(q_start);
                let result = run(&gpu, &problem, &with(family)).and_then(|output| check(&problem, &output));
                assert_eq!(result, Ok(()), "{}, {family:?}, q_start {q_start}", gpu.name());
            }
        }
    });
}

/// Running maxima that jump up and down by thousands, and a value that no weight may touch.
#[test]
fn extreme_logits_neither_overflow_nor_vanish() {
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            let spec = AttentionSpec::builder(8, 2, 16).scale(1.0).build().unwrap();
            for (q_len, magnitude) in [(1, 1e4), (20, 1e4), (1, 1e-30), (20, 1e-30)] {
                let mut problem = problem(&spec, q_len, 150);
                let sequence = &mut problem.sequences[0];
                sequence.q = sequence.q.iter().map(|_| 0.25).collect();
                for (i, key) in sequence.k.chunks_mut(16).enumerate() {
                    // Logits of 4 * value: rising, falling, alternating.
                    key.fill(magnitude / 4.0 * ((i * 37 % 64) as f32 / 32.0 - 1.0));
                }
                sequence.v[3] = 1e3;
                let output = run(&gpu, &problem, &with(family)).unwrap();
                assert_eq!(check(&problem, &output), Ok(()), "{}, {family:?}, {magnitude}", gpu.name());
            }
        }
    });
}

/// More items than one dimension of a dispatch holds go on along another.
#[test]
fn more_items_than_one_dispatch_dimension_holds() {
    let all = adapters();
    assert!(!all.is_empty());
    on_each(all, |adapter| {
        let mut descriptor = gqa::device_descriptor(&adapter);
        descriptor.required_limits.max_compute_workgroups_per_dimension = 9;
        let gpu = Gpu::open_with(&adapter, &descriptor).unwrap();
        for family in FAMILIES {
            let spec = AttentionSpec::builder(2, 1, 8).build().unwrap();
            let mut problem = problem(&spec, 220, 230);
            problem.sequences.extend(self::problem(&spec, 1, 300).sequences);
            let result = run(&gpu, &problem, &with(family)).and_then(|output| check(&problem, &output));
            assert_eq!(result, Ok(()), "{}, {family:?}", gpu.name());
        }

        // Dense masks of more sequences, and of more words, than that; merging more rows.
        let spec = AttentionSpec::builder(2, 1, 8).mask(Mask::Add).build().unwrap();
        let mut problem = problem(&spec, 220, 230);
        problem.sequences.extend((1..12).flat_map(|n| self::problem(&spec, 1, n).sequences));
        let values =
            (0..220 * 230).map(|i| if i % 7 < 3 { f32::NEG_INFINITY } else { (i % 5) as f32 }).collect();
        problem.mask = Some(ProblemMask { extents: [1, 1, 220, 230], values, gaps: true });
        let output = run(&gpu, &problem, &with(Family::Auto)).unwrap();
        assert_eq!(check(&problem, &output), Ok(()), "{}", gpu.name());
        let twice = [&output.lse[0][..], &output.lse[0]].concat();
        let rows =
            Output { out: vec![[&output.out[0][..], &output.out[0]].concat()], lse: vec![twice], ..output };
        // A result merged with itself: the same output, twice the weight.
        let merged = merge(&gpu, &spec, &rows, &rows).unwrap();
        let doubled: Vec<f64> = rows.lse[0].iter().map(|x| f64::from(*x) + std::f64::consts::LN_2).collect();
        let out: Vec<f64> = rows.out[0].iter().map(|x| f64::from(*x)).collect();
        let [lse, out] = [(&merged.lse[0], doubled), (&merged.out[0], out)]
            .map(|(got, expected)| compare(got, &expected, Tolerance::of_lse(1.0)));
        assert!(lse.passes() && out.passes(), "{}: {lse}; {out}", gpu.name());
    });
}

/// Sequences without queries, without keys, prefills and decodes in one step; every arrangement.
#[test]
fn ragged_batches_in_every_arrangement() {
    on_each(gpus(), |gpu| {
        for family in FAMILIES {
            let spec = AttentionSpec::builder(10, 2, 33).v_head_dim(17).q_dtype(Dtype::F16).build().unwrap();
            let mut runner = Runner::new(&gpu, &spec, &with(family)).unwrap();
            let mut batch = problem(&spec, 0, 0);
            let lengths = [(1, 200), (0, 9), (70, 70), (1, 1), (4, 0), (2, 90), (33, 40)];
            batch.sequences = lengths.iter().flat_map(|(q, kv)| problem(&spec, *q, *kv).sequences).collect();
            for inputs in [Arrangement::TokensHeads, Arrangement::HeadsTokens, Arrangement::Gaps] {
                for outputs in [Arrangement::TokensHeads, Arrangement::HeadsTokens, Arrangement::Gaps] {
                    let problem = Problem { inputs, outputs, ..batch.clone() };
                    let result = runner.run(&problem).and_then(|output| check(&problem, &output));
                    assert_eq!(result, Ok(()), "{}, {family:?}, {inputs:?}, {outputs:?}", gpu.name());
                }
            }
        }
    });
}
