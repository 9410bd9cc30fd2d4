//! Links kernels from parts: text in, text out. WGSL at module scope knows no order, so linking is concatenation.
//!
//! A linked module is: directives, a prelude of constants, how lanes load units of rows where they do, one implementation of each part contract
//! (of a walk with few rows, too, two: `write_out::few`), the kernel.

mod parts;
mod prelude;
mod table;
mod units;
mod write_out;

use std::fmt::Write as _;

use crate::spec::AttentionSpec;

pub use parts::Access;
pub use table::TableLayout;
use units::Side;
pub(crate) use units::{UNIT, WIDE_UNIT};

#[derive(Debug, Clone, Copy)]
struct Source {
    file: &'static str,
    text: &'static str,
}

macro_rules! source {
    ($file:literal) => {
        $crate::shader::Source {
            file: concat!("shaders/", $file),
            text: include_str!(concat!("../../shaders/", $file)),
        }
    };
}
use source;

/// A compute shader of this library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Many rows: tiles of rows and keys in workgroup memory.
    Prefill,
    /// Few rows, any adapter: teams of invocations read keys, rows share them.
    Decode,
    /// Few rows, subgroups: teams of lanes hold rows in registers and walk keys of their own.
    DecodeTeams,
    /// Many rows, matrix units: products of 16 x 16 matrices of f16.
    PrefillMatrix,
    /// Many rows, small fixed subgroups: rows across lanes.
    PrefillSubgroup,
    /// Few rows, small fixed subgroups: elements across lanes.
    DecodeSubgroup,
    /// Merges the states of the parts of a row.
    Combine,
    /// The same, and turns outputs of rotated values back.
    CombineRotated,
    /// Writes new keys and values into the cache.
    Append,
    /// The same text: brings queries into the form of a rotated cache.
    Embed,
    /// Brings a dense mask into the step's own form.
    Pack,
    /// Finds out which tiles of a dense mask are visible, in part or wholly.
    Classify,
    /// Merges partial results of the same rows.
    Merge,
    /// Turns lengths on the GPU into work lists.
    Schedule,
    /// Backward: packs rows for the others.
    BackwardRows,
    /// Backward: queries.
    BackwardQ,
    /// Backward: keys and values.
    BackwardKv,
    /// Backward: queries, rows across lanes.
    BackwardQSubgroup,
    /// Backward: keys and values, keys across lanes.
    BackwardKvSubgroup,
    /// Backward: sinks.
    BackwardSinks,
    /// Backward: turns gradients back and stores them.
    BackwardStore,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Self; 21] = [
        Self::Prefill,
        Self::PrefillMatrix,
        Self::Decode,
        Self::DecodeTeams,
        Self::PrefillSubgroup,
        Self::DecodeSubgroup,
        Self::Combine,
        Self::CombineRotated,
        Self::Append,
        Self::Embed,
        Self::Pack,
        Self::Classify,
        Self::Merge,
        Self::Schedule,
        Self::BackwardRows,
        Self::BackwardQ,
        Self::BackwardKv,
        Self::BackwardQSubgroup,
        Self::BackwardKvSubgroup,
        Self::BackwardSinks,
        Self::BackwardStore,
    ];

    /// Its name: that of its file, and of its label behind `gqa.`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::DecodeTeams => "decode_teams",
            Self::PrefillMatrix => "prefill_matrix",
            Self::PrefillSubgroup => "prefill_subgroup",
            Self::DecodeSubgroup => "decode_subgroup",
            Self::Combine => "combine",
            Self::CombineRotated => "combine_rotated",
            Self::Append => "append",
            Self::Embed => "embed",
            Self::Pack => "pack",
            Self::Classify => "classify",
            Self::Merge => "merge",
            Self::Schedule => "schedule",
            Self::BackwardRows => "backward_rows",
            Self::BackwardQ => "backward_q",
            Self::BackwardKv => "backward_kv",
            Self::BackwardQSubgroup => "backward_q_subgroup",
            Self::BackwardKvSubgroup => "backward_kv_subgroup",
            Self::BackwardSinks => "backward_sinks",
            Self::BackwardStore => "backward_store",
        }
    }

    /// Whether it writes rows of a cache.
    pub(crate) const fn appends(self) -> bool {
        matches!(self, Self::Append | Self::Embed)
    }

    /// Whether it merges states.
    pub(crate) const fn combines(self) -> bool {
        matches!(self, Self::Combine | Self::CombineRotated)
    }

    /// Whether it reads keys and values for queries.
    pub(crate) const fn attends(self) -> bool {
        matches!(
            self,
            Self::Prefill
                | Self::PrefillMatrix
                | Self::Decode
                | Self::DecodeTeams
                | Self::PrefillSubgroup
                | Self::DecodeSubgroup
        )
    }

    /// Whether it reads keys and values for gradients.
    pub(crate) const fn differentiates(self) -> bool {
        matches!(
            self,
            Self::BackwardQ | Self::BackwardKv | Self::BackwardQSubgroup | Self::BackwardKvSubgroup
        )
    }

    fn source(self) -> Source {
        match self {
            Self::Prefill => source!("prefill.wgsl"),
            Self::Decode => source!("decode.wgsl"),
            Self::DecodeTeams => source!("decode_teams.wgsl"),
            Self::PrefillMatrix => source!("prefill_matrix.wgsl"),
            Self::PrefillSubgroup => source!("prefill_subgroup.wgsl"),
            Self::DecodeSubgroup => source!("decode_subgroup.wgsl"),
            Self::Combine => source!("combine.wgsl"),
            Self::CombineRotated => source!("combine_rotated.wgsl"),
            Self::Append | Self::Embed => source!("append.wgsl"),
            Self::Pack => source!("pack.wgsl"),
            Self::Classify => source!("classify.wgsl"),
            Self::Merge => source!("merge.wgsl"),
            Self::Schedule => source!("schedule.wgsl"),
            Self::BackwardRows => source!("backward_rows.wgsl"),
            Self::BackwardQ => source!("backward_q.wgsl"),
            Self::BackwardKv => source!("backward_kv.wgsl"),
            Self::BackwardQSubgroup => source!("backward_q_subgroup.wgsl"),
            Self::BackwardKvSubgroup => source!("backward_kv_subgroup.wgsl"),
            Self::BackwardSinks => source!("backward_sinks.wgsl"),
            Self::BackwardStore => source!("backward_store.wgsl"),
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Rows x keys that one workgroup holds at a time, and its invocations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows: (token, query head of the group) pairs; of kernels that walk rows, those of a step.
    pub rows: u32,
    /// Keys of a step of the walk.
    pub keys: u32,
    /// Invocations of the workgroup.
    pub threads: u32,
}

/// How f16 reaches a shader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum F16 {
    /// 16-bit stores; loads are whole words, converted by `unpack2x16float`.
    Native,
    /// Whole words, converted by `unpack2x16float`.
    Unpack,
    /// Whole words, converted in integer arithmetic.
    Integer,
}

