//! What a caller may choose of a plan.

use crate::shader::MatrixUnits;

/// Which family of kernels a plan takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum Family {
    /// What suits the adapter.
    #[default]
    Auto,
    /// Tiles in workgroup memory, or (decode, where subgroups have the lanes) in registers of a team of lanes: any adapter.
    Portable,
    /// One subgroup a workgroup: software adapters.
    Subgroup,
}

/// What a caller may choose. The default suits the adapter's class; `gqa tune` measures what suits the adapter itself.
///
/// With the feature `serde` it is what `gqa tune` writes, so that an application can read its user's choice:
///
/// ```
/// # #[cfg(feature = "serde")] {
/// let stored = r#"{"family": "portable", "decode_rows": 8}"#;
/// let options: gqa::Options = serde_json::from_str(stored)?;
/// assert_eq!(options.decode_rows, Some(8));
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Options {
    /// Which kernels.
    pub family: Family,
    /// Rows of a prefill tile: multiples of 4 that fit workgroup memory, or (subgroup kernels) 1 to 4 for each lane.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub prefill_rows: Option<u32>,
    /// Rows of a decode tile, at most: the group is cut evenly. With subgroup kernels, more than 8 are tiles of the prefill kernel, in
    /// multiples of the lanes. Refused where a group needs more than workgroup memory holds.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub decode_rows: Option<u32>,
    /// Whether decode holds rows in registers of teams of lanes, where subgroups have the lanes for it; `Some(true)` is refused where
    /// they have not. Only the portable family has the choice.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub decode_teams: Option<bool>,
    /// Workgroups that fill the device: keys are cut into chunks until there are as many.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub fill: Option<u32>,
    /// Keys of a chunk, where it should not follow from the batch.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub chunk: Option<u32>,
    /// What [`Caps::loop_iterations`](crate::Caps::loop_iterations) is to be, where the driver is one that it is not known of; `u32::MAX` for as many as
    /// there are.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub loop_iterations: Option<u32>,
    /// Prefill by products of 16 x 16 matrices of f16, added up in f32, for specs whose queries are f16, whose keys and values are f16 or
    /// fp8, with dims to 128; refused for others. Weights, and queries after norm and RoPE, are rounded to f16. [`MatrixUnits::Cooperative`] promises that the adapter has such products
    /// (`wgpu::Adapter::cooperative_matrix_properties`), and needs a device with `EXPERIMENTAL_COOPERATIVE_MATRIX`, which wgpu gives
    /// to programs that accept what is experimental.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub matrix_units: MatrixUnits,
    /// Compile with wgpu's bounds checks and loop bounds. By default shaders go without them: every index is proved in range by
    /// checks on the host of layouts, views and lengths (`src/pipeline.rs` has the proof), and tests run every kernel both ways.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub checked: bool,
    /// Count reads of K and V into [`Attention::fetch_counter`](crate::Attention::fetch_counter): slower, for proofs. While counting,
    /// kernels leave out what some of them otherwise read twice: the last key in the place of those beyond the end.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub count_fetches: bool,
    /// Queries may share one buffer with outputs and LSE, as tensors of a framework that allocates from pools do: then they are
    /// bound as if they were written.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub pooled: bool,
}
