//! Uptraining, as in the GQA paper (arXiv 2305.13245): MiniLM's twelve K/V heads become four, and one, by pooling; then the model learns to
//! give its old embeddings again. Forward and back run through gqa's kernels, in Burn.
//!
//! `cargo xtask uptrain`

mod bert;
mod decode;
mod picture;
mod quality;
mod text;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use burn::module::Module as _;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use clap::Parser;
use gqa_burn::gqa::{uptrain::Pooling, wgpu};
use gqa_burn::{GqaAttention, WgpuSetup};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use bert::{Checkpoint, Embeddings, Encoder, pooled};
use decode::Decode;
use quality::Quality;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// The ways to pool that are compared.
pub(crate) const POOLINGS: [(&str, Pooling); 3] =
    [("mean", Pooling::Mean), ("first", Pooling::First), ("random", Pooling::Random { seed: 1 })];
/// Kept in memory for one evaluation, in sentences.
const EVALUATED: usize = 40;
/// Steps before the learning rate is whole.
const WARM_UP: usize = 10;

/// Converts MiniLM to fewer K/V heads and trains it to be as before: a table and a picture.
#[derive(Debug, Parser)]
struct Arguments {
    /// A folder with config.json, model.safetensors and tokenizer.json of a BERT. `cargo xtask uptrain` fetches the default
    #[arg(default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/models/minilm"))]
    model: PathBuf,
    /// K/V heads to convert to
    #[arg(long, value_delimiter = ',', default_value = "4,1")]
    kv_heads: Vec<usize>,
    /// Ways to pool: mean, first, random
    #[arg(long, value_delimiter = ',', default_value = "mean,first,random", value_parser = pooling)]
    pooling: Vec<(&'static str, Pooling)>,
    /// Steps of training
    #[arg(long, default_value_t = 36)]
    steps: usize,
    /// Sentences of a step
    #[arg(long, default_value_t = 10)]
    sentences: usize,
    /// Steps between two evaluations
    #[arg(long, default_value_t = 12)]
    every: usize,
    /// Highest learning rate of AdamW
    #[arg(long, default_value_t = 1e-3)]
    rate: f64,
    /// Where the picture goes
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/uptrain.svg"))]
    svg: PathBuf,
    /// Write all numbers here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Part of the name of the adapter to run on; WGPU_ADAPTER_NAME does the same
    #[arg(long)]
    adapter: Option<String>,
}

/// One way to convert, and what came of it.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) kv_heads: usize,
    pub(crate) pooling: &'static str,
    /// After so many steps.
    pub(crate) points: Vec<(usize, Quality)>,
}

/// All that was found.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) runs: Vec<Run>,
    /// By K/V heads, the original's first.
    pub(crate) decodes: Vec<(usize, Decode)>,
}

/// A batch, and what the original makes of it.
struct Example {
    x: Tensor<2>,
    lengths: Vec<u32>,
    hidden: Vec<Tensor<2>>,
}

struct Trainer<'a> {
    arguments: &'a Arguments,
    checkpoint: Checkpoint,
    embeddings: Embeddings,
    setup: WgpuSetup,
    device: Device,
    bar: ProgressBar,
}

impl Run {
    pub(crate) fn name(&self) -> String {
        format!("{} K/V head{}, {}", self.kv_heads, if self.kv_heads == 1 { "" } else { "s" }, self.pooling)
    }

    pub(crate) fn last(&self) -> Quality {
        self.points.last().map_or(Quality { cosine: f64::NAN, rank: f64::NAN }, |(_, quality)| *quality)
    }
}

/// One of [`POOLINGS`].
fn pooling(name: &str) -> Result<(&'static str, Pooling), String> {
    POOLINGS.into_iter().find(|(known, _)| *known == name).ok_or_else(|| "mean, first or random".to_owned())
}

