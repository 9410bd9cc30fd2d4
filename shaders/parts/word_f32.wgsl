// A word of an f32 cache.

const PER_WORD: u32 = 1u;

fn encode_word(x: vec2<f32>) -> u32 {
    return bitcast<u32>(x.x);
}
