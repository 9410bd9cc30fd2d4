//! `gqa tune`: measures what a plan may choose on the user's adapter, and keeps the winner for later runs.

mod search;
pub(crate) mod store;

use std::path::PathBuf;

use gqa::profile::{Pass, Shape};
use gqa::{AttentionSpec, Class, Options, Plan};

use crate::Failure;
use crate::adapter::AdapterArgs;
use crate::info::SpecArgs;
use search::{Found, Search};
use store::{Entry, Key, Store};

/// Measure kernels, tiles and chunks on an adapter, and keep the fastest
///
/// What `gqa info` plans follows from a table by class of adapter; this measures its alternatives in turn, for decode and for prefill of one
/// causal attention: the family of kernels, teams of lanes for decode or not, rows of a decode tile, rows of a prefill tile, workgroups
/// that fill the device. Every alternative is verified before it is timed, runs of all alternatives take turns, and the plan's own choice stays unless another is faster by
/// more than 3 % and by more than the times spread.
///
/// The winner goes to tuned.json in the platform's cache directory, by adapter, driver, version of gqa, text of the kernels and spec.
/// `gqa bench --tuned` runs with it. An application passes it to `Attention::new` as `Options`: as printed here, or read from the file
/// with the library's feature `serde`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    spec: SpecArgs,
    /// Keys of the decode that is measured [default: 8192 on a CPU, else 32768]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    decode: Option<u32>,
    /// Tokens of the prefill that is measured [default: 512 on a CPU, else 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    prefill: Option<u32>,
    /// Samples of each alternative; the median counts
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
    /// Where winners are kept [default: gqa/tuned.json in the platform's cache directory]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Measure and print, but keep nothing
    #[arg(long)]
    dry_run: bool,
    /// Measure nothing: print what is kept
    #[arg(long, conflicts_with_all = ["heads", "dry_run"])]
    show: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people
    Table,
    /// What is kept: an entry, or (--show) the file
    Json,
}

/// Heads of the attention that is tuned where none are named: Llama 3's.
const HEADS: (u32, u32) = (32, 8);

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let path = store::path(args.file.as_deref())?;
    // Also before minutes of measuring: a file that cannot be read is told first.
    let store = Store::read(&path)?;
    if args.show {
        return show(&store, args.format);
    }
    let gpu = args.adapter.open_one()?;
    let is_software = gpu.caps.class == Class::Software;
    let spec = args.spec.build(args.spec.heads.unwrap_or(HEADS), true)?;
    let [decode, prefill] = match is_software {
        true => [8192, 512],
        false => [32_768, 4096],
    };
    let shape = |q_len, kv_len| Shape { spec: spec.clone(), q_len, kv_len, batch: 1, pass: Pass::Infer };
    let (decode, prefill) = (args.decode.unwrap_or(decode), args.prefill.unwrap_or(prefill));
    let shapes = [shape(1, decode), shape(prefill, prefill)];
    let found = Search::new(&gpu, shapes, args.samples as usize).run()?;
    let entry = Entry::new(Key::of(&gpu, &spec)?, &found);
    match args.format {
        Format::Table => print!("{}", table(&gpu.name(), &spec, &found)),
        Format::Json => println!("{}", entry.json()?),
    }
    if !args.dry_run {
        // Another run may have written in the meantime.
        let mut store = Store::read(&path)?;
        store.put(entry);
        store.write(&path)?;
        eprintln!("kept in {}: `gqa bench --tuned` runs with it", path.display());
    }
    Ok(())
}

fn show(store: &Store, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => println!("{}", store.json()?),
        Format::Table if store.entries.is_empty() => println!("nothing is kept yet: `gqa tune` measures"),
        Format::Table => {
            for Entry { key, options, decode, prefill } in &store.entries {
                println!("{}, driver {}, gqa {}", key.adapter, key.driver, key.version);
                println!("  {}", key.spec);
                println!("  {}", code(options));
                println!(
                    "  decode {:.2} x, prefill {:.2} x as fast as planned\n",
                    decode.gain(),
                    prefill.gain()
                );
            }
        }
    }
    Ok(())
}

/// For people: each stage with its alternatives, then the whole.
fn table(adapter: &str, spec: &AttentionSpec, found: &Found) -> String {
    let mut out = format!("{adapter}\n{spec}\n");
    let ms = |seconds: f64| format!("{:.3} ms", seconds * 1e3);
    for stage in &found.stages {
        out += &format!("\n{:<14} {:>14} {:>14} {:>8}\n", stage.what, "decode", "prefill", "spread");
        for trial in &stage.trials {
            let time = |nth: usize| trial.times[nth].map_or_else(|| "-".to_owned(), |t| ms(t.median_s));
            let chosen = if trial.is_chosen { "  <-" } else { "" };
            let spread = trial.spread() * 100.0;
            out += &format!("  {:<12} {:>14} {:>14} {spread:>7.1}%{chosen}\n", trial.name, time(0), time(1));
        }
    }
    out += "\nplanned against tuned, in turns:\n";
    for (what, change) in [("decode", &found.decode), ("prefill", &found.prefill)] {
        let (planned, tuned) = (ms(change.planned_s), ms(change.tuned_s));
        out += &format!("  {what:<12} {planned:>14} {tuned:>14} {:>6.2} x\n", change.gain());
    }
    out + "\n" + &code(&found.options) + "\n"
}

/// As a Rust program says it.
fn code(options: &Options) -> String {
    let mut fields = Vec::new();
    if options.family != gqa::Family::Auto {
        fields.push(format!("family: Family::{:?}", options.family));
    }
    fields.extend(options.decode_teams.map(|teams| format!("decode_teams: Some({teams})")));
    let numbers = [
        ("prefill_rows", options.prefill_rows),
        ("decode_rows", options.decode_rows),
        ("fill", options.fill),
    ];
    fields.extend(numbers.iter().filter_map(|(name, n)| n.map(|n| format!("{name}: Some({n})"))));
    match fields.is_empty() {
        true => "Options::default()".to_owned(),
        false => format!("Options {{ {}, ..Options::default() }}", fields.join(", ")),
    }
}

/// The plan for `options`, where the adapter and the kernels allow it.
fn plan(spec: &AttentionSpec, caps: &gqa::Caps, options: &Options) -> Option<Plan> {
    Plan::new(spec, caps, options).ok()
}
