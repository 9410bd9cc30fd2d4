// What four elements of the cache look like: f16, two in a word, low half first.

alias Four = vec2<u32>;

fn decode_four(four: Four) -> vec4<f32> {
    return vec4(decode_f16(four.x), decode_f16(four.y));
}
