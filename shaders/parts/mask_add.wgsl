// A mask that is added, in base 2; HIDDEN hides.

fn masked(logit: f32, row: Row, key: u32, kind: u32) -> f32 {
    // What arithmetic hides may have no number.
    if kind == FULL || logit == HIDDEN {
        return logit;
    }
    let bias = bitcast<f32>(words[row.mask + u32(i32(key) + row.mask_key)]);
    return select(logit + bias, HIDDEN, bias == HIDDEN);
}
