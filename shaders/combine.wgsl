// Combine: merges the states of a row's parts (chunks of its keys, shared or its own) and writes output and LSE.
//   m = max m_i;  d = sum d_i exp2(m_i - m);  out = sum o_i exp2(m_i - m) / d
// An invocation merges four columns of one row; a workgroup's invocations share nothing, so there is no barrier.
// Workgroup (x: fours of all rows of the tile, y: KV head, z: item).
//
// Bindings: 0 work list, 4 outputs, 5 LSE, 6 states, 7 words, 8 table (for sinks). Prelude: THREADS, V4.

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let item = work.items[workgroup.z];
    let kv_head = workgroup.y;
    let flat = workgroup.x * THREADS + thread;
    let row = item.row_begin + flat / V4;
    let four = flat % V4;
    if row >= item.row_end {
        return;
    }
    let sums = merged_sums(item, kv_head, row);
    let o = merged_four(item, kv_head, row, four, sums.x);
    let token = item.token + row / GROUP;
    finish_four(token, query_head(kv_head, row), four, o, sums);
    if four == 0u {
        finish_lse(token, query_head(kv_head, row), sums);
    }
}
