//! SmolLM2 in a terminal: a real model whose attention and KV cache are gqa's, and the rest Burn's.
//!
//! `cargo xtask model && cargo run --release -p gqa-burn --example smollm2 -- --prompt "What is the capital of France?"`

mod engine;
mod model;
mod tokenizer;
mod weights;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use clap::Parser;
use gqa_burn::{Dtype, WgpuSetup, gqa::wgpu};
use indicatif::{ProgressBar, ProgressStyle};

use engine::{Settings, Times};
use model::Model;
use tokenizer::Tokenizer;
use weights::{Gguf, Result};

/// Runs a language model of the Llama family from a GGUF file: SmolLM2-135M-Instruct, unless another is named.
#[derive(Debug, Parser)]
struct Arguments {
    /// The model. `cargo xtask model` fetches the default
    #[arg(default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/models/SmolLM2-135M-Instruct.Q4_1.gguf"))]
    model: PathBuf,
    /// A question; give it several times for several answers at once
    #[arg(long, short)]
    prompt: Vec<String>,
    /// A prompt as token ids, "1,4093,198", for comparing implementations
    #[arg(long, value_name = "IDS")]
    prompt_ids: Vec<String>,
    /// Print token ids instead of text
    #[arg(long)]
    print_ids: bool,
    /// Give prompts to the model as they are, without its chat template
    #[arg(long)]
    no_template: bool,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 128)]
    max_new: usize,
    /// 0 takes the likeliest token each time; 0.8 is lively
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// For --temperature
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How keys and values are stored: f32, f16, bf16, fp8, q8, q4
    #[arg(long, default_value = "f16", value_parser = dtype)]
    kv_dtype: Dtype,
    /// Rotate keys and values before they are stored (Hadamard, as in QuaRot): a third of the error of q8 and q4 goes
    #[arg(long)]
    rotate: bool,
    /// Keep them in pages of 16 slots
    #[arg(long)]
    paged: bool,
    /// Prompts that run at once; others wait until one ends
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Draft so many tokens from the text so far and verify them in one step: the same answer in fewer steps where text repeats
    #[arg(long, default_value_t = 0, value_name = "K")]
    speculate: usize,
    /// Print the perplexity of a text file's first tokens instead, beside that with f32 keys and values
    #[arg(long, value_name = "FILE")]
    perplexity: Option<PathBuf>,
    /// Tokens of that text
    #[arg(long, default_value_t = 1000)]
    tokens: usize,
    /// Part of the name of the adapter to run on; WGPU_ADAPTER_NAME does the same
    #[arg(long)]
    adapter: Option<String>,
}

fn main() -> std::process::ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.speculate > 0 && arguments.temperature > 0.0 {
        return Err("--speculate verifies the likeliest tokens: leave --temperature at 0".into());
    }
    let mut gguf = Gguf::open(&arguments.model)?;
    gguf.config()?;
    let tokenizer = Tokenizer::new(&gguf);
    let prompts = prompts(arguments, &tokenizer)?;
    let (device, setup) = open(arguments.adapter.as_deref())?;
    eprintln!("{} on {}", file_name(&arguments.model), setup.adapter.get_info().name);
    let start = Instant::now();
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template("{bar:40} layer {pos} of {len}")?);
    let model =
        Model::load(&mut gguf, (arguments.kv_dtype, arguments.rotate), (&device, &setup), |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
    bar.finish_and_clear();
    eprintln!("loaded in {:.1} s: {}", start.elapsed().as_secs_f64(), model.spec);
    let page = arguments.paged.then_some(16);
    if let Some(path) = &arguments.perplexity {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut ids = tokenizer?.ids(&text)?;
        ids.truncate(arguments.tokens);
        let found = engine::perplexity(&model, &setup, &ids, page)?;
        println!("perplexity {found:.4} over {} tokens", ids.len());
        let plain = model.spec.to_builder().kv_dtype(Dtype::F32).rotated(false).build()?;
        if model.spec != plain {
            let plain = engine::perplexity(&model.attending(plain, &setup)?, &setup, &ids, page)?;
            println!("with f32   {plain:.4}: {:+.3} %", (found / plain - 1.0) * 100.0);
        }
        return Ok(());
    }
    let settings = Settings {
        max_new: arguments.max_new,
        batch: arguments.batch,
        page,
        speculate: arguments.speculate,
        temperature: arguments.temperature,
        seed: arguments.seed,
        ends: tokenizer::ends(&gguf),
    };
    // One answer is told as it comes; of several each is told when it is whole.
    let alone = prompts.len() == 1 && !arguments.print_ids;
    let tokenizer = tokenizer.as_ref().ok();
    let mut told = Told::default();
    let (answers, times) = engine::answer(&model, &setup, &prompts, &settings, |_, new| {
        if let (true, Some(tokenizer)) = (alone, tokenizer) {
            told.tell(tokenizer, new);
        }
    })?;
    for answer in &answers {
        if arguments.print_ids || tokenizer.is_none() {
            let ids: Vec<_> = answer.new_tokens().iter().map(u32::to_string).collect();
            println!("{}", ids.join(","));
        } else if let (false, Some(tokenizer)) = (alone, tokenizer) {
            println!(
                "> {}\n{}\n",
                tokenizer.text(&answer.tokens[..answer.prompt])?.trim(),
                tokenizer.text(answer.new_tokens())?
            );
        }
    }
    if alone {
        println!();
    }
    eprintln!("{}", summary(&times));
    Ok(())
}

