//! What the cache stores, in plain Rust: the twin of the shader parts that encode and decode.

mod block;
mod fp8;
mod rotate;

pub use fp8::{decode_fp8, encode_fp8};
pub use rotate::{rotate, rotate_f64};

use crate::spec::{Dtype, RowLayout};

const BLOCK: usize = RowLayout::BLOCK as usize;

/// A row as [`RowLayout`] has it: words of numbers, the first element in the lowest bits, and words of headers.
///
/// Element-wise types round to the nearest (ties to even), and `Fp8` saturates. Of a blocked type, a block holds
/// `least + scale * quant`: its header has the scale in its low half and the least number in its high half, both as bf16.
pub fn encode_row(dtype: Dtype, row: &[f32]) -> (Vec<u32>, Vec<u32>) {
    let bits = dtype.bits_per_element();
    let layout = RowLayout::of(dtype, row.len() as u32);
    let headers: Vec<u32> = match dtype.is_blocked() {
        true => row.chunks(BLOCK).map(|numbers| block::header_of(numbers, bits)).collect(),
        false => Vec::new(),
    };
    let mut words = vec![0; layout.words as usize];
    for (i, &x) in row.iter().enumerate() {
        let number = match dtype {
            Dtype::F32 => x.to_bits(),
            Dtype::F16 => u32::from(half::f16::from_f32(x).to_bits()),
            Dtype::Bf16 => u32::from(half::bf16::from_f32(x).to_bits()),
            Dtype::Fp8 => encode_fp8(x),
            Dtype::Q8 | Dtype::Q4 => block::quant(block::number(x), headers[i / BLOCK], block::most(bits)),
        };
        let at = i * bits as usize;
        words[at / 32] |= number << (at % 32);
    }
    (words, headers)
}

/// The `dim` elements of a row that [`encode_row`] gave.
///
/// # Panics
/// When there are fewer words or headers than [`RowLayout`] says.
pub fn decode_row(dtype: Dtype, dim: u32, words: &[u32], headers: &[u32]) -> Vec<f32> {
    let bits = dtype.bits_per_element();
    let element = |i: usize| {
        let at = i * bits as usize;
        let number = words[at / 32] >> (at % 32) & (u32::MAX >> (32 - bits));
        match dtype {
            Dtype::F32 => f32::from_bits(number),
            Dtype::F16 => half::f16::from_bits(number as u16).to_f32(),
            Dtype::Bf16 => half::bf16::from_bits(number as u16).to_f32(),
            Dtype::Fp8 => decode_fp8(number),
            Dtype::Q8 | Dtype::Q4 => block::value(number, headers[i / BLOCK]),
        }
    };
    (0..dim as usize).map(element).collect()
}

