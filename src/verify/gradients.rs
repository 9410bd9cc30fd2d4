//! Gradients on a device against those of the reference: random problems of specs that train.

use fastrand::Rng;

use super::compare::LOGIT;
use super::problem::{Problem, Stored, Tensor};
use super::random::{PER_SPEC, normal, random_problem_of, training_spec};
use super::runner::{Bound, Call, LAYER, Runner, text};
use crate::attention::BackwardIo;
use crate::quant::stored;
use crate::reference::{self, Gradients};
use crate::spec::{AttentionSpec, Dtype};

/// Gradients of a problem, of all sequences one behind the other: of queries, of the keys and values that the step appended, of sinks.
pub type DeviceGradients = [Vec<f32>; 4];

/// A problem whose spec trains, and the gradient of its outputs, `[tokens][q_heads][v_head_dim]` of all sequences: from `seed`, as
/// [`random_problem`](super::random_problem).
pub fn random_gradients(seed: u64) -> (Problem, Vec<f32>) {
    let spec = training_spec(seed / PER_SPEC);
    let problem = random_problem_of(&spec, seed);
    let d_out = random_output_gradients(&problem, seed);
    (problem, d_out)
}

/// A gradient of the outputs of `problem`.
pub fn random_output_gradients(problem: &Problem, seed: u64) -> Vec<f32> {
    let spec = &problem.spec;
    let mut rng = Rng::with_seed(seed.wrapping_mul(3).wrapping_add(5));
    let count: u32 = problem.sequences.iter().map(|s| s.q_len * spec.q_heads() * spec.v_head_dim()).sum();
    let d_out: Vec<f32> = (0..count).map(|_| normal(&mut rng)).collect();
    stored(spec.q_dtype(), &d_out)
}

/// The reference's gradients, from the keys and values that the device has stored: as [`DeviceGradients`], with what an
/// element of each was added up from at most, and a logit that matters.
fn expected(problem: &Problem, runs: &[Stored], d_out: &[f32]) -> ([Vec<f64>; 4], [f64; 4], f64) {
    let spec = &problem.spec;
    let row = (spec.q_heads() * spec.v_head_dim()) as usize;
    let mut all: [Vec<f64>; 4] = Default::default();
    all[3] = vec![0.0; if spec.sinks() { spec.q_heads() as usize } else { 0 }];
    let (mut sizes, mut magnitude, mut token) = ([0.0f64; 4], 0.0f64, 0);
    for (nth, (s, stored)) in problem.sequences.iter().zip(runs).enumerate() {
        let sequence = problem.reference(nth, (&stored.k, &stored.v));
        let d_out = &d_out[token * row..(token + s.q_len as usize) * row];
        token += s.q_len as usize;
        let Gradients { q, k, v, sinks, sizes: each } = reference::gradients(spec, &sequence, d_out);
        let new = |of: &[f64], dim: u32| of[(s.history * spec.kv_heads() * dim) as usize..].to_vec();
        all[0].extend(q);
        all[1].extend(new(&k, spec.head_dim()));
        all[2].extend(new(&v, spec.v_head_dim()));
        all[3].iter_mut().zip(sinks).for_each(|(sum, x)| *sum += x);
        for (most, size) in sizes.iter_mut().zip(each) {
            *most = most.max(size);
        }
        // Sinks are added up over sequences.
        sizes[3] = all[3].iter().fold(sizes[3], |most, x| most.max(x.abs()));
        magnitude = magnitude.max(reference::attention(spec, &sequence).magnitude);
    }
    (all, sizes, magnitude)
}

/// Relative error that a gradient may have, of its largest element.
fn tolerance(spec: &AttentionSpec) -> f64 {
    match spec.q_dtype() {
        Dtype::F32 => 1e-4,
        _ => 2e-2,
    }
}

