// The states of a row, which its parts have left. Part p of an item is two words: (base, stride); the row r of a KV head has its state
// at row `base + kv_head * stride + r` of the state buffer.

struct CombineItem {
    token: u32,
    row_begin: u32,
    row_end: u32,
    // First word of the parts.
    parts: u32,
    count: u32,
}

struct CombineWork {
    params: Params,
    items: array<CombineItem>,
}

@group(0) @binding(0) var<storage, read> work: CombineWork;

fn part_state(item: CombineItem, kv_head: u32, row: u32, part: u32) -> u32 {
    let at = item.parts + 2u * part;
    return (words[at] + kv_head * words[at + 1u] + row) * STATE4;
}

// Running max and sum over all parts.
fn merged_sums(item: CombineItem, kv_head: u32, row: u32) -> vec2<f32> {
    var m = HIDDEN;
    for (var part = 0u; part < item.count; part++) {
        m = max(m, states[part_state(item, kv_head, row, part) + V4].x);
    }
    var d = 0.0;
    for (var part = 0u; part < item.count; part++) {
        let sums = states[part_state(item, kv_head, row, part) + V4];
        d += sums.y * exp2(sums.x - m);
    }
    return vec2(m, d);
}

// Four columns of the output over all parts, relative to the max `m`.
fn merged_four(item: CombineItem, kv_head: u32, row: u32, four: u32, m: f32) -> vec4<f32> {
    var o = vec4(0.0);
    for (var part = 0u; part < item.count; part++) {
        let at = part_state(item, kv_head, row, part);
        o += states[at + four] * exp2(states[at + V4].x - m);
    }
    return o;
}
