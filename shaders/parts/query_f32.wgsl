// Queries stored as f32.

@group(0) @binding(1) var<storage, read> queries: array<f32>;

fn load_query(index: u32) -> f32 {
    return queries[index];
}
