//! `gqa bench --serve`: a server's mixed batch, at once and sequence by sequence.

use gqa::profile::{Pass, ServeError, ServeReport, ServeShape, Shape, serve};
use gqa::verify::Gpu;
use indicatif::ProgressBar;

use super::measure::verify;
use super::{Args, Format};
use crate::Failure;

/// What one run has found.
#[derive(Debug, serde::Serialize)]
struct Report {
    adapter: String,
    driver: String,
    version: &'static str,
    spec: String,
    /// Answers to few prompts.
    serve: ServeReport,
    /// The same numbers of tokens, every sequence for itself.
    independent: ServeReport,
}

/// Heads that are measured where none are asked for: those of SmolLM2, whose decodes are short enough to be many.
const HEADS: ((u32, u32), u32) = ((9, 3), 64);

pub(super) fn main(gpu: &Gpu, args: &Args) -> Result<(), Failure> {
    let spec = match args.spec.heads {
        Some(heads) => args.spec.build(heads, true)?,
        None => crate::info::SpecArgs { dim: HEADS.1, ..args.spec.clone() }.build(HEADS.0, true)?,
    };
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    bar.set_message("verifying");
    let shape = |q_len, kv_len| Shape { spec: spec.clone(), q_len, kv_len, batch: 1, pass: Pass::Infer };
    verify(gpu, &spec, &gqa::Options::default(), &[shape(1, 8000), shape(512, 1024)])?;
    let measure = |answers| {
        bar.set_message(format!(
            "serving {answers} answers a prompt, {} times in three manners",
            args.samples
        ));
        let shape = ServeShape { page: args.page, ..ServeShape::mixed(spec.clone(), answers) };
        serve(gpu, &shape, args.samples).map_err(|e| match e {
            ServeError::Failed(message) => Failure::Usage(message),
            ServeError::Mismatch(message) => {
                eprintln!("gqa: nothing was measured, because the kernels are wrong here: {message}");
                Failure::Mismatch
            }
        })
    };
    let report = Report {
        adapter: gpu.name(),
        driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info),
        version: env!("CARGO_PKG_VERSION"),
        spec: spec.to_string(),
        serve: measure(args.answers)?,
        independent: measure(1)?,
    };
    bar.finish_and_clear();
    match args.format {
        Format::Json => {
            let json = serde_json::to_string_pretty(&report).map_err(|e| Failure::Usage(e.to_string()))?;
            println!("{json}");
        }
        Format::Csv => {
            println!("what,batched_s,one_by_one_s,speedup,paged_over_contiguous,cache_bytes,padded_bytes");
            for (what, serve) in [("serve", &report.serve), ("independent", &report.independent)] {
                let ServeReport { batched_s, one_by_one_s, speedup, paged_over_contiguous, .. } = serve;
                let [cache, padded] = [serve.cache_bytes, serve.padded_bytes];
                println!(
                    "{what},{batched_s},{one_by_one_s},{speedup},{paged_over_contiguous},{cache},{padded}"
                );
            }
        }
        Format::Table => print!("{}", table(&report)),
    }
    Ok(())
}

fn table(report: &Report) -> String {
    let Report { adapter, driver, spec, serve, independent, .. } = report;
    let mut text = format!(
        "{adapter}, {driver}\n{spec}\n\n{:60} {:>9} {:>12} {:>8} {:>8} {:>9} {:>9}\n",
        "", "at once", "one by one", "", "paged /", "cache", "padded"
    );
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    for s in [serve, independent] {
        text += &format!(
            "{:60} {:6.1} ms {:9.1} ms {:6.2} x {:8.2} {:5.0} MiB {:5.0} MiB\n",
            s.what,
            s.batched_s * 1e3,
            s.one_by_one_s * 1e3,
            s.speedup,
            s.paged_over_contiguous,
            mib(s.cache_bytes),
            mib(s.padded_bytes),
        );
    }
    text
}
