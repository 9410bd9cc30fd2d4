//! `gqa convert` from end to end: small checkpoints of every family against numpy, and files that are no checkpoints.
#![cfg(feature = "cli")]
// Helpers of tests: clippy.toml allows it only in the tests themselves.
#![allow(clippy::unwrap_used)]

mod bad;
mod support;

use serde_json::{Value, json};

use support::{Dir, Tensors, config, numpy, tensors_of, text};

/// Converts one of numpy's checkpoints and compares every tensor with numpy's, bit by bit.
#[track_caller]
fn agrees(test: &str, dir: &Dir, checkpoint: &str, kv_heads: usize, method: &str) {
    let out = dir.out(&format!("{test}-{kv_heads}-{method}"));
    let output = dir.convert(&["--kv-heads", &kv_heads.to_string(), "--method", method], &out);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let mut expected = numpy(checkpoint);
    let changed = numpy(&format!("{checkpoint}-{kv_heads}-{method}"));
    assert!(!changed.is_empty());
    expected.extend(changed);
    let found = tensors_of(&out);
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (name, tensor) in &expected {
        assert_eq!(&found[name], tensor, "{name}");
    }
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["num_key_value_heads"], kv_heads);
}

#[test]
fn a_sharded_llama_is_pooled_as_numpy_does() {
    let dir = Dir::sharded("mha", config("llama", [3, 8, 8, 16]));
    std::fs::write(dir.input().join("tokenizer.json"), "{ }").unwrap();
    for (kv_heads, method) in [(2, "mean"), (2, "first"), (1, "mean"), (1, "first")] {
        agrees("out", &dir, "mha", kv_heads, method);
    }
    let out = dir.out("out-2-mean");
    assert_eq!(std::fs::read(out.join("tokenizer.json")).unwrap(), b"{ }");
    let index = |dir: &std::path::Path| -> Value {
        serde_json::from_slice(&std::fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap()
    };
    let (before, after) = (index(dir.input()), index(&out));
    assert_eq!(before["weight_map"], after["weight_map"]);
    let bytes = |tensors: Tensors| tensors.values().map(|t| t.data.len()).sum::<usize>();
    assert_eq!(after["metadata"]["total_size"], bytes(tensors_of(&out)));
    assert!(before["metadata"]["total_size"].as_u64() > after["metadata"]["total_size"].as_u64());
}

#[test]
fn grouped_heads_are_pooled_further() {
    for model in ["qwen2", "qwen3", "mistral", "gemma2"] {
        let dir = Dir::single(&format!("gqa-{model}"), "gqa", config(model, [3, 8, 4, 16]));
        agrees(model, &dir, "gqa", 1, "mean");
        agrees(model, &dir, "gqa", 1, "first");
    }
}

#[test]
fn fused_projections_and_bert_are_pooled_as_numpy_does() {
    agrees("phi3", &Dir::single("phi3", "phi3", config("phi3", [1, 4, 4, 8])), "phi3", 2, "mean");
    // These have no KV heads in their config.
    let without = |model| {
        let mut config = config(model, [1, 4, 4, 8]);
        config.as_object_mut().unwrap().shift_remove("num_key_value_heads");
        config
    };
    agrees("bert", &Dir::single("bert", "bert", without("bert")), "bert", 2, "mean");
    let neox = Dir::single("neox", "neox", without("gpt_neox"));
    agrees("neox", &neox, "neox", 1, "mean");
    agrees("neox", &neox, "neox", 2, "mean");
    // And what came out can be pooled again: means in two steps differ by roundings only, which f16 shows.
    let again = Dir::at(neox.out("neox-2-mean"), neox.out("again"));
    let out = neox.out("again");
    assert_eq!(again.convert(&["--kv-heads", "1"], &out).status.code(), Some(0));
    let (found, once) = (tensors_of(&out), tensors_of(&neox.out("neox-1-mean")));
    for (name, tensor) in &found {
        assert_eq!(tensor.shape, once[name].shape);
        for (a, b) in tensor.f16().iter().zip(once[name].f16()) {
            assert!((a - b).abs() < 2e-3, "{name}: {a} {b}");
        }
    }
}

#[test]
fn layers_can_have_methods_of_their_own() {
    let dir = Dir::single("layers", "mha", config("llama", [3, 8, 8, 16]));
    let file = dir.input().with_extension("json");
    std::fs::write(&file, json!({ "default": "first", "1": "mean", "2": "random" }).to_string()).unwrap();
    let run = |out: &str, seed: &str| {
        let out = dir.out(out);
        let method = file.to_str().unwrap();
        let output = dir.convert(&["--kv-heads", "2", "--method", method, "--seed", seed], &out);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        tensors_of(&out)
    };
    let (found, repeated, other) = (run("a", "1"), run("b", "1"), run("c", "2"));
    assert_eq!(found, repeated);
    for (name, tensor) in &numpy("mha-2-mean") {
        match name.split('.').nth(2).unwrap() {
            "0" => assert_eq!(found[name], numpy("mha-2-first")[name]),
            "1" => assert_eq!(&found[name], tensor),
            _ => assert_ne!(found[name].data, other[name].data),
        }
    }
    // Keys and values are not the same numbers.
    let at = |part| &found[&format!("model.layers.2.self_attn.{part}_proj.weight")].data;
    assert_ne!(at("k"), at("v"));
}

#[test]
fn config_metadata_and_other_files_are_kept() {
    let mut config = config("llama", [3, 8, 8, 16]);
    let fields = config.as_object_mut().unwrap();
    fields.insert("zeta".to_owned(), json!({ "b": [1, null], "a": 1e-05 }));
    fields.insert("alpha".to_owned(), json!(0.1));
    fields.insert("rope_theta".to_owned(), json!(18446744073709551615u64));
    let dir = Dir::single("kept", "mha", config.clone());
    std::fs::write(dir.input().join("pytorch_model.bin"), "old").unwrap();
    std::fs::create_dir(dir.input().join("original")).unwrap();
    std::fs::write(dir.input().join("README.md"), "text").unwrap();
    let out = dir.out("out");
    let output = dir.convert(&["--kv-heads", "4"], &out);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    config["num_key_value_heads"] = json!(4);
    let written = std::fs::read_to_string(out.join("config.json")).unwrap();
    // Text against text: the order of the fields counts.
    assert_eq!(written, format!("{config:#}\n"));
    assert_eq!(std::fs::read(out.join("README.md")).unwrap(), b"text");
    assert!(!out.join("pytorch_model.bin").exists() && !out.join("original").exists());
    let file = std::fs::read(out.join("model.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let said = text(&output.stdout);
    for word in ["8/8", "8/4", "192", "96", "parameters", "left out: original, pytorch_model.bin"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}
