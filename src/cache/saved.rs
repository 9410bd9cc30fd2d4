//! Sequences as bytes: safetensors with the rows of every layer as the cache stores them, whatever its pages.
//!
//! Of layer `i` there are `layers.i.k` and `layers.i.v` with shape `[tokens, kv_heads, bytes]`, and `layers.i.k.headers` and
//! `layers.i.v.headers` where numbers are stored in blocks. Layers with a window have their last tokens only. The metadata says
//! what each layer holds, and which tokens were evicted: in lines of one entry, since entries come in any order, and one sequence is
//! to be one file.

use std::collections::HashMap;
use std::fmt::Write as _;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::copies::{buffer_of, sides};
use super::{Kind, KvCache};
use crate::device::create_buffer;
use crate::error::Error;
use crate::pages::SequenceId;

/// Copies of a sequence's pages on their way to the host. Made by [`KvCache::snapshot`].
///
/// Map the [buffer](Self::buffer) when the encoder's work is done, and give its bytes to [`Self::to_bytes`].
#[derive(Debug)]
pub struct Snapshot {
    buffer: wgpu::Buffer,
    len: u32,
    begin: u32,
    layers: Vec<SavedLayer>,
    kv_heads: Vec<u32>,
}

/// What is saved of a layer: a tensor for each side and plane.
#[derive(Debug)]
struct SavedLayer {
    kind: Kind,
    /// The first token that is kept, its page, and how many pages there are.
    kept: u32,
    first: u32,
    pages: u32,
    sides: usize,
}

/// Names of a layer's tensors: numbers and headers of keys, of values.
const NAMES: [[&str; 2]; 2] = [["k", "k.headers"], ["v", "v.headers"]];
const FORMAT: &str = "gqa.sequence.1";

/// What the metadata say: keys and values.
type Notes<'a> = HashMap<&'a str, &'a str>;

fn notes(metadata: &Option<HashMap<String, String>>) -> Option<Notes<'_>> {
    let lines = metadata.as_ref()?.get(FORMAT)?.lines();
    lines.map(|line| line.split_once(": ")).collect()
}

impl SavedLayer {
    /// The tensors of a layer: name, bytes of a row.
    fn tensors(&self) -> impl Iterator<Item = (&'static str, usize)> + use<> {
        let rows = self.kind.rows();
        let planes = (0..self.sides).flat_map(move |side| {
            let [numbers, headers] = [rows[side].words, rows[side].headers].map(|words| words as usize * 4);
            [(NAMES[side][0], numbers), (NAMES[side][1], headers)]
        });
        planes.filter(|(_, bytes)| *bytes > 0)
    }

    /// Slots of all its pages.
    fn slots(&self) -> usize {
        self.pages as usize * self.kind.pool.page as usize
    }

    /// For each row to be kept: its place among rows in pages (`[page][head][slot]`) and among rows by token (`[token][head]`).
    fn rows(&self, heads: usize, len: u32) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (page, first, kept) = (self.kind.pool.page, self.first, self.kept);
        (kept..len).flat_map(move |token| {
            let slot = token - first * page;
            (0..heads).map(move |head| {
                let paged = ((slot / page) as usize * heads + head) * page as usize + (slot % page) as usize;
                (paged, (token - kept) as usize * heads + head)
            })
        })
    }
}

