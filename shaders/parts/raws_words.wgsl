// Queries (in `append`: new keys), whole words of elements.

@group(0) @binding(1) var<storage, read> raws: array<u32>;
