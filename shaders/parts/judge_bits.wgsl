// Of some keys (1 to 32) of a mask's row, from `column` on: whether one is visible, whether one is not.
fn judge(row: u32, column: u32, keys: u32) -> vec2<bool> {
    let at = row + column / 32u;
    let shift = column % 32u;
    var bits = words[at] >> shift;
    if shift + keys > 32u {
        bits |= words[at + 1u] << (32u - shift);
    }
    let all = 0xffffffffu >> (32u - keys);
    return vec2((bits & all) != 0u, (bits & all) != all);
}
