// Outputs and their gradients, stored as f16, two in a word, low half first.

@group(0) @binding(2) var<storage, read> outs: array<u32>;
@group(0) @binding(4) var<storage, read> d_outs: array<u32>;

fn out(index: u32) -> f32 {
    let pair = decode_f16(outs[index / 2u]);
    return select(pair.x, pair.y, (index & 1u) == 1u);
}

fn d_out(index: u32) -> f32 {
    let pair = decode_f16(d_outs[index / 2u]);
    return select(pair.x, pair.y, (index & 1u) == 1u);
}
