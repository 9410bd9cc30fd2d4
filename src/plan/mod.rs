//! Which kernels, tiles and chunks for a spec on given caps, and why. Pure: no GPU is asked.

mod backward;
mod input;
mod work;

use crate::caps::Caps;
use crate::error::Error;
use crate::params::{AppendItem, CombineItem, MAP_KEYS, WorkItem};
use crate::shader::{BROADCAST_LANES, F16, Kernel, Tile, Variant, row_fours};
use crate::spec::AttentionSpec;

pub use backward::{BackwardLists, BackwardPlan};
pub use input::{Cut, MaskPlace, Shared, Span, StepAppend, StepInput, StepSequence, Traffic};
pub use work::WorkLists;

/// Most rows that [`Kernel::Decode`] packs: beyond, accumulators leave the registers.
const DECODE_ROWS: u32 = 16;
/// Most rows of [`Kernel::DecodeSubgroup`]: beyond, rows fill the lanes better than elements do.
const DECODE_SUBGROUP_ROWS: u32 = 7;
/// New tokens that one workgroup appends at most, and elements of them that it stages: 8 KiB.
const MAX_RUN: u32 = 16;
const RUN_ELEMENTS: u32 = 2048;
/// Invocations of the kernels that are not tiled.
pub(crate) const FLAT_THREADS: u32 = 64;

/// Which family of kernels a plan takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// What suits the adapter.
    #[default]
    Auto,
    /// Tiles in workgroup memory: any adapter.
    Portable,
    /// One subgroup a workgroup: software adapters.
    Subgroup,
}

/// What a caller may choose. The default suits the adapter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// Which kernels.
    pub family: Family,
    /// Keys of a chunk, where it should not follow from the batch.
    pub chunk: Option<u32>,
    /// Compile with bounds checks and loop bounds: slower, for debugging.
    pub checked: bool,
    /// Count reads of K and V into [`Attention::fetch_counter`](crate::Attention::fetch_counter): slower, for proofs.
    pub count_fetches: bool,
    /// Queries may share one buffer with outputs and LSE, as tensors of a framework that allocates from pools do: then they are
    /// bound as if they were written.
    pub pooled: bool,
}

/// Kernels, tiles and chunks for one spec on one adapter. `Display` tells the reasons.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    spec: AttentionSpec,
    prefill: Variant,
    decode: Variant,
    combine: Variant,
    append: Variant,
    embed: Option<Variant>,
    mask: Option<(Variant, Variant)>,
    chunk: Option<u32>,
    fill: u32,
    caps: Caps,
    reasons: Vec<String>,
}

impl Plan {
    /// Plans `spec` on `caps`.
    ///
    /// # Errors
    /// [`Error::Field`] when `options` ask for what the adapter or the kernels cannot do.
    pub fn new(spec: &AttentionSpec, caps: &Caps, options: &Options) -> Result<Self, Error> {
        if let Some(chunk) = options.chunk.filter(|c| *c == 0) {
            return Err(Error::field("options.chunk", chunk, "a chunk has at least one key"));
        }
        if spec.kv_heads() > caps.workgroups {
            return Err(Error::Limit {
                what: "a dispatch over all KV heads".to_owned(),
                limit: "max_compute_workgroups_per_dimension",
                needed: spec.kv_heads().into(),
                found: caps.workgroups.into(),
                hint: "request the adapter's own limit",
            });
        }
        let lanes = caps.fixed_subgroup().filter(|lanes| BROADCAST_LANES.contains(lanes));
        let lanes = match (options.family, lanes) {
            (Family::Portable, _) => None,
            (Family::Auto, lanes) => lanes.filter(|_| caps.software),
            (Family::Subgroup, Some(lanes)) => Some(lanes),
            (Family::Subgroup, None) => {
                let found = match caps.subgroup {
                    Some((min, max)) => format!("Subgroup on an adapter with subgroups of {min} to {max}"),
                    None => "Subgroup on an adapter without subgroups".to_owned(),
                };
                return Err(Error::field(
                    "options.family",
                    found,
                    "it needs subgroups of exactly 4 or exactly 8 lanes",
                ));
            }
        };
        let mut reasons = Vec::new();
        let (prefill, decode) = match lanes {
            Some(lanes) => subgroup_tiles(spec, lanes, &mut reasons),
            None => portable_tiles(spec, caps, &mut reasons),
        };
        let f16 = match (caps.f16, caps.unpack_f16) {
            (true, _) => F16::Native,
            (_, true) => F16::Unpack,
            _ => F16::Integer,
        };
        let shuffle = caps.subgroup.is_some_and(|(min, _)| min % 8 == 0);
        if decode.0 == Kernel::Decode {
            reasons.push(match shuffle {
                true => "dot products are added up by subgroup shuffles: subgroups are multiples of 8 lanes"
                    .to_owned(),
                false => "dot products are added up in workgroup memory: no subgroups of 8 lanes or more"
                    .to_owned(),
            });
        }
        let fill = caps.fill();
        reasons.push(match options.chunk {
            Some(chunk) => format!("keys are cut into chunks of {chunk}, as asked"),
            None => format!("keys are cut into chunks only until {fill} workgroups are busy"),
        });
        let variant = |(kernel, tile)| Variant {
            spec: spec.clone(),
            kernel,
            tile,
            f16,
            shuffle: shuffle && kernel == Kernel::Decode,
            counted: options.count_fetches,
            pooled: options.pooled,
            workgroups: caps.workgroups,
        };
        let flat = |kernel| variant((kernel, Tile { rows: 1, keys: 1, threads: FLAT_THREADS }));
        Ok(Self {
            spec: spec.clone(),
            prefill: variant(prefill),
            decode: variant(decode),
            combine: flat(if spec.rotated() { Kernel::CombineRotated } else { Kernel::Combine }),
            append: variant(run(Kernel::Append, spec)),
            embed: spec.rotated().then(|| variant(run(Kernel::Embed, spec))),
            mask: spec.mask().is_dense().then(|| (flat(Kernel::Pack), flat(Kernel::Classify))),
            chunk: options.chunk,
            fill,
            caps: caps.clone(),
            reasons,
        })
    }

