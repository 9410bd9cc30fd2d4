// Four elements of a key in f32.

alias KFour = vec4<f32>;

fn decode_k(four: KFour) -> vec4<f32> {
    return four;
}
