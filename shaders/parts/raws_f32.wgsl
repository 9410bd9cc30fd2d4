// Queries (in `append`: new keys), elements.

@group(0) @binding(1) var<storage, read> raws: array<f32>;
