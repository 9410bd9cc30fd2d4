//! What instructions a text of the ISA has, and how many multiply-adds they are.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::blocks::label;

/// Instructions by what they cost. A kind inside VALU counts there, too.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Mix {
    /// Vector arithmetic, all of it.
    pub(crate) valu: f64,
    /// Of it fused multiply-adds of floats, dot products and matrices.
    pub(crate) fma: f64,
    /// Of it multiplications of floats.
    pub(crate) mul: f64,
    /// Of it conversions between types.
    pub(crate) convert: f64,
    /// Of it selections by a mask.
    pub(crate) select: f64,
    /// Of it copies of registers.
    pub(crate) copy: f64,
    /// Of it integer and bit arithmetic: addresses, unpacking.
    pub(crate) integer: f64,
    /// Of it exponentials, reciprocals and the like, at a quarter of the rate.
    pub(crate) special: f64,
    /// Scalar arithmetic.
    pub(crate) salu: f64,
    /// Scalar loads.
    pub(crate) smem: f64,
    /// Vector loads.
    pub(crate) loads: f64,
    /// Vector stores and atomics.
    pub(crate) stores: f64,
    /// Reads, writes and permutes of workgroup memory.
    pub(crate) lds: f64,
    /// Waits for memory.
    pub(crate) waits: f64,
    /// Barriers.
    pub(crate) barriers: f64,
    /// Branches.
    pub(crate) branches: f64,
    /// Multiply-adds of a lane.
    pub(crate) multiply_adds: f64,
    /// The same, and multiplications that were not fused.
    pub(crate) multiplies: f64,
}

/// Instructions of the text, each as often as its block has weight. Blocks are labelled `BB7` or `BB7:`.
pub(crate) fn count(text: &str, wave: u32, weights: &HashMap<usize, f64>) -> Mix {
    let mut mix = Mix::default();
    let mut weight = weights.get(&0).copied().unwrap_or(1.0);
    for line in text.lines() {
        if let Some(number) = label(line) {
            weight = weights.get(&number).copied().unwrap_or(1.0);
            continue;
        }
        // A line has one instruction, or the two halves of a dual one.
        let code = line.split(';').next().unwrap_or_default();
        let mut names = code.split_whitespace().filter(|word| is_instruction(word));
        if let Some(first) = names.next() {
            mix.add(first, wave, weight);
            if first.starts_with("v_dual_") {
                names.filter(|n| n.starts_with("v_dual_")).for_each(|n| mix.add(n, wave, weight));
            }
        }
    }
    mix
}

fn is_instruction(word: &str) -> bool {
    let kinds = ["v_", "s_", "ds_", "buffer_", "global_", "flat_", "scratch_"];
    kinds.iter().any(|kind| word.starts_with(kind))
}

fn one_of(name: &str, starts: &[&str]) -> bool {
    starts.iter().any(|start| name.starts_with(start))
}

impl Mix {
    fn add(&mut self, name: &str, wave: u32, n: f64) {
        if let Some(name) = name.strip_prefix("v_") {
            self.valu += n;
            self.add_vector(name, wave, n);
        } else if name.starts_with("ds_") {
            self.lds += n;
        } else if let Some(name) = name.strip_prefix("s_") {
            self.add_scalar(name, n);
        } else if name.contains("_load") {
            self.loads += n;
        } else if name.contains("_store") || name.contains("_atomic") {
            self.stores += n;
        }
    }

    fn add_scalar(&mut self, name: &str, n: f64) {
        if one_of(name, &["load", "buffer_load"]) {
            self.smem += n;
        } else if name.starts_with("wait") {
            self.waits += n;
        } else if name == "barrier" || name.starts_with("barrier_signal") {
            self.barriers += n;
        } else if one_of(name, &["branch", "cbranch"]) {
            self.branches += n;
        } else if !one_of(
            name,
            &["barrier", "nop", "clause", "delay_alu", "endpgm", "inst_prefetch", "code_end"],
        ) {
            self.salu += n;
        }
    }

