//! Runs a set: verifies its specs, then measures group by group, ceilings among the rows.

use std::sync::Arc;
use std::time::Instant;

use gqa::profile::{CeilingSamplers, Ceilings, Filled, Pass, Row, Sampler, Shape, Workload};
use gqa::verify::{
    Gpu, Runner, Setup, check, check_gradients, problem_of_lens, random_output_gradients, random_problem_of,
};
use gqa::{Attention, AttentionSpec, Options};

use super::sets::{Group, Section, Set, samples_for};
use crate::Failure;
use crate::progress::Progress;
use crate::tune::store::Store;

/// Seconds that one sample should take at least.
const SAMPLE_SECONDS: f64 = 0.03;
/// Seconds of one run beyond which a row of a set is not worth its time.
const MOST_SECONDS: f64 = 60.0;
/// Random problems of each measured spec.
const CHECKS: u64 = 3;

/// All numbers of a run.
pub(super) struct Measured {
    pub(super) ceilings: Ceilings,
    pub(super) groups: Vec<GroupCeilings>,
    pub(super) rows: Vec<Row>,
    pub(super) left_out: Vec<String>,
    pub(super) tuned: Vec<Tuned>,
}

/// A spec that was run as `gqa tune` has found best.
#[derive(Debug, serde::Serialize)]
pub(super) struct Tuned {
    spec: String,
    options: Options,
}

/// What the adapter could do while a group was measured: whoever doubts a row sees here whether the machine was slow then.
#[derive(Debug, serde::Serialize)]
pub(super) struct GroupCeilings {
    section: &'static str,
    rows: usize,
    seconds: f64,
    read_bytes_per_s: f64,
    fma_flops_per_s: f64,
}

/// How often rows are sampled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Samples {
    pub(super) asked: usize,
    /// Whether slow rows are, too.
    pub(super) exact: bool,
}

/// Measures `set`.
pub(super) fn measure(
    gpu: &Gpu,
    set: &Set,
    samples: Samples,
    tuned: Option<&Store>,
) -> Result<Measured, Failure> {
    let options = |spec: &AttentionSpec| tuned.and_then(|store| store.options(gpu, spec));
    let mut progress = Progress::new(set.rows(), "rows");
    let mut specs: Vec<&AttentionSpec> = Vec::new();
    let shapes: Vec<_> = set.groups.iter().flat_map(|group| &group.shapes).cloned().collect();
    for shape in &shapes {
        if !specs.contains(&&shape.spec) {
            specs.push(&shape.spec);
        }
    }
    progress.stage(format!("verifying the kernels of {} specs", specs.len()));
    let mut of_tuned = Vec::new();
    for spec in specs {
        progress.now(format!("verifying {spec}"));
        let tuned_options = options(spec);
        if tuned.is_some() && tuned_options.is_none() {
            progress.tell(&format!("not tuned, so as planned: {spec}"));
        }
        verify(gpu, spec, &tuned_options.clone().unwrap_or_default(), &shapes)?;
        of_tuned.extend(tuned_options.map(|options| Tuned { spec: spec.to_string(), options }));
    }
    progress.stage("trying ceiling kernels".to_owned());
    let mut run = Run {
        gpu,
        samples,
        alone: set.rows() == 1,
        ceilings: CeilingSamplers::new(gpu).map_err(Failure::Adapter)?,
        attentions: Vec::new(),
        left_out: set.left_out.clone(),
        options: &options,
    };
    for reason in &set.left_out {
        progress.tell(&format!("left out: {reason}"));
    }
    let (mut groups, mut rows) = (Vec::new(), Vec::new());
    for group in &set.groups {
        let start = Instant::now();
        progress.stage(format!("{}: {} rows", group.section.title(), group.shapes.len()));
        let measured = run.group(group, &progress)?;
        progress.group_done(group.shapes.len());
        let [read_bytes_per_s, fma_flops_per_s] = run.ceilings.close_group();
        groups.push(GroupCeilings {
            section: group.section.name(),
            rows: measured.len(),
            seconds: start.elapsed().as_secs_f64(),
            read_bytes_per_s,
            fma_flops_per_s,
        });
        rows.extend(measured);
        // The device frees what was dropped when it is asked how far it is.
        gpu.finish(gpu.device.create_command_encoder(&Default::default())).map_err(Failure::Adapter)?;
    }
    let ceilings = run.ceilings.result();
    rows.iter_mut().for_each(|row| row.compare_to(&ceilings));
    // Contexts that did not fit into one group are read in one list.
    let section = |row: &Row| Section::ALL.iter().position(|section| section.name() == row.section);
    let context = |row: &Row| if row.section == Section::Context.name() { row.kv_len } else { 0 };
    rows.sort_by_key(|row| (section(row), context(row)));
    Ok(Measured { ceilings, groups, rows, left_out: run.left_out, tuned: of_tuned })
}

