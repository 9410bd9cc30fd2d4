// The step's words: page tables, places of listed rows, parts of rows that are merged, masks and their maps.

@group(0) @binding(7) var<storage, read> words: array<u32>;
