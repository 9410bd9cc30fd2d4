//! Continuous batching: sequences join when there is room and leave when they end; each step prefills, decodes and verifies drafts.

use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use gqa_burn::{CacheShape, KvCache, PagedShape, Sequence, SequenceId, WgpuSetup};

use crate::model::Model;
use crate::weights::Result;

/// How answers are made.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Most tokens of an answer.
    pub(crate) max_new: usize,
    /// Sequences that run at once.
    pub(crate) batch: usize,
    /// Slots of a page, where the cache is paged.
    pub(crate) page: Option<u32>,
    /// Tokens drafted from the text so far and verified in one step; 0 for none.
    pub(crate) speculate: usize,
    /// 0 takes the likeliest token; otherwise logits are divided by it and one is drawn.
    pub(crate) temperature: f32,
    /// For drawing.
    pub(crate) seed: u64,
    /// Any of them ends an answer.
    pub(crate) ends: Vec<u32>,
}

/// A prompt and its answer so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    /// Prompt and answer.
    pub(crate) tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub(crate) prompt: usize,
    /// Forward calls that had a part in the answer.
    pub(crate) steps: usize,
}

impl Answer {
    /// Tokens of the answer.
    pub(crate) fn new_tokens(&self) -> &[u32] {
        &self.tokens[self.prompt..]
    }
}

/// How long it took.
#[derive(Debug, Clone, Default)]
pub(crate) struct Times {
    /// Forward calls that prefilled, and their tokens.
    pub(crate) prefill: (Duration, usize),
    /// All others, and the tokens that they gave.
    pub(crate) decode: (Duration, usize),
    /// Forward calls of the second kind.
    pub(crate) steps: usize,
    /// What the cache says of itself when the first answer ends.
    pub(crate) cache: String,
    /// Attention alone, over all layers, of the sequences that run when the first answer ends.
    pub(crate) attention: Duration,
}

/// A sequence that is running.
struct Running {
    prompt: usize,
    id: SequenceId,
    /// Tokens of the answer that the cache has not seen: the whole prompt, then one.
    unseen: usize,
    draft: Vec<u32>,
}

/// A cache for `sequences` of at most `longest` tokens.
pub(crate) fn cache(
    model: &Model,
    setup: &WgpuSetup,
    (sequences, longest): (u32, u32),
    page: Option<u32>,
) -> Result<KvCache> {
    let layers = model.config.layers;
    let (device, spec) = (&setup.device, &model.spec);
    Ok(match page {
        None => {
            KvCache::new(device, spec, CacheShape { layers: layers as u32, sequences, capacity: longest })?
        }
        Some(page) => {
            let tokens = sequences * longest.next_multiple_of(page);
            KvCache::paged(
                device,
                &vec![spec; layers],
                PagedShape { sequences, page, tokens, longest_step: longest },
            )?
        }
    })
}

/// Answers all `prompts`, calling `said` with the number of the prompt and its new tokens as they come.
pub(crate) fn answer(
    model: &Model,
    setup: &WgpuSetup,
    prompts: &[Vec<u32>],
    settings: &Settings,
    mut said: impl FnMut(usize, &[u32]),
) -> Result<(Vec<Answer>, Times)> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0).saturating_add(settings.max_new);
    check_context(model, longest)?;
    if prompts.iter().any(Vec::is_empty) {
        return Err("a prompt is empty".into());
    }
    let batch = settings.batch.clamp(1, prompts.len().max(1));
    let mut cache = cache(model, setup, (batch as u32, longest as u32), settings.page)?;
    let mut answers: Vec<_> =
        prompts.iter().map(|p| Answer { tokens: p.clone(), prompt: p.len(), steps: 0 }).collect();
    let mut times = Times::default();
    let mut random = fastrand::Rng::with_seed(settings.seed);
    let mut waiting = 0..prompts.len();
    let mut running: Vec<Running> = Vec::new();
    loop {
        while running.len() < batch
            && let Some(prompt) = waiting.next()
        {
            let unseen = prompts[prompt].len();
            running.push(Running { prompt, id: cache.open()?, unseen, draft: Vec::new() });
        }
        if running.is_empty() {
            return Ok((answers, times));
        }
        let start = Instant::now();
        let (mut tokens, mut rows, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
        for one in &mut running {
            let text = &answers[one.prompt].tokens;
            // A draft beyond the last wanted token is of no use.
            let wanted = (settings.max_new - answers[one.prompt].new_tokens().len()).saturating_sub(1);
            one.draft = match one.unseen {
                1 => draft(text, settings.speculate.min(wanted)),
                _ => Vec::new(),
            };
            tokens.extend(&text[text.len() - one.unseen..]);
            rows.extend(tokens.len() - 1..tokens.len() + one.draft.len());
            tokens.extend(&one.draft);
            sequences.push(Sequence::new(one.id, (one.unseen + one.draft.len()) as u32));
        }
        let logits = numbers(model.forward(&mut cache, &sequences, &tokens, &rows)?)?;
        let mut logits = logits.chunks_exact(model.config.vocabulary);
        let prefills = running.iter().any(|one| one.unseen > 1);
        let mut given = 0;
        for one in &mut running {
            let answer = &mut answers[one.prompt];
            answer.steps += 1;
            let seen = answer.tokens.len();
            // Each row tells what follows the token before it: drafts are right as long as they say the same.
            let drafts = std::mem::take(&mut one.draft);
            let mut right = true;
            for (nth, row) in logits.by_ref().take(drafts.len() + 1).enumerate() {
                if !right || ended(answer, settings) {
                    continue;
                }
                let next = pick(row, settings.temperature, &mut random);
                answer.tokens.push(next);
                right = drafts.get(nth) == Some(&next);
            }
            let new = &answer.tokens[seen..];
            given += new.len();
            // What was drafted and not said goes; the last token has not been seen yet.
            cache.truncate(one.id, (answer.tokens.len() - 1) as u32)?;
            one.unseen = 1;
            said(one.prompt, new);
        }
        let took = start.elapsed();
        match prefills {
            true => times.prefill = (times.prefill.0 + took, times.prefill.1 + tokens.len()),
            false => {
                times.decode = (times.decode.0 + took, times.decode.1 + given);
                times.steps += 1;
            }
        }
        let leaving = running.iter().any(|one| ended(&answers[one.prompt], settings));
        if leaving && times.attention.is_zero() {
            let mebibytes = cache.size() as f64 / f64::from(1 << 20);
            times.cache = format!("KV cache  {mebibytes:.1} MiB, {}", cache.usage());
            times.attention = attention_alone(model, &mut cache, &running)?;
        }
        for one in running.iter().filter(|one| ended(&answers[one.prompt], settings)) {
            cache.close(one.id)?;
        }
        running.retain(|one| !ended(&answers[one.prompt], settings));
    }
}

