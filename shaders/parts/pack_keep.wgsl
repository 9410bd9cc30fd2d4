// A byte for each key, four in a word: 0 hides. Into a bit for each key.

@group(0) @binding(1) var<storage, read> given: array<u32>;

fn pack_word(source: u32, keys: u32) -> u32 {
    var bits = 0u;
    for (var i = 0u; i < keys; i++) {
        let at = source + i * work.head.key_stride;
        let byte = (given[at / 4u] >> (at % 4u * 8u)) & 0xffu;
        bits |= select(0u, 1u << i, byte != 0u);
    }
    return bits;
}
