// Backward, last: gradients go from f32 to where and how the caller's tensor lies; those of turned queries and keys turn back.
//   x' = R x  =>  dx = R^T dx', and R^T is R at the negative position
// A workgroup takes a run of tokens of one head.
//
// Bindings: 0 work list, 4 the gradient of the caller's tensor, 6 rows of f32, 8 table where a part uses it.
// Parts: `turned` (rope, rope_none), `store_out`. Prelude: THREADS, MAX_WORKGROUPS.

struct StoreHead {
    items: u32,
    // Elements of a head.
    dim: u32,
    // From a token to the next, from a head to the next, and in front of the first, in elements of the rows of f32.
    token: u32,
    head: u32,
    first: u32,
    // Whether they turn back.
    turns: u32,
    // The caller's tensor.
    out_offset: u32,
    out_token: u32,
    out_head: u32,
}

struct StoreWork {
    head: StoreHead,
    items: array<StoreItem>,
}

@group(0) @binding(0) var<storage, read> work: StoreWork;
@group(0) @binding(6) var<storage, read> gradients: array<f32>;

fn weighed(source: u32, element: u32) -> f32 {
    return gradients[source + element];
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let index = workgroup.x + workgroup.z * MAX_WORKGROUPS;
    let head = work.head;
    if index >= head.items {
        return;
    }
    let item = work.items[index];
    // Counted on, not divided anew for each element: software adapters divide lane by lane.
    var nth = thread / head.dim;
    var element = thread % head.dim;
    while nth < item.tokens {
        let token = item.token + nth;
        let source = head.first + token * head.token + workgroup.y * head.head;
        var x = weighed(source, element);
        if head.turns == 1u {
            x = turned(source, element, -(item.position + i32(nth)));
        }
        store_out(head.out_offset + token * head.out_token + workgroup.y * head.out_head + element, x);
        element += THREADS;
        while element >= head.dim {
            element -= head.dim;
            nth++;
        }
    }
}
