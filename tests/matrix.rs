//! Prefill by products of matrices: the kernel as it is, its products in plain arithmetic, against the f64 reference. What is left to
//! adapters with matrix units: `shaders/parts/matrix_cooperative.wgsl`, halves as they lie in the cache, rounding.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{gpus, on_each};
use gqa::shader::{Kernel, MatrixUnits};
use gqa::verify::{PER_SPEC, Runner, Setup, check, random_problem_of};

use gqa::{AttentionSpec, Dtype, Mask, Options, Rope, SpecBuilder, alibi_slopes};

fn spec(q_heads: u32, kv_heads: u32, head_dim: u32) -> SpecBuilder {
    AttentionSpec::builder(q_heads, kv_heads, head_dim).q_dtype(Dtype::F16).kv_dtype(Dtype::F16).causal(true)
}

/// Problems of one spec on every adapter. Few and small, and a test for each: Mesa takes some ten seconds to compile a kernel.
fn hold(nth: u64, builder: SpecBuilder) {
    let spec = builder.build().unwrap();
    on_each(gpus(), |gpu| {
        let options = Options {
            matrix_units: MatrixUnits::Emulated,
            chunk: Some(75),
            decode_rows: Some(1),
            ..Options::default()
        };
        let mut runner = Runner::new(&gpu, &spec, &Setup { options, ..Setup::default() }).unwrap();
        assert_eq!(runner.attention().plan().prefill().kernel, Kernel::PrefillMatrix);
        for seed in 0..12 {
            runner.lay_out([None, Some(8), Some(1)][seed as usize % 3], 3);
            let problem = random_problem_of(&spec, 9_000 + nth * PER_SPEC + seed);
            let result = runner.run(&problem).and_then(|output| check(&problem, &output));
            assert_eq!(result, Ok(()), "{}, seed {seed}, {spec:?}", gpu.name());
        }
    });
}

/// Teams of 32 lanes, and 64 rows where there are 32 KiB.
#[test]
fn a_group_of_seven_behind_a_window() {
    hold(0, spec(7, 1, 16).v_head_dim(20).window(9, 2).softcap(20.0).sinks(true));
}

/// Teams of 16, 32 rows.
#[test]
fn a_group_cut_into_tiles() {
    hold(1, spec(71, 1, 33).v_head_dim(8).kv_dtype(Dtype::Fp8).rope(Rope::new(32)).qk_norm(1e-6));
}

/// Teams of 64, 64 rows.
#[test]
fn a_mask_that_is_added() {
    hold(2, spec(6, 2, 20).v_head_dim(5).mask(Mask::Add).alibi(&alibi_slopes(6)));
}

/// Teams of 16, 16 rows.
#[test]
fn values_within_keys() {
    hold(3, spec(16, 2, 128).v_in_k(36).causal(false));
}
