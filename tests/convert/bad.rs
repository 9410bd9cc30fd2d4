//! Damaged, truncated and hostile files: an error that says what is wrong, and nothing left behind.

use serde_json::{Value, json};

use crate::support::{Dir, config, file_of, numpy, shard, text, with_header};

const TO_TWO: [&str; 2] = ["--kv-heads", "2"];
const MODEL: &str = "model.safetensors";
const KEY: &str = "model.layers.1.self_attn.k_proj.weight";

fn llama() -> Value {
    config("llama", [3, 8, 8, 16])
}

fn single(test: &str) -> Dir {
    Dir::single(&format!("bad-{test}"), "mha", llama())
}

#[test]
fn numbers_of_heads_that_cannot_be() {
    let dir = single("heads");
    for (kv_heads, word) in [
        ("8", "nothing to do"),
        ("16", "fewer than --kv-heads 16"),
        ("3", "must divide the model's 8"),
        ("0", "must divide"),
        ("-1", "--kv-heads"),
        ("99999999999999999999", "--kv-heads"),
    ] {
        dir.refused(&["--kv-heads", kv_heads], word);
    }
}

#[test]
fn configs_that_make_no_sense() {
    let dir = single("config");
    let huge = 1u64 << 62;
    for (key, value, word) in [
        ("model_type", json!("t5"), "known are llama, mistral"),
        ("model_type", json!(7), "must be a string"),
        ("model_type", Value::Null, "must be a string"),
        ("num_attention_heads", json!(0), "`num_attention_heads` is 0"),
        ("num_attention_heads", json!("8"), "`num_attention_heads` is \"8\""),
        ("num_attention_heads", json!(8.5), "whole number"),
        ("num_attention_heads", json!(-8), "whole number"),
        ("num_attention_heads", json!(huge), "do not divide"),
        ("num_attention_heads", Value::Null, "is missing"),
        ("num_key_value_heads", json!([8]), "whole number"),
        ("num_key_value_heads", json!(3), "do not divide 8 attention heads"),
        ("num_hidden_layers", json!(2), "has 2 layers only"),
        ("num_hidden_layers", json!(huge), "`layers.3.self_attn.k_proj.weight` is missing"),
        ("hidden_size", json!(32), "config.json needs [32] "),
        ("hidden_size", json!(15), "do not divide the hidden size"),
        ("hidden_size", json!(huge), "beyond all memory"),
        ("head_dim", json!(4), "config.json needs [32] "),
        ("head_dim", json!(huge), "beyond all memory"),
        ("head_dim", json!({}), "whole number"),
    ] {
        let mut config = llama();
        config[key] = value;
        dir.write("config.json", config.to_string());
        dir.refused(&TO_TWO, word);
    }
    for (text, word) in [
        ("", "config.json: EOF"),
        ("[]", "config.json: invalid type"),
        ("{\"model_type\": \"llama\"", "config.json: EOF"),
        ("{}", "`model_type` is missing"),
        (&"[".repeat(100_000), "config.json"),
    ] {
        dir.write("config.json", text);
        dir.refused(&TO_TWO, word);
    }
    dir.write("config.json", [0xff, 0xfe]);
    dir.refused(&TO_TWO, "UTF-8");
    std::fs::remove_file(dir.input().join("config.json")).unwrap();
    dir.refused(&TO_TWO, "config.json");
}

#[test]
fn directories_that_cannot_be() {
    let dir = single("places");
    let out = dir.out("there");
    std::fs::create_dir(&out).unwrap();
    let said = |dir: &Dir, out: &std::path::Path| {
        let output = dir.convert(&TO_TWO, out);
        assert_eq!(output.status.code(), Some(2));
        text(&output.stderr)
    };
    assert!(said(&dir, &out).contains("exists already"));
    assert!(std::fs::read_dir(&out).unwrap().next().is_none());
    assert!(said(&dir, dir.input()).contains("exists already"));
    for inside in ["out", "../in/out"] {
        assert!(said(&dir, &dir.input().join(inside)).contains("must not lie inside"));
    }
    assert!(said(&dir, &dir.out("no").join("parent")).contains("no"));
    let missing = Dir::at(dir.out("missing"), dir.out(""));
    missing.refused(&TO_TWO, "missing");
    let file = Dir::at(dir.input().join("config.json"), dir.out(""));
    file.refused(&TO_TWO, "not a directory");
    assert_eq!(std::fs::read_dir(dir.input()).unwrap().count(), 2);

    std::fs::remove_file(dir.input().join(MODEL)).unwrap();
    dir.refused(&TO_TWO, "neither model.safetensors nor");
    std::fs::create_dir(dir.input().join(MODEL)).unwrap();
    dir.refused(&TO_TWO, "not a file");
}

