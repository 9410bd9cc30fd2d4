// New keys and values stored as f16, two in a word, low half first.

@group(0) @binding(1) var<storage, read> new_k: array<u32>;
@group(0) @binding(2) var<storage, read> new_v: array<u32>;

fn half_of(word: u32, index: u32) -> f32 {
    let pair = decode_f16(word);
    return select(pair.x, pair.y, (index & 1u) == 1u);
}

fn load_new_k(index: u32) -> f32 {
    return half_of(new_k[index / 2u], index);
}

fn load_new_v(index: u32) -> f32 {
    return half_of(new_v[index / 2u], index);
}
