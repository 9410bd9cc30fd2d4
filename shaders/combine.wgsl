// Combine: merges the states of the chunks of a row and writes output and LSE.
//   m = max m_i;  d = sum d_i exp2(m_i - m);  out = sum o_i exp2(m_i - m) / d
// An invocation merges four columns of one row; a workgroup's invocations share nothing, so there is no barrier.
// Workgroup (x: fours of all rows of the tile, y: KV head, z: item).
//
// Bindings: 0 work list, 4 outputs, 5 LSE, 6 states, 8 table (for sinks). Prelude: THREADS, V4.

struct CombineItem {
    token: u32,
    row_begin: u32,
    row_end: u32,
    state: u32,
    chunks: u32,
}

struct CombineWork {
    params: Params,
    items: array<CombineItem>,
}

@group(0) @binding(0) var<storage, read> work: CombineWork;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let item = work.items[workgroup.z];
    let kv_head = workgroup.y;
    let rows = item.row_end - item.row_begin;
    let flat = workgroup.x * THREADS + thread;
    let local_row = flat / V4;
    let four = flat % V4;
    if local_row >= rows {
        return;
    }
    let first = item.state + kv_head * rows + local_row;
    let stride = KV_HEADS * rows;

    var m = HIDDEN;
    for (var chunk = 0u; chunk < item.chunks; chunk++) {
        m = max(m, states[(first + chunk * stride) * STATE4 + V4].x);
    }
    var o = vec4(0.0);
    var d = 0.0;
    for (var chunk = 0u; chunk < item.chunks; chunk++) {
        let at = (first + chunk * stride) * STATE4;
        let sums = states[at + V4];
        let shrink = exp2(sums.x - m);
        d += sums.y * shrink;
        o += states[at + four] * shrink;
    }

    let row = item.row_begin + local_row;
    let token = item.token + row / GROUP;
    finish_four(token, query_head(kv_head, row), four, o, vec2(m, d));
    if four == 0u {
        finish_lse(token, query_head(kv_head, row), vec2(m, d));
    }
}
