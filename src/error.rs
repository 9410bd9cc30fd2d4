//! The one error type: each variant says what was needed, what was found and what to do.

/// Why a call was refused. After an error nothing has changed: no cache length, no buffer, no command.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of the spec, the batch, the options or such lies outside what it may be, or a call has been left out.
    #[error("{field} is {found}: {needed}")]
    Field {
        /// The field's name, as in the API.
        field: &'static str,
        /// What was there.
        found: String,
        /// What would have been accepted.
        needed: String,
    },
    /// Something does not fit a limit of the device.
    #[error("{what} needs {needed}, but the device's {limit} is {found}: {hint}")]
    Limit {
        /// What was about to be made.
        what: String,
        /// The name of the limit, as in `wgpu::Limits`.
        limit: &'static str,
        /// What it needs, in the limit's unit.
        needed: u64,
        /// The limit's value.
        found: u64,
        /// What would help.
        hint: &'static str,
    },
    /// The device has no memory left. (In a browser such errors come later, to the device's own error handler.)
    #[error("the device has no memory for {what} of {needed} bytes: free buffers, or make the cache smaller")]
    OutOfMemory {
        /// Label of the buffer.
        what: String,
        /// Its size in bytes.
        needed: u64,
    },
    /// A sequence would outgrow its place in the cache.
    #[error(
        "sequence {sequence} needs {needed} slots, but has {capacity} and uses {used}: truncate it, close it and open another, \
         or create the cache with a larger capacity"
    )]
    SequenceFull {
        /// Index of the sequence in the cache.
        sequence: u32,
        /// Slots that it would need.
        needed: u64,
        /// Slots in use now.
        used: u32,
        /// Slots that it has.
        capacity: u32,
    },
    /// Sequences would need more pages of the cache than are free.
    #[error("the cache needs {needed} more pages of {slots} slots, but {free} are free: {hint}")]
    CacheFull {
        /// Pages that the call would need, beyond those that it gives back.
        needed: u64,
        /// Pages that are free.
        free: u64,
        /// Slots of a page.
        slots: u32,
        /// What would help.
        hint: &'static str,
    },
    /// Every sequence of the cache is open.
    #[error("all {capacity} sequences of the cache are open: close one, or create the cache with more")]
    NoFreeSequence {
        /// Sequences that the cache can hold.
        capacity: u32,
    },
    /// A handle of another cache, or of a sequence that was closed.
    #[error("the handle of sequence {sequence} is not valid here: {reason}")]
    StaleSequence {
        /// Index that the handle names.
        sequence: u32,
        /// Closed, or of another cache.
        reason: &'static str,
    },
    /// A sequence of the step does not lie any more where it lay when the step was prepared.
    #[error(
        "the step knows places that sequence {sequence} has given back since: record a step before its sequences are truncated, \
         evicted, closed, moved or extended again, then prepare or update it anew (a loop: prepare_loop)"
    )]
    StaleStep {
        /// Index of the sequence in the cache.
        sequence: u32,
    },
    /// Bindings of another step, or of memory that the step has left to grow.
    #[error(
        "the bindings are not of this step as it is now: call Attention::bind again, and keep the new ones"
    )]
    StaleBindings,
    /// One sequence twice in a batch: its rows would be written twice.
    #[error("sequence {sequence} appears twice in one batch: merge its entries, or prepare two steps")]
    RepeatedSequence {
        /// Index of the sequence in the cache.
        sequence: u32,
    },
    /// The cache was made for another shape or storage type.
    #[error("the cache was made for {found}, but the attention is for {needed}: create both from one spec")]
    CacheMismatch {
        /// What the attention's spec asks for.
        needed: String,
        /// What the cache holds.
        found: String,
    },
    /// The cache of the step has fewer layers.
    #[error("layer {layer} does not exist: the cache has {layers} (0 to {})", layers.saturating_sub(1))]
    NoSuchLayer {
        /// The layer asked for.
        layer: u32,
        /// Layers of the cache.
        layers: u32,
    },
    /// A buffer view is too small, misaligned or lacks a usage.
    #[error("buffer {name}: {problem} (needed {needed}, found {found})")]
    Buffer {
        /// Which view, as in the API: `q`, `new_k`, `mask`, `from.lse` ...
        name: &'static str,
        /// What is wrong.
        problem: &'static str,
        /// What would have been accepted.
        needed: String,
        /// What was there.
        found: String,
    },
    /// A shader was refused: a bug of this library or of the driver. The message names file and line. (In a browser such errors come later,
    /// to the device's own error handler.)
    #[error("shader {kernel} was refused: {message}; please report this with the output of `gqa info`")]
    Shader {
        /// Name of the kernel.
        kernel: &'static str,
        /// What the compiler said, with lines of the linked text mapped back to their files.
        message: String,
    },
}

impl Error {
    /// A field error, from anything printable.
    pub(crate) fn field(field: &'static str, found: impl ToString, needed: impl Into<String>) -> Self {
        Self::Field { field, found: found.to_string(), needed: needed.into() }
    }
}
