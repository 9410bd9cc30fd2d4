// What four elements of the cache look like: f32.

alias Four = vec4<f32>;

fn decode_four(four: Four) -> vec4<f32> {
    return four;
}
