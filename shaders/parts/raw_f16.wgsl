// Queries (in `append`: new keys) stored as f16, two in a word, low half first.

fn raw(index: u32) -> f32 {
    let pair = decode_f16(raws[index / 2u]);
    return select(pair.x, pair.y, (index & 1u) == 1u);
}
