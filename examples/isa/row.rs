//! What is known of one kernel on one family: the driver's figures and what follows from its texts.

use gqa::shader::Tile;
use serde::{Deserialize, Serialize};

use crate::blocks::{loops, weights};
use crate::mix::{Mix, count};
use crate::radv::{Compiled, Result};
use crate::specs::Candidate;

/// One line of the report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// As RADV_FORCE_FAMILY has it.
    pub(crate) family: String,
    /// The driver and its version.
    pub(crate) driver: String,
    /// Kernel and spec.
    pub(crate) name: String,
    /// Rows of the tile.
    pub(crate) rows: u32,
    /// Keys of the tile.
    pub(crate) keys: u32,
    /// Invocations of a workgroup.
    pub(crate) threads: u32,
    /// Lanes of a wave.
    pub(crate) wave: u32,
    /// Vector registers.
    pub(crate) vgprs: u64,
    /// Scalar registers.
    pub(crate) sgprs: u64,
    /// Vector registers that went to memory.
    pub(crate) spilled_vgprs: u64,
    /// Scalar registers that went to vector registers.
    pub(crate) spilled_sgprs: u64,
    /// Bytes of memory that each invocation needs for what fits no register.
    pub(crate) scratch: u64,
    /// Bytes of workgroup memory.
    pub(crate) lds: u64,
    /// Waves that one SIMD holds.
    pub(crate) subgroups: u64,
    /// Bytes of code.
    pub(crate) code: u64,
    /// Cycles of a wave alone, by the compiler's model.
    pub(crate) latency: u64,
    /// Cycles for each 64 invocations on a full SIMD, by the compiler's model.
    pub(crate) inverse: u64,
    /// Inverse throughput for 1,000 multiply-add operations in the code, a wave of 64 lanes counting as 64.
    pub(crate) per_fma: Option<f64>,
    /// Inverse throughput for 1,000 multiply-adds that the problem needs, of kernels that attend.
    pub(crate) useful: Option<f64>,
    /// Multiplications in the code over those that the problem needs, both with the compiler's weights.
    pub(crate) agreement: Option<f64>,
    /// Instructions, each once.
    pub(crate) mix: Mix,
    /// Instructions, each as often as the compiler guesses that it runs.
    pub(crate) weighted: Mix,
    /// The loops, in the order of the code.
    pub(crate) loops: Vec<LoopRow>,
}

/// One round of a loop, without the loops inside it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct LoopRow {
    /// Number of its first block, as in the disassembly.
    pub(crate) block: usize,
    /// Loops around it, itself included.
    pub(crate) depth: u32,
    /// Its instructions.
    pub(crate) mix: Mix,
}

/// How far the two counts of multiplications may be apart.
const TOLERANCE: f64 = 0.25;

impl Row {
    /// Reads what the driver told of a candidate.
    pub(crate) fn of(candidate: &Candidate, compiled: &Compiled) -> Result<Self> {
        let get = |name| compiled.statistic(name);
        let Tile { rows, keys, threads } = candidate.variant.tile;
        // Without a disassembler for the family RADV gives its own text of the same instructions.
        let (wave, assembly) = (compiled.wave, compiled.text("Assembly"));
        let ir = compiled.text("ACO IR");
        let weights = weights(ir);
        let loops = loops(ir).into_iter().map(|l| LoopRow {
            block: l.header,
            depth: l.depth,
            mix: count(assembly, wave, &l.shares),
        });
        let weighted = count(assembly, wave, &weights);
        let inverse = get("Inverse Throughput")?;
        let per = |multiply_adds: f64| (multiply_adds > 0.0).then(|| 1000.0 * inverse as f64 / multiply_adds);
        let needed = needed(candidate);
        Ok(Self {
            name: candidate.name.clone(),
            rows,
            keys,
            threads,
            wave,
            vgprs: get("VGPRs")?,
            sgprs: get("SGPRs")?,
            spilled_vgprs: get("Spilled VGPRs")?,
            spilled_sgprs: get("Spilled SGPRs")?,
            scratch: get("Scratch size")?,
            lds: get("LDS size")?,
            subgroups: get("Subgroups per SIMD")?,
            code: get("Code size")?,
            latency: get("Latency")?,
            inverse,
            per_fma: per(weighted.multiply_adds * 64.0),
            useful: needed.and_then(per),
            agreement: needed.map(|needed| weighted.multiplies * 64.0 / needed),
            mix: count(assembly, wave, &Default::default()),
            weighted,
            loops: loops.collect(),
            ..Self::default()
        })
    }

    /// Whether a loop inside the loop over tiles is not unrolled, so that the model's trip counts are wrong and `useful` with them.
    pub(crate) fn is_doubtful(&self) -> bool {
        self.agreement.is_some_and(|ratio| (ratio - 1.0).abs() > TOLERANCE)
    }
}

/// Multiply-adds that 64 invocations owe to the problem when the loop over tiles runs 8 times, the compiler's guess.
fn needed(candidate: &Candidate) -> Option<f64> {
    let (spec, tile) = (&candidate.variant.spec, candidate.variant.tile);
    let attends = ["prefill", "decode"].iter().any(|k| candidate.variant.kernel.name().starts_with(k));
    let pairs = f64::from(tile.rows) * f64::from(tile.keys);
    let dims = f64::from(spec.head_dim() + spec.v_head_dim());
    attends.then(|| pairs * dims * 8.0 * 64.0 / f64::from(tile.threads))
}
