// Backward, sinks: a sink has a weight p = exp2(sink - l) in every row of its head, and no value.
//   dsink = - sum p delta
// A workgroup takes one query head; an invocation every THREADS-th token, always the same ones, so sums are always the same.
//
// Bindings: 0 work list (Params only), 1 rows of `backward_rows`, 6 gradients of the sinks, 8 table.
// Prelude: THREADS, Q_HEADS, SINKS_AT.

struct SinkWork {
    params: Params,
}

@group(0) @binding(0) var<storage, read> work: SinkWork;
@group(0) @binding(1) var<storage, read> packed: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> d_sinks: array<f32>;

var<workgroup> shares: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let head = item_index(workgroup);
    if head >= Q_HEADS {
        return;
    }
    let sink = table_number(SINKS_AT + head);
    var share = 0.0;
    for (var token = thread; token < work.params.items; token += THREADS) {
        // Of a token that no sequence has both are 0, and the weight may be infinite.
        let sums = packed[packed_row(work.params.tokens, token, head) + K4 + V4];
        share -= select(exp2(sink - sums.x) * sums.y, 0.0, sums.y == 0.0);
    }
    shares[thread] = share;
    // Every share is there.
    workgroupBarrier();
    if thread == 0u {
        var sum = 0.0;
        for (var i = 0u; i < THREADS; i++) {
            sum += shares[i];
        }
        d_sinks[head] = sum;
    }
}
