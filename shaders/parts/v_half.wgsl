// Four elements of a value in f16, as they are: matrices take them so.

alias VFour = vec4<f16>;

fn decode_v(four: VFour) -> vec4<f32> {
    return vec4<f32>(four);
}
