// New values stored as f32.

@group(0) @binding(2) var<storage, read> new_v: array<f32>;

fn load_new_v(index: u32) -> f32 {
    return new_v[index];
}
