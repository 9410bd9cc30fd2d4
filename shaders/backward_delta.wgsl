// Backward, first: what the gradients of a row's logits have in common.
//   delta = sum dO O;  l = LSE in base 2
// An invocation takes one (token, query head) row.
//
// Bindings: 0 work list (Params only), 1 outputs, 4 their gradients (both laid out alike), 5 LSE, 6 (l, delta) of each row.
// Prelude: THREADS, Q_HEADS, V_HEAD_DIM, MAX_WORKGROUPS.

struct DeltaWork {
    params: Params,
}

@group(0) @binding(0) var<storage, read> work: DeltaWork;
@group(0) @binding(5) var<storage, read> lse: array<u32>;
@group(0) @binding(6) var<storage, read_write> row_sums: array<vec2<f32>>;

const MINUS_INFINITY: u32 = 0xff800000u;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = item_index(workgroup) * THREADS + thread;
    let params = work.params;
    if row / Q_HEADS >= params.items {
        return;
    }
    let token = row / Q_HEADS;
    let head = row % Q_HEADS;
    let bits = lse[params.lse_offset + token * params.lse_token + head * params.lse_head];
    // A row that saw no key: its weights, and the sink's, become 0.
    var sums = vec2(-HIDDEN, 0.0);
    if bits != MINUS_INFINITY {
        let first = params.out_offset + token * params.out_token + head * params.out_head;
        var delta = 0.0;
        for (var element = 0u; element < V_HEAD_DIM; element++) {
            delta += raw(first + element) * d_out(first + element);
        }
        sums = vec2(bitcast<f32>(bits) * LOG2_E, delta);
    }
    row_sums[row] = sums;
}
