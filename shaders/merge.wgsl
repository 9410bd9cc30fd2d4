// Merge: two partial results (out, LSE) of the same rows over different keys become one, in place.
//   l = log(exp(l1) + exp(l2));  out = out1 exp(l1 - l) + out2 exp(l2 - l)
// (FlashInfer, arXiv 2501.01005.) An LSE of -inf says that its part saw no key, and weighs nothing.
// An invocation merges one (token, query head) row: the LSE of a row is read before it is written, and by no other.
//
// Bindings: 0 work list (Params only), 1 and 2 output and LSE that are merged, 4 and 5 those that are merged into.
// Prelude: THREADS, Q_HEADS, V_HEAD_DIM, MAX_WORKGROUPS. Parts: `raw` reads an output of the first, `load_out`, `store_out` those of
// the second.

struct MergeWork {
    params: Params,
}

@group(0) @binding(0) var<storage, read> work: MergeWork;
@group(0) @binding(2) var<storage, read> from_lse: array<u32>;
@group(0) @binding(5) var<storage, read_write> into_lse: array<u32>;

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
    let at = params.lse_offset + token * params.lse_token + head * params.lse_head;
    let theirs = from_lse[at];
    let ours = into_lse[at];
    let empty = ours == MINUS_INFINITY;
    if theirs == MINUS_INFINITY && !empty {
        return;
    }
    let first = params.out_offset + token * params.out_token + head * params.out_head;
    if theirs == MINUS_INFINITY {
        // Neither has seen a key.
        for (var element = 0u; element < V_HEAD_DIM; element++) {
            store_out(first + element, 0.0);
        }
        return;
    }
    // In base 2. `ours` may be -inf: its weight is then 0, and no arithmetic touches it.
    let l1 = bitcast<f32>(theirs) * LOG2_E;
    let l2 = select(bitcast<f32>(ours) * LOG2_E, l1, empty);
    let top = max(l1, l2);
    let w1 = exp2(l1 - top);
    let w2 = select(exp2(l2 - top), 0.0, empty);
    let sum = w1 + w2;
    into_lse[at] = bitcast<u32>((top + log2(sum)) * LN_2);
    for (var element = 0u; element < V_HEAD_DIM; element++) {
        let mine = select(load_out(first + element) * w2, 0.0, empty);
        store_out(first + element, (raw(first + element) * w1 + mine) / sum);
    }
}
