// From what the forward pass has left to the gradient of a logit:
//   p = exp2(s - l),  ds = p (dO v^T - delta)
// with the row's log-sum-exp l in base 2 and delta = dO . O (FlashAttention-2, arXiv 2307.08691). `backward_rows` has packed a row's
// query, dO, l and delta.
//
// Gradients of queries, keys and values are left in f32, in rows of whole groups of four, for `backward_store`.

@group(0) @binding(1) var<storage, read> packed: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> gradients: array<vec4<f32>>;

// First group of a packed row: see `packed_row`. The rows of a sequence follow each other.
fn first_four(item: WorkItem, kv_head: u32, row: u32) -> u32 {
    return ((kv_head * work.params.tokens + item.token) * GROUP + row) * ROW4;
}

// Where the gradient of a row's query lies among all of the step.
fn row_index(item: WorkItem, kv_head: u32, row: u32) -> u32 {
    return row_token(item, row) * Q_HEADS + query_head(kv_head, row);
}

// (l, delta) of a row; beyond the tile a row weighs nothing.
fn sums_of(item: WorkItem, kv_head: u32, row: u32) -> vec2<f32> {
    if row >= item.row_end {
        return vec2(-HIDDEN, 0.0);
    }
    return packed[first_four(item, kv_head, row) + K4 + V4].xy;
}

// Four elements of a turned query, zero beyond HEAD_DIM and beyond the tile.
fn q_four(item: WorkItem, kv_head: u32, row: u32, four: u32) -> vec4<f32> {
    if row >= item.row_end || four >= K4 {
        return vec4(0.0);
    }
    return packed[first_four(item, kv_head, row) + four];
}

// Four elements of the gradient of a row's output, zero beyond V_HEAD_DIM and beyond the tile.
fn d_four(item: WorkItem, kv_head: u32, row: u32, four: u32) -> vec4<f32> {
    if row >= item.row_end || four >= V4 {
        return vec4(0.0);
    }
    return packed[first_four(item, kv_head, row) + K4 + four];
}