fn check_context(model: &Model, tokens: usize) -> Result<()> {
    let context = model.config.context;
    match tokens <= context {
        true => Ok(()),
        false => {
            Err(format!("the text needs {tokens} tokens, and the model was trained for {context}").into())
        }
    }
}

fn ended(answer: &Answer, settings: &Settings) -> bool {
    let new = answer.new_tokens();
    new.len() >= settings.max_new || new.last().is_some_and(|last| settings.ends.contains(last))
}

/// What followed the last time the text ended as it does now: prompt lookup (Saxena 2023). The longest ending of up to three tokens
/// that came before, and its latest place, wins.
pub(crate) fn draft(text: &[u32], most: usize) -> Vec<u32> {
    for len in (1..=3.min(text.len().saturating_sub(1))).rev() {
        let (before, ending) = (&text[..text.len() - 1], &text[text.len() - len..]);
        if let Some(at) = before.windows(len).rposition(|words| words == ending) {
            return text[at + len..].iter().copied().take(most).collect();
        }
    }
    Vec::new()
}

fn pick(logits: &[f32], temperature: f32, random: &mut fastrand::Rng) -> u32 {
    let best =
        (0..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1)).map_or((0, 0.0), |(id, logit)| (id, *logit));
    if temperature <= 0.0 {
        return best.0;
    }
    let weights = || logits.iter().map(|logit| ((logit - best.1) / temperature).exp());
    let mut rest = random.f32() * weights().sum::<f32>();
    for (id, weight) in (0..).zip(weights()) {
        rest -= weight;
        if rest <= 0.0 {
            return id;
        }
    }
    best.0
}

/// Attention of the last tokens alone: a second pass, so that no pass is slowed by waiting between layers.
fn attention_alone(model: &Model, cache: &mut KvCache, running: &[Running]) -> Result<Duration> {
    let sequences: Vec<_> =
        running.iter().map(|one| Sequence { new_len: 0, ..Sequence::new(one.id, 1) }).collect();
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        model.attend(cache, &sequences)?.into_data();
        best = best.min(start.elapsed());
    }
    Ok(best)
}

/// A tensor's numbers, once they are there.
pub(crate) fn numbers(tensor: Tensor<2>) -> Result<Vec<f32>> {
    tensor
        .into_data()
        .try_to_vec()
        .map_err(|error| format!("the device gave other numbers: {error:?}").into())
}

/// Perplexity of `tokens`: `exp` of the mean of `-ln p(token | those before)`, all but the first.
pub(crate) fn perplexity(model: &Model, setup: &WgpuSetup, tokens: &[u32], page: Option<u32>) -> Result<f64> {
    const CHUNK: usize = 512;
    check_context(model, tokens.len())?;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= model.config.vocabulary) {
        return Err(format!("token {token} is not in the vocabulary of {}", model.config.vocabulary).into());
    }
    let mut cache = cache(model, setup, (1, tokens.len() as u32), page)?;
    let id = cache.open()?;
    let (mut sum, mut count) = (0.0, 0);
    for first in (0..tokens.len()).step_by(CHUNK) {
        let chunk = &tokens[first..tokens.len().min(first + CHUNK)];
        let rows: Vec<_> = (0..chunk.len()).collect();
        let logits = model.forward(&mut cache, &[Sequence::new(id, chunk.len() as u32)], chunk, &rows)?;
        let logits = numbers(logits)?;
        for (row, next) in logits.chunks_exact(model.config.vocabulary).zip(&tokens[first + 1..]) {
            let largest = row.iter().copied().fold(f32::MIN, f32::max);
            let all: f64 = row.iter().map(|logit| f64::from(logit - largest).exp()).sum();
            sum += all.ln() - f64::from(row[*next as usize] - largest);
            count += 1;
        }
    }
    Ok((sum / f64::from(count.max(1))).exp())
}
