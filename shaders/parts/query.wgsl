// Queries as their logits need them: normalised, turned.

fn query_source(item: WorkItem, kv_head: u32, row: u32) -> u32 {
    return work.params.q_offset + row_token(item, row) * work.params.q_token
        + query_head(kv_head, row) * work.params.q_head;
}

// Before the first `query_four`, by all invocations: the norms of the tile's rows.
fn measure_queries(item: WorkItem, kv_head: u32, thread: u32) {
    if NORM {
        for (var row = item.row_begin + thread; row < item.row_end; row += THREADS) {
            measure(row - item.row_begin, query_source(item, kv_head, row));
        }
        norms_measured();
    }
}

// Four elements of a row, zero beyond HEAD_DIM and beyond the tile.
fn query_four(item: WorkItem, kv_head: u32, row: u32, four: u32) -> vec4<f32> {
    var q = vec4(0.0);
    if row < item.row_end && four < K4 {
        let source = query_source(item, kv_head, row);
        let position = query_position(item, row);
        for (var i = 0u; i < 4u; i++) {
            let element = four * 4u + i;
            if element < HEAD_DIM {
                q[i] = turned(source, element, position) * norm_of(row - item.row_begin);
            }
        }
    }
    return q;
}
