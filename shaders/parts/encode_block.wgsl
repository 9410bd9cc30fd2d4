// Blocks of numbers as `least + scale * quant`: `block_number` of every element, the least and the greatest of them, then
// `block_header`, then `block_quant` of each number. Division may be off by 2.5 units in the last place, so adapters may differ in
// a quant, or in the last bit of a scale, now and then.

// A number as a block counts it: at most 1e38 in magnitude, so that every range is finite; 2e38 for NaN, which so outlives `max`.
fn block_number(value: f32) -> f32 {
    if (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u {
        return 2e38;
    }
    return clamp(value, -1e38, 1e38);
}

// From the least and the greatest number, and the steps between them (255 or 15). The least is rounded down and the scale up, so
// that every number lies within the steps.
fn block_header(least: f32, most: f32, steps: f32) -> u32 {
    if most > 1e38 {
        return 0x7fc07fc0u;
    }
    let bits = bitcast<u32>(least);
    // Away from zero where negative: 16 bits that are not all zero carry. Subnormals are 0, as GPUs may take them.
    let carry = select(0u, 0xffffu, (bits >> 31u) == 1u);
    let low = select((bits + carry) & 0xffff0000u, 0u, (bits & 0x7f800000u) == 0u);
    let scale = (most - bitcast<f32>(low)) / steps;
    if scale < 1.1754943508222875e-38 {
        return low;
    }
    return low | ((bitcast<u32>(scale) + 0xffffu) >> 16u);
}

// The quant of a number, at most `most` (255 or 15).
fn block_quant(x: f32, header: u32, most: u32) -> u32 {
    // All numbers of the block are the same, or none is one.
    if (header & 0xffffu) == 0u || header == 0x7fc07fc0u {
        return 0u;
    }
    let scale = bitcast<f32>(header << 16u);
    let least = bitcast<f32>(header & 0xffff0000u);
    return u32(clamp(floor((x - least) / scale + 0.5), 0.0, f32(most)));
}
