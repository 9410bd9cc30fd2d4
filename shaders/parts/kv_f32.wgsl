// What a key and a value look like: f32. A row of the cache is K4 (V4) groups of four values, zero-padded.

@group(0) @binding(2) var<storage, read> k_cache: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> v_cache: array<vec4<f32>>;

fn load_k(row: u32, four: u32) -> vec4<f32> {
    fetched();
    return k_cache[row * K4 + four];
}

fn load_v(row: u32, four: u32) -> vec4<f32> {
    fetched();
    return v_cache[row * V4 + four];
}
