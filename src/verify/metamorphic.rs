//! Laws that attention obeys whatever its inputs: two ways to the same result, both on the device.

use super::adapters::Gpu;
use super::compare::{Tolerance, compare};
use super::problem::{Problem, ProblemSequence};
use super::random::random_problem;
use super::runner::{Output, Setup, run};
use crate::plan::{Family, Options};
use crate::spec::AttentionSpec;

/// A law: its name, and the check of it on the problem of a seed.
pub type Law = (&'static str, fn(&Gpu, u64) -> Result<(), String>);

/// Every law.
pub const LAWS: [Law; 6] = [
    ("many chunks = one chunk", chunks),
    ("GQA = MHA with repeated KV heads", repeated_heads),
    ("permuted KV heads permute outputs", permuted_heads),
    ("decode after append = last row of prefill", decode_of_prefill),
    ("a batch = its sequences alone", batch_of_one),
    ("every family of kernels agrees", families),
];

fn chunks(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let problem = random_problem(seed);
    let with = |chunk| Setup { options: Options { chunk: Some(chunk), ..Options::default() }, slack: 0 };
    same(&problem, &run(gpu, &problem, &with(17))?, &run(gpu, &problem, &with(1 << 20))?)
}

fn families(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let problem = random_problem(seed);
    let with = |family| Setup { options: Options { family, ..Options::default() }, slack: 0 };
    same(&problem, &run(gpu, &problem, &with(Family::Auto))?, &run(gpu, &problem, &with(Family::Portable))?)
}

fn repeated_heads(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let gqa = random_problem(seed);
    let group = gqa.spec.group() as usize;
    let repeat =
        |rows: &[f32], dim: u32| rows.chunks(dim as usize).flat_map(|row| row.repeat(group)).collect();
    let spec = with_kv_heads(&gqa.spec, gqa.spec.q_heads())?;
    let sequence = |s: &ProblemSequence| ProblemSequence {
        k: repeat(&s.k, spec.head_dim()),
        v: repeat(&s.v, spec.v_head_dim()),
        ..s.clone()
    };
    let sequences = gqa.sequences.iter().map(sequence).collect();
    let mha = Problem { spec: spec.clone(), sequences, ..gqa.clone() };
    let setup = Setup::default();
    same(&gqa, &run(gpu, &gqa, &setup)?, &run(gpu, &mha, &setup)?)
}

fn permuted_heads(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let problem = random_problem(seed);
    let spec = &problem.spec;
    // Heads in reverse order: blocks of `width` elements within each token.
    let reverse = |x: &[f32], width: u32| -> Vec<f32> {
        let token = (width * spec.kv_heads()) as usize;
        x.chunks(token).flat_map(|t| t.chunks(width as usize).rev().flatten().copied()).collect()
    };
    let sequence = |s: &ProblemSequence| ProblemSequence {
        q: reverse(&s.q, spec.group() * spec.head_dim()),
        k: reverse(&s.k, spec.head_dim()),
        v: reverse(&s.v, spec.v_head_dim()),
        ..s.clone()
    };
    let permuted = Problem { sequences: problem.sequences.iter().map(sequence).collect(), ..problem.clone() };
    let setup = Setup::default();
    let mut output = run(gpu, &permuted, &setup)?;
    for out in &mut output.out {
        *out = reverse(out, spec.group() * spec.v_head_dim());
    }
    for lse in &mut output.lse {
        *lse = reverse(lse, spec.group());
    }
    same(&problem, &run(gpu, &problem, &setup)?, &output)
}

fn decode_of_prefill(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let mut prefill = random_problem(seed);
    prefill.sequences.retain(|s| s.q_len > 0 && s.kv_len > 0);
    for s in &mut prefill.sequences {
        (s.q_start, s.history) = (None, 0);
    }
    let spec = prefill.spec.clone();
    let mut decode = prefill.clone();
    for s in &mut decode.sequences {
        let first = s.q.len() - (spec.q_heads() * spec.head_dim()) as usize;
        s.q.drain(..first);
        (s.q_len, s.history) = (1, s.kv_len - 1);
    }
    let setup = Setup::default();
    let mut last = run(gpu, &prefill, &setup)?;
    for (out, lse) in last.out.iter_mut().zip(&mut last.lse) {
        out.drain(..out.len() - (spec.q_heads() * spec.v_head_dim()) as usize);
        lse.drain(..lse.len() - spec.q_heads() as usize);
    }
    same(&decode, &run(gpu, &decode, &setup)?, &last)
}

fn batch_of_one(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let problem = random_problem(seed);
    let setup = Setup::default();
    let mut alone = Output { out: Vec::new(), lse: Vec::new(), fetches: None };
    for s in &problem.sequences {
        let output = run(gpu, &Problem { sequences: vec![s.clone()], ..problem.clone() }, &setup)?;
        alone.out.extend(output.out);
        alone.lse.extend(output.lse);
    }
    same(&problem, &run(gpu, &problem, &setup)?, &alone)
}

/// Compares two results of the device as if one were the truth.
fn same(problem: &Problem, got: &Output, expected: &Output) -> Result<(), String> {
    let double = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    for (i, s) in problem.sequences.iter().enumerate() {
        let largest = s.v.iter().fold(0.0, |m, v| f64::max(m, f64::from(v.abs())));
        let tolerance = Tolerance::of_output(&problem.spec, largest);
        // Both sides are rounded.
        let tolerance = Tolerance { atol: 2.0 * tolerance.atol, rtol: 2.0 * tolerance.rtol };
        let out = compare(&got.out[i], &double(&expected.out[i]), tolerance);
        let lse = compare(&got.lse[i], &double(&expected.lse[i]), Tolerance::of_lse());
        if let Some(mismatch) = [out, lse].iter().find(|m| !m.passes()) {
            return Err(format!("sequence {i} (q_len {}, kv_len {}): {mismatch}", s.q_len, s.kv_len));
        }
    }
    Ok(())
}

fn with_kv_heads(spec: &AttentionSpec, kv_heads: u32) -> Result<AttentionSpec, String> {
    AttentionSpec::builder(spec.q_heads(), kv_heads, spec.head_dim())
        .v_head_dim(spec.v_head_dim())
        .q_dtype(spec.q_dtype())
        .kv_dtype(spec.kv_dtype())
        .scale(spec.scale())
        .causal(spec.causal())
        .build()
        .map_err(|e| e.to_string())
}