impl Snapshot {
    pub(super) fn new(
        cache: &KvCache,
        encoder: &mut wgpu::CommandEncoder,
        id: SequenceId,
    ) -> Result<Self, Error> {
        let (len, begin) = (cache.table.len(id)?, cache.table.begin(id)?);
        let mut layers = Vec::new();
        let mut size = 0;
        for layer in cache.layers.iter() {
            let kind = cache.kinds[layer.kind as usize];
            let (first, pages) = cache.table.pages(id, layer.kind as usize)?;
            // What is reserved holds nothing yet.
            let pages = (pages.len() as u32).min(len.div_ceil(kind.pool.page).saturating_sub(first));
            let kept = cache.table.live_from(id, layer.kind as usize)?.min(len);
            let saved = SavedLayer { kind, kept, first, pages, sides: sides(layer).len() };
            let row: usize = saved.tensors().map(|(_, bytes)| bytes).sum();
            size += (saved.slots() * row) as u64 * u64::from(kind.entry.kv_heads());
            layers.push(saved);
        }
        let found = cache.device.limits().max_buffer_size;
        if size > found {
            return Err(Error::Limit {
                what: format!("a snapshot of {len} tokens"),
                limit: "max_buffer_size",
                needed: size,
                found,
                hint: "evict tokens first",
            });
        }
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let buffer = create_buffer(&cache.device, "gqa.snapshot", size.max(4), usage)?;
        let mut at = 0;
        for (layer, saved) in cache.layers.iter().zip(&layers) {
            let (_, pages) = cache.table.pages(id, layer.kind as usize)?;
            for side in 0..saved.sides {
                for plane in 0..2 {
                    for page in &pages[..saved.pages as usize] {
                        let shard = &layer.shards[(page / saved.kind.pool.pages_per_shard) as usize];
                        for (offset, bytes) in saved.kind.parts(*page, side, plane) {
                            encoder.copy_buffer_to_buffer(buffer_of(shard, side), offset, &buffer, at, bytes);
                            at += bytes;
                        }
                    }
                }
            }
        }
        let kv_heads = layers.iter().map(|saved| saved.kind.entry.kv_heads()).collect();
        Ok(Self { buffer, len, begin, layers, kv_heads })
    }

    /// What is to be mapped for reading, once the commands are done.
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// The sequence as a safetensors file, from the bytes of the mapped buffer.
    ///
    /// # Errors
    /// [`Error::Field`] when there are fewer bytes than the buffer has.
    pub fn to_bytes(&self, mapped: &[u8]) -> Result<Vec<u8>, Error> {
        if (mapped.len() as u64) < self.buffer.size() {
            let needed = format!("the buffer has {} bytes", self.buffer.size());
            return Err(Error::field("mapped", format!("{} bytes", mapped.len()), needed));
        }
        let mut rest = mapped;
        let mut tensors = Vec::new();
        let mut notes = format!("len: {}\nevicted: {}\n", self.len, self.begin);
        for (nth, (saved, heads)) in self.layers.iter().zip(&self.kv_heads).enumerate() {
            let heads = *heads as usize;
            let tokens = (self.len - saved.kept) as usize;
            let (entry, kept) = (saved.kind.entry, saved.kept);
            // A string takes whatever is written.
            let _ = writeln!(notes, "layers.{nth}: {entry}\nlayers.{nth}.first: {kept}");
            for (name, bytes) in saved.tensors() {
                let (paged, behind) = rest.split_at(saved.slots() * heads * bytes);
                rest = behind;
                let mut by_token = vec![0; tokens * heads * bytes];
                for (from, to) in saved.rows(heads, self.len) {
                    by_token[to * bytes..][..bytes].copy_from_slice(&paged[from * bytes..][..bytes]);
                }
                tensors.push((format!("layers.{nth}.{name}"), vec![tokens, heads, bytes], by_token));
            }
        }
        let broken =
            |e: safetensors::SafeTensorError| Error::field("saved", e, "this is a bug: please report it");
        let mut views = Vec::new();
        for (name, shape, bytes) in &tensors {
            views.push((name, TensorView::new(Dtype::U8, shape.clone(), bytes).map_err(broken)?));
        }
        let metadata = HashMap::from([(FORMAT.to_owned(), notes)]);
        safetensors::serialize(views, Some(metadata)).map_err(broken)
    }
}

