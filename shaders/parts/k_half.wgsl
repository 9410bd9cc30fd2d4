// Four elements of a key in f16, as they are: matrices take them so.

alias KFour = vec4<f16>;

fn decode_k(four: KFour) -> vec4<f32> {
    return vec4<f32>(four);
}
