// Queries (in `append`: new keys) stored as f32.

@group(0) @binding(1) var<storage, read> raws: array<f32>;

fn raw(index: u32) -> f32 {
    return raws[index];
}
