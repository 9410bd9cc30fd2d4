//! A checkpoint's directory: its shards, mapped into memory, and what lies beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{failed, read_text};
use crate::Failure;
use crate::case::header::{Header, Tensor, Unique};

/// Largest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;
const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const CONFIG: &str = "config.json";
/// Ends of files that hold weights in another form, and so would still have the old heads.
const OTHER_WEIGHTS: [&str; 11] =
    ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "index.json"];

/// One file of tensors.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) header: Header,
    map: Mmap,
    /// Where the data start.
    start: usize,
}

impl Shard {
    fn open(dir: &Path, name: &str) -> Result<Self, Failure> {
        let path = dir.join(name);
        let why = |e: &dyn std::fmt::Display| failed(&path, e);
        // Opening a pipe would wait forever.
        if !std::fs::metadata(&path).map_err(|e| why(&e))?.is_file() {
            return Err(why(&"not a file"));
        }
        let file = File::open(&path).map_err(|e| why(&e))?;
        // SAFETY: a map may not change while Rust sees it as a slice, and nothing here writes to it. Another program might:
        // then the numbers read are garbage, and where it truncates the file the system ends this process (SIGBUS). No
        // program that maps files can rule that out; the header is read once, and sizes are not read from the map again.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| why(&e))?;
        let (header, data) = Header::read(&map, MAX_HEADER).map_err(|e| why(&e))?;
        let start = map.len() - data.len();
        Ok(Self { name: name.to_owned(), header, map, start })
    }

    /// The tensors, by name.
    pub(super) fn tensors(&self) -> BTreeMap<&str, Tensor<'_>> {
        self.header.tensors(self.map.get(self.start..).unwrap_or_default())
    }
}

/// The part of an index that must be right.
#[derive(Deserialize)]
struct Index {
    weight_map: Unique<String>,
}

#[derive(Debug)]
pub(super) struct Checkpoint {
    pub(super) shards: Vec<Shard>,
    /// The index, where there is one.
    pub(super) index: Option<Map<String, Value>>,
    /// Files that are copied.
    pub(super) others: Vec<OsString>,
    /// Folders and weights in other forms, which are not.
    pub(super) left_out: Vec<String>,
}

impl Checkpoint {
    pub(super) fn open(dir: &Path) -> Result<Self, Failure> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        let (shards, index) = match (single.exists(), index.exists()) {
            (true, false) => (vec![Shard::open(dir, SINGLE)?], None),
            (false, true) => sharded(dir, &index)?,
            (true, true) => {
                let why = format!("it has both {SINGLE} and {INDEX}: remove the one that does not count");
                return Err(failed(dir, &why));
            }
            (false, false) => return Err(failed(dir, &format!("it has neither {SINGLE} nor {INDEX}"))),
        };
        let mut checkpoint = Self { shards, index, others: Vec::new(), left_out: Vec::new() };
        checkpoint.sort_others(dir)?;
        Ok(checkpoint)
    }

    /// Sorts what else lies in the directory.
    fn sort_others(&mut self, dir: &Path) -> Result<(), Failure> {
        for entry in std::fs::read_dir(dir).map_err(|e| failed(dir, &e))? {
            let name = entry.map_err(|e| failed(dir, &e))?.file_name();
            let text = name.to_string_lossy().into_owned();
            if text == CONFIG || text == INDEX || self.shards.iter().any(|shard| shard.name == text) {
                continue;
            }
            let path = dir.join(&name);
            let is_file = std::fs::metadata(&path).map_err(|e| failed(&path, &e))?.is_file();
            let weights = OTHER_WEIGHTS.iter().any(|end| text.ends_with(&format!(".{end}")));
            if is_file && !weights { self.others.push(name) } else { self.left_out.push(text) }
        }
        self.others.sort();
        self.left_out.sort();
        Ok(())
    }
}

type Sharded = (Vec<Shard>, Option<Map<String, Value>>);

/// Opens the shards that an index names, and holds them against it.
fn sharded(dir: &Path, path: &Path) -> Result<Sharded, Failure> {
    let text = read_text(path)?;
    let refuse = |why: String| failed(path, &why);
    let Index { weight_map: Unique(places) } = serde_json::from_str(&text).map_err(|e| failed(path, &e))?;
    let json: Map<String, Value> = serde_json::from_str(&text).map_err(|e| failed(path, &e))?;
    if !json.get("metadata").is_none_or(Value::is_object) {
        return Err(refuse("`metadata` is no object".to_owned()));
    }
    let mut shards = Vec::new();
    let names: BTreeSet<_> = places.values().collect();
    if let Some(name) = names.iter().find(|name| !is_plain(name)) {
        let needed = "the plain name of a .safetensors file beside the index";
        return Err(refuse(format!("the shard {name:?} is not {needed}")));
    }
    for name in names {
        let shard = Shard::open(dir, name)?;
        for tensor in shard.header.tensors.keys() {
            match places.get(tensor) {
                Some(place) if place == name => {}
                Some(place) => {
                    return Err(refuse(format!(
                        "tensor `{tensor}` lies in {name}, but the index says {place}"
                    )));
                }
                None => return Err(refuse(format!("tensor `{tensor}` of {name} is missing in the index"))),
            }
        }
        shards.push(shard);
    }
    for (tensor, place) in &places {
        let holds = |shard: &Shard| shard.name == *place && shard.header.tensors.contains_key(tensor);
        if !shards.iter().any(holds) {
            return Err(refuse(format!("tensor `{tensor}` is missing in {place}")));
        }
    }
    Ok((shards, Some(json)))
}

/// A name that cannot lead out of the directory, on any system, and that no other file of a checkpoint has.
fn is_plain(name: &str) -> bool {
    !name.starts_with('.') && name.ends_with(".safetensors") && !name.contains(['/', '\\', ':', '\0'])
}
