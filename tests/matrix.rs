//! Prefill by products of matrices: the kernel as it is, its products in plain arithmetic, against the f64 reference. What is left to
//! adapters with matrix units: `shaders/parts/matrix_cooperative.wgsl`, halves as they lie in the cache, rounding.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::gpus;
use gqa::shader::{Kernel, MatrixUnits};
use gqa::verify::{PER_SPEC, Runner, Setup, check, random_problem_of};

use gqa::{AttentionSpec, Dtype, Mask, Options, Rope, SpecBuilder, alibi_slopes};

fn spec(q_heads: u32, kv_heads: u32, head_dim: u32) -> SpecBuilder {
    AttentionSpec::builder(q_heads, kv_heads, head_dim).q_dtype(Dtype::F16).kv_dtype(Dtype::F16).causal(true)
}

/// Few and small: Mesa takes some ten seconds to compile each. Teams of 32, 16, 64, 16 lanes; 64, 32, 64, 16 rows where there are 32 KiB.
fn specs() -> Vec<AttentionSpec> {
    let all = [
        spec(7, 1, 16).v_head_dim(20).window(9, 2).softcap(20.0).sinks(true),
        spec(71, 1, 33).v_head_dim(8).kv_dtype(Dtype::Fp8).rope(Rope::new(32)).qk_norm(1e-6),
        spec(6, 2, 20).v_head_dim(5).mask(Mask::Add).alibi(&alibi_slopes(6)),
        spec(16, 2, 128).v_in_k(36).causal(false),
    ];
    all.into_iter().map(|builder| builder.build().unwrap()).collect()
}

#[test]
fn matrices_give_the_same_outputs() {
    for gpu in gpus() {
        for (nth, spec) in specs().into_iter().enumerate() {
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
                let problem = random_problem_of(&spec, 9_000 + nth as u64 * PER_SPEC + seed);
                let result = runner.run(&problem).and_then(|output| check(&problem, &output));
                assert_eq!(result, Ok(()), "{}, seed {seed}, {spec:?}", gpu.name());
            }
        }
    }
}
