// Four elements of a value in f32.

alias VFour = vec4<f32>;

fn decode_v(four: VFour) -> vec4<f32> {
    return four;
}
