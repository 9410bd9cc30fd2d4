//! The KV cache in GPU memory: many layers, many sequences with lengths of their own.

use std::sync::Arc;

use crate::caps::Caps;
use crate::device::create_buffer;
use crate::error::Error;
use crate::pages::{PoolShape, SequenceId, SequenceTable};
use crate::shader::row_fours;
use crate::spec::{AttentionSpec, Dtype};

/// Shape of a [`KvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers of the model; each has buffers of its own.
    pub layers: u32,
    /// Sequences that can be open at once.
    pub sequences: u32,
    /// Tokens that each sequence can hold.
    pub capacity: u32,
}

/// What of a spec a cache depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    kv_heads: u32,
    head_dim: u32,
    /// 0 where values lie in keys.
    v_head_dim: u32,
    dtype: Dtype,
}

impl Entry {
    pub(crate) fn of(spec: &AttentionSpec) -> Self {
        Self {
            kv_heads: spec.kv_heads(),
            head_dim: spec.head_dim(),
            v_head_dim: if spec.v_in_k() { 0 } else { spec.v_head_dim() },
            dtype: spec.kv_dtype(),
        }
    }
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kv_heads, head_dim, v_head_dim, dtype } = self;
        write!(f, "{kv_heads} KV heads of {head_dim} and {v_head_dim} in {dtype}")
    }
}

/// K and V of one layer, as `[sequence][kv_head][slot][dim]`, rows zero-padded to groups of four elements.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Keys.
    pub k: wgpu::Buffer,
    /// Values; the same buffer where values lie in keys.
    pub v: wgpu::Buffer,
}

/// Keys and values of many sequences, for all layers of a model.
///
/// Lengths live on the host. [`extend`](Self::extend) makes room for new tokens before
/// [`Attention::prepare`](crate::Attention::prepare); [`Attention::append`](crate::Attention::append) then writes them, layer by
/// layer. Shortening costs nothing on the GPU.
#[derive(Debug)]
pub struct KvCache {
    entry: Entry,
    table: SequenceTable,
    layers: Arc<[Layer]>,
}

impl KvCache {
    /// Creates the buffers of every layer.
    ///
    /// # Errors
    /// [`Error::Limit`] when a layer exceeds what one storage binding or buffer of the device can hold,
    /// [`Error::OutOfMemory`], and [`Error::Field`] when a count is 0.
    pub fn new(device: &wgpu::Device, spec: &AttentionSpec, shape: CacheShape) -> Result<Self, Error> {
        let caps = Caps::of(device);
        for (field, value) in
            [("layers", shape.layers), ("sequences", shape.sequences), ("capacity", shape.capacity)]
        {
            if value == 0 {
                return Err(Error::field(field, value, "it must be at least 1"));
            }
        }
        let k_size = layer_bytes(spec, shape, spec.head_dim(), &caps)?;
        let v_size = layer_bytes(spec, shape, spec.v_head_dim(), &caps)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let buffer =
            |name: &str, layer, size| create_buffer(device, &format!("gqa.cache.{name}{layer}"), size, usage);
        let layers = (0..shape.layers)
            .map(|i| {
                let k = buffer("k", i, k_size)?;
                let v = if spec.v_in_k() { k.clone() } else { buffer("v", i, v_size)? };
                Ok(Layer { k, v })
            })
            .collect::<Result<_, Error>>()?;
        // Each sequence has one page.
        let (page, pages) = (shape.capacity, shape.sequences);
        let pool = PoolShape { page, pages, pages_per_shard: pages, window: None };
        let table = SequenceTable::new(shape.sequences, shape.capacity, &[pool]);
        Ok(Self { entry: Entry::of(spec), table, layers })
    }

    /// Opens an empty sequence.
    ///
    /// # Errors
    /// [`Error::NoFreeSequence`] when all are open.
    pub fn open(&mut self) -> Result<SequenceId, Error> {
        self.table.open()
    }

    /// Closes a sequence and frees its slots.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub fn close(&mut self, id: SequenceId) -> Result<(), Error> {
        self.table.close(id)
    }

    /// Makes room for new tokens at the end of several sequences, or of none.
    ///
    /// # Errors
    /// [`Error::SequenceFull`], [`Error::StaleSequence`], [`Error::RepeatedSequence`]; all lengths are as before.
    pub fn extend(&mut self, growth: &[(SequenceId, u32)]) -> Result<(), Error> {
        // Without forks there is nothing to copy.
        self.table.extend(growth, &mut Vec::new())
    }

    /// Forgets all but the first `len` tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Field`] when it has fewer, [`Error::StaleSequence`].
    pub fn truncate(&mut self, id: SequenceId, len: u32) -> Result<(), Error> {
        self.table.truncate(id, len)
    }

    /// Forgets the tokens of every sequence; all stay open.
    pub fn clear(&mut self) {
        self.table.clear();
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::StaleSequence`].
    pub fn len(&self, id: SequenceId) -> Result<u32, Error> {
        self.table.len(id)
    }

    /// Whether no sequence holds a token.
    pub fn is_empty(&self) -> bool {
        self.table.used() == 0
    }

    /// Buffers of every layer.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Bytes of GPU memory, over all layers.
    pub fn size(&self) -> u64 {
        let values = |layer: &Layer| if layer.k == layer.v { 0 } else { layer.v.size() };
        self.layers.iter().map(|layer| layer.k.size() + values(layer)).sum()
    }

    pub(crate) fn shared_layers(&self) -> Arc<[Layer]> {
        Arc::clone(&self.layers)
    }
    pub(crate) fn table(&self) -> &SequenceTable {
        &self.table
    }
    pub(crate) fn entry(&self) -> Entry {
        self.entry
    }
}

/// Bytes of K or V of one layer, checked against the device's limits.
fn layer_bytes(spec: &AttentionSpec, shape: CacheShape, dim: u32, caps: &Caps) -> Result<u64, Error> {
    let fours = u128::from(shape.sequences)
        * u128::from(spec.kv_heads())
        * u128::from(shape.capacity)
        * u128::from(row_fours(dim));
    let needed = u64::try_from(fours * 4 * u128::from(spec.kv_dtype().bytes())).unwrap_or(u64::MAX);
    let what = || format!("K or V of one layer ({} sequences of {} tokens)", shape.sequences, shape.capacity);
    let hint = "use fewer sequences, a smaller capacity or a smaller kv_dtype, or request a higher limit from the adapter";
    let limits = [
        ("max_storage_buffer_binding_size", caps.binding_size),
        ("max_buffer_size", caps.buffer_size),
        // Shader indices are u32 and count groups of four; whole bytes are the simpler bound to state.
        ("32-bit index", u64::from(u32::MAX) * 4),
    ];
    match limits.into_iter().find(|(_, found)| needed > *found) {
        Some((limit, found)) => Err(Error::Limit { what: what(), limit, needed, found, hint }),
        None => Ok(needed),
    }
}
