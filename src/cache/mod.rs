//! The KV cache in GPU memory: many layers, many sequences with lengths of their own, in pages that they may share.

mod copies;
#[cfg(feature = "safetensors")]
mod saved;
mod shape;

use std::sync::Arc;

use crate::caps::Caps;
use crate::device::create_buffer;
use crate::error::Error;
use crate::pages::{Place, SequenceId, SequenceTable, Usage};
use crate::spec::AttentionSpec;

#[cfg(feature = "safetensors")]
pub use saved::Snapshot;
pub use shape::{CacheShape, PagedShape};
pub(crate) use shape::{Entry, Kind};

/// K and V of one layer. Where it exceeds what a binding can hold it is cut into shards.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Its buffers: all of the same shape, but that the last may have fewer pages.
    pub shards: Vec<Shard>,
    /// Which kind of layers it is.
    pub(crate) kind: u32,
}

/// A part of a layer, as `[kv_head][page][slot][dim]`, rows zero-padded to groups of four elements; behind the numbers of all rows the
/// headers of those that are stored in blocks, in the same order.
#[derive(Debug, Clone)]
pub struct Shard {
    /// Keys.
    pub k: wgpu::Buffer,
    /// Values; the same buffer where values lie in keys.
    pub v: wgpu::Buffer,
}

/// Keys and values of many sequences, for all layers of a model.
///
/// Lengths and pages live on the host. [`extend`](Self::extend) makes room for new tokens before
/// [`Attention::prepare`](crate::Attention::prepare); [`Attention::append`](crate::Attention::append) then writes them, layer by
/// layer. After an error all is as before.
///
/// ```
/// # use gqa::{AttentionSpec, Dtype, KvCache, PagedShape};
/// # let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
/// // As in Gemma 3: five layers with a window for each that sees all. The former keep 1024 + 512 tokens of a text.
/// let global = AttentionSpec::builder(8, 4, 256).kv_dtype(Dtype::Q8).build()?;
/// let local = global.to_builder().window(1023, None).build()?;
/// let layers: Vec<_> = (0..34).map(|i| if i % 6 == 5 { &global } else { &local }).collect();
/// let shape = PagedShape { sequences: 8, page: 16, tokens: 32_768, longest_step: 512 };
/// let mut cache = KvCache::paged(&device, &layers, shape)?;
///
/// // A system prompt, shared by two conversations.
/// let mut encoder = device.create_command_encoder(&Default::default());
/// let prompt = cache.open()?;
/// cache.extend(&mut encoder, &[(prompt, 300)])?;
/// let (a, b) = (cache.fork(prompt)?, cache.fork(prompt)?);
/// cache.extend(&mut encoder, &[(a, 1), (b, 1)])?;
/// queue.submit([encoder.finish()]);
/// println!("{}", cache.usage());
/// # Ok::<(), gqa::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    device: wgpu::Device,
    kinds: Vec<Kind>,
    table: SequenceTable,
    layers: Arc<[Layer]>,
    copies: copies::Copies,
}

impl KvCache {
    /// Creates a contiguous cache: every sequence has a place of its own for `capacity` tokens in every layer.
    ///
    /// # Errors
    /// [`Error::Limit`] when a sequence exceeds what one storage binding or buffer of the device can hold,
    /// [`Error::OutOfMemory`], and [`Error::Field`] when a count is 0.
    pub fn new(device: &wgpu::Device, spec: &AttentionSpec, shape: CacheShape) -> Result<Self, Error> {
        let CacheShape { layers, sequences, capacity } = shape;
        for (field, value) in [("layers", layers), ("sequences", sequences), ("capacity", capacity)] {
            if value == 0 {
                return Err(Error::field(field, value, "it must be at least 1"));
            }
        }
        let kind = shape::kind(Entry::of(spec), None, (capacity, sequences), &Caps::of(device))?;
        Self::build(device, vec![kind], &vec![0; layers as usize], (sequences, capacity))
    }

    /// Creates a paged cache for a model whose layers have these specs, in order. Layers that hold the same and have the same window
    /// share a page table; layers with a window keep only what it still reaches.
    ///
    /// # Errors
    /// [`Error::Limit`] when one page exceeds what a storage binding can hold, [`Error::OutOfMemory`], and [`Error::Field`] when a
    /// count is 0 or a page is not a power of two.
    pub fn paged(device: &wgpu::Device, layers: &[&AttentionSpec], shape: PagedShape) -> Result<Self, Error> {
        let (kinds, of_layers) = shape::kinds_of(layers, shape, &Caps::of(device))?;
        Self::build(device, kinds, &of_layers, (shape.sequences, MAX_TOKENS))
    }

