// Of some keys of a mask's row, from `column` on: whether one is visible, whether one is not, or with another logit.

fn judge(row: u32, column: u32, keys: u32) -> vec2<bool> {
    var seen = false;
    var changed = false;
    for (var i = 0u; i < keys; i++) {
        let bias = bitcast<f32>(words[row + column + i]);
        seen |= bias != HIDDEN;
        changed |= bias != 0.0;
    }
    return vec2(seen, changed);
}
