// A word of a bf16 cache: two values, low half first.

const PER_WORD: u32 = 2u;

fn encode_word(x: vec2<f32>) -> u32 {
    return encode_bf16(x.x) | (encode_bf16(x.y) << 16u);
}
