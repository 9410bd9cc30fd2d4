// What a key and a value look like: f16, two in a word, low half first. A row is K4 (V4) groups of four, zero-padded.

@group(0) @binding(2) var<storage, read> k_cache: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> v_cache: array<vec2<u32>>;

fn load_k(row: u32, four: u32) -> vec4<f32> {
    fetched();
    let words = k_cache[row * K4 + four];
    return vec4(decode_f16(words.x), decode_f16(words.y));
}

fn load_v(row: u32, four: u32) -> vec4<f32> {
    fetched();
    let words = v_cache[row * V4 + four];
    return vec4(decode_f16(words.x), decode_f16(words.y));
}
