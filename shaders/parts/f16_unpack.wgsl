// Two f16 of a word as f32, by the built-in.

fn decode_f16(word: u32) -> vec2<f32> {
    return unpack2x16float(word);
}