    fn add_vector(&mut self, name: &str, wave: u32, n: f64) {
        let name = name.strip_prefix("dual_").unwrap_or(name);
        let fused = multiply_adds(name, wave);
        if fused > 0.0 {
            self.fma += n;
            self.multiply_adds += fused * n;
            self.multiplies += fused * n;
        } else if one_of(name, &["mul_f", "pk_mul_f", "mul_legacy_f"]) {
            self.mul += n;
            self.multiplies += if name.starts_with("pk_") { 2.0 * n } else { n };
        } else if name.starts_with("cvt_") {
            self.convert += n;
        } else if name.starts_with("cndmask") {
            self.select += n;
        } else if one_of(name, &["mov_", "readlane", "readfirstlane", "writelane", "swap"]) {
            self.copy += n;
        } else if one_of(name, &["exp_", "log_", "rcp_", "rsq_", "sqrt_", "sin_", "cos_", "s_"]) {
            self.special += n;
        } else if [
            "_u32", "_i32", "_b32", "_u16", "_i16", "_b16", "_u24", "_i24", "_u64", "_i64", "_b64", "_u8",
        ]
        .iter()
        .any(|kind| name.contains(kind))
        {
            self.integer += n;
        }
    }
}

/// Multiply-adds that one lane makes; 0 for what is not a fused multiply-add of floats.
fn multiply_adds(name: &str, wave: u32) -> f64 {
    if name.starts_with("wmma_") || name.starts_with("swmmac_") {
        return 16.0 * 16.0 * 16.0 / f64::from(wave.max(1));
    }
    let packed = [("pk_fma", 2.0), ("dot2", 2.0), ("dot4", 4.0), ("dot8", 8.0)];
    if let Some((_, each)) = packed.iter().find(|(start, _)| name.starts_with(start)) {
        return *each;
    }
    let floats = ["fma_", "fmac_", "fmamk_", "fmaak_", "mad_", "mac_", "madmk_", "madak_"];
    let is_float = ["_f32", "_f16", "_mix"].iter().any(|kind| name.contains(kind));
    if one_of(name, &floats) && is_float { 1.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_sorted() {
        let text = "BB0:\n\ts_load_b128 s[8:11], s[2:3], null   ; f4080201\n\ts_waitcnt lgkmcnt(0)\n\
            \tv_fma_mix_f32 v1, v2, v3, v4 op_sel:[1,0,0]  ; 12 34\n\tv_mul_lo_u32 v1, v2, v3\n\
            BB3:\n\tv_dual_fmac_f32 v1, v2, v3 :: v_dual_mul_f32 v4, v5, v6\n\tds_load_b128 v[0:3], v4\n\
            \tv_mad_u32_u24 v1, v2, v3, v4\n\tv_cvt_f32_f16_e32 v1, v2\n\ts_cbranch_scc0 BB3\n\ts_barrier\n";
        let mix = count(text, 32, &HashMap::from([(3, 8.0)]));
        assert_eq!((mix.smem, mix.waits, mix.lds, mix.branches, mix.barriers), (1.0, 1.0, 8.0, 8.0, 8.0));
        assert_eq!((mix.valu, mix.fma, mix.mul, mix.convert, mix.integer), (34.0, 9.0, 8.0, 8.0, 9.0));
        assert_eq!((mix.multiply_adds, mix.multiplies), (9.0, 17.0));
    }

    #[test]
    fn acos_own_text_reads_the_same() {
        let text = "BB0\n/* logical preds: / linear preds: / kind: uniform, top-level, */\n\
            \t v1: %21:v[1] = v_lshrrev_b32 3, %3628:v[0]\n\t v1: %9:v[2] = v_fma_f32 %1:v[1], %2:v[2], %3:v[3]\n\
            \ts_wait_kmcnt imm:0\n\tbuffer_store_dword %1, %2\n";
        let mix = count(text, 64, &HashMap::new());
        assert_eq!((mix.valu, mix.fma, mix.integer, mix.waits, mix.stores), (2.0, 1.0, 1.0, 1.0, 1.0));
    }

    #[test]
    fn packed_and_matrix_instructions_are_several() {
        assert_eq!(multiply_adds("pk_fma_f16", 64), 2.0);
        assert_eq!(multiply_adds("dot2_f32_f16", 64), 2.0);
        assert_eq!(multiply_adds("wmma_f32_16x16x16_f16", 64), 64.0);
        assert_eq!(multiply_adds("mad_u64_u32", 64), 0.0);
    }
}