    /// The spec that was planned.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }
    /// The kernel for sequences of many rows.
    pub fn prefill(&self) -> &Variant {
        &self.prefill
    }
    /// The kernel for sequences of few rows; it may be the same as [`Self::prefill`].
    pub fn decode(&self) -> &Variant {
        &self.decode
    }
    /// Merges chunks.
    pub fn combine(&self) -> &Variant {
        &self.combine
    }
    /// Writes into the cache.
    pub fn append(&self) -> &Variant {
        &self.append
    }
    /// With a rotated cache: what rotates queries like its keys.
    pub fn embed(&self) -> Option<&Variant> {
        self.embed.as_ref()
    }
    /// With a dense mask: what packs it, and what finds the tiles that need not be read.
    pub fn mask(&self) -> Option<(&Variant, &Variant)> {
        self.mask.as_ref().map(|(pack, classify)| (pack, classify))
    }
    /// Merges partial results; not among [`Self::variants`], because [`Merge`](crate::Merge) compiles it where it is wanted.
    pub fn merge(&self) -> Variant {
        Variant { kernel: Kernel::Merge, counted: false, ..self.combine.clone() }
    }
    /// All variants that this plan compiles, each once.
    pub fn variants(&self) -> Vec<&Variant> {
        let mut all = vec![&self.prefill, &self.decode, &self.combine, &self.append];
        if self.prefill == self.decode {
            all.remove(1);
        }
        all.extend(&self.embed);
        all.extend(self.mask.iter().flat_map(|(pack, classify)| [pack, classify]));
        all
    }
    /// The work of one step; the input's words grow by what the lists refer to.
    pub fn work(&self, input: &mut StepInput) -> WorkLists {
        let mut lists = WorkLists::default();
        lists.fill(self, input);
        lists
    }
    /// Least keys of a chunk that follows from the batch.
    pub(crate) const LEAST_CHUNK: u32 = work::MIN_CHUNK as u32;

    /// Keys of a chunk, where they do not follow from the batch.
    pub(crate) fn fixed_chunk(&self) -> Option<u32> {
        self.chunk
    }
    /// Workgroups that fill the device.
    pub(crate) fn fill(&self) -> u32 {
        self.fill
    }
    /// Makes the work of a loop on the GPU; not among [`Self::variants`], because it is compiled where a loop is wanted.
    pub fn schedule(&self) -> Variant {
        Variant { kernel: Kernel::Schedule, counted: false, ..self.combine.clone() }
    }
    /// Bytes of one row of the state buffer.
    pub fn state_row_bytes(&self) -> u64 {
        (u64::from(row_fours(self.spec.v_head_dim())) + 1) * 16
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.spec)?;
        for (role, variant) in [("prefill", &self.prefill), ("decode", &self.decode)] {
            let Tile { rows, keys, threads } = variant.tile;
            writeln!(f, "{role:8} {:17} {rows} rows x {keys} keys, {threads} invocations", variant.kernel)?;
        }
        let names: Vec<_> = self.variants().iter().map(|variant| variant.kernel.name()).collect();
        writeln!(f, "variants compiled: {} ({})", names.len(), names.join(", "))?;
        for reason in &self.reasons {
            writeln!(f, "- {reason}")?;
        }
        Ok(())
    }
}

