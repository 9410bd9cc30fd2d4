//! `gqa info`: adapters, their caps, and the plan for a spec.

use gqa::verify::{AdapterChoice, lacking};
use gqa::{AttentionSpec, Dtype, Mask, Options, Plan, Rope, alibi_slopes};

use crate::Failure;
use crate::adapter::AdapterArgs;

/// List adapters and what they can do; with --heads, the plan for that attention and its reasons
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    spec: SpecArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl Args {
    /// The spec that is asked about, if one is.
    fn spec(&self) -> Result<Option<AttentionSpec>, Failure> {
        let Some(heads) = self.spec.heads else {
            return match self.asks_for_kernels() {
                true => Err(Failure::Usage("say of how many heads, e.g. --heads 32/8".to_owned())),
                false => Ok(None),
            };
        };
        let ModelArgs { sinks, qk_norm, mask } = self.model;
        let builder = self.spec.build(heads, true)?.to_builder().sinks(sinks).mask(mask);
        let builder = if qk_norm { builder.qk_norm(1e-6) } else { builder };
        builder.build().map(Some).map_err(|e| Failure::Usage(e.to_string()))
    }

    /// Whether anything is said that only kernels depend on.
    fn asks_for_kernels(&self) -> bool {
        let SpecArgs {
            dim,
            v_dim,
            dtype,
            kv_dtype,
            v_dtype,
            rotate,
            window,
            softcap,
            alibi,
            rope,
            v_in_k,
            ..
        } = self.spec;
        let ModelArgs { sinks, qk_norm, mask } = self.model;
        let flags = [rotate, alibi, v_in_k, sinks, qk_norm, mask != Mask::None];
        let values =
            [v_dim.is_some(), v_dtype.is_some(), window.is_some(), softcap.is_some(), rope.is_some()];
        let others = (dim, dtype, kv_dtype) != (128, Dtype::F32, Dtype::F16);
        others || flags.into_iter().chain(values).any(|given| given)
    }
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
    /// Storage of the KV cache: f32, f16, bf16, fp8, q8 or q4
    #[arg(long, value_name = "DTYPE", default_value = "f16")]
    pub(crate) kv_dtype: Dtype,
    /// Storage of values, where it differs from that of keys
    #[arg(long, value_name = "DTYPE")]
    pub(crate) v_dtype: Option<Dtype>,
    /// Rotate keys and values before they are stored, against the error of few bits
    #[arg(long)]
    pub(crate) rotate: bool,
    /// Keys before its own that a query sees: one less than a model's sliding window, which counts its own (4096: 4095)
    #[arg(long, value_name = "KEYS")]
    pub(crate) window: Option<u32>,
    /// Bend logits to at most this
    #[arg(long, value_name = "CAP")]
    pub(crate) softcap: Option<f32>,
    /// ALiBi with the slopes of its paper
    #[arg(long)]
    pub(crate) alibi: bool,
    /// Turn queries and keys (RoPE, half pairing), with this base
    #[arg(long, value_name = "THETA")]
    pub(crate) rope: Option<f64>,
    /// Values are the first --v-dim elements of the keys (absorbed MLA)
    #[arg(long, requires = "v_dim")]
    pub(crate) v_in_k: bool,
}

/// What needs data of a model, beyond queries, keys and values.
#[derive(Debug, Clone, clap::Args)]
struct ModelArgs {
    /// A logit without a value for each query head
    #[arg(long)]
    sinks: bool,
    /// Normalise queries and keys
    #[arg(long)]
    qk_norm: bool,
    /// A mask that is data: tree, keep or add
    #[arg(long, value_name = "KIND", value_parser = parse_mask, default_value = "none")]
    mask: Mask,
}

fn parse_mask(s: &str) -> Result<Mask, String> {
    match s {
        "none" => Ok(Mask::None),
        "tree" => Ok(Mask::Tree),
        "keep" => Ok(Mask::Keep),
        "add" => Ok(Mask::Add),
        _ => Err("a mask is none, tree, keep or add".to_owned()),
    }
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
        let v_dim = self.v_dim.unwrap_or(self.dim);
        let builder = AttentionSpec::builder(q_heads, kv_heads, self.dim);
        let builder = if self.v_in_k { builder.v_in_k(v_dim) } else { builder.v_head_dim(v_dim) };
        let mut builder = builder
            .q_dtype(self.dtype)
            .kv_dtype(self.kv_dtype)
            .v_dtype(self.v_dtype.unwrap_or(self.kv_dtype))
            .rotated(self.rotate)
            .causal(causal)
            .window(self.window, None);
        if let Some(cap) = self.softcap {
            builder = builder.softcap(cap);
        }
        if self.alibi {
            builder = builder.alibi(&alibi_slopes(q_heads));
        }
        if let Some(theta) = self.rope {
            builder = builder.rope(Rope { theta, ..Rope::new(self.dim) });
        }
        builder.build().map_err(|e| Failure::Usage(e.to_string()))
    }
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let spec = args.spec()?;
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
    for adapter in lacking() {
        println!("left out: {adapter}");
    }
    match broken {
        Some(failure) if usable == 0 => Err(failure),
        _ => Ok(()),
    }
}
