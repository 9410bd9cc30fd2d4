//! `gqa bench --serve`: a server's mixed batch, at once and sequence by sequence.

use gqa::profile::{ServeReport, ServeShape, serve};
use gqa::verify::Gpu;
use indicatif::ProgressBar;

use super::{Args, Format, verify};
use crate::Failure;

/// What one run has found.
#[derive(Debug, serde::Serialize)]
struct Report {
    adapter: String,
    driver: String,
    version: &'static str,
    spec: String,
    serve: ServeReport,
}

/// Heads that are measured where none are asked for: those of SmolLM2, whose decodes are short enough to be many.
const HEADS: ((u32, u32), u32) = ((9, 3), 64);

pub(super) fn main(gpu: &Gpu, args: &Args) -> Result<(), Failure> {
    let spec = match args.spec.heads {
        Some(heads) => args.spec.build(heads, true)?,
        None => crate::info::SpecArgs { dim: HEADS.1, ..args.spec.clone() }.build(HEADS.0, true)?,
    };
    let shape = ServeShape { page: args.page, ..ServeShape::mixed(spec.clone(), args.answers) };
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    bar.set_message("verifying");
    verify(gpu, &spec)?;
    bar.set_message(format!("serving {} times in three manners", args.samples + 1));
    let result = serve(gpu, &shape, args.samples);
    bar.finish_and_clear();
    let report = Report {
        adapter: gpu.name(),
        driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info),
        version: env!("CARGO_PKG_VERSION"),
        spec: spec.to_string(),
        serve: result.map_err(Failure::Usage)?,
    };
    match args.format {
        Format::Json => {
            let json = serde_json::to_string_pretty(&report).map_err(|e| Failure::Usage(e.to_string()))?;
            println!("{json}");
        }
        Format::Csv => {
            let ServeReport { batched_s, one_by_one_s, speedup, paged_over_contiguous, .. } = report.serve;
            println!("batched_s,one_by_one_s,speedup,paged_over_contiguous,cache_bytes,padded_bytes");
            let [cache, padded] = [report.serve.cache_bytes, report.serve.padded_bytes];
            println!("{batched_s},{one_by_one_s},{speedup},{paged_over_contiguous},{cache},{padded}");
        }
        Format::Table => print!("{}", table(&report)),
    }
    Ok(())
}

fn table(report: &Report) -> String {
    let Report { adapter, driver, spec, serve, .. } = report;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    format!(
        "{adapter}, {driver}\n{spec}\n{}\n\
         at once              {:9.2} ms\n\
         sequence by sequence {:9.2} ms   {:.2} x\n\
         pages / contiguous   {:9.3}\n\
         cache in pages       {:9.1} MiB\n\
         padded to longest    {:9.1} MiB   {:.1} x\n",
        serve.what,
        serve.batched_s * 1e3,
        serve.one_by_one_s * 1e3,
        serve.speedup,
        serve.paged_over_contiguous,
        mib(serve.cache_bytes),
        mib(serve.padded_bytes),
        serve.padded_bytes as f64 / serve.cache_bytes as f64,
    )
}
