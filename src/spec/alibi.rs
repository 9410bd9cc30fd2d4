//! ALiBi: a penalty that grows with distance, in place of position embeddings (Press et al. 2021, arXiv 2108.12409).

/// The slopes of the paper for `heads` query heads: `2^(-8 i / heads)`, i from 1. Where `heads` is no power of two, those of
/// the power below, then every second one of the power above (the authors' code, and BLOOM's and MPT's).
pub fn alibi_slopes(heads: u32) -> Vec<f32> {
    let below = match heads {
        0 => return Vec::new(),
        n => 1 << n.ilog2(),
    };
    let slope = |i: u32, of: u32| (-8.0 * f64::from(i) / f64::from(of)).exp2() as f32;
    let first = (1..=below).map(|i| slope(i, below));
    let between = (0..heads - below).map(|i| slope(2 * i + 1, 2 * below));
    first.chain(between).collect()
}

#[cfg(test)]
mod tests {
    use super::alibi_slopes;

    /// As printed in the paper for 8 heads, and as BLOOM's code gives for 12.
    #[test]
    fn slopes_are_those_of_the_paper() {
        assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        let twelve = alibi_slopes(12);
        assert_eq!(twelve[..8], alibi_slopes(8));
        let tail = [0.707_106_77, 0.353_553_38, 0.176_776_69, 0.088_388_346];
        for (got, expected) in twelve[8..].iter().zip(tail) {
            assert!((got - expected).abs() < 1e-7);
        }
    }
}
