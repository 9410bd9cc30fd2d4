// Two bf16 of a word, low half first.

fn decode_bf16(word: u32) -> vec2<f32> {
    return bitcast<vec2<f32>>(vec2(word << 16u, word & 0xffff0000u));
}