#[test]
fn a_failure_half_way_leaves_nothing() {
    // Shards are written first, other files are copied last. A folder is left out, a file that cannot be read is an error.
    let dir = single("half");
    let at = dir.input().join("tokenizer.json");
    std::fs::create_dir(&at).unwrap();
    assert_eq!(dir.convert(&TO_TWO, &dir.out("good")).status.code(), Some(0));
    std::fs::remove_dir(&at).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("/proc/self/mem", &at).unwrap();
        // Reading address 0 of that file fails, on Linux; elsewhere it does not exist, which is found before.
        dir.refused(&TO_TWO, "tokenizer.json");
    }
}

#[test]
fn methods_that_do_not_exist() {
    let dir = single("methods");
    dir.refused(&["--kv-heads", "2", "--method", "median"], "neither mean, first or random");
    let file = dir.out("method.json");
    for (text, word) in [
        ("{\"default\": \"median\"}", "must be mean, first or random"),
        ("{\"3\": \"first\"}", "layer \"3\" does not exist: the model has 0 to 2"),
        ("{\"01\": \"first\"}", "layer \"01\" does not exist"),
        ("{\"layer\": \"first\"}", "neither \"default\" nor the number"),
        ("{\"-1\": \"first\"}", "neither \"default\" nor the number"),
        ("{\"1\": \"first\", \"1\": \"mean\"}", "appears twice"),
        ("{\"1\": 5}", "invalid type"),
        ("[]", "invalid type"),
        ("{", "EOF"),
    ] {
        std::fs::write(&file, text).unwrap();
        dir.refused(&["--kv-heads", "2", "--method", file.to_str().unwrap()], word);
    }
}

#[test]
fn tensors_that_do_not_fit() {
    let dir = single("tensors");
    let good = numpy("mha");
    let with = |name: &str, shape: &[usize], dtype, bytes: usize| {
        let mut tensors = good.clone();
        let tensor = tensors.get_mut(KEY).unwrap().clone();
        tensors.insert(name.to_owned(), tensor);
        let tensor = tensors.get_mut(name).unwrap();
        tensor.shape = shape.to_vec();
        tensor.dtype = dtype;
        tensor.data.resize(bytes, 0);
        dir.write(MODEL, file_of(&tensors));
    };
    use safetensors::Dtype::{BF16, F16, F64, U8};
    with(KEY, &[8, 32], F16, 512);
    dir.refused(&TO_TWO, &format!("`{KEY}` of model.safetensors: it has the shape [8, 32]"));
    with(KEY, &[4, 16], F16, 128);
    dir.refused(&TO_TWO, "config.json needs [16, 16]");
    with(KEY, &[0, 16], F16, 0);
    dir.refused(&TO_TWO, "shape [0, 16]");
    with(KEY, &[], F16, 2);
    dir.refused(&TO_TWO, "shape []");
    with(KEY, &[16, 16], U8, 256);
    dir.refused(&TO_TWO, "stored as U8, but only F32, F16 and BF16");
    with(KEY, &[16, 16], F64, 2048);
    dir.refused(&TO_TWO, "stored as F64");
    with("model.layers.1.self_attn.k_proj.qweight", &[16, 16], U8, 256);
    dir.refused(&TO_TWO, "`qweight`, neither weight nor bias");
    with("layers.1.self_attn.k_proj.weight", &[16, 16], BF16, 512);
    dir.refused(&TO_TWO, "under another name");
    with("model.layers.9.self_attn.k_proj.weight", &[16, 16], BF16, 512);
    dir.refused(&TO_TWO, "has 3 layers only");
    let mut tensors = good.clone();
    tensors.remove(KEY);
    dir.write(MODEL, file_of(&tensors));
    dir.refused(&TO_TWO, "`layers.1.self_attn.k_proj.weight` is missing");
}

