// Keys of independent elements: a row of the cache is K4 groups of four, zero-padded.

@group(0) @binding(2) var<storage, read> k_cache: array<KFour>;

fn load_k(row: u32, four: u32) -> vec4<f32> {
    fetched();
    return decode_k(k_cache[row * K4 + four]);
}
