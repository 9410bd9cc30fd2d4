//! How the lanes of a small subgroup load a row of the cache together: as units of up to 16 or 32 bytes, several fours of elements each.
//!
//! Software adapters pay for a load by lane and component, whatever a component's size: wide units of 64-bit numbers are the cheapest.

use std::fmt::Write as _;

use super::{Variant, row_fours};
use crate::spec::Dtype;

/// Most bytes of a unit, but for those that are wide.
pub(crate) const UNIT: u32 = 16;
/// Most bytes of a wide one, of 64-bit numbers.
pub(crate) const WIDE_UNIT: u32 = 32;

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Keys.
    K,
    /// Values.
    V,
}

/// What a lane loads at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unit {
    /// Fours of elements.
    fours: u32,
    /// 32-bit words.
    words: u32,
    /// Whether two words are one component.
    long: bool,
    /// Whether words of f16 are kept whole: LLVM else cuts the 16 bits of each out of the 64, and with AVX2 one in four lane by lane.
    kept: bool,
}

impl Variant {
    /// Whether the text needs 64-bit integers.
    pub fn uses_int64(&self) -> bool {
        self.loads_units()
            && [Side::K, Side::V].into_iter().any(|side| self.unit(side).is_some_and(|u| u.long))
    }

    /// Whether rows are loaded by lanes together.
    pub(super) fn loads_units(&self) -> bool {
        use super::Kernel::{BackwardQSubgroup, DecodeSubgroup, PrefillSubgroup};
        matches!(self.kernel, DecodeSubgroup | PrefillSubgroup | BackwardQSubgroup)
    }

    /// What a lane loads of a side's row at a time: the widest unit that leaves no more registers empty than fours would. None where
    /// it loads four by four: values that are keys share their binding and end where they like, and two fours of 4 bits share a word.
    pub(super) fn unit(&self, side: Side) -> Option<Unit> {
        let spec = &self.spec;
        let (dtype, dim) = match side {
            Side::K => (spec.k_dtype(), spec.head_dim()),
            Side::V => (spec.v_dtype(), spec.v_head_dim()),
        };
        if spec.v_in_k() {
            return None;
        }
        let (row, lanes, bits) = (row_fours(dim), self.tile.threads, dtype.bits_per_element());
        let most = self.long_unit.max(UNIT);
        // SwiftShader, of 4 lanes, was slower with wide units (measured before loops were written out).
        let fours = [4, 2, 1].into_iter().filter(|fours| lanes == 8 || *fours == 1).find(|fours| {
            let registers = (row / fours).div_ceil(lanes) * fours;
            let whole = row % fours == 0 && (fours * bits) % 8 == 0;
            whole && fours * bits / 2 <= most && registers == row.div_ceil(lanes)
        })?;
        let words = fours * bits / 8;
        Some(Unit { fours, words, long: self.long_unit > 0 && words > 1, kept: self.long_unit == WIDE_UNIT })
    }

    /// Fours that a lane loads at a time.
    pub(super) fn unit_fours(&self, side: Side) -> u32 {
        if self.loads_units() { self.unit(side).map_or(1, |unit| unit.fours) } else { 1 }
    }

    /// The text of a side: its binding, `K_FOURS` (of a unit), `load_k_unit` (the fours of a unit of a row; zeros beyond it).
    pub(super) fn unit_text(&self, side: Side, text: &mut String) {
        let (k, name, binding) = match side {
            Side::K => ("k", "K", 2),
            Side::V => ("v", "V", 3),
        };
        let unit = self.unit(side);
        let fours = unit.map_or(1, |unit| unit.fours);
        let dtype = if side == Side::K { self.spec.k_dtype() } else { self.spec.v_dtype() };
        let (load, decoded) = match unit {
            Some(unit) => {
                let _ = writeln!(
                    text,
                    "@group(0) @binding({binding}) var<storage, read> {k}_cache: array<{}>;",
                    unit.wgsl()
                );
                (format!("{k}_cache[row * UNITS + at]"), unit.decoded(dtype, k))
            }
            None => (format!("load_{k}(row, at)"), vec!["unit".to_owned()]),
        };
        let header = match unit.filter(|_| dtype.is_blocked()) {
            Some(unit) => {
                let at =
                    format!("let h = work.params.{k}_headers + row * {name}_UNITS + at * {fours}u / 8u;");
                format!("\n        {at}\n        let header = {};", unit.word(&format!("{k}_cache")))
            }
            None => String::new(),
        };
        let fetched = if unit.is_some() { "fetched(); " } else { "" };
        let each: Vec<_> =
            (0..).zip(decoded).map(|(c, four)| format!("{fetched}fours[{c}] = {four};")).collect();
        let _ = writeln!(
            text,
            "const {name}_FOURS: u32 = {fours}u;
fn load_{k}_unit(row: u32, at: u32) -> array<vec4<f32>, {fours}> {{
    const UNITS = {name}4 / {fours}u;
    var fours: array<vec4<f32>, {fours}>;
    if UNITS % LANES == 0u || at < UNITS {{
        let unit = {load};{header}
        {}
    }}
    return fours;
}}",
            each.join("\n        ")
        );
    }
}

