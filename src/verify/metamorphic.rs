//! Laws that attention obeys whatever its inputs: two ways to the same result, both on the device.

use std::ops::Range;

use super::adapters::Gpu;
use super::compare::{Tolerance, compare};
use super::merging::merge;
use super::problem::{Problem, ProblemMask, ProblemSequence, Weights};
use super::random::{random_problem, random_problem_of};
use super::runner::{Output, Setup, run};
use crate::plan::{Family, Options};
use crate::spec::{AttentionSpec, Dtype, Mask, MaskLayout, SpecBuilder};

/// A law: its name, and the check of it on the problem of a seed.
pub type Law = (&'static str, fn(&Gpu, u64) -> Result<(), String>);

/// Every law.
pub const LAWS: [Law; 10] = [
    ("many chunks = one chunk", chunks),
    ("GQA = MHA with repeated KV heads", repeated_heads),
    ("permuted KV heads permute outputs", permuted_heads),
    ("decode after append = last row of prefill", decode_of_prefill),
    ("a batch = its sequences alone", batch_of_one),
    ("every family of kernels agrees", families),
    ("window = sliced keys", window),
    ("documents = sequences of their own", documents),
    ("a tree that is a chain = causal", chain),
    ("merged halves of the keys = all keys", halves),
];

fn chunks(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let problem = random_problem(seed);
    let with =
        |chunk| Setup { options: Options { chunk: Some(chunk), ..Options::default() }, ..Setup::default() };
    same(&problem, &run(gpu, &problem, &with(17))?, &run(gpu, &problem, &with(1 << 20))?)
}

fn families(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let problem = random_problem(seed);
    let with = |family| Setup { options: Options { family, ..Options::default() }, ..Setup::default() };
    same(&problem, &run(gpu, &problem, &with(Family::Auto))?, &run(gpu, &problem, &with(Family::Portable))?)
}

fn repeated_heads(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let gqa = random_problem(seed);
    let group = gqa.spec.group() as usize;
    let repeat =
        |rows: &[f32], dim: u32| rows.chunks(dim as usize).flat_map(|row| row.repeat(group)).collect();
    let mha = gqa.spec.to_builder().kv_heads(gqa.spec.q_heads());
    let spec = mha.build().map_err(|e| e.to_string())?;
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
    let group = spec.group();
    let mut builder = spec.to_builder();
    if let Some(slopes) = spec.alibi() {
        builder = builder.alibi(&reverse(slopes, group));
    }
    // A plane of the mask is a head: planes of all tokens and keys move with their group.
    let mask = problem.mask.as_ref().map(|mask| match mask.extents {
        [_, 1, ..] => mask.clone(),
        [_, _, tokens, keys] => {
            ProblemMask { values: reverse(&mask.values, group * tokens * keys), ..mask.clone() }
        }
    });
    let permuted = Problem {
        spec: builder.build().map_err(|e| e.to_string())?,
        sequences: problem.sequences.iter().map(sequence).collect(),
        mask,
        weights: Weights { sinks: reverse(&problem.weights.sinks, group), ..problem.weights.clone() },
        ..problem.clone()
    };
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
        (s.q_start, s.history, s.tree) = (None, 0, None);
    }
    let spec = prefill.spec.clone();
    let mut decode = prefill.clone();
    decode.mask = prefill.mask.as_ref().map(|mask| last_tokens(mask, &prefill.sequences));
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
    let mut alone = Output::default();
    for (nth, s) in problem.sequences.iter().enumerate() {
        let mask = problem.mask.as_ref().map(|mask| match mask.extents {
            [1, ..] => mask.clone(),
            [_, heads, tokens, keys] => {
                let plane = (heads * tokens * keys) as usize;
                let values = mask.values[nth * plane..(nth + 1) * plane].to_vec();
                ProblemMask { extents: [1, heads, tokens, keys], values, gaps: false }
            }
        });
        let output = run(gpu, &Problem { sequences: vec![s.clone()], mask, ..problem.clone() }, &setup)?;
        alone.out.extend(output.out);
        alone.lse.extend(output.lse);
    }
    same(&problem, &run(gpu, &problem, &setup)?, &alone)
}