/// What multiplies 16 x 16 matrices for [`Kernel::PrefillMatrix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MatrixUnits {
    /// Nothing: the kernel is not planned.
    #[default]
    None,
    /// The adapter's matrix units: wgpu's `EXPERIMENTAL_COOPERATIVE_MATRIX`.
    Cooperative,
    /// Plain arithmetic in f32 on any adapter: slow, it proves the kernel where there are no such units.
    Emulated,
}

/// Everything that decides the text of one linked kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// The problem.
    pub spec: AttentionSpec,
    /// Which shader.
    pub kernel: Kernel,
    /// Its tile.
    pub tile: Tile,
    /// How f16 is read and written.
    pub f16: F16,
    /// Whether [`Kernel::Decode`] reduces by subgroup shuffles.
    pub shuffle: bool,
    /// Most bytes that a lane loads at a time as 64-bit integers, which halve the components of a load: 0 where shaders may not use them.
    pub long_unit: u32,
    /// Whether loops over the parts of a head stay loops (long heads, backward, on software adapters, whose compilers take long else).
    pub rolled: bool,
    /// What multiplies matrices.
    pub matrix_units: MatrixUnits,
    /// Whether reads of K and V are counted.
    pub counted: bool,
    /// Whether queries may share a buffer with outputs.
    pub pooled: bool,
    /// Workgroups along one dispatch dimension.
    pub workgroups: u32,
}

