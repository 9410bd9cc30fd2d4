//! The new checkpoint: planned as a whole, then written tensor by tensor into a directory that gets its name at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use gqa::uptrain::{HeadShape, pool_heads};
use half::{bf16, f16};
use indicatif::ProgressBar;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value};

use super::checkpoint::Shard;
use super::config::Config;
use super::method::Methods;
use super::names::{Block, Heads, Leaf, Target};
use super::{bad, failed};
use crate::Failure;
use crate::case::header::Tensor;

/// Bytes that are written between two looks at the bar.
const PIECE: usize = 8 << 20;

/// A tensor with KV heads, and what becomes of it.
#[derive(Debug)]
struct Change {
    target: Target,
    heads: Heads,
    shape: HeadShape,
}

/// A tensor of the new checkpoint.
#[derive(Debug)]
struct Entry<'a> {
    name: &'a str,
    tensor: Tensor<'a>,
    change: Option<Change>,
    shape: Vec<usize>,
    bytes: usize,
}

/// A shard of the new checkpoint.
#[derive(Debug)]
pub(super) struct NewShard<'a> {
    pub(super) name: &'a str,
    metadata: &'a BTreeMap<String, String>,
    entries: Vec<Entry<'a>>,
}

/// What a checkpoint becomes; all its tensors have been checked.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    config: &'a Config,
    kv_heads: usize,
    pub(super) shards: Vec<NewShard<'a>>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(config: &'a Config, kv_heads: usize, shards: &'a [Shard]) -> Result<Self, Failure> {
        let mut plan = Self { config, kv_heads, shards: Vec::new() };
        let mut found = BTreeSet::new();
        for shard in shards {
            let mut entries = Vec::new();
            for (name, tensor) in shard.tensors() {
                let refuse = |why: String| bad(format!("tensor `{name}` of {}: {why}", shard.name));
                let target = config.family.target(name).map_err(refuse)?;
                if target.is_some_and(|target| !found.insert(target)) {
                    return Err(refuse("the same layer has it under another name".to_owned()));
                }
                entries.push(plan.entry(name, tensor, target).map_err(refuse)?);
            }
            // As the safetensors crate sorts them: every tensor starts at a multiple of its elements' size.
            entries.sort_by_key(|entry| std::cmp::Reverse(entry.tensor.dtype));
            plan.shards.push(NewShard { name: &shard.name, metadata: &shard.header.metadata, entries });
        }
        for (target, name) in (0..config.layers).flat_map(|layer| config.family.required(layer)) {
            if !found.contains(&target) {
                return Err(bad(format!("tensor `{name}` is missing in the checkpoint")));
            }
        }
        Ok(plan)
    }

    fn entry(&self, name: &'a str, tensor: Tensor<'a>, target: Option<Target>) -> Result<Entry<'a>, String> {
        let mut entry =
            Entry { name, tensor, change: None, shape: tensor.shape.to_vec(), bytes: tensor.data.len() };
        let Some(target) = target else { return Ok(entry) };
        let Config { layers, q_heads, kv_heads, head_dim, hidden, .. } = *self.config;
        if target.layer >= layers {
            return Err(format!("config.json has {layers} layers only"));
        }
        // Shape first: what is not in the file can be as large as config.json likes, and must not be allocated.
        let count = self.config.family.count(target.makes, [q_heads, kv_heads]);
        let (needed, columns) = match target.leaf {
            Leaf::Weight => (vec![count * head_dim, hidden], hidden),
            Leaf::Bias => (vec![count * head_dim], 1),
        };
        if entry.shape != needed {
            return Err(format!(
                "it has the shape {:?}, but config.json needs {needed:?} ({q_heads} query heads, {kv_heads} KV heads, \
                 head_dim {head_dim}, hidden size {hidden})",
                entry.shape
            ));
        }
        if tensor.float().is_none() {
            let dtype = tensor.dtype;
            return Err(format!("it is stored as {dtype}, but only F32, F16 and BF16 can be pooled"));
        }
        let heads = self.config.family.heads(target.makes, q_heads, [kv_heads, self.kv_heads]);
        let shape = HeadShape { heads: kv_heads, head_dim, columns };
        entry.bytes = tensor.data.len() / count * heads.blocks.len();
        if let Some(rows) = entry.shape.first_mut() {
            *rows = heads.blocks.len() * head_dim;
        }
        entry.change = Some(Change { target, heads, shape });
        Ok(entry)
    }

    fn entries(&self) -> impl Iterator<Item = &Entry<'a>> {
        self.shards.iter().flat_map(|shard| &shard.entries)
    }

    /// Bytes of all new tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.entries().map(|entry| entry.bytes as u64).sum()
    }

    /// Elements of all tensors, before and after.
    pub(super) fn parameters(&self) -> [u64; 2] {
        let elements = |shape: &[usize]| shape.iter().map(|n| *n as u64).product::<u64>();
        let before = self.entries().map(|entry| elements(entry.tensor.shape)).sum();
        [before, self.entries().map(|entry| elements(&entry.shape)).sum()]
    }
}

