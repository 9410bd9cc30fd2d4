// Outputs stored as f16, on adapters that write whole words only. Two invocations may own the halves of one word
// (odd dims, odd strides): each clears and sets its own 16 bits atomically, so neither can lose the other's.

@group(0) @binding(4) var<storage, read_write> outputs: array<atomic<u32>>;

fn load_out(index: u32) -> f32 {
    let pair = decode_f16(atomicLoad(&outputs[index / 2u]));
    return select(pair.x, pair.y, (index & 1u) == 1u);
}

fn store_out(index: u32, value: f32) {
    let shift = (index & 1u) * 16u;
    atomicAnd(&outputs[index / 2u], ~(0xffffu << shift));
    atomicOr(&outputs[index / 2u], encode_f16(value) << shift);
}
