//! Grouped-query attention on every GPU: prefill, decode and a KV cache for [`wgpu`].
//!
//! A program that owns a [`wgpu::Device`] gets attention recorded into its own command encoder, on Vulkan, Metal, DX12, GL and
//! WebGPU. Keys and values are read **once per group** of query heads (of groups beyond 16, once per 16 rows), never once per query
//! head: decoding is bound by that read, so it is the point of grouped-query attention
//! ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)). MHA (groups of 1) and MQA (one KV head) are the two ends of the same
//! [`AttentionSpec`].
//!
//! # A tour
//!
//! | you have | you call | how often |
//! | --- | --- | --- |
//! | heads, dims, storage types | [`AttentionSpec::builder`] | once |
//! | a device | [`Attention::new`], and [`Attention::warm_up`] for no wait at the first step | once per spec |
//! | a model's layers | [`KvCache::new`] | once |
//! | a conversation | [`KvCache::open`], at its end [`KvCache::close`] | once per sequence |
//! | new tokens | [`KvCache::extend`], [`Attention::prepare`] or [`Attention::update`] | once per forward call |
//! | their K, V and queries of a layer | [`Attention::append`], [`Attention::record`] | once per layer |
//! | sinks, weights of q and k norms | [`Attention::set_weights`] | once per layer of a model |
//! | a dense mask | [`Attention::mask`] | once per forward call |
//! | gradients of the outputs | [`Attention::prepare_backward`], [`Attention::backward`] | once per step, and once per layer |
//! | partial results of the same queries | [`Merge`] | as often as you like |
//! | many users | [`KvCache::paged`], [`KvCache::fork`], [`KvCache::evict`] | |
//! | a loop that the host does not watch | [`Attention::prepare_loop`], [`Attention::schedule`] | once, and once per step |
//! | a checkpoint with too many KV heads | [`uptrain::pool_heads`], or `gqa convert` | once per model |
//!
//! The library never submits and never waits for the GPU. [`Attention::record`] creates no buffer; the first use of a kernel compiles it on
//! the calling thread, unless [`Attention::warm_up`] has.
//!
//! ```
//! use gqa::{Attention, AttentionSpec, Batch, CacheShape, Dtype, Io, KvCache, NewKv, Options, Sequence};
//!
//! # let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
//! # let tensor = |elements: u64| {
//! #     let usage = wgpu::BufferUsages::STORAGE;
//! #     let descriptor = wgpu::BufferDescriptor { label: None, size: elements * 4, usage, mapped_at_creation: false };
//! #     device.create_buffer(&descriptor)
//! # };
//! let spec = AttentionSpec::builder(32, 8, 128).kv_dtype(Dtype::F16).build()?;
//! let attention = Attention::new(&device, spec.clone(), Options::default())?;
//! let mut cache = KvCache::new(&device, &spec, CacheShape { layers: 2, sequences: 4, capacity: 2048 })?;
//!
//! // A prompt of 100 tokens and, in the same call, the next token of another sequence.
//! let (prompt, chat) = (cache.open()?, cache.open()?);
//! let mut encoder = device.create_command_encoder(&Default::default());
//! cache.extend(&mut encoder, &[(prompt, 100), (chat, 1)])?;
//! let sequences = [Sequence::new(prompt, 100), Sequence::new(chat, 1)];
//! let step = attention.prepare(&queue, &cache, &Batch::new(&spec, &sequences))?;
//!
//! // The model's own tensors, [tokens, heads, dim]; other strides go into the batch.
//! let (q, out) = (tensor(101 * 32 * 128), tensor(101 * 32 * 128));
//! let (k, v) = (tensor(101 * 8 * 128), tensor(101 * 8 * 128));
//! for layer in 0..2 {
//!     let new = NewKv { k: k.as_entire_buffer_binding(), v: v.as_entire_buffer_binding() };
//!     attention.append(&mut encoder, &step, layer, new)?;
//!     let io = Io { q: q.as_entire_buffer_binding(), out: out.as_entire_buffer_binding(), lse: None };
//!     attention.record(&mut encoder, &step, layer, io)?;
//! }
//! queue.submit([encoder.finish()]);
//! # Ok::<(), gqa::Error>(())
//! ```
//!
//! # Which kernels run
//!
//! [`Plan`] chooses from the spec and the device's [`Caps`], and its `Display` says why; `gqa info --heads 32/8` prints it. Every
//! kernel runs without any optional feature; [`device_descriptor`] requests what makes them faster.
//!
//! By default shaders are compiled without wgpu's runtime checks, because every index is proved in range by checks on the host
//! (lengths that live on the GPU are clamped); [`Options::checked`] turns them on.
//!
//! # What is true
//!
//! [`mod@reference`] defines every result, in f64. [`verify`] and the `gqa` command (feature `cli`, on by default) hold the kernels
//! against it on the adapters of the machine at hand; applications switch the default features off.

mod attention;
mod batch;
mod cache;
mod caps;
mod device;
mod error;
mod layout;
mod merge;
mod pages;
pub mod params;
mod pipeline;
pub mod plan;
#[cfg(feature = "cli")]
pub mod profile;
pub mod quant;
pub mod reference;
mod rope;
pub mod shader;
mod spec;
mod step;
mod upload;
pub mod uptrain;
#[cfg(feature = "cli")]
pub mod verify;
mod weights;

pub use attention::{Attention, BackwardIo, BackwardStep, Bindings, Io, NewKv};
pub use batch::{Batch, Sequence};
#[cfg(feature = "safetensors")]
pub use cache::Snapshot;
pub use cache::{CacheShape, KvCache, Layer, PagedShape, Shard};
pub use caps::{Caps, Class};
pub use device::{WANTED_FEATURES, device_descriptor};
pub use error::Error;
pub use layout::{Layout, Shape};
pub use merge::{Merge, MergeLayout, MergeStep, Partial};
pub use pages::{PoolUsage, SequenceId, Usage};
pub use plan::{Family, Options, Plan};
pub use rope::{Pairing, Rope, Scaling};
pub use spec::{
    AttentionSpec, Dtype, MAX_HEAD_DIM, MAX_HEADS, MAX_V_HEAD_DIM, Mask, MaskLayout, RowLayout, SpecBuilder,
    alibi_slopes, hidden_below,
};
pub use step::Step;
pub use weights::LayerWeights;
pub use wgpu;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
