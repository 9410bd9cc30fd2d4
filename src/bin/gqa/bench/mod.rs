//! `gqa bench`: verifies, measures the adapter's ceilings, then times every kernel against the nearer one.

mod plot;
mod serve;
mod table;

use std::path::PathBuf;

use gqa::profile::{CeilingSamplers, Ceilings, Row, Sampler, Shape, Workload};
use gqa::verify::{Gpu, Runner, Setup, check, random_problem_of};
use gqa::{AttentionSpec, Options};
use indicatif::{ProgressBar, ProgressStyle};

use crate::Failure;
use crate::adapter::AdapterArgs;
use crate::info::SpecArgs;

/// Verify the kernels, measure the adapter's ceilings, then time decode and prefill against them
///
/// Without --heads: MHA 32/32, GQA 32/8 and MQA 32/1 at several lengths. With it: one shape.
/// A fraction is the least time that the nearer ceiling allows, over the median time; bytes count each K/V element once
/// per sequence. Times are the host's clock around submissions of many repetitions; runs of all rows take turns.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    spec: SpecArgs,
    /// Query tokens of each sequence (with --heads)
    #[arg(long, value_name = "N", default_value_t = 1, requires = "heads")]
    q_len: u32,
    /// Keys of each sequence (with --heads)
    #[arg(long, value_name = "N", default_value_t = 4096, requires = "heads")]
    kv_len: u32,
    /// Sequences (with --heads)
    #[arg(long, value_name = "N", default_value_t = 1, requires = "heads")]
    batch: u32,
    /// Queries see the keys up to their own position only (with --heads)
    #[arg(long, requires = "heads")]
    causal: bool,
    /// Measure a server's mixed batch instead, at once and sequence by sequence: 64 decodes of 200 to 8,000 tokens and 2 prefill chunks
    /// of 512; once as answers to few prompts, which share pages, and once with nothing shared
    #[arg(long)]
    serve: bool,
    /// With --serve, answers to each prompt
    #[arg(long, value_name = "N", default_value_t = 8, requires = "serve", value_parser = clap::value_parser!(u32).range(1..=64))]
    answers: u32,
    /// With --serve, slots of a page
    #[arg(long, value_name = "N", default_value_t = gqa::PagedShape::PAGE, requires = "serve")]
    page: u32,
    /// Samples of each row; the median counts
    #[arg(long, value_name = "N", default_value_t = 9)]
    samples: usize,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Also draw a roofline and time against length
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people
    Table,
    /// One object: adapter, driver, version, ceilings, rows
    Json,
    /// The rows alone
    Csv,
}

/// Everything that one run has found.
#[derive(Debug, serde::Serialize)]
struct Report {
    adapter: String,
    driver: String,
    version: &'static str,
    ceilings: Ceilings,
    rows: Vec<Row>,
}

/// Seconds that one sample should take at least.
const SAMPLE_SECONDS: f64 = 0.03;
/// Random problems of each measured spec.
const CHECKS: u64 = 3;

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    if args.samples == 0 {
        return Err(Failure::Usage("--samples must be at least 1".to_owned()));
    }
    let gpu = args.adapter.open_one()?;
    if args.serve {
        return serve::main(&gpu, args);
    }
    let shapes = shapes(args, gpu.caps.software)?;
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let report = measure(&gpu, &shapes, args.samples, &bar);
    bar.finish_and_clear();
    let report = report?;

    match args.format {
        Format::Table => print!("{}", table::table(&report)),
        Format::Csv => print!("{}", table::csv(&report)),
        Format::Json => {
            let json = serde_json::to_string_pretty(&report).map_err(|e| Failure::Usage(e.to_string()))?;
            println!("{json}");
        }
    }
    if let Some(path) = &args.plot {
        plot::draw(&report, path).map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))?;
        eprintln!("drawn: {}", path.display());
    }
    Ok(())
}

