// Queries (in `append`: new keys) stored as f32.

fn raw(index: u32) -> f32 {
    return raws[index];
}
