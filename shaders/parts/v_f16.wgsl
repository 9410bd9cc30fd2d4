// Four elements of a value in f16.

alias VFour = vec2<u32>;

fn decode_v(four: VFour) -> vec4<f32> {
    return vec4(decode_f16(four.x), decode_f16(four.y));
}
