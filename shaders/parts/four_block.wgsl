// Four quants of a block as f32: `least + scale * quant`. The header has the scale in its low half, the least number in its high
// half, both as bf16. 8 bits of scale times 8 of quant are exact in f32, so fused or not it is the same everywhere.

// `bits` of a quant: 8 or 4. The first of the four lies in the lowest bits of `word`.
fn decode_four_block(bits: u32, word: u32, header: u32) -> vec4<f32> {
    let quants = vec4(word, word >> bits, word >> (2u * bits), word >> (3u * bits)) & vec4((1u << bits) - 1u);
    let scale = bitcast<f32>(header << 16u);
    let least = bitcast<f32>(header & 0xffff0000u);
    return vec4(least) + scale * vec4<f32>(quants);
}
