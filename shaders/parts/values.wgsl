// Values of independent elements: a row of the cache is V4 groups of four, zero-padded.

@group(0) @binding(3) var<storage, read> v_cache: array<VFour>;

fn load_v(row: u32, four: u32) -> vec4<f32> {
    fetched();
    return decode_v(v_cache[row * V4 + four]);
}
