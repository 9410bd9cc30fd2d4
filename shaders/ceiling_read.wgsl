// Read ceiling: streams a buffer once and adds everything up, so that no load can be left out.
// An invocation begins LANE behind its neighbour and steps by STRIDE: neighbours read neighbouring elements (1, THREADS), or each
// has a run of its own (STEPS, 1).
//
// Bindings: 0 the buffer, 1 a sum per workgroup, so that it must be computed.
// Prelude: Element (what one load brings), `fold` (its sum), `place` (of a thread among its neighbours), THREADS, STEPS (elements
// per invocation, a multiple of 4), LANE, STRIDE.

@group(0) @binding(0) var<storage, read> source: array<Element>;
@group(0) @binding(1) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = workgroup.x * THREADS * STEPS + place(thread) * LANE;
    var a = Element();
    var b = Element();
    var c = Element();
    var d = Element();
    for (var step = 0u; step < STEPS; step += 4u) {
        let at = first + step * STRIDE;
        a += source[at];
        b += source[at + STRIDE];
        c += source[at + 2u * STRIDE];
        d += source[at + 3u * STRIDE];
    }
    let sum = fold(a) + fold(b) + fold(c) + fold(d);
    // Contents are zero: no invocation writes, yet none may assume so.
    if sum != 0.0 {
        sums[workgroup.x] = sum;
    }
}
