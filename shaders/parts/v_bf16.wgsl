// Four elements of a value in bf16.

alias VFour = vec2<u32>;

fn decode_v(four: VFour) -> vec4<f32> {
    return vec4(decode_bf16(four.x), decode_bf16(four.y));
}
