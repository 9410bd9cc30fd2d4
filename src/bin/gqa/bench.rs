//! `gqa bench`: verifies, measures the adapter's ceilings, then every kernel as a fraction of the nearer one.

use gqa::profile::{Sampler, Shape, Workload, measure_ceilings};
use gqa::{Family, Options};

use crate::Failure;
use crate::adapter::AdapterArgs;
use crate::info::SpecArgs;

/// Verify the kernels, measure the adapter's ceilings, then time decode and prefill against them
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    spec: SpecArgs,
    #[arg(long)]
    q_len: Option<u32>,
    #[arg(long)]
    kv_len: Option<u32>,
    #[arg(long)]
    batch: Option<u32>,
    #[arg(long)]
    chunk: Option<u32>,
    #[arg(long)]
    portable: bool,
    #[arg(long)]
    no_ceilings: bool,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let gpu = args.adapter.open_one()?;
    let c = if args.no_ceilings { gqa::profile::Ceilings { read_bytes_per_s: 4.2e9, fma_flops_per_s: 96e9 } } else { measure_ceilings(&gpu).map_err(Failure::Adapter)? };
    println!("{c:?}");
    let heads = match args.spec.heads { Some(h) => vec![h], None => vec![(32, 32), (32, 8), (32, 1)] };
    for h in heads {
        let spec = args.spec.build(h, true)?;
        let shape = Shape { spec, q_len: args.q_len.unwrap_or(1), kv_len: args.kv_len.unwrap_or(4096), batch: args.batch.unwrap_or(1) };
        let family = if args.portable { Family::Portable } else { Family::Auto };
        let w = Workload::new(&gpu, &shape, Options { family, chunk: args.chunk, ..Default::default() }).map_err(|e| Failure::Usage(e.to_string()))?;
        let t = std::time::Instant::now();
        let mut s = Sampler::new(&gpu, Box::new(|e| w.record(e)), 0.05).map_err(Failure::Adapter)?;
        let warm = t.elapsed();
        for _ in 0..9 { s.sample().map_err(Failure::Adapter)?; }
        let r = w.row(s.result(), &c);
        println!("{:20} {}/{} q {} kv {} median {:.3} ms min {:.3} ms {:.2} GB/s {:.1} GFLOP/s {} {:.0}%  warm {warm:?}", r.kernel, r.q_heads, r.kv_heads, r.q_len, r.kv_len, r.median_s*1e3, r.min_s*1e3, r.bytes as f64/r.median_s*1e-9, r.flops as f64/r.median_s*1e-9, r.ceiling, r.fraction*100.0);
    }
    Ok(())
}
