// Combine for a rotated cache: as `combine`, and turns the output back, whose values were rotated when they were stored.
//   out = H sum o_i exp2(m_i - m) / d        (H is its own inverse: parts/rotate.wgsl)
// Workgroup (x: row of the tile, y: KV head, z: item); the row waits in workgroup memory.
//
// Bindings: 0 work list, 4 outputs, 5 LSE, 6 states, 7 words, 8 table (for sinks). Prelude: THREADS, V4, V_HEAD_DIM.

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let item = work.items[workgroup.z];
    let kv_head = workgroup.y;
    let row = item.row_begin + workgroup.x;
    if row >= item.row_end {
        return;
    }
    let sums = merged_sums(item, kv_head, row);
    let token = item.token + row / GROUP;
    let head = query_head(kv_head, row);
    for (var four = thread; four < V4; four += THREADS) {
        let o = finished(head, merged_four(item, kv_head, row, four, sums.x), sums);
        for (var i = 0u; i < 4u; i++) {
            rows[four * 4u + i] = o[i];
        }
    }
    // The row is whole.
    workgroupBarrier();
    rotate_rows(1u, V4 * 4u, V_HEAD_DIM, thread);
    for (var four = thread; four < V4; four += THREADS) {
        let at = four * 4u;
        store_four(token, head, four, vec4(rows[at], rows[at + 1u], rows[at + 2u], rows[at + 3u]));
    }
    if thread == 0u {
        finish_lse(token, head, sums);
    }
}
