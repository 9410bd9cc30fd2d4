// Backward, first: rows as the kernels that follow read them again and again, in f32 and whole groups of four.
//   q turned, dO, (l, delta):  l = LSE in base 2,  delta = sum dO O
// A workgroup takes a run of tokens of one query head.
//
// Bindings: 0 work list, 1 queries, 2 outputs, 4 their gradients (both laid out alike), 5 LSE, 6 rows, 8 table where a part uses it.
// Prelude: THREADS, K4 = ceil(HEAD_DIM / 4), V4, MAX_WORKGROUPS.

struct RowsWork {
    params: Params,
    items: array<StoreItem>,
}

@group(0) @binding(0) var<storage, read> work: RowsWork;
@group(0) @binding(5) var<storage, read> lse: array<u32>;
@group(0) @binding(6) var<storage, read_write> packed: array<vec4<f32>>;

const MINUS_INFINITY: u32 = 0xff800000u;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let index = item_index(workgroup);
    let params = work.params;
    if index >= params.items {
        return;
    }
    let item = work.items[index];
    let head = workgroup.y;
    for (var i = thread; i < item.tokens * (K4 + V4); i += THREADS) {
        let nth = i / (K4 + V4);
        let four = i % (K4 + V4);
        let token = item.token + nth;
        var x = vec4(0.0);
        if four < K4 {
            let source = params.q_offset + token * params.q_token + head * params.q_head;
            for (var e = 0u; e < 4u; e++) {
                if four * 4u + e < HEAD_DIM {
                    x[e] = turned(source, four * 4u + e, item.position + i32(nth));
                }
            }
        } else {
            let source = params.out_offset + token * params.out_token + head * params.out_head;
            for (var e = 0u; e < 4u; e++) {
                let element = (four - K4) * 4u + e;
                if element < V_HEAD_DIM {
                    x[e] = d_out(source + element);
                }
            }
        }
        packed[packed_row(params.tokens, token, head) + four] = x;
    }
    for (var nth = thread; nth < item.tokens; nth += THREADS) {
        let token = item.token + nth;
        let bits = lse[params.lse_offset + token * params.lse_token + head * params.lse_head];
        // A row that saw no key: its weights, and the sink's, become 0.
        var sums = vec2(-HIDDEN, 0.0);
        if bits != MINUS_INFINITY {
            let source = params.out_offset + token * params.out_token + head * params.out_head;
            var delta = 0.0;
            for (var element = 0u; element < V_HEAD_DIM; element++) {
                delta += out(source + element) * d_out(source + element);
            }
            sums = vec2(bitcast<f32>(bits) * LOG2_E, delta);
        }
        packed[packed_row(params.tokens, token, head) + K4 + V4] = vec4(sums, 0.0, 0.0);
    }
}
