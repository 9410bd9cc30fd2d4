// A boolean mask, a bit for each key: 0 hides. Keys in front of column 0 are visible (a tree is about the new tokens only).

fn masked(logit: f32, row: Row, key: u32, kind: u32) -> f32 {
    // What arithmetic hides may have no bit.
    if kind == FULL || logit == HIDDEN {
        return logit;
    }
    let column = i32(key) + row.mask_key;
    if column < 0 {
        return logit;
    }
    let word = words[row.mask + u32(column) / 32u];
    return select(HIDDEN, logit, ((word >> (u32(column) % 32u)) & 1u) == 1u);
}
