// From f32 to 16 bits, ties to even, in integer arithmetic: the same bits on every adapter (WGSL leaves the rounding of
// pack2x16float open).

fn encode_f16(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return sign | 0x7e00u;
    }
    // 65520 and more round to infinity.
    if magnitude >= 0x477ff000u {
        return sign | 0x7c00u;
    }
    // Normal: drop 13 bits, round, move the exponent's bias from 127 to 15.
    if magnitude >= 0x38800000u {
        return sign | ((magnitude + 0x0fffu + ((magnitude >> 13u) & 1u) - 0x38000000u) >> 13u);
    }
    // Subnormal: shift the mantissa with its hidden bit to units of 2^-24. Below 2^-25 nothing is left.
    if magnitude < 0x33000000u {
        return sign;
    }
    let mantissa = (magnitude & 0x007fffffu) | 0x00800000u;
    let shift = 126u - (magnitude >> 23u);
    let kept = mantissa >> shift;
    let half = 1u << (shift - 1u);
    let rest = mantissa & ((1u << shift) - 1u);
    let up = rest > half || (rest == half && (kept & 1u) == 1u);
    return sign | (kept + select(0u, 1u, up));
}

fn encode_bf16(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
