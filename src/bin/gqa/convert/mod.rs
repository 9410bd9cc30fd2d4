//! `gqa convert`: a checkpoint with fewer KV heads.

mod checkpoint;
mod config;
mod method;
mod names;
mod write;

use std::fmt::Display;
use std::io::Read;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use crate::Failure;
use checkpoint::{CONFIG, Checkpoint, INDEX};
use config::Config;
use method::Methods;
use write::{Output, Plan, rewritten_index};

/// Largest JSON file that is read.
const MAX_TEXT: u64 = 100_000_000;

/// Give a checkpoint fewer KV heads: MHA becomes GQA or MQA, and GQA has fewer groups
///
/// Pools neighbouring heads of the key and value projections, as "GQA: Training Generalized Multi-Query Transformer Models" (Ainslie
/// et al. 2023) does. The new model needs some more training (the paper: 5 % of the original steps) before it is as good as the old one.
///
/// IN is a directory as Hugging Face has them: config.json, and model.safetensors or shards with model.safetensors.index.json. Known
/// are llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe, gemma, gemma2, gemma3_text, phi3, gpt_neox and bert. Projections in F32,
/// F16 or BF16 keep their type, all other tensors are copied as they are, and so are other files, but weights in other formats and folders.
///
/// num_key_value_heads is written into config.json, also for bert and gpt_neox, whose code in transformers does not know it: such a
/// model needs code of its own. The fused projection of gpt_neox has, for each KV head, the query heads of its group, its key and its
/// value, which is its old layout where a group is one head, and that of Falcon's "new decoder architecture".
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// KV heads of the new model; divides those of the old one
    #[arg(long, value_name = "N")]
    kv_heads: usize,
    /// mean, first or random (normal numbers with the deviation of the old ones), or a JSON file with a method for each layer:
    /// {"default": "mean", "0": "first"}, where layers count from 0 and the default is mean
    #[arg(long, value_name = "METHOD", default_value = "mean")]
    method: String,
    /// Seed of random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Directory of the checkpoint
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Directory of the new checkpoint; it must not exist, and appears when it is complete
    #[arg(value_name = "OUT")]
    output: PathBuf,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let Args { kv_heads, input, output, .. } = args;
    if !std::fs::metadata(input).map_err(|e| failed(input, &e))?.is_dir() {
        return Err(failed(input, &"not a directory"));
    }
    let config = Config::read(&input.join(CONFIG))?;
    config.check(*kv_heads)?;
    let methods = Methods::read(&args.method, args.seed, config.layers)?;
    let checkpoint = Checkpoint::open(input)?;
    let plan = Plan::new(&config, *kv_heads, &checkpoint.shards)?;

    let out = Output::create(output, input)?;
    let bar = ProgressBar::new(plan.bytes());
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {bytes}/{total_bytes} {elapsed} {msg}")
    {
        bar.set_style(style);
    }
    bar.set_prefix("convert");
    for shard in &plan.shards {
        bar.set_message(shard.name.to_owned());
        shard.write(out.path(), &methods, &bar)?;
    }
    if let Some(index) = &checkpoint.index {
        write_text(&out.path().join(INDEX), &rewritten_index(index, &plan))?;
    }
    write_text(&out.path().join(CONFIG), &config.rewritten(*kv_heads))?;
    for name in &checkpoint.others {
        let from = input.join(name);
        std::fs::copy(&from, out.path().join(name)).map_err(|e| failed(&from, &e))?;
    }
    out.finish()?;
    bar.finish_and_clear();
    summarise(args, &config, plan.parameters());
    if !checkpoint.left_out.is_empty() {
        println!("left out: {}", checkpoint.left_out.join(", "));
    }
    Ok(())
}

fn summarise(args: &Args, config: &Config, [before, after]: [u64; 2]) {
    let row =
        |what, before: &dyn Display, after: &dyn Display| println!("{what:<34} {before:>15} {after:>15}");
    row("", &"before", &"after");
    row("query heads / KV heads", &heads(config, config.kv_heads), &heads(config, args.kv_heads));
    let bytes = |kv_heads| config.cache_bytes(kv_heads);
    row("K/V cache in f16, bytes per token", &bytes(config.kv_heads), &bytes(args.kv_heads));
    row("parameters", &before, &after);
}

fn heads(config: &Config, kv_heads: usize) -> String {
    format!("{}/{kv_heads}", config.q_heads)
}

fn bad(message: impl Into<String>) -> Failure {
    Failure::Usage(message.into())
}

/// A failure at a file.
fn failed(path: &Path, why: &(impl Display + ?Sized)) -> Failure {
    bad(format!("{}: {why}", path.display()))
}

/// The text of a file that is no larger than a JSON file can honestly be.
fn read_text(path: &Path) -> Result<String, Failure> {
    // Opening a pipe would wait forever.
    if !std::fs::metadata(path).map_err(|e| failed(path, &e))?.is_file() {
        return Err(failed(path, "not a file"));
    }
    let file = std::fs::File::open(path).map_err(|e| failed(path, &e))?;
    let mut text = String::new();
    file.take(MAX_TEXT + 1).read_to_string(&mut text).map_err(|e| failed(path, &e))?;
    if text.len() as u64 > MAX_TEXT {
        return Err(failed(path, &format!("more than {MAX_TEXT} bytes")));
    }
    Ok(text)
}

fn write_text(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|e| failed(path, &e))
}
