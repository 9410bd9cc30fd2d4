// A word of a f16 cache: two values, low half first.

const PER_WORD: u32 = 2u;

fn encode_word(x: vec2<f32>) -> u32 {
    return encode_f16(x.x) | (encode_f16(x.y) << 16u);
}