/// The shapes to measure: the one asked for, or the standard set.
fn shapes(args: &Args, software: bool) -> Result<Vec<Shape>, Failure> {
    if let Some(heads) = args.spec.heads {
        if args.q_len == 0 || args.kv_len == 0 || args.batch == 0 {
            return Err(Failure::Usage("--q-len, --kv-len and --batch must be at least 1".to_owned()));
        }
        let spec = args.spec.build(heads, args.causal)?;
        return Ok(vec![Shape { spec, q_len: args.q_len, kv_len: args.kv_len, batch: args.batch }]);
    }
    let (decodes, prefills) =
        if software { ([1024, 4096, 16_384], [128, 512]) } else { ([4096, 16_384, 65_536], [1024, 4096]) };
    let mut shapes = Vec::new();
    for kv_heads in [32, 8, 1] {
        let spec = args.spec.build((32, kv_heads), true)?;
        let shape = |q_len, kv_len| Shape { spec: spec.clone(), q_len, kv_len, batch: 1 };
        shapes.extend(decodes.map(|len| shape(1, len)));
        shapes.extend(prefills.map(|len| shape(len, len)));
    }
    // Decodes first, shortest first.
    shapes.sort_by_key(|s| (s.q_len > 1, s.kv_len));
    Ok(shapes)
}

fn measure(gpu: &Gpu, shapes: &[Shape], samples: usize, bar: &ProgressBar) -> Result<Report, Failure> {
    let mut specs: Vec<&AttentionSpec> = Vec::new();
    for shape in shapes {
        if !specs.contains(&&shape.spec) {
            specs.push(&shape.spec);
        }
    }
    for spec in specs {
        bar.set_message(format!("verifying {}/{} heads", spec.q_heads(), spec.kv_heads()));
        verify(gpu, spec)?;
    }
    bar.set_message("trying ceiling kernels");
    let mut ceilings = CeilingSamplers::new(gpu).map_err(Failure::Adapter)?;

    let mut workloads = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        bar.set_message(format!("preparing {} of {}", i + 1, shapes.len()));
        match Workload::new(gpu, shape, Options::default()) {
            Ok(workload) => workloads.push(workload),
            // In the standard set a cache beyond the adapter's limits is left out; alone it is the answer.
            Err(error) if shapes.len() > 1 => bar.suspend(|| eprintln!("left out: {error}")),
            Err(error) => return Err(Failure::Usage(error.to_string())),
        }
    }
    let mut samplers = Vec::new();
    for (i, workload) in workloads.iter().enumerate() {
        bar.set_message(format!("compiling {} of {}", i + 1, workloads.len()));
        let record = Box::new(|encoder: &mut wgpu::CommandEncoder| workload.record(encoder));
        samplers.push(Sampler::new(gpu, record, SAMPLE_SECONDS).map_err(Failure::Adapter)?);
    }
    for sample in 0..samples {
        bar.set_message(format!("sample {} of {samples}", sample + 1));
        ceilings.sample().map_err(Failure::Adapter)?;
        for sampler in &mut samplers {
            sampler.sample().map_err(Failure::Adapter)?;
        }
    }
    let ceilings = ceilings.result();
    let rows = workloads.iter().zip(&samplers).map(|(w, s)| w.row(s.result(), &ceilings)).collect();
    Ok(Report {
        adapter: gpu.name(),
        driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info),
        version: env!("CARGO_PKG_VERSION"),
        ceilings,
        rows,
    })
}

/// Numbers of a kernel that is wrong are worth nothing.
fn verify(gpu: &Gpu, spec: &AttentionSpec) -> Result<(), Failure> {
    let setup = Setup::default();
    let mut runner = Runner::new(gpu, spec, &setup).map_err(|e| Failure::Adapter(e.to_string()))?;
    for seed in 0..CHECKS {
        let problem = random_problem_of(spec, seed);
        if let Err(message) = runner.run(&problem).and_then(|output| check(&problem, &output)) {
            eprintln!(
                "gqa: nothing was measured, because the kernels are wrong here: {spec:?}, seed {seed}: {message}"
            );
            return Err(Failure::Mismatch);
        }
    }
    Ok(())
}
