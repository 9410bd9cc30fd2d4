// From a dot product to a logit in base 2: scale, softcap, bias, mask, in that order.
//
// No weight is taken from HIDDEN: `weight` selects 0 there, so a row that has seen no key keeps d = 0.
// Parts: `scaled` (scale, softcap), `biased` (alibi), `masked` (mask_bits, mask_add), each of which may be nothing.

// `kind` is that of the tile which holds the key.
fn logit(dot: f32, row: Row, key: u32, kind: u32) -> f32 {
    var visible = key < row.end;
    if WINDOW_LEFT >= 0 {
        visible = visible && key >= row.begin;
    }
    return masked(select(HIDDEN, biased(scaled(dot), row, key), visible), row, key, kind);
}

fn weight(logit: f32, row_max: f32) -> f32 {
    return select(exp2(logit - row_max), 0.0, logit == HIDDEN);
}
