// Outputs and their gradients, stored as f32.

@group(0) @binding(2) var<storage, read> outs: array<f32>;
@group(0) @binding(4) var<storage, read> d_outs: array<f32>;

fn out(index: u32) -> f32 {
    return outs[index];
}

fn d_out(index: u32) -> f32 {
    return d_outs[index];
}
