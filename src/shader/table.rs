//! The table of a layer: numbers that belong to a head or to an element, in one uniform buffer. `parts/table.wgsl` reads it.

use crate::spec::AttentionSpec;

/// Where each kind of number begins, in words; what a spec does not have takes no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TableLayout {
    /// Sinks times log2(e), one for each query head.
    pub sinks: u32,
    /// ALiBi slopes times log2(e), one for each query head.
    pub slopes: u32,
    /// Weights of the queries' norm, one for each element.
    pub q_norm: u32,
    /// Weights of the keys' norm, one for each element.
    pub k_norm: u32,
    /// Turns per token of each pair: high and low word of 64-bit fixed point.
    pub turns: u32,
    /// Words of the table: a multiple of four, 0 where the spec needs none.
    pub words: u32,
}

impl TableLayout {
    /// The table of `spec`.
    pub fn of(spec: &AttentionSpec) -> Self {
        let mut words = 0;
        let mut place = |present: bool, count: u32| {
            let at = words;
            words += if present { count } else { 0 };
            at
        };
        let norm = spec.qk_norm().is_some();
        let layout = Self {
            sinks: place(spec.sinks(), spec.q_heads()),
            slopes: place(spec.alibi().is_some(), spec.q_heads()),
            q_norm: place(norm, spec.head_dim()),
            k_norm: place(norm, spec.head_dim()),
            turns: place(true, spec.rope().map_or(0, |rope| rope.dim)),
            words: 0,
        };
        Self { words: words.next_multiple_of(4), ..layout }
    }
}
