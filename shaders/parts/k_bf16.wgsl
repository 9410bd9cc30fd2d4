// Four elements of a key in bf16.

alias KFour = vec2<u32>;

fn decode_k(four: KFour) -> vec4<f32> {
    return vec4(decode_bf16(four.x), decode_bf16(four.y));
}
