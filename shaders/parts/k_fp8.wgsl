// Four elements of a key in fp8.

alias KFour = u32;

fn decode_k(four: KFour) -> vec4<f32> {
    return decode_four_fp8(four);
}
