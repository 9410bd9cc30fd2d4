//! Which kernels, tiles and chunks for a spec on given caps, and why. Pure: no GPU is asked.

mod backward;
mod input;
mod loops;
mod options;
mod tiles;
mod work;

use crate::caps::Caps;
use crate::error::Error;
use crate::params::{AppendItem, CombineItem, WorkItem};
use crate::shader::{F16, Kernel, Tile, Variant, row_fours};
use crate::spec::AttentionSpec;
use tiles::{Choice, Tiles};

pub use backward::{BackwardLists, BackwardPlan, Rounds};
pub use input::{Cut, MaskPlace, Shared, Span, StepAppend, StepInput, StepSequence, Traffic};
pub use options::{Family, Options};
pub use tiles::{ClassTiles, TABLE};
pub use work::WorkLists;

/// New tokens that one workgroup appends at most, and elements of them that it stages: 8 KiB.
const MAX_RUN: u32 = 16;
const RUN_ELEMENTS: u32 = 2048;
/// Invocations of the kernels that are not tiled.
pub(crate) const FLAT_THREADS: u32 = 64;

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
    longest_chunk: u32,
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
        let least_one = [
            ("options.chunk", options.chunk, "a chunk has at least one key"),
            ("options.fill", options.fill, "at least one workgroup fills a device"),
            ("options.decode_rows", options.decode_rows, "a tile has at least one row"),
        ];
        for (field, given, needed) in least_one {
            if given == Some(0) {
                return Err(Error::field(field, 0, needed));
            }
        }
        let caps = &Caps {
            loop_iterations: options.loop_iterations.or(caps.loop_iterations).filter(|n| *n < u32::MAX),
            ..caps.clone()
        };
        if spec.kv_heads() > caps.workgroups {
            return Err(Error::Limit {
                what: "a dispatch over all KV heads".to_owned(),
                limit: "max_compute_workgroups_per_dimension",
                needed: spec.kv_heads().into(),
                found: caps.workgroups.into(),
                hint: "request the adapter's own limit",
            });
        }
        let mut reasons = Vec::new();
        let Tiles { prefill, decode, fill } = Tiles::new(spec, caps, options, &mut reasons)?;
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
        reasons.push(match options.chunk {
            Some(chunk) => format!(
                "keys are cut into chunks of about {chunk}, as asked, in whole steps and of even length"
            ),
            None => format!("keys are cut into chunks only until {fill} workgroups are busy"),
        });
        let variant = |(kernel, tile)| Variant {
            spec: spec.clone(),
            kernel,
            tile,
            f16,
            shuffle: shuffle && kernel == Kernel::Decode,
            long_unit: tiles::long_unit(caps, kernel),
            rolled: false,
            matrix_units: options.matrix_units,
            counted: options.count_fetches,
            pooled: options.pooled,
            workgroups: caps.workgroups,
        };
        let flat = |kernel| variant((kernel, Tile { rows: 1, keys: 1, threads: FLAT_THREADS }));
        let (prefill, decode) = (variant(prefill), variant(decode));
        // Whole steps of both.
        let step = prefill.tile.keys.max(decode.tile.keys);
        let longest = loops::longest_walk(&prefill, caps).min(loops::longest_walk(&decode, caps));
        let longest_chunk = (longest / step).max(1).saturating_mul(step);
        if let Some(iterations) = caps.loop_iterations {
            reasons.push(format!(
                "chunks have at most {longest_chunk} keys: this driver ends the loops of an invocation after {iterations} iterations"
            ));
        }
        Ok(Self {
            spec: spec.clone(),
            prefill,
            decode,
            combine: flat(if spec.rotated() { Kernel::CombineRotated } else { Kernel::Combine }),
            append: variant(run(Kernel::Append, spec)),
            embed: spec.rotated().then(|| variant(run(Kernel::Embed, spec))),
            mask: spec.mask().is_dense().then(|| (flat(Kernel::Pack), flat(Kernel::Classify))),
            chunk: options.chunk,
            longest_chunk,
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
    /// Least and most keys of a chunk where no walk has more than `keys`: the same where they do not follow from the batch.
    pub(crate) fn chunk_bounds(&self, keys: u32) -> (u32, u32) {
        let (least, most) = self.chunk.map_or((work::MIN_CHUNK, u32::MAX), |chunk| (chunk, chunk));
        // Chunks are merged in loops, too.
        let merged =
            self.caps.loop_iterations.map_or(1, |iterations| keys.div_ceil(iterations.div_ceil(8).max(1)));
        // The GPU adds keys to it in 32 bits.
        let bound = |chunk: u32| chunk.max(merged).min(self.longest_chunk).min(1 << 31);
        (bound(least), bound(most))
    }
    /// What the keys of a chunk are a multiple of: one of 65 takes a kernel that walks 64 as long as one of 128. Not where they are fixed.
    pub(crate) fn chunk_step(&self) -> u32 {
        self.chunk.map_or_else(|| self.prefill.tile.keys.max(self.decode.tile.keys), |_| 1)
    }
    /// What it was made for.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }
    /// Workgroups that fill the device: until then keys are cut into chunks.
    pub fn fill(&self) -> u32 {
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

/// A kernel that stages rows in workgroup memory, as many as fit a few KiB.
fn run(kernel: Kernel, spec: &AttentionSpec) -> Choice {
    let widest = spec.head_dim().max(spec.v_head_dim()).next_multiple_of(32);
    let rows = (RUN_ELEMENTS / widest).clamp(1, MAX_RUN);
    (kernel, Tile { rows, keys: 1, threads: FLAT_THREADS })
}
