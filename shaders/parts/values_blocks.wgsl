// Values in blocks: a row has V_WORDS words of V_BITS a number, and behind the numbers of all rows V_UNITS headers.

@group(0) @binding(3) var<storage, read> v_cache: array<u32>;

fn load_v(row: u32, four: u32) -> vec4<f32> {
    fetched();
    let at = four * 4u * V_BITS;
    let word = v_cache[row * V_WORDS + at / 32u] >> (at % 32u);
    return decode_four_block(V_BITS, word, v_cache[work.params.v_headers + row * V_UNITS + four / 8u]);
}
