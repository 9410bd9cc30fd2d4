// Four values of each of the 4 lanes of a subgroup, in every lane. WGSL wants constant lane numbers.

fn broadcast(x: vec4<f32>) -> array<vec4<f32>, LANES> {
    return array(
        subgroupBroadcast(x, 0u), subgroupBroadcast(x, 1u), subgroupBroadcast(x, 2u), subgroupBroadcast(x, 3u),
    );
}
