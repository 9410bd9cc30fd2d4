// Four elements of a value in fp8.

alias VFour = u32;

fn decode_v(four: VFour) -> vec4<f32> {
    return decode_four_fp8(four);
}
