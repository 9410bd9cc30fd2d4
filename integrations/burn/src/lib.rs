//! Grouped-query attention for [Burn](https://burn.dev) tensors, by [`gqa`]: K/V heads are never expanded, the KV cache stays in
//! GPU memory, and nothing is copied between the two.
//!
//! Both sides record onto one `wgpu` queue. A tensor of Burn's wgpu backend is a range of a buffer; [`GqaAttention::forward`] binds
//! that very range, with the tensor's own offset and strides, and returns a new tensor that the kernels have written.
//!
//! | Burn has | here it is |
//! | --- | --- |
//! | `Device::wgpu_options().init_with_setup()`: a device and its [`WgpuSetup`] | what [`GqaAttention::new`] and [`KvCache::new`] take |
//! | `Tensor<3>` of `[tokens, heads, head_dim]` | queries, new keys, new values, outputs |
//! | `Tensor<4>` of `[sequences, heads, q_len, kv_len]`, float or bool | a dense mask: [`GqaAttention::add_mask`], [`GqaAttention::keep_mask`] |
//!
//! To train, [`GqaAttention::train`] begins a pass whose calls Burn's autodiff goes back through (feature `autodiff`, on by default).
//!
//! Everything else (masks, RoPE, storage types, pages, forks, windows) is the library's own: [`AttentionSpec`], [`KvCache`].
//!
//! ```no_run
//! use burn::tensor::{Device, Distribution, Tensor};
//! use gqa_burn::{AttentionSpec, CacheShape, GqaAttention, KvCache, Sequence};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (device, setup) = Device::wgpu_options().init_with_setup()?;
//! let spec = AttentionSpec::builder(9, 3, 64).build()?;
//! let attention = GqaAttention::new(&setup, spec.clone())?;
//! let mut cache = KvCache::new(&setup.device, &spec, CacheShape { layers: 1, sequences: 1, capacity: 2048 })?;
//! let chat = cache.open()?;
//!
//! // A prompt of 16 tokens; `x.matmul(w).reshape([16, 9, 64])` in a model.
//! let random = |heads| Tensor::<3>::random([16, heads, 64], Distribution::Default, &device);
//! let (q, k, v) = (random(9), random(3), random(3));
//! let mut step = attention.begin(&mut cache, &[Sequence::new(chat, 16)])?;
//! let out = attention.forward(&cache, &mut step, 0, [q, k, v])?;
//! assert_eq!(out.dims(), [16, 9, 64]);
//! # Ok(())
//! # }
//! ```

mod attention;
mod device;
mod error;
mod step;
#[cfg(feature = "autodiff")]
mod training;
mod view;

pub use attention::GqaAttention;
pub use burn::tensor::wgpu::WgpuSetup;
pub use device::{choose, open};
pub use error::Error;
pub use gqa::{
    self, AttentionSpec, CacheShape, Dtype, KvCache, Mask, Options, PagedShape, Rope, Sequence, SequenceId,
};
pub use step::Step;
#[cfg(feature = "autodiff")]
pub use training::Training;

/// The README's examples compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
