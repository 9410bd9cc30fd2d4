// Two f16 of a word as f32, in integer arithmetic: for adapters that have neither f16 nor its conversion.
//
// Exponent and mantissa move to their f32 places and 2^112 corrects the bias, which normalises subnormals too;
// exponent 31 (infinity, NaN) becomes 255.

fn decode_f16(word: u32) -> vec2<f32> {
    let halves = vec2(word & 0xffffu, word >> 16u);
    let sign = (halves & vec2(0x8000u)) << vec2(16u);
    let magnitude = (halves & vec2(0x7fffu)) << vec2(13u);
    let finite = bitcast<vec2<u32>>(bitcast<vec2<f32>>(magnitude) * 5.192296858534828e33);
    let special = magnitude | vec2(0x7f800000u);
    return bitcast<vec2<f32>>(sign | select(finite, special, magnitude >= vec2(0x0f800000u)));
}
