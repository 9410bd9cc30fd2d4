// Queries that may share a buffer with outputs, which wgpu allows where both are bound alike; never written.

@group(0) @binding(1) var<storage, read_write> raws: array<f32>;