/// Who will compile the text: they disagree on one directive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compiler {
    /// wgpu's own: rejects `enable subgroups`.
    Naga,
    /// A browser's: requires it.
    Tint,
}

/// A linked kernel, and where its lines come from.
#[derive(Debug, Clone)]
pub struct Linked {
    /// The WGSL text; its entry point is `main`.
    pub text: String,
    /// First line (from 1) of each file, in order; one that is linked twice is there twice.
    files: Vec<(u32, &'static str)>,
}

impl Linked {
    /// The file and its line (from 1; of loops written out that of their end) behind a line (from 1) of the linked text.
    pub fn locate(&self, line: u32) -> (&'static str, u32) {
        let at = self.files.partition_point(|(first, _)| *first <= line);
        match at.checked_sub(1).and_then(|i| self.files.get(i)) {
            Some((first, file)) => (file, line - first + 1),
            None => ("prelude", line),
        }
    }

    /// A compiler's message with each `wgsl:LINE` replaced by `FILE:LINE`.
    pub fn explain(&self, message: &str) -> String {
        let mut pieces = message.split("wgsl:");
        let mut out = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            let digits = piece.bytes().take_while(u8::is_ascii_digit).count();
            match piece[..digits].parse() {
                Ok(line) => {
                    let (file, line) = self.locate(line);
                    let _ = write!(out, "{file}:{line}{}", &piece[digits..]);
                }
                Err(_) => {
                    let _ = write!(out, "wgsl:{piece}");
                }
            }
        }
        out
    }
}

/// Links `variant` for `compiler`.
pub fn link(variant: &Variant, compiler: Compiler) -> Linked {
    let mut text = String::new();
    if variant.native_f16_out() || variant.uses_matrix_units() {
        text.push_str("enable f16;\n");
    }
    if variant.uses_matrix_units() {
        text.push_str("enable wgpu_cooperative_matrix;\n");
    }
    if compiler == Compiler::Tint && variant.uses_subgroups() {
        text.push_str("enable subgroups;\n");
    }
    variant.prelude(&mut text);
    if variant.loads_units() {
        for side in [Side::K, Side::V] {
            variant.unit_text(side, &mut text);
        }
    }
    let mut line = 1 + text.lines().count() as u32;
    let mut files = Vec::new();
    let counts = variant.loop_counts();
    for part in variant.parts().into_iter().chain([variant.kernel.source()]) {
        files.push((line, part.file));
        text.push_str(&write_out::write_out(part.text, &counts));
        line += part.text.lines().count() as u32;
        if let Some(each) = variant.few_rows_each().filter(|_| part.file == parts::ATTEND.file) {
            files.push((line, part.file));
            text.push_str(&write_out::few(part.text, &counts, each));
            line += part.text.lines().count() as u32;
        }
    }
    Linked { text, files }
}

/// Groups of four values in a row of the cache: rows are padded to whole groups.
pub const fn row_fours(dim: u32) -> u32 {
    dim.div_ceil(4)
}

/// Lanes of a team of [`Kernel::DecodeTeams`]: the fewest whose registers hold the queries and outputs of `rows` rows. None where 16 are too few.
pub fn team_lanes(spec: &AttentionSpec, rows: u32) -> Option<u32> {
    [4, 8, 16].into_iter().find(|lanes| {
        let [k, v] = [spec.head_dim(), spec.v_head_dim()].map(|dim| row_fours(dim).div_ceil(*lanes));
        // A float for each row and quad is what waits between loops.
        rows * (k + v) <= TEAM_FOURS && rows * lanes / 4 <= TEAM_SUMS && v <= MERGED_FOURS
    })
}

/// Groups of four floats of queries and outputs that an invocation holds at most: 128 registers of some 200.
const TEAM_FOURS: u32 = 32;
/// Sums of dot products, and weights, that an invocation holds at most.
const TEAM_SUMS: u32 = 32;
/// Those of outputs of a row: 64 invocations merge theirs in 8 KiB of workgroup memory.
const MERGED_FOURS: u32 = 8;

/// Lanes for which [`Kernel::PrefillSubgroup`] has a broadcast part.
pub const BROADCAST_LANES: [u32; 2] = [4, 8];
