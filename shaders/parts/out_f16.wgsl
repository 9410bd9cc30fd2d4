// Outputs stored as f16, on adapters that can write 16 bits.

@group(0) @binding(4) var<storage, read_write> outputs: array<f16>;

fn load_out(index: u32) -> f32 {
    return f32(outputs[index]);
}

fn store_out(index: u32, value: f32) {
    outputs[index] = f16(value);
}
