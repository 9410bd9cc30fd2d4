// Outputs stored as f32.

@group(0) @binding(4) var<storage, read_write> outputs: array<f32>;

fn load_out(index: u32) -> f32 {
    return outputs[index];
}

fn store_out(index: u32, value: f32) {
    outputs[index] = value;
}
