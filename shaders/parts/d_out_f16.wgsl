// Gradients of the outputs, stored as f16, two in a word, low half first.

@group(0) @binding(4) var<storage, read> d_outs: array<u32>;

fn d_out(index: u32) -> f32 {
    let pair = decode_f16(d_outs[index / 2u]);
    return select(pair.x, pair.y, (index & 1u) == 1u);
}