impl NewShard<'_> {
    /// Writes the shard into `dir`, holding no more than one projection in memory.
    pub(super) fn write(&self, dir: &Path, methods: &Methods, bar: &ProgressBar) -> Result<(), Failure> {
        let path = dir.join(self.name);
        let why = |e: &dyn std::fmt::Display| failed(&path, e);
        let mut file = BufWriter::new(File::create_new(&path).map_err(|e| why(&e))?);
        let mut write = |bytes: &[u8]| -> Result<(), Failure> {
            for piece in bytes.chunks(PIECE) {
                file.write_all(piece).map_err(|e| why(&e))?;
                bar.inc(piece.len() as u64);
            }
            Ok(())
        };
        let header = self.header().map_err(|e| why(&e))?;
        bar.inc_length(8 + header.len() as u64);
        write(&(header.len() as u64).to_le_bytes())?;
        write(&header)?;
        for entry in &self.entries {
            match &entry.change {
                Some(change) => change.write(entry, methods, &mut write)?,
                None => write(entry.tensor.data)?,
            }
        }
        file.flush().map_err(|e| why(&e))
    }

    /// Names, types, shapes and places; filled with spaces so that the data are aligned.
    fn header(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut header = Map::new();
        if !self.metadata.is_empty() {
            header.insert("__metadata__".to_owned(), serde_json::to_value(self.metadata)?);
        }
        let mut start = 0;
        for Entry { name, tensor, shape, bytes, .. } in &self.entries {
            let data_offsets = (start, start + bytes);
            let info = TensorInfo { dtype: tensor.dtype, shape: shape.clone(), data_offsets };
            header.insert((*name).to_owned(), serde_json::to_value(info)?);
            start += bytes;
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(header)
    }
}

impl Change {
    fn write(
        &self,
        entry: &Entry<'_>,
        methods: &Methods,
        write: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Self { target, heads, shape } = self;
        let Entry { name, tensor, .. } = entry;
        let numbers = shape.head_dim * shape.columns;
        let pool = |(i, pool): (usize, &Vec<usize>)| {
            let mut weights = Vec::with_capacity(numbers * pool.len());
            for head in pool {
                weights.extend(tensor.floats(head * numbers, numbers));
            }
            let kv_heads =
                heads.blocks.iter().filter(|b| matches!(b, Block::Pooled { pool, .. } if *pool == i));
            let pooling = methods.pooling(target.layer, name, i);
            let pooled = pool_heads(&weights, *shape, kv_heads.count(), pooling);
            Ok(encode(tensor.dtype, &pooled.map_err(|e| bad(format!("tensor `{name}`: {e}")))?))
        };
        let pools: Vec<_> = heads.pools.iter().enumerate().map(pool).collect::<Result<_, Failure>>()?;
        let head_bytes = tensor.data.len() / heads.count;
        for block in &heads.blocks {
            let (bytes, head) = match *block {
                Block::Copy(head) => (tensor.data, head),
                Block::Pooled { pool, head } => (pools.get(pool).map_or(&[][..], Vec::as_slice), head),
            };
            let Some(bytes) = bytes.get(head * head_bytes..(head + 1) * head_bytes) else {
                return Err(bad(format!("tensor `{name}` has no head {head}: please report this")));
            };
            write(bytes)?;
        }
        Ok(())
    }
}

/// Numbers as a file stores them, rounded to the nearest, ties to even.
fn encode(dtype: Dtype, numbers: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::BF16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// The index with the sizes of the new tensors; places stay.
pub(super) fn rewritten_index(index: &Map<String, Value>, plan: &Plan<'_>) -> String {
    let mut index = index.clone();
    let metadata = index.entry("metadata").or_insert_with(|| Map::new().into());
    if let Some(metadata) = metadata.as_object_mut() {
        metadata.insert("total_size".to_owned(), plan.bytes().into());
        if metadata.contains_key("total_parameters") {
            metadata.insert("total_parameters".to_owned(), plan.parameters()[1].into());
        }
    }
    format!("{:#}\n", Value::Object(index))
}

/// A directory that has another name until it is complete, and that is removed if it never is: after an error or a panic, but
/// not where the process is killed.
#[derive(Debug)]
pub(super) struct Output {
    partial: PathBuf,
    target: PathBuf,
    finished: bool,
}

impl Output {
    /// Makes the directory beside `target`, which must not exist and not lie inside `input`.
    pub(super) fn create(target: &Path, input: &Path) -> Result<Self, Failure> {
        let why = |e: &dyn std::fmt::Display| failed(target, e);
        // A link that leads nowhere is there, too.
        if target.symlink_metadata().is_ok() {
            return Err(why(&"it exists already: name a directory that does not"));
        }
        let Some(name) = target.file_name() else { return Err(why(&"no name of a directory")) };
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let parent = parent.canonicalize().map_err(|e| failed(parent, &e))?;
        if parent.starts_with(input.canonicalize().map_err(|e| failed(input, &e))?) {
            return Err(why(&format!("it must not lie inside {}", input.display())));
        }
        let mut partial = name.to_owned();
        partial.push(format!(".partial-{}", std::process::id()));
        let partial = parent.join(partial);
        std::fs::create_dir(&partial).map_err(|e| failed(&partial, &e))?;
        Ok(Self { partial, target: parent.join(name), finished: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives the directory its name.
    pub(super) fn finish(mut self) -> Result<(), Failure> {
        std::fs::rename(&self.partial, &self.target).map_err(|e| failed(&self.target, &e))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = std::fs::remove_dir_all(&self.partial)
        {
            eprintln!("gqa: {} could not be removed: {error}", self.partial.display());
        }
    }
}