    fn build(
        device: &wgpu::Device,
        kinds: Vec<Kind>,
        of_layers: &[u32],
        (sequences, capacity): (u32, u32),
    ) -> Result<Self, Error> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let mut layers = Vec::new();
        for (nth, kind) in of_layers.iter().enumerate() {
            let of = kinds[*kind as usize];
            let mut shards = Vec::new();
            for shard in 0..of.shards() {
                let [k_size, v_size] = of.shard_bytes(shard);
                let buffer = |name: &str, size| {
                    create_buffer(device, &format!("gqa.cache.{name}{nth}.{shard}"), size, usage)
                };
                let k = buffer("k", k_size)?;
                let v = if v_size == 0 { k.clone() } else { buffer("v", v_size)? };
                shards.push(Shard { k, v });
            }
            layers.push(Layer { shards, kind: *kind });
        }
        let pools: Vec<_> = kinds.iter().map(|kind| kind.pool).collect();
        let table = SequenceTable::new(sequences, capacity, &pools);
        let copies = copies::Copies::default();
        Ok(Self { device: device.clone(), kinds, table, layers: layers.into(), copies })
    }

    /// Opens an empty sequence.
    ///
    /// # Errors
    /// [`Error::NoFreeSequence`] when all are open.
    pub fn open(&mut self) -> Result<SequenceId, Error> {
        self.table.open()
    }

    /// Opens a sequence that begins as another is now, in the same pages: nothing is copied until one of the two grows, and then the
    /// last page only. (In a contiguous cache, [`Self::new`], that page is all of the sequence.)
    ///
    /// # Errors
    /// [`Error::NoFreeSequence`], [`Error::StaleSequence`], [`Error::OutOfMemory`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId, Error> {
        self.copies.make_room(&self.device, &self.kinds)?;
        self.table.fork(id)
    }

    /// Closes a sequence and frees its pages, but for those that others share.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub fn close(&mut self, id: SequenceId) -> Result<(), Error> {
        self.table.close(id)
    }

    /// Makes room for new tokens at the end of several sequences, or of none. Records copies of pages that a sequence can no longer
    /// share with its forks: submit `encoder` before, or with, what appends the tokens. The next step must append them all.
    ///
    /// # Errors
    /// [`Error::CacheFull`], [`Error::SequenceFull`], [`Error::StaleSequence`], [`Error::RepeatedSequence`]; nothing has changed.
    pub fn extend(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        growth: &[(SequenceId, u32)],
    ) -> Result<(), Error> {
        self.copies.pages.clear();
        self.table.extend(growth, &mut self.copies.pages)?;
        self.copies.record(encoder, &self.kinds, &self.layers);
        Ok(())
    }

    /// Takes pages for tokens to come, without making the sequences longer: for lengths that live on the GPU
    /// ([`Attention::prepare_loop`](crate::Attention::prepare_loop)). [`Self::advance`] tells how many have come.
    ///
    /// # Errors
    /// As [`Self::extend`].
    pub fn reserve(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        growth: &[(SequenceId, u32)],
    ) -> Result<(), Error> {
        self.copies.pages.clear();
        self.table.reserve(growth, &mut self.copies.pages)?;
        self.copies.record(encoder, &self.kinds, &self.layers);
        Ok(())
    }

    /// Counts tokens that were appended into reserved pages.
    ///
    /// # Errors
    /// [`Error::Field`] when fewer are reserved, [`Error::StaleSequence`].
    pub fn advance(&mut self, id: SequenceId, tokens: u32) -> Result<(), Error> {
        self.table.advance(id, tokens)
    }

    /// Forgets all but the first `len` tokens of a sequence. Costs nothing on the GPU.
    ///
    /// # Errors
    /// [`Error::Field`] when it has fewer, or when a layer's window would reach back to keys that it has let go;
    /// [`Error::StaleSequence`].
    pub fn truncate(&mut self, id: SequenceId, len: u32) -> Result<(), Error> {
        self.table.truncate(id, len)
    }

    /// Forgets the first `tokens` tokens of a sequence: no query sees them any more, and their pages are free. All others keep their
    /// positions.
    ///
    /// # Errors
    /// [`Error::Field`] when it has fewer, [`Error::StaleSequence`].
    pub fn evict(&mut self, id: SequenceId, tokens: u32) -> Result<(), Error> {
        self.table.evict(id, tokens)
    }

    /// Forgets the tokens of every sequence; all stay open.
    pub fn clear(&mut self) {
        self.table.clear();
    }

    /// Moves pages so that every sequence lies in as few shards as it can, in order, and the free pages are the last ones. Returns how
    /// many moved. Steps that were prepared before are stale.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn defragment(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<u32, Error> {
        self.copies.make_room(&self.device, &self.kinds)?;
        self.copies.moves.clear();
        self.table.defragment(&mut self.copies.moves);
        self.copies.record_moves(encoder, &self.kinds, &self.layers);
        // What waits in the spare page moves twice, and arrives once.
        Ok(self.copies.moves.iter().filter(|moved| matches!(moved.to, Place::Page(_))).count() as u32)
    }

    /// Records copying all that the cache holds of a sequence into a buffer that can be mapped: the first half of saving it.
    ///
    /// # Errors
    /// [`Error::StaleSequence`], [`Error::OutOfMemory`]; [`Error::Limit`] when the device has no buffer as large.
    #[cfg(feature = "safetensors")]
    pub fn snapshot(&self, encoder: &mut wgpu::CommandEncoder, id: SequenceId) -> Result<Snapshot, Error> {
        Snapshot::new(self, encoder, id)
    }

    /// Opens a sequence that was saved: [`Snapshot::to_bytes`]. Pages may be of another size, and windows shorter than they were.
    /// Submit what was recorded with the cache before: the queue writes ahead of what is submitted later.
    ///
    /// # Errors
    /// [`Error::Field`] for bytes that are damaged, or saved from layers of another kind; [`Error::CacheFull`],
    /// [`Error::SequenceFull`], [`Error::NoFreeSequence`].
    #[cfg(feature = "safetensors")]
    pub fn restore(&mut self, queue: &wgpu::Queue, bytes: &[u8]) -> Result<SequenceId, Error> {
        saved::restore(self, queue, bytes)
    }

    /// Tokens of one sequence, evicted ones included.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub fn len(&self, id: SequenceId) -> Result<u32, Error> {
        self.table.len(id)
    }

    /// Tokens at the beginning of a sequence that were evicted.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub fn evicted(&self, id: SequenceId) -> Result<u32, Error> {
        self.table.begin(id)
    }

    /// Whether no sequence holds a token.
    pub fn is_empty(&self) -> bool {
        self.table.used() == 0
    }

    /// What is in use. `Display` shows it as a table.
    pub fn usage(&self) -> Usage {
        self.table.usage()
    }

    /// That the accounts of pages are sound: for tests.
    ///
    /// # Errors
    /// Says what is not.
    #[doc(hidden)]
    pub fn check(&self) -> Result<(), String> {
        self.table.check()
    }

    /// Buffers of every layer.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Bytes of GPU memory, over all layers.
    pub fn size(&self) -> u64 {
        let values = |shard: &Shard| if shard.k == shard.v { 0 } else { shard.v.size() };
        let shards = self.layers.iter().flat_map(|layer| &layer.shards);
        shards.map(|shard| shard.k.size() + values(shard)).sum()
    }

    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.device
    }
    pub(crate) fn shared_layers(&self) -> Arc<[Layer]> {
        Arc::clone(&self.layers)
    }
    pub(crate) fn table(&self) -> &SequenceTable {
        &self.table
    }

    #[cfg(feature = "cli")]
    pub(crate) fn kind(&self, kind: usize) -> Option<&Kind> {
        self.kinds.get(kind)
    }

    /// The kind of layers that attention with `spec` is for.
    pub(crate) fn kind_of(&self, spec: &AttentionSpec) -> Result<(usize, Kind), Error> {
        let needed = Entry::of(spec);
        let find = |fits: &dyn Fn(&Kind) -> bool| {
            let found = self.kinds.iter().enumerate().find(|(_, kind)| kind.entry == needed && fits(kind));
            found.map(|(index, kind)| (index, *kind))
        };
        let exact = find(&|kind| kind.window.is_some() && kind.window == spec.window_left());
        exact.or_else(|| find(&|kind| kind.window.is_none())).ok_or_else(|| {
            let window = |window: Option<u32>| match window {
                Some(keys) => format!(" with a window of {keys} before"),
                None => String::new(),
            };
            let found: Vec<_> =
                self.kinds.iter().map(|k| format!("{}{}", k.entry, window(k.window))).collect();
            let needed = format!("{needed}{}", window(spec.window_left()));
            Error::CacheMismatch { needed, found: found.join(", or ") }
        })
    }
}

/// Tokens of a sequence stay below, where pages are the only other limit.
const MAX_TOKENS: u32 = u32::MAX >> 1;
