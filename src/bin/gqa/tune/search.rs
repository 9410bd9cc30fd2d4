//! The search: one choice after another, each from the best of the choices before it.

use std::sync::Arc;

use gqa::profile::{Filled, Sampler, Shape, Timing, Workload};
use gqa::shader::Kernel;
use gqa::verify::Gpu;
use gqa::{Attention, Family, Options, Plan};

use super::plan;
use super::store::Change;
use crate::Failure;
use crate::bench::verify;
use crate::progress::Progress;

/// Seconds that one sample should take at least.
const SAMPLE_SECONDS: f64 = 0.05;
/// By how much an alternative must be faster than the plan's own choice.
const LEAST_GAIN: f64 = 0.03;

/// Which of the two shapes a choice is judged by.
const BOTH: [bool; 2] = [true, true];
const DECODE: [bool; 2] = [true, false];
const PREFILL: [bool; 2] = [false, true];

/// What was found.
pub(super) struct Found {
    pub(super) stages: Vec<Stage>,
    pub(super) options: Options,
    pub(super) decode: Change,
    pub(super) prefill: Change,
}

/// A choice with its alternatives.
pub(super) struct Stage {
    pub(super) what: &'static str,
    pub(super) trials: Vec<Trial>,
}

/// An alternative: the first is what was chosen before.
pub(super) struct Trial {
    pub(super) name: String,
    options: Options,
    /// Of decode and prefill, where the choice is judged by it.
    pub(super) times: [Option<Timing>; 2],
    pub(super) is_chosen: bool,
}

impl Trial {
    /// How far its times spread, relative to their medians.
    pub(super) fn spread(&self) -> f64 {
        self.times.iter().flatten().map(Timing::spread).fold(0.0, f64::max)
    }

    /// Its times over those of another: their geometric mean.
    fn ratio_to(&self, other: &Self) -> f64 {
        let pairs = self.times.iter().zip(&other.times);
        let logs: Vec<f64> =
            pairs.filter_map(|(a, b)| Some((a.as_ref()?.median_s / b.as_ref()?.median_s).ln())).collect();
        (logs.iter().sum::<f64>() / logs.len() as f64).exp()
    }
}

/// A search on one adapter.
pub(super) struct Search<'a> {
    gpu: &'a Gpu,
    /// Decode, prefill.
    shapes: [Shape; 2],
    samples: usize,
    progress: Progress,
    /// Options that were found right.
    verified: Vec<Options>,
}

