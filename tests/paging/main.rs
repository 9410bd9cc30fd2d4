//! Whatever a cache does with its pages, attention gives the same: laws on every adapter.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod fetches;
mod laws;
mod rings;
mod saving;
mod shards;
mod world;

use common::{gpus, on_each};
use fastrand::Rng;
use gqa::verify::{PER_SPEC, Problem, ProblemSequence, Runner, check, random_problem, random_setup, same};
use gqa::{AttentionSpec, Dtype, Family, Mask, Options, Rope, alibi_slopes};
use laws::LAWS;
use world::Lab;

/// All that shared keys have to do with: positions, windows, masks, sinks, storage.
fn featured() -> [AttentionSpec; 5] {
    let builder = AttentionSpec::builder;
    [
        builder(6, 2, 32).softcap(3.0).alibi(&alibi_slopes(6)).kv_dtype(Dtype::F16),
        builder(8, 2, 40).rope(Rope::new(40)).window(50, None).sinks(true).q_dtype(Dtype::F16),
        builder(4, 2, 64).mask(Mask::Tree).rope(Rope::new(64)).kv_dtype(Dtype::Q8),
        builder(10, 1, 20).mask(Mask::Tree).window(40, None).alibi(&alibi_slopes(10)),
        builder(16, 2, 48).v_in_k(32).qk_norm(1e-5).causal(false).kv_dtype(Dtype::Fp8),
    ]
    .map(|builder| builder.build().unwrap())
}

/// Specs drawn at random that the laws are for: without a dense mask, and of a size that a reference takes in its stride.
fn random_specs(from: u64, count: usize) -> Vec<AttentionSpec> {
    let specs = (from..).map(|seed| random_problem(seed * PER_SPEC).spec);
    let fits = |spec: &AttentionSpec| !spec.mask().is_dense() && spec.q_heads() * spec.head_dim() <= 1500;
    specs.filter(fits).take(count).collect()
}

#[test]
fn laws_of_caches() {
    on_each(gpus(), |gpu| {
        let start = std::time::Instant::now();
        let specs = featured().into_iter().chain(random_specs(40, 4));
        for (nth, spec) in specs.enumerate() {
            // Where an adapter has both families, they take turns.
            let family = if nth % 3 == 1 { Family::Portable } else { Family::Auto };
            let lab = Lab::new(&gpu, &spec, Options { family, ..Options::default() }).unwrap();
            for (name, law) in LAWS {
                let seed = 100 + nth as u64;
                let result = law(&lab, &mut Rng::with_seed(seed));
                assert_eq!(result, Ok(()), "{}: {name}, seed {seed}, {family:?}, {spec:?}", gpu.name());
            }
        }
        println!("{}: {:.1?}", gpu.name(), start.elapsed());
    });
}

#[test]
fn pages_of_any_size_and_order_give_what_one_piece_gives() {
    on_each(gpus(), |gpu| {
        let fits = |problem: &Problem| {
            let pairs = |s: &ProblemSequence| u64::from(s.q_len) * u64::from(s.kv_len);
            let work = problem.sequences.iter().map(pairs).sum::<u64>();
            work > 0 && work * u64::from(problem.spec.q_heads() * problem.spec.head_dim()) < 20_000_000
        };
        for spec in (60..).filter(|spec| fits(&random_problem(spec * PER_SPEC))).take(6) {
            let setup = random_setup(spec * PER_SPEC);
            let mut runner = Runner::new(&gpu, &random_problem(spec * PER_SPEC).spec, &setup).unwrap();
            let seeds = spec * PER_SPEC..(spec + 1) * PER_SPEC;
            for seed in seeds.filter(|seed| fits(&random_problem(*seed))).take(3) {
                let problem = random_problem(seed);
                runner.lay_out(None, 1);
                let whole = runner.run(&problem).unwrap();
                assert_eq!(check(&problem, &whole), Ok(()), "{}, seed {seed}, contiguous", gpu.name());
                for (page, slack) in [(1, 0), (4, 2), (16, 1), (64, 0), (64, 3)] {
                    runner.lay_out(Some(page), slack);
                    let paged = runner.run(&problem).unwrap();
                    let result = same(&problem, &paged, &whole);
                    assert_eq!(result, Ok(()), "{}, seed {seed}, pages of {page}", gpu.name());
                }
            }
        }
    });
}
