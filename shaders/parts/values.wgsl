// Values of their own: a row of the cache is V4 groups of four, zero-padded.

@group(0) @binding(3) var<storage, read> v_cache: array<Four>;

fn load_v(row: u32, four: u32) -> vec4<f32> {
    fetched();
    return decode_four(v_cache[row * V4 + four]);
}
