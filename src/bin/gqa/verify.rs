//! `gqa verify`: random and metamorphic checks against the reference.

use std::cell::Cell;

use gqa::AttentionSpec;
use gqa::verify::{
    Gpu, LAWS, PER_SPEC, Runner, check, check_gradients, random_gradients, random_problem, random_setup,
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::Failure;
use crate::adapter::{AdapterArgs, side_by_side};

/// Check the kernels against the f64 reference: random problems and laws that attention obeys
///
/// Gradients are those of the reference's backward pass, relative to the largest of their tensor: 1e-4, and 2e-2 where they are stored
/// as f16. Forty problems share a spec, because compiling costs more than running. Outputs, cache slack and the gaps of tensors hold
/// NaN before each run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Random problems per adapter
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    count: u64,
    /// Seed of the first problem; a failure prints the seed that repeats it
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 60))]
    seed: u64,
    /// Random problems whose gradients are checked, per adapter
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    gradients: u64,
    /// Times that each law is checked, per adapter
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    laws: u64,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let bars = MultiProgress::new();
    let failures = side_by_side(&args.adapter.open()?, |gpu| verify(gpu, args, &bars))?;
    if failures.iter().any(|count| *count > 0) { Err(Failure::Mismatch) } else { Ok(()) }
}

/// Runs all checks on one adapter and prints a summary; returns how many failed.
fn verify(gpu: &Gpu, args: &Args, bars: &MultiProgress) -> Result<usize, Failure> {
    let laws = args.laws * LAWS.len() as u64;
    let bar = bars.add(ProgressBar::new(args.count + args.gradients + laws));
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {elapsed} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(gpu.name());
    let start = std::time::Instant::now();
    let cancelled = Cell::new(0);
    let failures = run_random(gpu, args, &bar)?
        + run_gradients(gpu, args, &bar, &cancelled)?
        + run_laws(gpu, args, &bar);
    bar.finish_and_clear();
    let verdict = if failures == 0 { "PASS" } else { "FAIL" };
    bars.suspend(|| {
        println!(
            "{verdict} {}: {} random problems and {} of gradients from seed {}, {laws} checks of {} laws, {failures} failures, {:.0} s",
            gpu.name(),
            args.count,
            args.gradients,
            args.seed,
            LAWS.len(),
            start.elapsed().as_secs_f64(),
        );
        if args.gradients > 0 {
            let (problems, cancelled) = (args.gradients, cancelled.get());
            println!(
                "     gradients: {cancelled} tensors of {problems} problems were near enough only for what outputs stored as f16 have rounded"
            );
        }
    });
    Ok(failures)
}

fn run_random(gpu: &Gpu, args: &Args, bar: &ProgressBar) -> Result<usize, Failure> {
    run_problems(gpu, (args.seed, args.count), bar, &|seed| {
        let problem = random_problem(seed);
        let spec = problem.spec.clone();
        (spec, Box::new(move |runner| runner.run(&problem).and_then(|output| check(&problem, &output))))
    })
}

/// Adds to `cancelled` the tensors that needed what is allowed for outputs stored as f16.
fn run_gradients(
    gpu: &Gpu,
    args: &Args,
    bar: &ProgressBar,
    cancelled: &Cell<usize>,
) -> Result<usize, Failure> {
    run_problems(gpu, (args.seed, args.gradients), bar, &|seed| {
        let (problem, d_out) = random_gradients(seed);
        let spec = problem.spec.clone();
        let run = move |runner: &mut Runner<'_>| {
            check_gradients(runner, &problem, &d_out).map(|more| cancelled.set(cancelled.get() + more))
        };
        (spec, Box::new(run))
    })
}

/// A problem: its spec, and what runs and checks it.
type Trial<'a> = (AttentionSpec, Box<dyn FnOnce(&mut Runner<'_>) -> Result<(), String> + 'a>);

/// Runs the problems of `count` seeds from `first` on, and returns how many failed.
fn run_problems<'a>(
    gpu: &Gpu,
    (first, count): (u64, u64),
    bar: &ProgressBar,
    problem: &dyn Fn(u64) -> Trial<'a>,
) -> Result<usize, Failure> {
    let mut failures = 0;
    let mut runner: Option<Runner<'_>> = None;
    for seed in first..first.saturating_add(count) {
        let (spec, run) = problem(seed);
        let setup = random_setup(seed);
        let fits = |r: &Runner<'_>| *r.attention().plan().spec() == spec;
        let mut current = match runner.take().filter(fits) {
            Some(runner) => runner,
            None => Runner::new(gpu, &spec, &setup).map_err(|e| Failure::Adapter(e.to_string()))?,
        };
        let result = run(&mut current);
        runner = Some(current);
        if let Err(message) = result {
            failures += 1;
            bar.suspend(|| println!("seed {seed}: {message}\n  {spec:?}\n  {:?}", setup.options));
        }
        bar.inc(1);
    }
    Ok(failures)
}

fn run_laws(gpu: &Gpu, args: &Args, bar: &ProgressBar) -> usize {
    let mut failures = 0;
    for (i, (name, law)) in LAWS.iter().enumerate() {
        bar.set_message(*name);
        for round in 0..args.laws {
            // Far apart, so that each check has a spec of its own.
            let seed = args.seed + (round * LAWS.len() as u64 + i as u64) * PER_SPEC + 3;
            if let Err(message) = law(gpu, seed) {
                failures += 1;
                bar.suspend(|| println!("law {name:?}, seed {seed}: {message}"));
            }
            bar.inc(1);
        }
    }
    failures
}
