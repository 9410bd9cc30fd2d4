// From f32 to E4M3 in the low 8 bits, ties to even, in integer arithmetic: the same bits on every adapter. Beyond 448 it is 448,
// infinity too; NaN stays NaN.

fn encode_fp8(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 24u) & 0x80u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return sign | 0x7fu;
    }
    // Normal (2^-6 and more): drop 20 bits, round, move the exponent's bias from 127 to 7. 0x7e is 448.
    if magnitude >= 0x3c800000u {
        return sign | min((magnitude + 0x7ffffu + ((magnitude >> 20u) & 1u) - 0x3c000000u) >> 20u, 0x7eu);
    }
    // Subnormal: shift the mantissa with its hidden bit to units of 2^-9. Below 2^-10 nothing is left.
    if magnitude < 0x3a800000u {
        return sign;
    }
    let mantissa = (magnitude & 0x007fffffu) | 0x00800000u;
    let shift = 141u - (magnitude >> 23u);
    let kept = mantissa >> shift;
    let half = 1u << (shift - 1u);
    let rest = mantissa & ((1u << shift) - 1u);
    let up = rest > half || (rest == half && (kept & 1u) == 1u);
    return sign | (kept + select(0u, 1u, up));
}