fn main() -> std::process::ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let config = checkpoint.config;
    for kv_heads in &arguments.kv_heads {
        config.spec(*kv_heads)?;
    }
    if arguments.steps == 0 || arguments.sentences == 0 || arguments.every == 0 {
        return Err("--steps, --sentences and --every are at least 1".into());
    }
    let training = text::tokenize(&arguments.model, text::TRAINING)?;
    let held_out = text::tokenize(&arguments.model, text::HELD_OUT)?;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = gqa_burn::choose(&instance, arguments.adapter.as_deref())?;
    let (device, setup) = gqa_burn::open(&instance, &adapter)?;
    let info = adapter.get_info();
    eprintln!(
        "{} ({}), {} steps of {} sentences",
        info.name, info.backend, arguments.steps, arguments.sentences
    );
    let embeddings = checkpoint.embeddings(&device)?;
    let bar = progress();
    let trainer = Trainer { arguments, checkpoint, embeddings, setup, device, bar: bar.clone() };
    bar.set_length(trainer.length(held_out.len()));

    let decode = |kv_heads: &usize| Ok((*kv_heads, decode::measure(&config, *kv_heads, &trainer.setup)?));
    let kinds: Vec<_> = std::iter::once(&config.heads).chain(&arguments.kv_heads).collect();
    bar.set_message("decoding");
    let decodes = kinds.into_iter().map(decode).collect::<Result<Vec<_>>>()?;
    let (attention, original) = trainer.original()?;
    bar.set_message("the original");
    let expected = trainer.embed(&original, &attention, &held_out)?;
    let examples = trainer.examples(&original, &attention, &training)?;
    let mut runs = Vec::new();
    for kv_heads in &arguments.kv_heads {
        let attention = config.attention(*kv_heads, &trainer.setup)?;
        for (name, pooling) in arguments.pooling.iter().copied() {
            let mut run = Run { kv_heads: *kv_heads, pooling: name, points: Vec::new() };
            bar.set_message(run.name());
            let encoder =
                trainer.checkpoint.encoder(*kv_heads, pooling, &trainer.device.clone().autodiff())?;
            trainer.train(encoder, &attention, &examples, |step, encoder| {
                let found = trainer.embed(encoder, &attention, &held_out)?;
                let quality = quality::compare(&found, &expected);
                let (name, Quality { cosine, rank }) = (run.name(), quality);
                // Where nobody looks at a bar, too.
                bar.suspend(|| {
                    eprintln!("{name:24} step {step:4}: cosine {cosine:.3}, rank correlation {rank:.3}")
                });
                run.points.push((step, quality));
                Ok(())
            })?;
            runs.push(run);
        }
    }
    bar.finish_and_clear();
    let report = Report { runs, decodes };
    println!("{}", table(&report, config.heads));
    picture::draw(&report, &arguments.svg)?;
    eprintln!("The picture: {}", arguments.svg.display());
    if let Some(path) = &arguments.json {
        std::fs::write(path, format!("{:#}\n", machine(&report)))?;
    }
    eprintln!("{:.1} minutes", start.elapsed().as_secs_f64() / 60.0);
    Ok(())
}

impl Trainer<'_> {
    /// Steps of the progress bar: batches that go forward, those of training too.
    fn length(&self, held_out: usize) -> u64 {
        let Arguments { steps, every, kv_heads, pooling, .. } = self.arguments;
        let evaluation = held_out.div_ceil(EVALUATED);
        let evaluations = 1 + steps.div_ceil(*every);
        (evaluation + steps + kv_heads.len() * pooling.len() * (steps + evaluations * evaluation)) as u64
    }

    fn original(&self) -> Result<(Arc<GqaAttention>, Encoder)> {
        let heads = self.checkpoint.config.heads;
        let encoder = self.checkpoint.encoder(heads, Pooling::Mean, &self.device)?;
        Ok((self.checkpoint.config.attention(heads, &self.setup)?, encoder))
    }

    /// Embeddings of sentences: means of their last hidden states, of length 1.
    fn embed(
        &self,
        encoder: &Encoder,
        attention: &Arc<GqaAttention>,
        texts: &[Vec<u32>],
    ) -> Result<Vec<Vec<f32>>> {
        let mut embeddings = Vec::new();
        for texts in texts.chunks(EVALUATED) {
            let lengths = text::lengths(texts);
            let hidden =
                encoder.forward(attention, self.embeddings.forward(texts, &self.device), &lengths)?;
            let last = hidden.into_iter().next_back().ok_or("the model has no layers")?;
            let rows =
                pooled(last, &lengths).into_data().try_to_vec::<f32>().map_err(|e| format!("{e:?}"))?;
            embeddings.extend(rows.chunks(self.checkpoint.config.width).map(<[f32]>::to_vec));
            self.bar.inc(1);
        }
        Ok(embeddings)
    }

    /// Batches with the original's hidden states: made once, for all that train.
    fn examples(
        &self,
        original: &Encoder,
        attention: &Arc<GqaAttention>,
        texts: &[Vec<u32>],
    ) -> Result<Vec<Example>> {
        let Arguments { steps, sentences, .. } = *self.arguments;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        fastrand::Rng::with_seed(1).shuffle(&mut order);
        let mut order = order.into_iter().cycle();
        let mut examples = Vec::new();
        for _ in 0..steps {
            let texts: Vec<_> = order.by_ref().take(sentences).map(|nth| texts[nth].clone()).collect();
            let (x, lengths) = (self.embeddings.forward(&texts, &self.device), text::lengths(&texts));
            let hidden = original.forward(attention, x.clone(), &lengths)?;
            examples.push(Example { x, lengths, hidden });
            self.bar.inc(1);
        }
        Ok(examples)
    }

    /// Trains on each example once, and calls `evaluate` before, every so often, and behind.
    fn train(
        &self,
        mut encoder: Encoder,
        attention: &Arc<GqaAttention>,
        examples: &[Example],
        mut evaluate: impl FnMut(usize, &Encoder) -> Result<()>,
    ) -> Result<()> {
        let mut optimizer = AdamWConfig::new().init();
        for (step, example) in examples.iter().enumerate() {
            if step % self.arguments.every == 0 {
                evaluate(step, &encoder.valid())?;
            }
            let hidden = encoder.forward(attention, example.x.clone().autodiff(), &example.lengths)?;
            let gradients = loss(&hidden, example)?.backward();
            let gradients = GradientsParams::from_grads(gradients, &encoder);
            let warm = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
            let left = 1.0 - step as f64 / examples.len() as f64;
            encoder = optimizer.step(self.arguments.rate * warm * left, encoder, gradients);
            self.bar.inc(1);
        }
        evaluate(examples.len(), &encoder.valid())
    }
}