/// Token ids of all prompts.
fn prompts(arguments: &Arguments, tokenizer: &Result<Tokenizer>) -> Result<Vec<Vec<u32>>> {
    let mut prompts = Vec::new();
    for text in &arguments.prompt {
        let tokenizer = tokenizer.as_ref().map_err(ToString::to_string)?;
        let text = if arguments.no_template { text.clone() } else { tokenizer.chat(text)? };
        prompts.push(tokenizer.ids(&text)?);
    }
    for list in &arguments.prompt_ids {
        let ids =
            list.split([',', ' ']).filter(|id| !id.is_empty()).map(str::parse).collect::<Result<_, _>>();
        prompts.push(ids.map_err(|error| format!("--prompt-ids '{list}': {error}"))?);
    }
    if prompts.is_empty() && arguments.perplexity.is_none() {
        return Err(
            "nothing to answer: give --prompt \"...\", for example \"What is the capital of France?\"".into(),
        );
    }
    Ok(prompts)
}

/// The named adapter, or the best.
fn open(name: Option<&str>) -> Result<(Device, WgpuSetup)> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = gqa_burn::choose(&instance, name)?;
    Ok(gqa_burn::open(&instance, &adapter)?)
}

/// Text as it comes: bytes of one character may be in several tokens.
#[derive(Default)]
struct Told {
    tokens: Vec<u32>,
    bytes: usize,
}

impl Told {
    fn tell(&mut self, tokenizer: &Tokenizer, new: &[u32]) {
        self.tokens.extend(new);
        let Ok(text) = tokenizer.text(&self.tokens) else { return };
        // An unfinished character is shown when it is whole.
        let whole = text.trim_end_matches('\u{fffd}');
        if let Some(rest) = whole.get(self.bytes..) {
            print!("{rest}");
            let _ = std::io::stdout().flush();
            self.bytes = whole.len();
        }
    }
}

fn summary(times: &Times) -> String {
    let per_second = |(time, tokens): (std::time::Duration, usize)| match tokens {
        0 => "-".to_owned(),
        _ => format!("{:.1}", tokens as f64 / time.as_secs_f64().max(1e-9)),
    };
    let (prefill, decode) = (times.prefill, times.decode);
    let step = decode.0.as_secs_f64() / times.steps.max(1) as f64;
    let mut lines = format!(
        "prefill   {} tokens/s, {} tokens\ndecode    {} tokens/s, {} tokens in {} steps\n",
        per_second(prefill),
        prefill.1,
        per_second(decode),
        decode.1,
        times.steps
    );
    if times.steps > 0 {
        let attention = times.attention.as_secs_f64();
        lines += &format!(
            "attention {:.1} ms of {:.0} ms a step ({:.1} %)\n",
            attention * 1e3,
            step * 1e3,
            attention / step * 100.0
        );
    }
    lines + &times.cache
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A storage type by its name.
fn dtype(name: &str) -> Result<Dtype, String> {
    let known = || Dtype::ALL.map(Dtype::name).join(", ");
    Dtype::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| format!("one of {}", known()))
}
