//! gqa (docs to come)
#![warn(missing_docs)]

mod attention;
mod batch;
mod cache;
mod caps;
mod device;
mod error;
mod layout;
mod pages;
pub mod params;
mod pipeline;
pub mod plan;
pub mod reference;
pub mod shader;
mod spec;
mod step;

#[cfg(feature = "cli")]
pub mod profile;
#[cfg(feature = "cli")]
pub mod verify;

pub use attention::{Attention, Bindings, Io, NewKv};
pub use batch::{Batch, Sequence};
pub use cache::{CacheShape, KvCache, Layer};
pub use caps::Caps;
pub use device::{WANTED_FEATURES, device_descriptor};
pub use error::Error;
pub use layout::{Layout, Shape};
pub use pages::SequenceId;
pub use plan::{Family, Options, Plan};
pub use spec::{AttentionSpec, Dtype, MAX_HEAD_DIM, MAX_HEADS, SpecBuilder};
pub use step::Step;
pub use wgpu;
