// A number for each key, stored as queries are: HIDES and less (-inf, too) hides. Into base 2. Part: `raw`.

fn pack_word(source: u32, keys: u32) -> u32 {
    let bias = raw(source);
    return bitcast<u32>(select(bias * LOG2_E, HIDDEN, bias <= HIDES));
}