/// A mask whose only token is the last one of each sequence.
fn last_tokens(mask: &ProblemMask, sequences: &[ProblemSequence]) -> ProblemMask {
    let [_, heads, _, keys] = mask.extents;
    let layout = MaskLayout::dense(mask.extents);
    let mut values = Vec::new();
    for (nth, s) in sequences.iter().enumerate() {
        for head in 0..heads {
            let at = layout.index([nth as u32, head, s.q_len - 1, 0]) as usize;
            values.extend_from_slice(&mask.values[at..at + keys as usize]);
        }
    }
    ProblemMask { extents: [sequences.len() as u32, heads, 1, keys], values, gaps: false }
}

/// A problem of `seed`'s shape whose spec has nothing but heads, dims and storage, and `more`.
fn plain(seed: u64, more: fn(SpecBuilder) -> SpecBuilder) -> Result<Problem, String> {
    let spec = random_problem(seed).spec;
    let builder = AttentionSpec::builder(spec.q_heads(), spec.kv_heads(), spec.head_dim())
        .v_head_dim(spec.v_head_dim())
        .q_dtype(spec.q_dtype())
        .kv_dtype(spec.k_dtype())
        .v_dtype(spec.v_dtype())
        .rotated(spec.rotated());
    let mut problem = random_problem_of(&more(builder).build().map_err(|e| e.to_string())?, seed);
    for s in &mut problem.sequences {
        (s.q_start, s.documents, s.tree, s.history) = (None, None, None, 0);
    }
    Ok(problem)
}

/// Rows of `dim` elements `from..to`, of tokens with `heads` heads.
fn tokens(x: &[f32], (heads, dim): (u32, u32), span: Range<u32>) -> Vec<f32> {
    let row = (heads * dim) as usize;
    x[span.start as usize * row..span.end as usize * row].to_vec()
}

/// A sequence cut to some of its queries and some of its keys.
fn cut(spec: &AttentionSpec, s: &ProblemSequence, queries: Range<u32>, keys: Range<u32>) -> ProblemSequence {
    let kv_heads = spec.kv_heads();
    ProblemSequence {
        q_len: queries.len() as u32,
        kv_len: keys.len() as u32,
        q: tokens(&s.q, (spec.q_heads(), spec.head_dim()), queries),
        k: tokens(&s.k, (kv_heads, spec.head_dim()), keys.clone()),
        v: tokens(&s.v, (kv_heads, spec.v_head_dim()), keys),
        ..s.clone()
    }
}

fn window(gpu: &Gpu, seed: u64) -> Result<(), String> {
    const LEFT: u32 = 9;
    let mut windowed = plain(seed, |builder| builder.window(LEFT, None))?;
    windowed.sequences.retain(|s| s.q_len > 0 && s.kv_len > 0);
    let spec = &windowed.spec;
    for s in &mut windowed.sequences {
        *s = cut(spec, s, s.q_len - 1..s.q_len, 0..s.kv_len);
    }
    let slice = |s: &ProblemSequence| cut(spec, s, 0..1, s.kv_len.saturating_sub(LEFT + 1)..s.kv_len);
    let sequences = windowed.sequences.iter().map(slice).collect();
    let spec = spec.to_builder().window(None, None).build().map_err(|e| e.to_string())?;
    let sliced = Problem { spec, sequences, ..windowed.clone() };
    let setup = Setup::default();
    same(&windowed, &run(gpu, &windowed, &setup)?, &run(gpu, &sliced, &setup)?)
}

