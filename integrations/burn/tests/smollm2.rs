//! SmolLM2-135M-Instruct end to end, on its real weights, against what PyTorch and transformers say (`oracle/smollm2.py`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "../examples/smollm2/engine.rs"]
mod engine;
#[path = "../examples/smollm2/model.rs"]
mod model;
#[path = "../examples/smollm2/tokenizer.rs"]
mod tokenizer;
#[path = "../examples/smollm2/weights.rs"]
mod weights;

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard};

use engine::{Answer, Settings, answer, perplexity};
use gqa_burn::{Dtype, Sequence};
use model::Model;
use serde_json::Value;
use tokenizer::Tokenizer;
use weights::Gguf;

/// Where two logits of the oracle are nearer than this, rounding may choose.
const NEAR: f64 = 0.05;

fn model_path() -> PathBuf {
    let file = "../../target/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    std::env::var_os("GQA_MODEL")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(file), PathBuf::from)
}

fn gguf() -> Gguf {
    Gguf::open(&model_path()).unwrap_or_else(|error| panic!("{error}"))
}

/// The same weights, with keys and values stored otherwise.
fn storing(model: &Model, dtype: Dtype, rotated: bool) -> Model {
    let spec = model.spec.to_builder().kv_dtype(dtype).rotated(rotated).build().unwrap();
    model.attending(spec, &common::open().1).unwrap()
}

/// One set of weights, one test at a time: they fill both cores anyway.
static MODEL: LazyLock<Mutex<Model>> = LazyLock::new(|| {
    let (device, setup) = common::open();
    Mutex::new(Model::load(&mut gguf(), (Dtype::F32, false), (&device, &setup), |_, _| {}).unwrap())
});

fn model() -> MutexGuard<'static, Model> {
    MODEL.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// All prompts at once, in pages: what the other ways to the same answers are held against.
static TOGETHER: LazyLock<Vec<Answer>> = LazyLock::new(|| {
    let settings = Settings { batch: 16, page: Some(16), ..settings(32) };
    answers(&model(), &prompts(), &settings)
});

fn oracle() -> Value {
    serde_json::from_str(include_str!("data/smollm2.json")).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn prompts() -> Vec<Vec<u32>> {
    oracle()["prompts"].as_array().unwrap().iter().map(|prompt| ids(&prompt["ids"])).collect()
}

fn settings(max_new: usize) -> Settings {
    Settings { max_new, batch: 1, page: None, speculate: 0, temperature: 0.0, seed: 1, ends: vec![2] }
}

fn answers(model: &Model, prompts: &[Vec<u32>], settings: &Settings) -> Vec<Answer> {
    answer(model, &common::open().1, prompts, settings, |_, _| {}).unwrap().0
}

#[test]
fn the_tokenizer_is_the_models() {
    let (oracle, tokenizer) = (oracle(), Tokenizer::new(&gguf()).unwrap());
    for of in ["prompts", "tokenizer"] {
        for case in oracle[of].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.ids(text).unwrap(), ids(&case["ids"]), "{text:?}");
            assert_eq!(tokenizer.text(&ids(&case["ids"])).unwrap(), text);
        }
    }
    let template = oracle["prompts"].as_array().unwrap().iter().find(|p| p["name"] == "template").unwrap();
    let text = template["text"].as_str().unwrap();
    let question = text.rsplit_once("user\n").unwrap().1.split_once("<|im_end|>").unwrap().0;
    assert_eq!(tokenizer.chat(question).unwrap(), text);
}

#[test]
fn the_capital_of_france() {
    let model = model();
    let tokenizer = Tokenizer::new(&gguf()).unwrap();
    let prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
    let ids = tokenizer.ids(prompt).unwrap();
    assert_eq!(ids, [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]);
    for dtype in [Dtype::F32, Dtype::F16] {
        let stored = storing(&model, dtype, false);
        let answers = answers(&stored, std::slice::from_ref(&ids), &settings(16));
        assert_eq!(
            tokenizer.text(answers[0].new_tokens()).unwrap(),
            "The capital of France is Paris.<|im_end|>"
        );
    }
}

#[test]
fn other_prompts_as_transformers_answers_them() {
    let (answers, oracle) = (&*TOGETHER, oracle());
    for (answer, case) in answers.iter().zip(oracle["prompts"].as_array().unwrap()) {
        let (name, greedy) = (&case["name"], ids(&case["greedy"]));
        if answer.new_tokens() == greedy {
            continue;
        }
        let margins: Vec<f64> =
            case["margins"].as_array().unwrap().iter().map(|m| m.as_f64().unwrap()).collect();
        let parted = answer.new_tokens().iter().zip(&greedy).position(|(found, wanted)| found != wanted);
        let parted = parted.expect("as many tokens");
        assert!(margins[parted] <= NEAR, "{name}: another token {parted}, by {}", margins[parted]);
        // A near call: then every token behind it by itself, after the oracle's own tokens.
        let text = [ids(&case["ids"]), greedy.clone()].concat();
        let told = told(&model(), &text);
        for (nth, (token, margin)) in greedy.iter().zip(margins).enumerate() {
            let found = told[text.len() - greedy.len() + nth - 1];
            assert!(
                found == *token || margin <= NEAR,
                "{name}: token {nth} is {found}, not {token}, by {margin}"
            );
        }
    }
}

