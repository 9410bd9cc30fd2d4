//! What can go wrong between Burn and the library.

/// An error of this crate. After one of [`begin`](crate::GqaAttention::begin) the cache is as before; after one of `forward` it has what
/// `begin` made room for, and [`Step::undo`](crate::Step::undo) takes that back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library refuses.
    #[error(transparent)]
    Gqa(#[from] gqa::Error),
    /// The adapter gives no device, or Burn does not take it.
    #[error("no device for Burn: {0}")]
    Device(String),
    /// The tensor is not one of Burn's wgpu backend.
    #[error(
        "{name}: not a tensor of Burn's wgpu backend ({found}); create it on the device that shares the setup"
    )]
    Backend {
        /// Which argument.
        name: &'static str,
        /// What Burn said.
        found: String,
    },
    /// Burn could not compute the tensor, or another of its runtimes has it.
    #[error("{name}: Burn does not give its memory: {found}")]
    Memory {
        /// Which argument.
        name: &'static str,
        /// What Burn said.
        found: String,
    },
    /// The tensor has another shape, type or stride.
    #[error("{name}: {problem}: needed {needed}, found {found}")]
    Tensor {
        /// Which argument.
        name: &'static str,
        /// What is wrong.
        problem: &'static str,
        /// What was needed.
        needed: String,
        /// What was found.
        found: String,
    },
    /// The cache has changed since [`begin`](crate::GqaAttention::begin).
    #[error(
        "step: sequence {index} had {expected} tokens at `begin` and has {found} now; begin a step for each forward call"
    )]
    Stale {
        /// Index of the sequence in the step.
        index: usize,
        /// Tokens at `begin`.
        expected: u32,
        /// Tokens now.
        found: u32,
    },
    /// The layer cannot go forward in this pass of [`Training`](crate::Training).
    #[error("layer {layer}: {}", match used {
        true => "went forward already in this pass, and gradients need what it left: begin another with `train`".to_owned(),
        false => format!("the pass was begun with {layers} layers"),
    })]
    Layer {
        /// Which was asked for.
        layer: u32,
        /// Layers of the pass.
        layers: u32,
        /// Whether it went forward.
        used: bool,
    },
}