#[test]
fn indexes_that_lie() {
    let dir = Dir::sharded("bad-index", llama());
    let good = dir.index();
    for (name, word) in [
        ("../in/model-00001-of-00002.safetensors", "not the plain name"),
        ("/etc/passwd.safetensors", "not the plain name"),
        ("a\\b.safetensors", "not the plain name"),
        ("c:b.safetensors", "not the plain name"),
        ("..", "not the plain name"),
        ("", "not the plain name"),
        ("config.json", "not the plain name"),
        ("nul\0.safetensors", "not the plain name"),
        ("other.safetensors", "other.safetensors"),
        (&shard(1), "lies in"),
        (&shard(0), "lies in"),
    ] {
        let mut index = good.clone();
        let key = if name == shard(0) { 1 } else { 0 };
        let names: Vec<_> = numpy("mha").into_keys().collect();
        index["weight_map"][&names[key]] = json!(name);
        dir.write_index(index);
        dir.refused(&TO_TWO, word);
    }
    let mut index = good.clone();
    index["weight_map"]["more"] = json!(shard(0));
    dir.write_index(index);
    dir.refused(&TO_TWO, "`more` is missing in");
    let mut index = good.clone();
    index["weight_map"].as_object_mut().unwrap().shift_remove(KEY);
    dir.write_index(index);
    dir.refused(&TO_TWO, "is missing in the index");
    for (index, word) in [
        (json!({ "weight_map": {} }), "is missing in the checkpoint"),
        (json!({ "metadata": {} }), "weight_map"),
        (json!({ "weight_map": [] }), "invalid type"),
        (json!({ "weight_map": { "a": 1 } }), "invalid type"),
        (json!({ "weight_map": good["weight_map"], "metadata": 5 }), "`metadata` is no object"),
        (json!([]), "index.json"),
    ] {
        dir.write_index(index);
        dir.refused(&TO_TWO, word);
    }
    dir.write(
        "model.safetensors.index.json",
        "{\"weight_map\": {\"a\": \"x.safetensors\", \"a\": \"y.safetensors\"}}",
    );
    dir.refused(&TO_TWO, "`a` appears twice");
    dir.write_index(good);
    dir.write(MODEL, file_of(&numpy("mha")));
    dir.refused(&TO_TWO, "has both");
    std::fs::remove_file(dir.input().join(MODEL)).unwrap();
    std::fs::remove_file(dir.input().join(shard(1))).unwrap();
    dir.refused(&TO_TWO, &shard(1));
}

#[test]
fn headers_that_lie() {
    let dir = single("headers");
    let entry = |from: u64, to: u64| json!({ "dtype": "F16", "shape": [4], "data_offsets": [from, to] });
    let max = u64::MAX;
    for (header, word) in [
        (json!({ "a": entry(0, 8), "b": entry(4, 12) }), "inside another"),
        (json!({ "a": entry(0, 8), "b": entry(12, 20) }), "the one before ends at 8"),
        (json!({ "a": entry(0, 6) }), "do not fit F16 [4]"),
        (json!({ "a": entry(0, 800) }), "truncated?"),
        (json!({ "a": entry(8, 0) }), "starts at byte 8"),
        (json!({ "a": { "dtype": "F16", "shape": [max, 2], "data_offsets": [0, 8] } }), "do not fit"),
        (json!({ "a": { "dtype": "F16", "shape": [4], "data_offsets": [0, max] } }), "truncated?"),
        (json!({ "a": { "dtype": "Q9", "shape": [4], "data_offsets": [0, 8] } }), "Q9"),
        (json!({ "a": { "dtype": "F16", "shape": [-4], "data_offsets": [0, 8] } }), "header"),
        (json!({ "__metadata__": { "a": 1 } }), "header"),
        (json!({ "a": entry(0, 8) }), "bytes follow behind"),
        (json!([]), "object of tensors"),
    ] {
        dir.write(MODEL, with_header(&header.to_string(), &[0; 20]));
        dir.refused(&TO_TWO, word);
    }
    for length in [41, 1000, 100_000_000, 100_000_001, 1 << 40, max] {
        let mut file = with_header("{}", &[0; 32]);
        file[..8].copy_from_slice(&u64::to_le_bytes(length));
        dir.write(MODEL, file);
        dir.refused(&TO_TWO, "its header claims");
    }
    dir.write(MODEL, with_header("{\"a\": 1, \"a\": 1}", &[]));
    dir.refused(&TO_TWO, "header");
    let twice = entry(0, 8).to_string();
    dir.write(MODEL, with_header(&format!("{{\"a\":{twice},\"a\":{twice}}}"), &[0; 8]));
    dir.refused(&TO_TWO, "`a` appears twice");
}

#[test]
fn a_file_cut_anywhere() {
    let dir = single("cut");
    let file = file_of(&numpy("mha"));
    let early = 0..40;
    for length in early.chain((40..file.len()).step_by(97)).chain([file.len() - 1]) {
        dir.write(MODEL, &file[..length]);
        dir.refused(&TO_TWO, MODEL);
    }
    dir.write(MODEL, [&file[..], &[0]].concat());
    dir.refused(&TO_TWO, "bytes follow behind");
}

#[test]
fn headers_with_flipped_bits() {
    let dir = single("flipped");
    let file = file_of(&numpy("mha"));
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut random = 1u64;
    let (mut refused, out) = (0, dir.out("flipped"));
    for _ in 0..300 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut damaged = file.clone();
        damaged[(random >> 33) as usize % header] ^= 1 << ((random >> 8) % 8);
        dir.write(MODEL, damaged);
        // Some flips only rename a tensor that is copied.
        let output = dir.convert(&TO_TWO, &out);
        let said = text(&output.stderr);
        match output.status.code() {
            Some(0) => std::fs::remove_dir_all(&out).unwrap(),
            code => {
                refused += 1;
                assert_eq!(code, Some(2), "{said}");
            }
        }
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(std::fs::read_dir(dir.out("")).unwrap().count(), 1, "{said}");
    }
    assert!(refused > 150, "{refused}");
}
