// Two f16 of a word as f32, in integer arithmetic: for adapters that have neither f16 nor its conversion.
//
// Exponent and mantissa move to their f32 places, and 2^112 corrects the bias. Subnormals are units of 2^-24 (moved like the
// others they would be f32 subnormals, which a GPU may flush). Exponent 31 (infinity, NaN) becomes 255.

fn decode_f16(word: u32) -> vec2<f32> {
    let halves = vec2(word & 0xffffu, word >> 16u);
    let sign = (halves & vec2(0x8000u)) << vec2(16u);
    let magnitude = (halves & vec2(0x7fffu)) << vec2(13u);
    let normal = bitcast<vec2<f32>>(magnitude) * 5.192296858534828e33;
    let subnormal = vec2<f32>(halves & vec2(0x3ffu)) * 5.960464477539063e-8;
    let finite = bitcast<vec2<u32>>(select(normal, subnormal, (halves & vec2(0x7c00u)) == vec2(0u)));
    let special = magnitude | vec2(0x7f800000u);
    return bitcast<vec2<f32>>(sign | select(finite, special, magnitude >= vec2(0x0f800000u)));
}