/// What groups have in common.
struct Run<'a> {
    gpu: &'a Gpu,
    samples: Samples,
    /// Whether there is but one row, whose failure is the answer.
    alone: bool,
    ceilings: CeilingSamplers<'a>,
    /// Compiled once, though measured in several groups.
    attentions: Vec<Arc<Attention>>,
    left_out: Vec<String>,
    /// What was tuned for a spec, where something was.
    options: &'a dyn Fn(&AttentionSpec) -> Option<Options>,
}

impl Run<'_> {
    /// Prepares, measures and drops a group.
    fn group(&mut self, group: &Group, progress: &Progress) -> Result<Vec<Row>, Failure> {
        let count = group.shapes.len();
        let mut workloads = Vec::new();
        for (i, shape) in group.shapes.iter().enumerate() {
            progress.now(format!("{}: preparing {} of {count}", group.section.title(), i + 1));
            match self.workload(shape) {
                Ok(workload) => workloads.push(workload),
                Err(error) if self.alone => return Err(Failure::Usage(error.to_string())),
                // In a set, what is beyond the adapter's limits is left out.
                Err(error) => {
                    let reason = format!("{shape}: {error}");
                    progress.tell(&format!("left out: {reason}"));
                    self.left_out.push(reason);
                }
            }
        }
        let mut samplers = Vec::new();
        let mut flop_s = f64::INFINITY;
        for (i, workload) in workloads.iter().enumerate() {
            // A slow adapter shows in small rows that large ones would take hours.
            let flops = workload.traffic().flops as f64;
            let seconds = flops * flop_s;
            if !self.samples.exact && flop_s.is_finite() && seconds > MOST_SECONDS {
                let reason = format!("{}: it would take {seconds:.0} s a run here", workload.shape());
                progress.tell(&format!("left out: {reason}"));
                self.left_out.push(reason);
                continue;
            }
            progress.now(format!("{}: first run of {} of {count}", group.section.title(), i + 1));
            let record = Box::new(|encoder: &mut wgpu::CommandEncoder| workload.record(encoder));
            let sampler = Sampler::new(self.gpu, record, SAMPLE_SECONDS).map_err(Failure::Adapter)?;
            let samples = match self.samples {
                Samples { asked, exact: true } => asked,
                Samples { asked, exact: false } => samples_for(sampler.expected_s(), asked),
            };
            flop_s = flop_s.min(sampler.repetition_s() / flops);
            samplers.push((workload, sampler, samples));
        }
        let rounds = samplers.iter().map(|(.., samples)| *samples).max().unwrap_or(0);
        for round in 0..rounds {
            progress.now(format!("{}: round {} of {rounds}", group.section.title(), round + 1));
            self.ceilings.sample().map_err(Failure::Adapter)?;
            for (_, sampler, _) in samplers.iter_mut().filter(|(.., samples)| round < *samples) {
                sampler.sample().map_err(Failure::Adapter)?;
            }
            progress.rounds(count, (round + 1, rounds));
        }
        let row = |(workload, mut sampler, _): (&Workload, Sampler<'_>, usize)| {
            workload.row(group.section.name(), sampler.take())
        };
        Ok(samplers.into_iter().map(row).collect())
    }

    fn workload(&mut self, shape: &Shape) -> Result<Workload, gqa::Error> {
        let known = self.attentions.iter().find(|attention| attention.plan().spec() == &shape.spec);
        let attention = match known {
            Some(attention) => Arc::clone(attention),
            None => {
                let options = (self.options)(&shape.spec).unwrap_or_default();
                let new = Attention::new(&self.gpu.device, shape.spec.clone(), options)?;
                self.attentions.push(Arc::new(new));
                Arc::clone(&self.attentions[self.attentions.len() - 1])
            }
        };
        Workload::over(self.gpu, attention, shape, &Filled::new(self.gpu, shape)?)
    }
}

