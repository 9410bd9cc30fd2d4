//! E4M3, element by element, in integer arithmetic: the same bits as `encode_fp8.wgsl` and `four_fp8.wgsl`.

/// The nearest E4M3 (ties to even), in the low 8 bits. Beyond 448 it is 448, infinity too; NaN stays NaN.
pub fn encode_fp8(value: f32) -> u32 {
    let bits = value.to_bits();
    let sign = bits >> 24 & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7f;
    }
    // Normal (2^-6 and more): drop 20 bits, round, move the exponent's bias from 127 to 7. 0x7e is 448.
    if magnitude >= 0x3c80_0000 {
        return sign | ((magnitude + 0x7_ffff + (magnitude >> 20 & 1) - 0x3c00_0000) >> 20).min(0x7e);
    }
    // Subnormal: shift the mantissa with its hidden bit to units of 2^-9. Below 2^-10 nothing is left.
    if magnitude < 0x3a80_0000 {
        return sign;
    }
    let mantissa = (magnitude & 0x007f_ffff) | 0x0080_0000;
    let shift = 141 - (magnitude >> 23);
    let kept = mantissa >> shift;
    let half = 1 << (shift - 1);
    let rest = mantissa & ((1 << shift) - 1);
    let up = rest > half || (rest == half && kept & 1 == 1);
    sign | (kept + u32::from(up))
}

/// The number behind the low 8 bits.
pub fn decode_fp8(code: u32) -> f32 {
    let sign = (code & 0x80) << 24;
    let magnitude = match code & 0x7f {
        0x7f => 0x7fc0_0000,
        // Units of 2^-9.
        subnormal @ 0..8 => (subnormal as f32 * 0.001_953_125).to_bits(),
        normal => (normal << 20) + 0x3c00_0000,
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition: `(-1)^s * 2^(e - 7) * (1 + m / 8)`, and `m * 2^-9` where `e` is 0.
    fn defined(code: u32) -> f64 {
        let (exponent, mantissa) = ((code >> 3 & 15) as i32, f64::from(code & 7));
        let magnitude = match exponent {
            0 => mantissa * 2f64.powi(-9),
            _ => 2f64.powi(exponent - 7) * (1.0 + mantissa / 8.0),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn codes_are_what_the_format_says() {
        for code in 0..256 {
            let x = decode_fp8(code);
            match code & 0x7f {
                0x7f => assert!(x.is_nan()),
                _ => assert_eq!((f64::from(x), x.is_sign_negative()), (defined(code), code >= 128), "{code}"),
            }
            assert_eq!(encode_fp8(x), code);
        }
        assert_eq!((decode_fp8(0x7e), decode_fp8(1)), (448.0, 2f32.powi(-9)));
    }

    #[test]
    fn rounding_is_to_the_nearest_and_at_ties_to_even() {
        for code in 0..0x7e {
            let [low, high] = [code, code + 1].map(decode_fp8);
            let middle = (low + high) / 2.0;
            assert_eq!(encode_fp8(middle), code + (code & 1), "between {low} and {high}");
            assert_eq!(encode_fp8(middle.next_down()), code);
            assert_eq!(encode_fp8(middle.next_up()), code + 1);
            assert_eq!(encode_fp8(-middle), 0x80 | (code + (code & 1)));
        }
    }

    #[test]
    fn large_numbers_saturate_and_nan_stays() {
        for x in [448.0, 449.0, 464.0, 480.0, 1e6, f32::MAX, f32::INFINITY] {
            assert_eq!((encode_fp8(x), encode_fp8(-x)), (0x7e, 0xfe), "{x}");
        }
        assert_eq!((encode_fp8(f32::NAN) & 0x7f, encode_fp8(0.0), encode_fp8(-0.0)), (0x7f, 0, 0x80));
        assert_eq!((encode_fp8(f32::from_bits(1)), encode_fp8(-f32::MIN_POSITIVE)), (0, 0x80));
    }
}