/// What comes back of a row: the nearest numbers that `dtype` can store.
///
/// Types without blocks store element by element, so of them `row` may be a whole tensor.
pub fn stored(dtype: Dtype, row: &[f32]) -> Vec<f32> {
    let (words, headers) = encode_row(dtype, row);
    decode_row(dtype, row.len() as u32, &words, &headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKED: [Dtype; 2] = [Dtype::Q8, Dtype::Q4];
    const DIMS: [usize; 12] = [1, 3, 4, 7, 31, 32, 33, 40, 64, 80, 127, 576];

    /// Numbers of many magnitudes, from a seed (Steele and Vigna's SplitMix64).
    fn numbers(len: usize, mut seed: u64) -> Vec<f32> {
        let mut random = || {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..len).map(|_| random() * (random() * 12.0).exp2()).collect()
    }

    fn header_of(numbers: &[f32], dtype: Dtype) -> (f32, f32) {
        let header = encode_row(dtype, numbers).1[0];
        (f32::from_bits(header & 0xffff_0000), f32::from_bits(header << 16))
    }

    /// Half a step of a block of `numbers`, by the definition.
    fn half_step(numbers: &[f32], bits: u32) -> f64 {
        let most = numbers.iter().fold(f32::MIN, |a, b| a.max(*b));
        let least = numbers.iter().fold(f32::MAX, |a, b| a.min(*b));
        let (most, least) = (f64::from(most), f64::from(least));
        // The least is rounded by up to 2^-7, the scale by up to 2^-7.
        (most - least + least.abs() / 128.0) / f64::from(block::most(bits)) * (1.0 + 1.0 / 128.0) / 2.0
    }

    #[test]
    fn what_is_stored_is_stored_as_itself() {
        for dtype in Dtype::ALL {
            for (i, dim) in DIMS.into_iter().enumerate() {
                let row = numbers(dim, i as u64);
                let once = stored(dtype, &row);
                assert_eq!(once.len(), dim);
                if !dtype.is_blocked() {
                    assert_eq!(stored(dtype, &once), once, "{dtype}, {dim}");
                }
            }
        }
        let known = [1.0 / 3.0, -65_520.0, 1e-8];
        assert_eq!(stored(Dtype::F32, &known), known);
        assert_eq!(stored(Dtype::F16, &known), [0.333_251_95, f32::NEG_INFINITY, 0.0]);
        assert_eq!(stored(Dtype::Bf16, &known), [0.333_984_38, -65_536.0, 1.001_171_8e-8]);
        assert_eq!(stored(Dtype::Fp8, &known), [0.343_75, -448.0, 0.0]);
    }

    #[test]
    fn errors_are_at_most_half_a_step() {
        for (seed, dim) in (0..50).flat_map(|seed| DIMS.map(|dim| (seed, dim))) {
            let row = numbers(dim, seed);
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Fp8] {
                let smallest = if dtype == Dtype::Fp8 { 2f64.powi(-10) } else { 2f64.powi(-25) };
                for (x, y) in row.iter().map(|x| f64::from(*x)).zip(stored(dtype, &row)) {
                    assert!(
                        (x - f64::from(y)).abs() <= dtype.epsilon() * x.abs() + smallest,
                        "{dtype}: {x}, {y}"
                    );
                }
            }
            for dtype in BLOCKED {
                for (xs, ys) in row.chunks(BLOCK).zip(stored(dtype, &row).chunks(BLOCK)) {
                    let (least, scale) = header_of(xs, dtype);
                    let bits = dtype.bits_per_element();
                    assert!(f64::from(scale) / 2.0 <= half_step(xs, bits) * (1.0 + 1e-6));
                    // Of f32: the difference, the quotient and the sum.
                    let tiny = 1e-6 * (least.abs() + scale * block::most(bits) as f32);
                    let most = scale / 2.0 + tiny;
                    assert!(xs.iter().zip(ys).all(|(x, y)| (x - y).abs() <= most), "{dtype}: {xs:?}, {ys:?}");
                    assert!(xs.iter().all(|x| *x >= least));
                }
            }
        }
    }

    #[test]
    fn rows_are_padded_with_zero_bits_and_begin_with_the_lowest() {
        for dtype in Dtype::ALL {
            for dim in DIMS {
                let (words, headers) = encode_row(dtype, &vec![448.0; dim]);
                let layout = RowLayout::of(dtype, dim as u32);
                assert_eq!((words.len(), headers.len()), (layout.words as usize, layout.headers as usize));
                let used = dim * dtype.bits_per_element() as usize;
                assert!(
                    (used..words.len() * 32).all(|bit| words[bit / 32] >> (bit % 32) & 1 == 0),
                    "{dtype}"
                );
            }
        }
        assert_eq!(encode_row(Dtype::F16, &[1.0, -2.0]), (vec![0xc000_3c00, 0], vec![]));
        assert_eq!(encode_row(Dtype::Fp8, &[1.0, -2.0, 448.0]), (vec![0x007e_c038], vec![]));
        let steps: Vec<f32> = (0..16).map(|i| i as f32).collect();
        assert_eq!(encode_row(Dtype::Q4, &steps), (vec![0x7654_3210, 0xfedc_ba98], vec![0x3f80]));
        let steps = [-1.0, 0.0, 254.0];
        assert_eq!(encode_row(Dtype::Q8, &steps), (vec![0x00ff_0100], vec![0xbf80_3f80]));
    }

    #[test]
    fn a_short_last_block_stands_alone() {
        for dtype in BLOCKED {
            let mut row = numbers(BLOCK, 1);
            row.extend([100.0, 101.0]);
            let whole = stored(dtype, &row);
            assert_eq!(whole[..BLOCK], stored(dtype, &row[..BLOCK]));
            assert_eq!(whole[BLOCK..], stored(dtype, &row[BLOCK..]));
            // By half of the steps between them: nothing of the first block shows.
            assert!((whole[BLOCK + 1] - 101.0).abs() < 0.04 && whole[BLOCK] == 100.0);
        }
    }

    #[test]
    fn constants_zeros_and_extremes() {
        for dtype in BLOCKED {
            for constant in [0.0_f32, -0.0, 1.0, -3.5, 96.0, -1e-30] {
                let row = [constant; 40];
                let most = (constant / 128.0).abs();
                assert!(
                    stored(dtype, &row).iter().all(|x| (x - constant).abs() <= most),
                    "{dtype}, {constant}"
                );
            }
            assert_eq!(stored(dtype, &[0.1; 3]), [stored(dtype, &[0.1])[0]; 3]);
            // Below the smallest normal number all is 0.
            let tiny = [f32::from_bits(1), -f32::from_bits(9), f32::MIN_POSITIVE / 2.0];
            assert_eq!(stored(dtype, &tiny), [0.0; 3]);
            let huge = [f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, 0.0];
            let expected = [1e38, -1e38, 1e38, -1e38, 0.0];
            let most = 1e38 * 2.1 * dtype.epsilon() as f32;
            assert!(stored(dtype, &huge).iter().zip(expected).all(|(x, y)| (x - y).abs() <= most), "{dtype}");
        }
    }

    #[test]
    fn nan_stays_and_spoils_its_block_only() {
        for dtype in Dtype::ALL {
            let mut row = numbers(40, 3);
            let clean = stored(dtype, &row);
            row[35] = f32::NAN;
            let spoilt = if dtype.is_blocked() { BLOCK..40 } else { 35..36 };
            for (i, (x, y)) in stored(dtype, &row).into_iter().zip(clean).enumerate() {
                assert_eq!(x.is_nan(), spoilt.contains(&i), "{dtype}, {i}");
                assert!(x.is_nan() || x == y);
            }
            assert!(stored(dtype, &[f32::NAN; 3]).iter().all(|x| x.is_nan()), "{dtype}");
        }
        // What a cache full of ones reads as.
        for dtype in Dtype::ALL {
            assert!(decode_row(dtype, 2, &[u32::MAX; 2], &[u32::MAX]).iter().all(|x| x.is_nan()), "{dtype}");
        }
    }
}
