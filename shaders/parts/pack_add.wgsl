// A number for each key, stored as queries are: HIDES and less (-inf, too) hides the key. Into base 2. Part: `raw`.

fn pack_word(source: u32, keys: u32) -> u32 {
    let bias = raw(source);
    // NaN hides, too. The upper bound keeps what is added finite.
    return bitcast<u32>(select(HIDDEN, min(bias, 1e38) * LOG2_E, bias > HIDES));
}