type Choice = (Kernel, Tile);

/// A kernel that stages rows in workgroup memory, as many as fit a few KiB.
fn run(kernel: Kernel, spec: &AttentionSpec) -> Choice {
    let widest = spec.head_dim().max(spec.v_head_dim()).next_multiple_of(32);
    let rows = (RUN_ELEMENTS / widest).clamp(1, MAX_RUN);
    (kernel, Tile { rows, keys: 1, threads: FLAT_THREADS })
}

/// Kernels whose workgroup is one subgroup.
fn subgroup_tiles(spec: &AttentionSpec, lanes: u32, reasons: &mut Vec<String>) -> (Choice, Choice) {
    let widest = spec.head_dim().max(spec.v_head_dim());
    let each = if widest <= 128 { 2 } else { 1 };
    reasons.push(format!(
        "a workgroup is one subgroup of {lanes}: on a software adapter barriers cost more than they share"
    ));
    reasons.push(format!(
        "prefill: {each} rows a lane, because queries and outputs of {widest} elements must stay close"
    ));
    let rows_across = |each| (Kernel::PrefillSubgroup, Tile { rows: lanes * each, keys: 1, threads: lanes });
    let prefill = rows_across(each);
    let group = spec.group();
    if group <= DECODE_SUBGROUP_ROWS {
        reasons.push(format!(
            "decode: the {group} rows of a group fit the registers, elements lie across lanes"
        ));
        return (prefill, (Kernel::DecodeSubgroup, Tile { rows: group, keys: 1, threads: lanes }));
    }
    let decode = rows_across(even_tiles(group, 16).div_ceil(lanes));
    reasons.push(format!(
        "decode: {group} rows of a group fill the lanes, rows lie across them {} at a time",
        decode.1.rows
    ));
    (prefill, decode)
}

/// Kernels that share tiles in workgroup memory.
fn portable_tiles(spec: &AttentionSpec, caps: &Caps, reasons: &mut Vec<String>) -> (Choice, Choice) {
    // norm_rms.wgsl adds a number for each row, and arrays begin at multiples of 16.
    let norm_bytes = |rows: u32| if spec.qk_norm().is_some() { (rows * 4).next_multiple_of(16) } else { 0 };
    // As in prefill.wgsl: q_part, kv_part (9 groups a row), weights, team.
    let prefill_bytes =
        |rows: u32| rows * 9 * 16 + 32 * 9 * 16 + 32 * rows * 4 + 8 * rows * 4 + norm_bytes(rows);
    let rows = if prefill_bytes(64) <= caps.workgroup_memory && caps.invocations >= 128 { 64 } else { 32 };
    reasons.push(format!(
        "prefill: {rows} rows, because {} KiB of workgroup memory hold the parts of {}",
        caps.workgroup_memory / 1024,
        if rows == 64 { "64" } else { "32, not of 64" },
    ));
    let prefill = (Kernel::Prefill, Tile { rows, keys: MAP_KEYS, threads: rows * 2 });

    // As in decode.wgsl and reduce_workgroup.wgsl: q_tile, scores, team_dots, row_max, merge.
    let (k4, keys) = (row_fours(spec.head_dim()), MAP_KEYS);
    // An invocation for each four columns of a value.
    let threads = row_fours(spec.v_head_dim()).next_power_of_two().max(64);
    let decode_bytes = |rows: u32| {
        let each = k4 * 16 + keys * 4 + threads * 4;
        rows * each + (rows * 4).next_multiple_of(16) + threads * 16 + threads * 4 + norm_bytes(rows)
    };
    let most = (1..=DECODE_ROWS).rev().find(|rows| decode_bytes(*rows) <= caps.workgroup_memory).unwrap_or(1);
    let group = spec.group();
    if group.div_ceil(most) > 2 * group.div_ceil(rows) {
        reasons.push(format!(
            "decode: as prefill, because {group} rows of a group would need {} tiles of {most}, each reading all keys",
            group.div_ceil(most)
        ));
        return (prefill, prefill);
    }
    let rows = even_tiles(group, most);
    reasons.push(if rows == group {
        format!("decode: all {rows} rows of a group in one tile, so K and V are read once per group")
    } else {
        format!("decode: tiles of {rows} rows, because {most} is what registers and workgroup memory hold")
    });
    (prefill, (Kernel::Decode, Tile { rows, keys, threads }))
}

/// Rows of a tile when `rows` are cut evenly into tiles of at most `most`.
fn even_tiles(rows: u32, most: u32) -> u32 {
    rows.div_ceil(rows.div_ceil(most))
}