/// How far hidden states are from the original's, relative to how large those are, on average over layers; and 1 less the cosine of embeddings.
fn loss(hidden: &[Tensor<2>], example: &Example) -> Result<Tensor<1>> {
    let (Some(found), Some(expected)) = (hidden.last(), example.hidden.last()) else {
        return Err("the model has no layers".into());
    };
    let [found, expected] = [found.clone(), expected.clone().autodiff()].map(|x| pooled(x, &example.lengths));
    let mut loss = (found * expected).sum_dim(1).mean().neg() + 1.0;
    for (found, expected) in hidden.iter().zip(&example.hidden) {
        let expected = expected.clone().autodiff();
        let far = (found.clone() - expected.clone()).square().mean() / expected.square().mean();
        loss = loss + far / hidden.len() as f64;
    }
    Ok(loss)
}

fn progress() -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed:>4} {bar:30} {percent:>3} %, {eta} left: {msg}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// For a README: what pooling alone leaves, what training gives back, and what it is for.
fn table(report: &Report, heads: usize) -> String {
    let mut lines = vec![
        format!(
            "| K/V heads | pooling | cosine, pooled | trained | rank correlation, pooled | trained | decode at {}, ms | cache, bytes a token |",
            decode::CONTEXT
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- |".to_owned(),
    ];
    for (kv_heads, decode) in &report.decodes {
        let cost = format!("{:.2} | {} |", decode.milliseconds, decode.bytes_per_token);
        if *kv_heads == heads {
            lines.push(format!("| {heads} | (the original) | 1 | | 1 | | {cost}"));
        }
        for run in report.runs.iter().filter(|run| run.kv_heads == *kv_heads) {
            let (Some((_, first)), last) = (run.points.first(), run.last()) else { continue };
            lines.push(format!(
                "| {kv_heads} | {} | {:.3} | {:.3} | {:.3} | {:.3} | {cost}",
                run.pooling, first.cosine, last.cosine, first.rank, last.rank
            ));
        }
    }
    lines.join("\n")
}

/// The same, whole.
fn machine(report: &Report) -> serde_json::Value {
    let run = |run: &Run| {
        let point =
            |(step, q): &(usize, Quality)| json!({ "step": step, "cosine": q.cosine, "rank": q.rank });
        let points: Vec<_> = run.points.iter().map(point).collect();
        json!({ "kv_heads": run.kv_heads, "pooling": run.pooling, "points": points })
    };
    let decode = |(kv_heads, decode): &(usize, Decode)| {
        json!({
            "kv_heads": kv_heads, "context": decode::CONTEXT, "milliseconds": decode.milliseconds,
            "bytes_per_token": decode.bytes_per_token,
        })
    };
    let runs: Vec<_> = report.runs.iter().map(run).collect();
    let decodes: Vec<_> = report.decodes.iter().map(decode).collect();
    json!({ "runs": runs, "decodes": decodes })
}