/// Reads a saved sequence into the cache.
pub(super) fn restore(cache: &mut KvCache, queue: &wgpu::Queue, bytes: &[u8]) -> Result<SequenceId, Error> {
    let damaged =
        |found: String| Error::field("saved", found, "a whole file of Snapshot::to_bytes is needed");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(e.to_string()))?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))?;
    let notes = notes(header.metadata()).ok_or_else(|| damaged(format!("not of format {FORMAT}")))?;
    let text = |key: &str| notes.get(key).ok_or_else(|| damaged(format!("without {key}")));
    let number = |key: &str| text(key)?.parse::<u32>().map_err(|e| damaged(format!("{key}: {e}")));
    let (len, begin) = (number("len")?, number("evicted")?);
    // The first token that each kind of layers has, and the rows of every tensor.
    let mut kept = vec![begin; cache.kinds.len()];
    let mut tensors = Vec::new();
    for (nth, layer) in cache.layers.iter().enumerate() {
        let kind = cache.kinds[layer.kind as usize];
        let (needed, found) = (kind.entry.to_string(), *text(&format!("layers.{nth}"))?);
        if needed != found {
            return Err(Error::field("saved", found, format!("layer {nth} of this cache has {needed}")));
        }
        let first = number(&format!("layers.{nth}.first"))?;
        if !(begin..=len).contains(&first) {
            return Err(damaged(format!("of {len} tokens, {begin} evicted, layer {nth} from {first} on")));
        }
        kept[layer.kind as usize] = kept[layer.kind as usize].max(first);
        let saved = SavedLayer { kind, kept: first, first: 0, pages: 0, sides: sides(layer).len() };
        for (name, bytes) in saved.tensors() {
            let name = format!("layers.{nth}.{name}");
            let tensor = file.tensor(&name).map_err(|e| damaged(e.to_string()))?;
            let shape = [(len - first) as usize, kind.entry.kv_heads() as usize, bytes];
            if tensor.shape() != shape || tensor.dtype() != Dtype::U8 {
                return Err(damaged(format!("{name} with shape {:?}, not {shape:?}", tensor.shape())));
            }
            tensors.push(tensor.data());
        }
    }
    if notes.contains_key(format!("layers.{}", cache.layers.len()).as_str()) {
        return Err(damaged(format!("of more than {} layers", cache.layers.len())));
    }
    let id = cache.table.restore((len, begin), &kept)?;
    let mut tensors = tensors.into_iter();
    for (nth, layer) in cache.layers.iter().enumerate() {
        let kind = cache.kinds[layer.kind as usize];
        let (first, pages) = cache.table.pages(id, layer.kind as usize)?;
        let saved_from = number(&format!("layers.{nth}.first"))?;
        // Of what was saved, what the pages here begin with.
        let kept = saved_from.max(first * kind.pool.page).min(len);
        let saved = SavedLayer { kind, kept, first, pages: pages.len() as u32, sides: sides(layer).len() };
        let heads = kind.entry.kv_heads() as usize;
        for side in 0..saved.sides {
            let rows = kind.rows()[side];
            let planes = [rows.words, rows.headers].into_iter().filter(|words| *words > 0);
            for (plane, words) in planes.enumerate() {
                let (bytes, data) = (words as usize * 4, tensors.next().unwrap_or_default());
                let skipped = (kept - saved_from) as usize * heads;
                let mut paged = vec![0; saved.slots() * heads * bytes];
                for (to, from) in saved.rows(heads, len) {
                    let from = (skipped + from) * bytes;
                    paged[to * bytes..][..bytes].copy_from_slice(&data[from..][..bytes]);
                }
                for (page, image) in pages.iter().zip(paged.chunks(heads * kind.pool.page as usize * bytes)) {
                    let shard = &layer.shards[(page / kind.pool.pages_per_shard) as usize];
                    for ((offset, size), rows) in
                        kind.parts(*page, side, plane).zip(image.chunks(kind.pool.page as usize * bytes))
                    {
                        debug_assert_eq!(size, rows.len() as u64);
                        queue.write_buffer(buffer_of(shard, side), offset, rows);
                    }
                }
            }
        }
    }
    Ok(id)
}