fn documents(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let apart = plain(seed, |builder| builder)?;
    let mut packed = apart.clone();
    let mut whole = ProblemSequence { q: vec![], k: vec![], v: vec![], ..apart.sequences[0].clone() };
    let mut lens = Vec::new();
    (whole.q_len, whole.kv_len) = (0, 0);
    let mut sequences = Vec::new();
    for s in &apart.sequences {
        // As many queries as keys: documents lie one behind the other among both.
        let both = s.q_len.min(s.kv_len);
        let s = cut(&apart.spec, s, 0..both, 0..both);
        whole.q_len += both;
        whole.kv_len += both;
        whole.q.extend_from_slice(&s.q);
        whole.k.extend_from_slice(&s.k);
        whole.v.extend_from_slice(&s.v);
        lens.push(both);
        sequences.push(s);
    }
    whole.documents = Some(lens);
    packed.sequences = vec![whole];
    let apart = Problem { sequences, ..apart };
    let setup = Setup::default();
    let output = run(gpu, &apart, &setup)?;
    let expected = Output { out: vec![output.out.concat()], lse: vec![output.lse.concat()], ..output };
    same(&packed, &run(gpu, &packed, &setup)?, &expected)
}

fn chain(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let mut causal = plain(seed, |builder| builder.mask(Mask::Tree))?;
    causal.sequences.retain(|s| s.q_len <= s.kv_len.min(64));
    let mut tree = causal.clone();
    for s in &mut tree.sequences {
        s.tree = Some((0..s.q_len).map(|i| u64::MAX >> (63 - i)).collect());
    }
    let setup = Setup::default();
    same(&causal, &run(gpu, &tree, &setup)?, &run(gpu, &causal, &setup)?)
}

fn halves(gpu: &Gpu, seed: u64) -> Result<(), String> {
    let whole = plain(seed, |builder| builder.causal(false))?;
    let setup = Setup::default();
    let part = |of: fn(u32) -> Range<u32>| {
        let half = |s: &ProblemSequence| cut(&whole.spec, s, 0..s.q_len, of(s.kv_len));
        run(gpu, &Problem { sequences: whole.sequences.iter().map(half).collect(), ..whole.clone() }, &setup)
    };
    let (first, second) = (part(|n| 0..n / 2)?, part(|n| n / 2..n)?);
    let merged = merge(gpu, &whole.spec, &first, &second)?;
    // Each half is rounded to the storage of outputs before they are merged.
    let rounded = if whole.spec.q_dtype() == Dtype::F32 { 0.0 } else { whole.spec.q_dtype().epsilon() };
    same_within(&whole, (&run(gpu, &whole, &setup)?, &merged), rounded)
}

/// Compares two results of the device as if one were the truth.
///
/// # Errors
/// Says which sequence and where.
pub fn same(problem: &Problem, got: &Output, expected: &Output) -> Result<(), String> {
    same_within(problem, (got, expected), 0.0)
}

/// The same, where outputs may be off by another part of the largest value.
fn same_within(
    problem: &Problem,
    (got, expected): (&Output, &Output),
    part_of_largest: f64,
) -> Result<(), String> {
    let double = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let answers = problem.answers(None);
    for (i, s) in problem.sequences.iter().enumerate() {
        let magnitude = answers[i].magnitude;
        let tolerance = Tolerance::of_output(&problem.spec, problem.largest_value(i), magnitude);
        // Both sides are rounded.
        let more = part_of_largest * problem.largest_value(i);
        let tolerance = Tolerance { atol: 2.0 * tolerance.atol + more, rtol: 2.0 * tolerance.rtol };
        let out = compare(&got.out[i], &double(&expected.out[i]), tolerance);
        let lse = compare(&got.lse[i], &double(&expected.lse[i]), Tolerance::of_lse(magnitude));
        if let Some(mismatch) = [out, lse].iter().find(|m| !m.passes()) {
            return Err(format!("sequence {i} (q_len {}, kv_len {}): {mismatch}", s.q_len, s.kv_len));
        }
    }
    Ok(())
}