/// Numbers of a kernel that is wrong are worth nothing: random problems of `spec`, and for each of `shapes` of this spec two that take its
/// kernels, on keys that are cut into chunks where the adapter has room for several, and on keys that are not.
pub(crate) fn verify(
    gpu: &Gpu,
    spec: &AttentionSpec,
    options: &Options,
    shapes: &[Shape],
) -> Result<(), Failure> {
    let setup = Setup { options: options.clone(), ..Setup::default() };
    let mut runner = Runner::new(gpu, spec, &setup).map_err(|e| Failure::Adapter(e.to_string()))?;
    let wrong = |what: String, message: String| {
        eprintln!(
            "gqa: nothing was measured, because the kernels are wrong here: {spec:?}, {what}: {message}"
        );
        Failure::Mismatch
    };
    for seed in 0..CHECKS {
        let problem = random_problem_of(spec, seed);
        let result = runner.run(&problem).and_then(|output| check(&problem, &output));
        result.map_err(|message| wrong(format!("seed {seed}"), message))?;
    }
    // What does not train is left out when its workload is made.
    let trains = runner.attention().plan().backward().is_ok();
    let mut known = Vec::new();
    for shape in shapes.iter().filter(|shape| shape.spec == *spec) {
        for lens in lens_to_check(shape) {
            let this = (lens, shape.pass == Pass::Backward && trains);
            if known.contains(&this) {
                continue;
            }
            known.push(this);
            let problem = problem_of_lens(spec, lens);
            let result = match this.1 {
                true => {
                    check_gradients(&mut runner, &problem, &random_output_gradients(&problem, 0)).map(drop)
                }
                false => runner.run(&problem).and_then(|output| check(&problem, &output)),
            };
            result.map_err(|message| wrong(format!("{} queries on {} keys", lens.0, lens.1), message))?;
        }
    }
    Ok(())
}

/// Queries and keys of problems that take the kernels of `shape`, and that the reference answers soon: more queries are more tiles, more
/// keys are more chunks.
fn lens_to_check(shape: &Shape) -> [(u32, u32); 2] {
    let q_len = shape.q_len.min(160 / shape.spec.group() + 2).min(80);
    [700, 64].map(|most| (q_len, shape.kv_len.min(most)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_as_small_as_tell_the_kernels() {
        let lens = |heads: (u32, u32), q_len, kv_len| {
            let spec = AttentionSpec::builder(heads.0, heads.1, 64).build().unwrap();
            lens_to_check(&Shape { spec, q_len, kv_len, batch: 3, pass: Pass::Infer })
        };
        assert_eq!(lens((32, 8), 1, 16_384), [(1, 700), (1, 64)]);
        assert_eq!(lens((32, 32), 1024, 1024), [(80, 700), (80, 64)]);
        assert_eq!(lens((32, 8), 16, 8), [(16, 8), (16, 8)]);
        // A hundred rows of each token: three tokens are many tiles.
        assert_eq!(lens((128, 1), 4096, 4096), [(3, 700), (3, 64)]);
    }
}
