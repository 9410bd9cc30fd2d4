// New values stored as f16, two in a word, low half first.

@group(0) @binding(2) var<storage, read> new_v: array<u32>;

fn load_new_v(index: u32) -> f32 {
    let pair = decode_f16(new_v[index / 2u]);
    return select(pair.x, pair.y, (index & 1u) == 1u);
}
