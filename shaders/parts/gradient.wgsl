// From what the forward pass has left to the gradient of a logit:
//   p = exp2(s - l),  ds = p (dO v^T - delta)
// with the row's log-sum-exp l in base 2 and delta = dO . O (FlashAttention-2, arXiv 2307.08691). `backward_delta` has written both.
//
// Gradients of queries, keys and values are left in f32, in rows of whole groups of four, for `backward_store`.

@group(0) @binding(5) var<storage, read> row_sums: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read_write> gradients: array<vec4<f32>>;

// (l, delta) of a row; beyond the tile a row weighs nothing.
fn sums_of(item: WorkItem, kv_head: u32, row: u32) -> vec2<f32> {
    if row >= item.row_end {
        return vec2(-HIDDEN, 0.0);
    }
    return row_sums[row_token(item, row) * Q_HEADS + query_head(kv_head, row)];
}

// Four elements of the gradient of a row's output, zero beyond V_HEAD_DIM and beyond the tile.
fn d_out_four(item: WorkItem, kv_head: u32, row: u32, four: u32) -> vec4<f32> {
    var d = vec4(0.0);
    if row < item.row_end && four < V4 {
        let source = work.params.out_offset + row_token(item, row) * work.params.out_token
            + query_head(kv_head, row) * work.params.out_head;
        for (var i = 0u; i < 4u; i++) {
            let element = four * 4u + i;
            if element < V_HEAD_DIM {
                d[i] = d_out(source + element);
            }
        }
    }
    return d;
}
