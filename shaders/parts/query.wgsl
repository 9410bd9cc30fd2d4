// Four elements of a query row, zero beyond HEAD_DIM and beyond the tile.
fn query_four(item: WorkItem, kv_head: u32, row: u32, four: u32) -> vec4<f32> {
    var q = vec4(0.0);
    if row < item.row_end && four < K4 {
        let first = work.params.q_offset + (item.token + row / GROUP) * work.params.q_token
            + query_head(kv_head, row) * work.params.q_head;
        for (var i = 0u; i < 4u; i++) {
            let element = four * 4u + i;
            if element < HEAD_DIM {
                q[i] = load_query(first + element);
            }
        }
    }
    return q;
}
