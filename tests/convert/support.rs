//! Checkpoints in directories of their own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f16(&self) -> Vec<f32> {
        let numbers = self.data.chunks_exact(2);
        numbers.map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
    }
}

pub(crate) type Tensors = BTreeMap<String, Tensor>;

fn read(file: &[u8]) -> Tensors {
    let tensors = SafeTensors::deserialize(file).unwrap().tensors();
    let own = |(name, t): (String, safetensors::tensor::TensorView<'_>)| {
        (name, Tensor { dtype: t.dtype(), shape: t.shape().to_vec(), data: t.data().to_vec() })
    };
    tensors.into_iter().map(own).collect()
}

/// A safetensors file.
pub(crate) fn file_of(tensors: &Tensors) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let offsets = [data.len(), data.len() + tensor.data.len()];
        let info = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets });
        header.insert(name.clone(), info);
        data.extend(&tensor.data);
    }
    with_header(&Value::Object(header).to_string(), &data)
}

pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Tensors of `tests/data/convert.safetensors` whose names start so.
pub(crate) fn numpy(checkpoint: &str) -> Tensors {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/convert.safetensors");
    let prefix = format!("{checkpoint}/");
    let all = read(&std::fs::read(path).unwrap()).into_iter();
    all.filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_owned(), tensor))).collect()
}

/// All tensors of a checkpoint's directory.
pub(crate) fn tensors_of(dir: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "safetensors") {
            tensors.extend(read(&std::fs::read(path).unwrap()));
        }
    }
    tensors
}

pub(crate) fn config(model_type: &str, [layers, q_heads, kv_heads, hidden]: [usize; 4]) -> Value {
    json!({
        "model_type": model_type,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": q_heads,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
    })
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A checkpoint `in`, and room for what is made of it.
pub(crate) struct Dir {
    input: PathBuf,
    root: PathBuf,
}

impl Dir {
    pub(crate) fn at(input: PathBuf, root: PathBuf) -> Self {
        Self { input, root }
    }

    fn new(test: &str) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("convert").join(test);
        let _ = std::fs::remove_dir_all(&root);
        let input = root.join("in");
        std::fs::create_dir_all(&input).unwrap();
        Self { input, root }
    }

    /// One of numpy's checkpoints, in one file.
    pub(crate) fn single(test: &str, checkpoint: &str, config: Value) -> Self {
        let dir = Self::new(test);
        dir.write("config.json", config.to_string());
        dir.write("model.safetensors", file_of(&numpy(checkpoint)));
        dir
    }

    /// The checkpoint `mha`, in two shards.
    pub(crate) fn sharded(test: &str, config: Value) -> Self {
        let dir = Self::new(test);
        dir.write("config.json", config.to_string());
        let (mut shards, mut places) = ([Tensors::new(), Tensors::new()], Map::new());
        for (i, (name, tensor)) in numpy("mha").into_iter().enumerate() {
            places.insert(name.clone(), shard(i % 2).into());
            shards[i % 2].insert(name, tensor);
        }
        for (i, tensors) in shards.iter().enumerate() {
            dir.write(&shard(i), file_of(tensors));
        }
        let size: usize = shards.iter().flat_map(Tensors::values).map(|t| t.data.len()).sum();
        dir.write_index(json!({ "metadata": { "total_size": size }, "weight_map": places }));
        dir
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.input.join(name), bytes).unwrap();
    }

    pub(crate) fn write_index(&self, index: Value) {
        self.write("model.safetensors.index.json", index.to_string());
    }

    pub(crate) fn index(&self) -> Value {
        let path = self.input.join("model.safetensors.index.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    pub(crate) fn input(&self) -> &Path {
        &self.input
    }

    /// A place for a new checkpoint.
    pub(crate) fn out(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn convert(&self, args: &[&str], out: &Path) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gqa"));
        command.arg("convert").args(args).args([&self.input, out]).output().unwrap()
    }

    /// Converts, and asserts an error that has the word, and that nothing is left behind.
    #[track_caller]
    pub(crate) fn refused(&self, args: &[&str], word: &str) {
        let before = self.entries();
        let output = self.convert(args, &self.out("refused"));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{word}: {said}{}", text(&output.stdout));
        assert!(said.contains(word), "{word:?} is not in {said:?}");
        assert_eq!(self.entries(), before, "{said}");
    }

    fn entries(&self) -> Vec<PathBuf> {
        let mut entries: Vec<_> = std::fs::read_dir(&self.root).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        entries
    }
}

pub(crate) fn shard(i: usize) -> String {
    format!("model-0000{}-of-00002.safetensors", i + 1)
}
