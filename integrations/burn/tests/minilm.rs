//! The example's MiniLM on its real weights, with all K/V heads and with fewer, against transformers and numpy (`oracle/minilm.py`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/uptrain/bert.rs"]
mod bert;
mod common;
#[path = "../examples/uptrain/text.rs"]
mod text;

use std::path::{Path, PathBuf};

use bert::Checkpoint;
use common::{assert_close, numbers, open};
use gqa_burn::gqa::uptrain::Pooling;
use serde_json::Value;

/// As the example has it.
type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/models/minilm")
}

fn oracle() -> Value {
    serde_json::from_str(include_str!("data/minilm.json")).unwrap()
}

/// The sentences that the oracle has embedded.
fn texts() -> Vec<Vec<u32>> {
    let count = oracle()["ids"].as_array().unwrap().len();
    let lines: Vec<_> = text::HELD_OUT.lines().take(count).collect();
    text::tokenize(&folder(), &lines.join("\n"))
        .unwrap_or_else(|error| panic!("{error}: `cargo xtask model` fetches it"))
}

#[test]
fn the_tokenizer_is_the_models() {
    let ids: Vec<Vec<u32>> = serde_json::from_value(oracle()["ids"].clone()).unwrap();
    assert_eq!(texts(), ids);
    // Whole speeches are kept apart.
    assert!(text::TRAINING.lines().all(|line| text::HELD_OUT.lines().all(|other| other != line)));
}

#[test]
fn embeddings_of_the_original_and_of_pooled_heads() {
    let (device, setup) = open();
    let checkpoint = Checkpoint::open(&folder()).unwrap();
    let (texts, embeddings) = (texts(), checkpoint.embeddings(&device).unwrap());
    for case in oracle()["cases"].as_array().unwrap() {
        let kv_heads = case["kv_heads"].as_u64().unwrap() as usize;
        let pooling = if case["pooling"] == "mean" { Pooling::Mean } else { Pooling::First };
        let encoder = checkpoint.encoder(kv_heads, pooling, &device).unwrap();
        let attention = checkpoint.config.attention(kv_heads, &setup).unwrap();
        let x = embeddings.forward(&texts, &device);
        let lengths = text::lengths(&texts);
        let hidden = encoder.forward(&attention, x, &lengths).unwrap().pop().unwrap();
        let found = numbers(bert::pooled(hidden, &lengths));
        let expected: Vec<Vec<f32>> = serde_json::from_value(case["embeddings"].clone()).unwrap();
        assert_close(&found, &expected.concat(), 1e-5);
    }
}
