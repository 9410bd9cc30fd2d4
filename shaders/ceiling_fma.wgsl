// Multiply-add ceiling: CHAINS independent chains of x = x * a + b, as many as registers hold.
//
// Bindings: 0 the factors (read, so that no chain is a constant), 1 one result per workgroup.
// Prelude: Element (f32 or vec4<f32>), `fold`, THREADS, STEPS, CHAINS.

@group(0) @binding(0) var<storage, read> source: array<f32>;
@group(0) @binding(1) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let a = Element(source[0] + f32(thread) * 1e-9);
    let b = Element(source[1]);
    var x: array<Element, CHAINS>;
    for (var i = 0u; i < CHAINS; i++) {
        x[i] = Element(f32(thread + i));
    }
    for (var step = 0u; step < STEPS; step++) {
        for (var i = 0u; i < CHAINS; i++) {
            x[i] = fma(x[i], a, b);
        }
    }
    var sum = 0.0;
    for (var i = 0u; i < CHAINS; i++) {
        sum += fold(x[i]);
    }
    if sum == 1.25 {
        sums[workgroup.x] = sum;
    }
}
