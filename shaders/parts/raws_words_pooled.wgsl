// The same, whole words of elements.

@group(0) @binding(1) var<storage, read_write> raws: array<u32>;
