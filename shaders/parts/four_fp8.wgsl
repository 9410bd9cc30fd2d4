// Four E4M3 of a word, the first in the lowest bits, as f32.
//
// Exponent and mantissa move to their f32 places, the bias from 7 to 127. Subnormals are units of 2^-9 (by exponents alone they
// would be f32 subnormals, which a GPU may flush). All ones is NaN: the format has no infinity.

fn decode_four_fp8(word: u32) -> vec4<f32> {
    let codes = vec4(word, word >> 8u, word >> 16u, word >> 24u);
    let magnitude = codes & vec4(0x7fu);
    let subnormal = bitcast<vec4<u32>>(vec4<f32>(magnitude) * 0.001953125);
    let finite = select((magnitude << vec4(20u)) + vec4(0x3c000000u), subnormal, magnitude < vec4(8u));
    let bits = select(finite, vec4(0x7fc00000u), magnitude == vec4(0x7fu));
    return bitcast<vec4<f32>>(((codes & vec4(0x80u)) << vec4(24u)) | bits);
}
