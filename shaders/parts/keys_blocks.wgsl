// Keys in blocks: a row has K_WORDS words of K_BITS a number, and behind the numbers of all rows K_UNITS headers.

@group(0) @binding(2) var<storage, read> k_cache: array<u32>;

fn load_k(row: u32, four: u32) -> vec4<f32> {
    fetched();
    let at = four * 4u * K_BITS;
    let word = k_cache[row * K_WORDS + at / 32u] >> (at % 32u);
    return decode_four_block(K_BITS, word, k_cache[work.params.k_headers + row * K_UNITS + four / 8u]);
}