impl Unit {
    /// Its type.
    const fn wgsl(self) -> &'static str {
        match (self.words, self.long) {
            (1, _) => "u32",
            (2, false) => "vec2<u32>",
            (2, true) => "u64",
            (_, false) => "vec4<u32>",
            (4, true) => "vec2<u64>",
            (_, true) => "vec4<u64>",
        }
    }

    /// Expression of word `h` of an array of them.
    fn word(self, array: &str) -> String {
        match (self.words, self.long) {
            (1, _) => format!("{array}[h]"),
            (2, false) => format!("{array}[h / 2u][h % 2u]"),
            (2, true) => format!("u32({array}[h / 2u] >> (h % 2u * 32u))"),
            (_, false) => format!("{array}[h / 4u][h % 4u]"),
            (words, true) => format!("u32({array}[h / {words}u][h / 2u % {}u] >> (h % 2u * 32u))", words / 2),
        }
    }

    /// Expressions of its fours, as f32.
    fn decoded(self, dtype: Dtype, k: &str) -> Vec<String> {
        let words: Vec<String> = match (self.words, self.long) {
            (1, _) => vec!["unit".to_owned()],
            (words, false) => {
                ["x", "y", "z", "w"].iter().take(words as usize).map(|c| format!("unit.{c}")).collect()
            }
            (2, true) => ["", " >> 32u"].iter().map(|high| format!("u32(unit{high})")).collect(),
            (words, true) => {
                let numbers = ["x", "y", "z", "w"].iter().take(words as usize / 2);
                numbers.flat_map(|c| ["", " >> 32u"].map(|high| format!("u32(unit.{c}{high})"))).collect()
            }
        };
        if dtype == Dtype::Q4 {
            let halves = ["", " >> 16u"];
            let two =
                |word: &String| halves.map(|half| format!("decode_four_block(4u, {word}{half}, header)"));
            return words.iter().flat_map(two).collect();
        }
        let words = match self.kept && dtype == Dtype::F16 {
            true => words.iter().map(|word| format!("({word} ^ work.params.zero)")).collect(),
            false => words,
        };
        let each = dtype.bits_per_element() / 8;
        let four = |words: &[String]| match dtype {
            Dtype::Q8 => format!("decode_four_block(8u, {}, header)", words.join(", ")),
            Dtype::F32 => format!("decode_{k}(bitcast<vec4<f32>>(vec4({})))", words.join(", ")),
            Dtype::F16 | Dtype::Bf16 => format!("decode_{k}(vec2({}))", words.join(", ")),
            _ => format!("decode_{k}({})", words.join(", ")),
        };
        words.chunks(each as usize).map(four).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionSpec, Caps, Class, Options, Plan};

    /// Fours and words of a unit of keys of `dim` elements, with few vector registers: wide ones with 64-bit numbers.
    fn unit((dtype, dim): (Dtype, u32), lanes: u32, int64: bool) -> Option<(u32, u32)> {
        let subgroup = Some((lanes, lanes));
        let caps = Caps { subgroup, class: Class::Software, int64, ..Caps::minimal() };
        let spec = AttentionSpec::builder(4, 1, dim).kv_dtype(dtype).build().ok()?;
        let plan = Plan::new(&spec, &caps, &Options::default()).ok()?;
        plan.decode().unit(Side::K).map(|unit| (unit.fours, unit.words))
    }

    #[test]
    fn units_are_as_wide_as_registers_allow() {
        use Dtype::{Bf16, F16, F32, Fp8, Q4, Q8};
        let short = [
            ((F32, 128), (1, 4)),
            ((F16, 128), (2, 4)),
            ((F16, 64), (2, 4)),
            ((F16, 112), (2, 4)),
            // Two fours each would take 4 registers where 3 do.
            ((F16, 80), (1, 2)),
            ((F16, 96), (1, 2)),
            // 9 fours: no two of them are a unit.
            ((F16, 33), (1, 2)),
            ((Fp8, 128), (4, 4)),
            ((Q8, 64), (2, 2)),
            ((Q4, 128), (4, 2)),
            ((Q4, 64), (2, 1)),
        ];
        let wide = [
            ((F32, 128), (2, 8)),
            ((F32, 32), (1, 4)),
            ((F16, 128), (4, 8)),
            ((F16, 64), (2, 4)),
            ((Bf16, 256), (4, 8)),
            ((Fp8, 256), (4, 4)),
            ((Q8, 128), (4, 4)),
        ];
        for (cases, int64) in [(&short[..], false), (&wide[..], true)] {
            for (row, expected) in cases {
                assert_eq!(unit(*row, 8, int64), Some(*expected), "{row:?}, 64 bits: {int64}");
            }
        }
        // Half a word is no unit, and 4 lanes load four by four.
        assert_eq!(unit((Q4, 36), 8, false), None);
        let of_4 = |dtype| unit((dtype, 128), 4, false);
        assert_eq!((of_4(F16), of_4(Q8)), (Some((1, 2)), Some((1, 1))));
    }
}
