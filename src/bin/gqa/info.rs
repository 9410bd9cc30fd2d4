//! `gqa info`: adapters, their caps, and the plan for a spec.

use gqa::verify::AdapterChoice;
use gqa::{AttentionSpec, Dtype, Options, Plan};

use crate::Failure;
use crate::adapter::AdapterArgs;

/// List adapters and what they can do; with --heads, the plan for that attention and its reasons
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    spec: SpecArgs,
}

/// An attention spec on the command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SpecArgs {
    /// Query heads / KV heads, e.g. 32/8
    #[arg(long, value_name = "Q/KV", value_parser = parse_heads)]
    pub(crate) heads: Option<(u32, u32)>,
    /// Elements of a query and key head
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) dim: u32,
    /// Elements of a value head [default: --dim]
    #[arg(long, value_name = "N")]
    pub(crate) v_dim: Option<u32>,
    /// Storage of queries and outputs: f32 or f16
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    pub(crate) dtype: Dtype,
    /// Storage of the KV cache: f32, f16 or bf16
    #[arg(long, value_name = "DTYPE", default_value = "f16")]
    pub(crate) kv_dtype: Dtype,
}

fn parse_heads(s: &str) -> Result<(u32, u32), String> {
    let parse = |x: &str| x.parse::<u32>().map_err(|e| format!("{x:?}: {e}"));
    let (q, kv) = s.split_once('/').ok_or("write query heads, a slash, KV heads: 32/8")?;
    Ok((parse(q)?, parse(kv)?))
}

impl SpecArgs {
    /// The spec with these heads.
    pub(crate) fn build(
        &self,
        (q_heads, kv_heads): (u32, u32),
        causal: bool,
    ) -> Result<AttentionSpec, Failure> {
        AttentionSpec::builder(q_heads, kv_heads, self.dim)
            .v_head_dim(self.v_dim.unwrap_or(self.dim))
            .q_dtype(self.dtype)
            .kv_dtype(self.kv_dtype)
            .causal(causal)
            .build()
            .map_err(|e| Failure::Usage(e.to_string()))
    }
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let spec = args.spec.heads.map(|heads| args.spec.build(heads, true)).transpose()?;
    let mut broken = None;
    let mut usable = 0;
    for (index, gpu) in args.adapter.open_indexed(AdapterChoice::All)? {
        let gpu = match gpu {
            Ok(gpu) => gpu,
            // One broken driver must not hide the others.
            Err(failure) => {
                println!("[{index}] {failure}\n");
                broken = Some(failure);
                continue;
            }
        };
        usable += 1;
        let info = &gpu.info;
        println!("[{index}] {} ({}, {:?})", info.name, info.backend, info.device_type);
        println!("    driver             {} {}", info.driver, info.driver_info);
        for line in gpu.caps.to_string().lines() {
            println!("    {line}");
        }
        if let Some(spec) = &spec {
            let plan =
                Plan::new(spec, &gpu.caps, &Options::default()).map_err(|e| Failure::Usage(e.to_string()))?;
            println!("  plan:");
            for line in plan.to_string().lines() {
                println!("    {line}");
            }
        }
        println!();
    }
    match broken {
        Some(failure) if usable == 0 => Err(failure),
        _ => Ok(()),
    }
}
