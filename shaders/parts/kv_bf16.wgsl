// What four elements of the cache look like: bf16, two in a word, low half first.

alias Four = vec2<u32>;

fn decode_four(four: Four) -> vec4<f32> {
    return vec4(decode_bf16(four.x), decode_bf16(four.y));
}

fn decode_bf16(word: u32) -> vec2<f32> {
    return bitcast<vec2<f32>>(vec2(word << 16u, word & 0xffff0000u));
}