/// The likeliest token after each of `text`.
fn told(model: &Model, text: &[u32]) -> Vec<u32> {
    let mut cache = engine::cache(model, &common::open().1, (1, text.len() as u32), None).unwrap();
    let sequences = [Sequence::new(cache.open().unwrap(), text.len() as u32)];
    let rows: Vec<_> = (0..text.len()).collect();
    let logits = engine::numbers(model.forward(&mut cache, &sequences, text, &rows).unwrap()).unwrap();
    let best = |row: &[f32]| (0..).zip(row).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    logits.chunks_exact(model.config.vocabulary).map(best).collect()
}

#[test]
fn together_and_in_pages_as_alone() {
    const LEN: usize = 6;
    let (together, model) = (&*TOGETHER, model());
    let prompts: Vec<_> = prompts().into_iter().take(8).collect();
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.extend(answers(&model, std::slice::from_ref(prompt), &settings(LEN)));
    }
    // Five places for eight: three join when others leave.
    let joining = answers(&model, &prompts, &Settings { batch: 5, page: Some(16), ..settings(LEN) });
    for (nth, alone) in alone.iter().enumerate() {
        assert_eq!(joining[nth].tokens, alone.tokens, "prompt {nth}");
        assert_eq!(together[nth].tokens[..alone.tokens.len()], alone.tokens, "prompt {nth}");
    }
}

#[test]
fn drafts_from_the_text_give_the_same_tokens_in_fewer_steps() {
    let oracle = oracle();
    // Two at once and in pages, of which one ends earlier.
    let of =
        |name: &str| oracle["prompts"].as_array().unwrap().iter().position(|p| p["name"] == name).unwrap();
    let nths = [of("table"), of("france")];
    let chosen = nths.map(|nth| prompts()[nth].clone());
    let settings = Settings { speculate: 7, batch: 2, page: Some(16), ..settings(32) };
    let together = &*TOGETHER;
    let drafted = answers(&model(), &chosen, &settings);
    for (drafted, nth) in drafted.iter().zip(nths) {
        assert_eq!(drafted.tokens, together[nth].tokens);
    }
    assert_eq!(together[nths[0]].steps, 32);
    assert!(drafted[0].steps <= 16, "{} steps", drafted[0].steps);
    println!("32 tokens in {} steps", drafted[0].steps);
}

#[test]
fn drafts() {
    assert_eq!(engine::draft(&[1, 2, 3, 9, 1, 2, 3], 2), [9, 1]);
    // The longest ending, and its latest place.
    assert_eq!(engine::draft(&[2, 3, 7, 1, 2, 3, 8, 4, 3, 9, 2, 3], 1), [8]);
    assert_eq!(engine::draft(&[5, 5, 5], 4), [5]);
    assert!(engine::draft(&[1, 2, 3], 4).is_empty());
    assert!(engine::draft(&[1], 4).is_empty());
}

#[test]
fn perplexity_of_the_licence_by_storage_type() {
    let (model, setup) = (model(), common::open().1);
    let oracle = oracle();
    let text = include_str!("../../../LICENSE-APACHE");
    let mut tokens = Tokenizer::new(&gguf()).unwrap().ids(text).unwrap();
    tokens.truncate(1000);
    assert_eq!(tokens, ids(&oracle["perplexity"]["ids"]));
    // Of the same weights in f32, by transformers.
    let plain = oracle["perplexity"]["value"].as_f64().unwrap();
    // Four bits want the rotation: without it they are 12 % off.
    for (dtype, rotated, bound) in
        [(Dtype::F16, false, 1e-3), (Dtype::Q8, false, 1e-2), (Dtype::Q4, true, 0.1)]
    {
        let stored = storing(&model, dtype, rotated);
        let found = perplexity(&stored, &setup, &tokens, Some(16)).unwrap();
        let off = found / plain - 1.0;
        println!("{}: {found:.4}, f32 {plain:.4}: {:+.3} %", stored.spec, off * 100.0);
        assert!(off.abs() <= bound, "{}: {found}, f32 {plain}", stored.spec);
    }
}

#[test]
fn other_files_give_clear_errors() {
    let folder = std::env::temp_dir().join(format!("gqa-burn-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("text.gguf");
    std::fs::write(&path, "not a model").unwrap();
    let error = Gguf::open(&path).err().unwrap().to_string();
    assert!(error.contains("not a GGUF file"), "{error}");
    let error = Gguf::open(&folder.join("absent.gguf")).err().unwrap().to_string();
    assert!(error.contains("cargo xtask model"), "{error}");
    // A header with the architecture alone: magic, version 3, no tensors, one entry.
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend([0u64, 1].map(u64::to_le_bytes).concat());
    for text in ["general.architecture", "gemma3"] {
        if text == "gemma3" {
            bytes.extend(8u32.to_le_bytes());
        }
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }
    bytes.extend([0; 64]);
    std::fs::write(&path, bytes).unwrap();
    let error = Gguf::open(&path).unwrap().config().unwrap_err().to_string();
    assert!(error.contains("architecture is 'gemma3'"), "{error}");
    // Cut short anywhere, a real file is an error and no panic.
    let whole = std::fs::read(model_path())
        .unwrap_or_else(|error| panic!("{error}: fetch it with `cargo xtask model`"));
    for len in [0, 3, 24, 1000, 1_000_000, 1_785_000] {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(Gguf::open(&path).and_then(|mut gguf| gguf.config()).is_err(), "{len} bytes");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
