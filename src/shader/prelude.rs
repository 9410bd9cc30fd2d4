//! The constants that a linked kernel begins with: of the spec, the tile, the rows of the cache.

use std::fmt::Write as _;

use super::{Kernel, TableLayout, Variant, row_fours, team_lanes};
use crate::params::{LIST_WORDS, MAP_KEYS, MAP_TILES, NO_LIST};
use crate::spec::{Dtype, Mask, RowLayout, hidden_below};

/// Turns of a loop that Mesa does not unroll: it unrolls up to 32, of some 830 instructions together. A loop around loads has branches for every lane, so unrolled it takes
/// LLVM seconds; kernels of small subgroups give such loops before and behind their walk at least these.
const ROLLED: u32 = 33;

impl Variant {
    /// Constants of the spec and the tile.
    pub(super) fn prelude(&self, text: &mut String) {
        let spec = &self.spec;
        let (k4, v4) = (row_fours(spec.head_dim()), row_fours(spec.v_head_dim()));
        let kv_heads = if self.kernel == Kernel::Embed { spec.q_heads() } else { spec.kv_heads() };
        let (k, v) = (self.k_row(), (spec.v_dtype(), spec.v_row()));
        // Elements of a row that waits in workgroup memory.
        let width = match self.kernel {
            Kernel::CombineRotated => v4 * 4,
            Kernel::Embed => pitch(k),
            _ => pitch(k).max(pitch(v)),
        };
        let table = TableLayout::of(spec);
        let rope = spec.rope();
        // Keys of a word of the packed mask, keys of a tile elsewhere.
        let keys = match (self.kernel, spec.mask()) {
            (Kernel::Pack, Mask::Keep) => 32,
            (Kernel::Pack, _) => 1,
            _ => self.tile.keys,
        };
        // Lanes that share a key.
        let team = match self.kernel {
            Kernel::DecodeTeams => team_lanes(spec, self.tile.rows).unwrap_or(16),
            _ => 8,
        };
        let unsigned = [
            ("HEAD_DIM", spec.head_dim()),
            ("V_HEAD_DIM", spec.v_head_dim()),
            ("K4", k4),
            ("V4", v4),
            ("WIDTH", width),
            ("Q_HEADS", spec.q_heads()),
            ("KV_HEADS", kv_heads),
            ("GROUP", spec.group()),
            ("ROWS", self.tile.rows),
            ("KEYS", keys),
            ("THREADS", self.tile.threads),
            ("LANES", self.tile.threads),
            ("TEAM", team),
            ("ROLLED", ROLLED),
            ("FEW_ROWS", self.few_rows_each().map_or(0, |each| each * self.tile.threads)),
            ("MAX_WORKGROUPS", self.workgroups),
            ("WHOLE", crate::params::WHOLE),
            ("MAP_KEYS", MAP_KEYS),
            ("MAP_TILES", MAP_TILES),
            ("TABLE4", table.words / 4),
            ("SINKS_AT", table.sinks),
            ("SLOPES_AT", table.slopes),
            ("NO_LIST", NO_LIST),
            ("LIST_WORDS", LIST_WORDS),
            ("NORM_AT", if self.kernel == Kernel::Append { table.k_norm } else { table.q_norm }),
            ("TURNS_AT", table.turns),
            ("ROPE_FIRST", rope.map_or(0, |r| r.first)),
            ("ROPE_DIM", rope.map_or(0, |r| r.dim)),
        ];
        // Beyond 2^30 a window is as good as none: positions stay below.
        let window = |keys: Option<u32>| keys.map_or(-1, |keys| keys.min(1 << 30) as i32);
        let signed =
            [("WINDOW_LEFT", window(spec.window_left())), ("WINDOW_RIGHT", window(spec.window_right()))];
        let flags = [
            ("CAUSAL", spec.causal()),
            ("ALWAYS_MERGED", spec.rotated()),
            ("MAPPED", spec.mask().is_dense()),
            ("COUNTED", self.counted),
            ("GUARDED", spec.mask().is_dense() || self.counted),
            ("NORM", spec.qk_norm().is_some() && !self.is_embedded()),
            ("INTERLEAVED", rope.is_some_and(|r| r.pairing == crate::rope::Pairing::Interleaved)),
        ];
        let log2_e = f64::from(std::f32::consts::LOG2_E);
        let cap = f64::from(spec.softcap().unwrap_or(1.0));
        let reals = [
            ("SCALE", spec.scale()),
            ("SCALE_LOG2", spec.scale() * std::f32::consts::LOG2_E),
            ("SCALE_PER_CAP", (f64::from(spec.scale()) / cap) as f32),
            ("CAP_LOG2", (cap * log2_e) as f32),
            ("EPSILON", spec.qk_norm().unwrap_or(0.0)),
            ("MAGNITUDE", rope.map_or(1.0, |r| r.magnitude()) as f32),
            ("HIDES", hidden_below(spec.q_dtype())),
        ];
        for (nth, dtype) in (0..).zip(Dtype::ALL) {
            let _ = writeln!(text, "const {}: u32 = {nth}u;", dtype.name().to_uppercase());
        }
        for (side, (dtype, row)) in [("K", k), ("V", v)] {
            for (name, value) in row_constants(dtype, row) {
                let _ = writeln!(text, "const {side}_{name}: u32 = {value}u;");
            }
        }
        for (name, value) in unsigned {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        for (name, value) in signed {
            let _ = writeln!(text, "const {name}: i32 = {value}i;");
        }
        for (name, value) in flags {
            let _ = writeln!(text, "const {name}: bool = {value};");
        }
        for (name, value) in reals {
            // WGSL leaves subnormal literals open, and has none for infinity.
            let value = if value.is_subnormal() { 0.0 } else { value.clamp(f32::MIN, f32::MAX) };
            let _ = writeln!(text, "const {name}: f32 = {value:e}f;");
        }
    }

    /// How its keys lie in what it reads or writes: of `embed` these are queries.
    fn k_row(&self) -> (Dtype, RowLayout) {
        let spec = &self.spec;
        match self.kernel {
            Kernel::Embed => (Dtype::F32, RowLayout::of(Dtype::F32, spec.head_dim())),
            _ => (spec.k_dtype(), spec.k_row()),
        }
    }
}

/// Elements that a row of a cache has room for, padding included.
fn pitch((dtype, row): (Dtype, RowLayout)) -> u32 {
    row.words * 32 / dtype.bits_per_element()
}

/// How a row lies in the cache, for `parts/encode_rows.wgsl` and the parts that read it: an invocation writes a unit.
fn row_constants(dtype: Dtype, row: RowLayout) -> [(&'static str, u32); 7] {
    let bits = dtype.bits_per_element();
    let (units, per_unit, block) = match dtype.is_blocked() {
        true => (row.headers, RowLayout::BLOCK, RowLayout::BLOCK),
        false => (row.words, 32 / bits, 1),
    };
    let format = Dtype::ALL.iter().position(|other| *other == dtype).unwrap_or_default() as u32;
    [
        ("FORMAT", format),
        ("BITS", bits),
        ("WORDS", row.words),
        ("UNITS", units),
        ("PER_UNIT", per_unit),
        ("BLOCK", block),
        ("PITCH", pitch((dtype, row))),
    ]
}