/// What a choice is of: its name, which shapes judge it, and its alternatives to what was chosen before.
type Choice = (&'static str, [bool; 2], fn(&Options, &Plan) -> Vec<(String, Options)>);

const CHOICES: [Choice; 5] = [
    ("family", BOTH, families),
    ("decode_teams", DECODE, decode_teams),
    ("decode_rows", DECODE, decode_rows),
    ("prefill_rows", PREFILL, prefill_rows),
    ("fill", BOTH, fills),
];

fn families(base: &Options, _: &Plan) -> Vec<(String, Options)> {
    let families = [("portable", Family::Portable), ("subgroup", Family::Subgroup)];
    families.map(|(name, family)| (name.to_owned(), Options { family, ..base.clone() })).into()
}

fn decode_teams(base: &Options, _: &Plan) -> Vec<(String, Options)> {
    let teams = [true, false];
    teams.map(|teams| (teams.to_string(), Options { decode_teams: Some(teams), ..base.clone() })).into()
}

fn decode_rows(base: &Options, _: &Plan) -> Vec<(String, Options)> {
    let rows = [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32];
    rows.map(|rows| (format!("{rows}"), Options { decode_rows: Some(rows), ..base.clone() })).into()
}

fn prefill_rows(base: &Options, _: &Plan) -> Vec<(String, Options)> {
    let rows = [8, 16, 24, 32, 64, 96, 128];
    rows.map(|rows| (format!("{rows}"), Options { prefill_rows: Some(rows), ..base.clone() })).into()
}

fn fills(base: &Options, plan: &Plan) -> Vec<(String, Options)> {
    let fill = plan.fill();
    let fills = [fill / 4, fill / 2, fill.saturating_mul(2), fill.saturating_mul(4)];
    let fills = fills.into_iter().filter(|fill| *fill > 0);
    fills.map(|fill| (format!("{fill}"), Options { fill: Some(fill), ..base.clone() })).collect()
}

impl<'a> Search<'a> {
    pub(super) fn new(gpu: &'a Gpu, shapes: [Shape; 2], samples: usize) -> Self {
        let progress = Progress::new(CHOICES.len() + 1, "choices");
        Self { gpu, shapes, samples, progress, verified: Vec::new() }
    }

    /// Makes all choices, then measures planned against tuned.
    pub(super) fn run(mut self) -> Result<Found, Failure> {
        let planned = Options::default();
        let mut options = planned.clone();
        let mut stages = Vec::new();
        for (what, judges, alternatives) in CHOICES {
            let base = self.plan(&options)?;
            let trials = self.trials(what, &options, alternatives(&options, &base))?;
            self.progress.stage(format!("{what}: {} alternatives", trials.len() - 1));
            if trials.len() > 1 {
                let stage = Stage { what, trials: self.judge(trials, judges)? };
                let chosen = stage.trials.iter().find(|trial| trial.is_chosen);
                options = chosen.map_or(options, |trial| trial.options.clone());
                stages.push(stage);
            }
            self.progress.group_done(1);
        }
        self.progress.stage("planned against tuned".to_owned());
        let trial = |name: &str, options: &Options| Trial {
            name: name.to_owned(),
            options: options.clone(),
            times: [None; 2],
            is_chosen: false,
        };
        let last = self.judge(vec![trial("planned", &planned), trial("tuned", &options)], BOTH)?;
        let change = |nth: usize| {
            let [planned_s, tuned_s] =
                [0, 1].map(|of: usize| last[of].times[nth].map_or(f64::NAN, |t| t.median_s));
            Change { planned_s, tuned_s }
        };
        // What does not hold when it is measured again is not kept.
        let options = if last[1].is_chosen { options } else { planned };
        let [decode, prefill] = match last[1].is_chosen {
            true => [change(0), change(1)],
            false => [change(0), change(1)].map(|c| Change { tuned_s: c.planned_s, ..c }),
        };
        Ok(Found { stages, options, decode, prefill })
    }

    fn plan(&self, options: &Options) -> Result<Plan, Failure> {
        Plan::new(&self.shapes[0].spec, &self.gpu.caps, options).map_err(|e| Failure::Usage(e.to_string()))
    }

    /// What was chosen before, and the alternatives that are possible and differ.
    fn trials(
        &self,
        what: &str,
        base: &Options,
        alternatives: Vec<(String, Options)>,
    ) -> Result<Vec<Trial>, Failure> {
        let kernels = |plan: &Plan| (plan.prefill().clone(), plan.decode().clone(), plan.fill());
        let plan_of_base = self.plan(base)?;
        let name = match what {
            "family" if plan_of_base.prefill().uses_subgroups() => "subgroup".to_owned(),
            "family" => "portable".to_owned(),
            "decode_teams" => (plan_of_base.decode().kernel == Kernel::DecodeTeams).to_string(),
            "decode_rows" => plan_of_base.decode().tile.rows.to_string(),
            "prefill_rows" => plan_of_base.prefill().tile.rows.to_string(),
            _ => plan_of_base.fill().to_string(),
        };
        let trial = |name, options| Trial { name, options, times: [None; 2], is_chosen: false };
        let mut seen = vec![kernels(&plan_of_base)];
        let mut trials = vec![trial(name, base.clone())];
        for (name, options) in alternatives {
            let Some(plan) = plan(&self.shapes[0].spec, &self.gpu.caps, &options) else { continue };
            if !seen.contains(&kernels(&plan)) {
                seen.push(kernels(&plan));
                trials.push(trial(name, options));
            }
        }
        Ok(trials)
    }

    /// Times `trials` in turns, and marks the one to go on with: the first, unless another is clearly faster.
    fn judge(&mut self, mut trials: Vec<Trial>, judges: [bool; 2]) -> Result<Vec<Trial>, Failure> {
        // One cache for all alternatives: they read it in turn.
        let fill =
            |(nth, shape): (usize, &Shape)| judges[nth].then(|| Filled::new(self.gpu, shape)).transpose();
        let filled: Result<Vec<_>, _> = self.shapes.iter().enumerate().map(fill).collect();
        let filled = filled.map_err(|e| Failure::Usage(e.to_string()))?;
        let mut workloads = Vec::new();
        for (nth, trial) in trials.iter().enumerate() {
            self.progress.now(format!("compiling and verifying {}", trial.name));
            let spec = &self.shapes[0].spec;
            if !self.verified.contains(&trial.options) {
                verify(self.gpu, spec, &trial.options, &self.shapes)?;
                self.verified.push(trial.options.clone());
            }
            let attention = Attention::new(&self.gpu.device, spec.clone(), trial.options.clone());
            let attention = Arc::new(attention.map_err(|e| Failure::Usage(e.to_string()))?);
            for (of_shape, (shape, filled)) in self.shapes.iter().zip(&filled).enumerate() {
                let Some(filled) = filled else { continue };
                let workload = Workload::over(self.gpu, Arc::clone(&attention), shape, filled)
                    .map_err(|e| Failure::Usage(e.to_string()))?;
                workloads.push((nth, of_shape, workload));
            }
        }
        let mut samplers = Vec::new();
        for (nth, of_shape, workload) in &workloads {
            self.progress.now(format!("first run of {}", trials[*nth].name));
            let record = Box::new(|encoder: &mut wgpu::CommandEncoder| workload.record(encoder));
            let sampler = Sampler::new(self.gpu, record, SAMPLE_SECONDS).map_err(Failure::Adapter)?;
            samplers.push((*nth, *of_shape, sampler));
        }
        for round in 0..self.samples {
            self.progress.now(format!("round {} of {}", round + 1, self.samples));
            for (.., sampler) in &mut samplers {
                sampler.sample().map_err(Failure::Adapter)?;
            }
        }
        for (nth, of_shape, sampler) in &mut samplers {
            trials[*nth].times[*of_shape] = Some(sampler.take());
        }
        let best = fastest(&trials);
        trials[best].is_chosen = true;
        Ok(trials)
    }
}

/// The fastest trial, where it is faster than the first by more than the least gain and by more than both spread.
fn fastest(trials: &[Trial]) -> usize {
    let ratio = |nth: usize| trials[nth].ratio_to(&trials[0]);
    let noise = |nth: usize| LEAST_GAIN.max(trials[0].spread() + trials[nth].spread());
    let clear = (1..trials.len()).filter(|nth| ratio(*nth) < 1.0 - noise(*nth));
    clear.min_by(|a, b| ratio(*a).total_cmp(&ratio(*b))).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(times: [Option<[f64; 3]>; 2]) -> Trial {
        let timing = |of: Option<[f64; 3]>| of.map(|samples| Timing::of(samples.to_vec()));
        Trial { name: String::new(), options: Options::default(), times: times.map(timing), is_chosen: false }
    }

    #[test]
    fn the_plans_choice_stays_unless_another_is_clearly_faster() {
        let steady = |seconds: f64| trial([Some([seconds; 3]), None]);
        assert_eq!(fastest(&[steady(1.0), steady(0.98)]), 0);
        assert_eq!(fastest(&[steady(1.0), steady(0.96), steady(0.9)]), 2);
        // Faster by a tenth, but times spread by as much.
        assert_eq!(fastest(&[trial([Some([0.8, 1.0, 1.2]), None]), steady(0.9)]), 0);
    }

    #[test]
    fn decode_and_prefill_weigh_the_same() {
        let both = |decode: f64, prefill: f64| trial([Some([decode; 3]), Some([prefill; 3])]);
        assert!((both(2.0, 0.5).ratio_to(&both(1.0, 1.0)) - 1.0).abs() < 1e-12);
        assert_eq!(fastest(&[both(1.0, 10.0), both(1.2, 5.0)]), 1);
    }
}