/// Runs forward and backward of a problem on the device, and holds every gradient against the reference: the largest error of a
/// tensor is at most 1e-4 (stored as f16: 2e-2) of its largest element. Two things are allowed more, of what was added up: a gradient that is
/// all zero, as where every row sees one key, and one from outputs stored as f16, where terms cancel that those have rounded. Returns how
/// many of the four tensors needed the latter.
///
/// # Errors
/// What the library refuses, or the first gradient that is wrong.
pub fn check_gradients(runner: &mut Runner<'_>, problem: &Problem, d_out: &[f32]) -> Result<usize, String> {
    let output = runner.run_backward(problem, d_out)?;
    let (Some(gradients), Some(stored)) = (&output.gradients, &output.stored) else {
        return Err("the device was not asked".to_owned());
    };
    let (expected, sizes, magnitude) = expected(problem, stored, d_out);
    let relative = tolerance(&problem.spec);
    let mut cancelled = 0;
    for (nth, name) in ["dq", "dk", "dv", "d_sinks"].into_iter().enumerate() {
        let (got, expected) = (&gradients[nth], &expected[nth]);
        if got.len() != expected.len() {
            return Err(format!("{name} has {} elements, not {}", got.len(), expected.len()));
        }
        let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        // A logit's error is an error of its weight; what cancels was rounded before.
        let lost = sizes[nth] * relative / 1e-4 * (1e-6 + LOGIT * magnitude);
        let is_rounded = problem.spec.q_dtype() != Dtype::F32;
        let more = if largest == 0.0 || is_rounded { lost } else { 0.0 };
        let allowed = relative * largest + more + 1e-9;
        let mut worst = 0.0f64;
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (f64::from(*got) - expected).abs();
            if error.is_nan() || error > allowed {
                return Err(format!(
                    "{name} element {i}: got {got}, expected {expected:.9}: {error:.1e} off, {allowed:.1e} allowed"
                ));
            }
            worst = worst.max(error);
        }
        cancelled += usize::from(largest > 0.0 && worst > relative * largest);
    }
    Ok(cancelled)
}

impl Call<'_> {
    /// Records and runs the way back of a call. Gradients are NaN before; a write outside of them is an error.
    pub(super) fn backward(&self, bound: &Bound<'_>, d_out: &[f32]) -> Result<DeviceGradients, String> {
        let Self { gpu, attention, problem, .. } = self;
        let (step, spec) = (bound.step, &problem.spec);
        let gradients = attention.prepare_backward(step).map_err(text)?;
        let mut d_outs = bound.out.0.blank();
        d_outs.write(0, d_out);
        let mut tensors = [bound.q.0, bound.new[0], bound.new[1]].map(Tensor::blank);
        let [d_out, dq, dk, dv] =
            [&d_outs, &tensors[0], &tensors[1], &tensors[2]].map(|t| gpu.upload("gqa.verify", &t.bytes));
        let sinks = if spec.sinks() { spec.q_heads() } else { 0 };
        let d_sinks = gpu.upload("gqa.verify", &vec![0xff; 4 * sinks.max(1) as usize]);
        let whole = wgpu::Buffer::as_entire_buffer_binding;
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        if let Some(counter) = attention.fetch_counter() {
            encoder.clear_buffer(counter, 0, None);
        }
        let io = BackwardIo {
            q: whole(bound.q.1),
            out: whole(bound.out.1),
            lse: whole(bound.lse),
            d_out: whole(&d_out),
            dq: whole(&dq),
            dk: whole(&dk),
            dv: whole(&dv),
            d_sinks: spec.sinks().then(|| whole(&d_sinks)),
        };
        attention.backward(&mut encoder, (step, &gradients), LAYER, io).map_err(text)?;
        gpu.finish(encoder)?;
        for (tensor, buffer) in tensors.iter_mut().zip([&dq, &dk, &dv]) {
            let len = tensor.bytes.len();
            tensor.bytes = gpu.download(buffer)?;
            tensor.bytes.truncate(len);
            if tensor.strays() > 0 {
                return Err(format!("{} elements outside the gradients were written", tensor.strays()));
            }
        }
        let [dq, dk, dv] = tensors.map(|tensor| tensor.read_all());
        let d_sinks: Vec<f32> = bytemuck::pod_collect_to_vec(&gpu.download(&d_sinks)?);
        Ok([dq, dk, dv, d_sinks[..sinks as usize].to_vec()])
    }
}
