//! What the tests on adapters share.
#![allow(dead_code)]

use gqa::verify::{Gpu, Problem, ProblemSequence, Setup, adapters, random_problem_of};
use gqa::{AttentionSpec, BackwardIo, Family, Options};

/// Both families where the adapter has both, checked and not.
pub(crate) const FAMILIES: [Family; 2] = [Family::Auto, Family::Portable];

pub(crate) fn gpus() -> Vec<Gpu> {
    let gpus: Vec<_> = adapters().iter().map(|adapter| Gpu::open(adapter).unwrap()).collect();
    assert!(!gpus.is_empty(), "no adapter: `cargo xtask setup` unpacks a software driver");
    gpus
}

/// `check` of all of them, side by side: most of the time goes to the drivers' compilers, and each keeps one core busy.
pub(crate) fn on_each<T: Send>(all: Vec<T>, check: impl Fn(T) + Sync) {
    let check = &check;
    std::thread::scope(|scope| {
        for item in all {
            scope.spawn(move || check(item));
        }
    });
}

/// Whole buffers as what the way back reads and writes.
pub(crate) fn backward_io<'a>(
    [q, out, lse, d_out, dq, dk, dv]: [&'a wgpu::Buffer; 7],
    d_sinks: Option<&'a wgpu::Buffer>,
) -> BackwardIo<'a> {
    let whole = wgpu::Buffer::as_entire_buffer_binding;
    BackwardIo {
        q: whole(q),
        out: whole(out),
        lse: whole(lse),
        d_out: whole(d_out),
        dq: whole(dq),
        dk: whole(dk),
        dv: whole(dv),
        d_sinks: d_sinks.map(whole),
    }
}

pub(crate) fn with(family: Family) -> Setup {
    Setup { options: Options { family, ..Options::default() }, slack: 2, page: None }
}

/// One sequence of random numbers.
pub(crate) fn problem(spec: &AttentionSpec, q_len: u32, kv_len: u32) -> Problem {
    let mut problem = random_problem_of(spec, 7);
    let numbers = |n: u32, step: f32| -> Vec<f32> {
        let row: Vec<f32> = (0..n).map(|i| (i as f32 * step).sin() * 2.0).collect();
        gqa::quant::stored(spec.q_dtype(), &row)
    };
    problem.sequences = vec![ProblemSequence {
        q_len,
        kv_len,
        q_start: None,
        history: kv_len / 2,
        q: numbers(q_len * spec.q_heads() * spec.head_dim(), 0.37),
        k: numbers(kv_len * spec.kv_heads() * spec.head_dim(), 0.71),
        v: numbers(kv_len * spec.kv_heads() * spec.v_head_dim(), 1.31),
        tree: None,
        documents: None,
    }];
    problem
}
