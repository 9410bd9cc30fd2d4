//! `gqa bench`: verifies, measures the adapter's ceilings, then times every kernel against the nearer one.

mod compare;
mod measure;
mod plot;
mod serve;
mod sets;
mod summary;
mod table;

use std::path::PathBuf;

use gqa::Class;
use gqa::profile::{Ceilings, Pass, Row, Shape};

use crate::Failure;
use crate::adapter::AdapterArgs;
use crate::info::SpecArgs;
use crate::tune::store::{self, Store};
use compare::{Comparison, Old};
pub(crate) use measure::verify;
use measure::{GroupCeilings, Measured, Samples, Tuned};
use sets::Set;
use summary::Finding;

/// Verify the kernels, measure the adapter's ceilings, then time decode and prefill against them
///
/// Without --heads, a standard set: decode of MHA 32/32, GQA 32/8 and MQA 32/1 with 128 to 131,072 keys, every storage of K and V,
/// batches to 64, 1 to 64 query tokens, prefill of 128 to 8,192; minutes on a CPU, and --quick takes seconds. With it: one shape.
/// A fraction is the least time that the nearer ceiling allows, over the median time; bytes count each K/V element once
/// per sequence. Times are the host's clock around submissions of many repetitions; runs of all rows of a group take turns.
/// The ceilings are the best of 30 kernels that read (36 with 64-bit integers) and 18 that compute, sampled in every group.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    spec: SpecArgs,
    /// Query tokens of each sequence (with --heads)
    #[arg(long, value_name = "N", default_value_t = 1, requires = "heads", conflicts_with = "serve")]
    q_len: u32,
    /// Keys of each sequence (with --heads)
    #[arg(long, value_name = "N", default_value_t = 4096, requires = "heads", conflicts_with = "serve")]
    kv_len: u32,
    /// Sequences (with --heads)
    #[arg(long, value_name = "N", default_value_t = 1, requires = "heads", conflicts_with = "serve")]
    batch: u32,
    /// Queries see later keys too, not only those up to their own position (with --heads)
    #[arg(long, requires = "heads", conflicts_with = "serve")]
    full: bool,
    /// A small set: MHA, GQA and MQA at a few lengths
    #[arg(long, conflicts_with_all = ["heads", "serve"])]
    quick: bool,
    /// Measure training instead, with K and V in f32: shapes forward, and backward beside it
    #[arg(long, conflicts_with_all = ["heads", "quick", "serve"])]
    backward: bool,
    /// Measure a server's mixed batch instead, at once and sequence by sequence: 64 decodes of 200 to 8,000 tokens and 2 prefill chunks
    /// of 512; once as answers to few prompts, which share pages, and once with nothing shared
    #[arg(long)]
    serve: bool,
    /// With --serve, answers to each prompt
    #[arg(long, value_name = "N", default_value_t = 8, requires = "serve", value_parser = clap::value_parser!(u32).range(1..=64))]
    answers: u32,
    /// With --serve, slots of a page
    #[arg(long, value_name = "N", default_value_t = gqa::PagedShape::PAGE, requires = "serve", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    page: u32,
    /// Run as `gqa tune` found best on this adapter, where it was run for the row's spec
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, conflicts_with = "serve")]
    tuned: Option<Option<PathBuf>>,
    /// Samples of each row; the median counts. In a set, rows that take long get fewer, which the report tells
    #[arg(long, value_name = "N", default_value_t = 9)]
    samples: usize,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Also print ratios to an earlier run, which --format json wrote; exit code 4 when a row is SLOWER: by more than 5 %, and
    /// beyond the quartiles of both runs
    #[arg(long, value_name = "OLD.json", conflicts_with = "serve")]
    compare: Option<PathBuf>,
    /// Also draw time against context, and a roofline
    #[arg(long, value_name = "FILE.svg", conflicts_with = "serve")]
    plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people
    Table,
    /// One object: adapter, driver, version, ceilings, groups, rows, summary
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
    groups: Vec<GroupCeilings>,
    rows: Vec<Row>,
    left_out: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tuned: Vec<Tuned>,
    summary: Vec<Finding>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<Comparison>,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    if args.samples == 0 {
        return Err(Failure::Usage("--samples must be at least 1".to_owned()));
    }
    // A file that cannot be read is told before minutes are spent.
    let old = args.compare.as_deref().map(Old::read).transpose()?;
    let read = |file: &Option<PathBuf>| match file {
        Some(file) if !file.exists() => {
            Err(Failure::Usage(format!("{}: no such file; `gqa tune --file` writes it", file.display())))
        }
        file => Store::read(&store::path(file.as_deref())?),
    };
    let tuned = args.tuned.as_ref().map(read).transpose()?;
    let gpu = args.adapter.open_one()?;
    if args.serve {
        return serve::main(&gpu, args);
    }
    let set = set(args, gpu.caps.class == Class::Software)?;
    let samples = Samples { asked: args.samples, exact: args.spec.heads.is_some() };
    let Measured { ceilings, groups, rows, left_out, tuned } =
        measure::measure(&gpu, &set, samples, tuned.as_ref())?;
    let summary = summary::findings(&rows, &ceilings);
    let mut report = Report {
        adapter: gpu.name(),
        driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info),
        version: env!("CARGO_PKG_VERSION"),
        ceilings,
        groups,
        rows,
        left_out,
        tuned,
        summary,
        comparison: None,
    };
    report.comparison = old.map(|old| compare::compare(&old, &report));

    match args.format {
        Format::Table => print!("{}", table::table(&report)),
        Format::Csv => print!("{}", table::csv(&report)),
        Format::Json => {
            let json = serde_json::to_string_pretty(&report).map_err(|e| Failure::Usage(e.to_string()))?;
            println!("{json}");
        }
    }
    if let Some(comparison) = &report.comparison {
        match args.format {
            Format::Table => print!("\n{comparison}"),
            // What other programs read is not disturbed.
            Format::Csv | Format::Json => eprint!("{comparison}"),
        }
    }
    let drawn = args.plot.as_ref().map_or(Ok(()), |path| {
        plot::draw(&report, path).map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))?;
        eprintln!("drawn: {}", path.display());
        Ok(())
    });
    match &report.comparison {
        Some(comparison) if comparison.has_regressions() => {
            // The exit code tells one thing, and this is the graver.
            drawn.unwrap_or_else(|e| eprintln!("gqa: {e}"));
            Err(Failure::Slower)
        }
        _ => drawn,
    }
}

/// What to measure: the shape asked for, or a set.
fn set(args: &Args, software: bool) -> Result<Set, Failure> {
    match args.spec.heads {
        Some(_) if args.q_len == 0 || args.kv_len == 0 || args.batch == 0 => {
            Err(Failure::Usage("--q-len, --kv-len and --batch must be at least 1".to_owned()))
        }
        Some(heads) => {
            let spec = args.spec.build(heads, !args.full)?;
            let Args { q_len, kv_len, batch, .. } = *args;
            Ok(Set::one(Shape { spec, q_len, kv_len, batch, pass: Pass::Infer }))
        }
        None if args.backward => Set::backward(&args.spec),
        None if args.quick => Set::quick(&args.spec, software),
        None => Set::standard(&args.spec),
    }
}
