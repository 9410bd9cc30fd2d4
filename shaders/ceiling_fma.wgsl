// Multiply-add ceiling: eight independent chains of x = x * a + b in registers, 16 of each between two loop tests.
//
// Bindings: 0 the factors (read, so that no chain is a constant), 1 one result per workgroup.
// Prelude: Element (f32, vec2 or vec4), `fold` (its sum), `mad` (the multiply-add), THREADS, STEPS.

@group(0) @binding(0) var<storage, read> source: array<f32>;
@group(0) @binding(1) var<storage, read_write> sums: array<f32>;

struct Chains {
    a: Element,
    b: Element,
    c: Element,
    d: Element,
    e: Element,
    f: Element,
    g: Element,
    h: Element,
}

fn once(x: Chains, k: Element, l: Element) -> Chains {
    return Chains(
        mad(x.a, k, l), mad(x.b, k, l), mad(x.c, k, l), mad(x.d, k, l),
        mad(x.e, k, l), mad(x.f, k, l), mad(x.g, k, l), mad(x.h, k, l),
    );
}

fn four_times(x: Chains, k: Element, l: Element) -> Chains {
    return once(once(once(once(x, k, l), k, l), k, l), k, l);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let k = Element(source[0] + f32(thread) * 1e-9);
    let l = Element(source[1]);
    let t = Element(f32(thread));
    var x = Chains(t, t + 1.0, t + 2.0, t + 3.0, t + 4.0, t + 5.0, t + 6.0, t + 7.0);
    for (var step = 0u; step < STEPS; step++) {
        x = four_times(four_times(four_times(four_times(x, k, l), k, l), k, l), k, l);
    }
    let sum = fold(x.a) + fold(x.b) + fold(x.c) + fold(x.d) + fold(x.e) + fold(x.f) + fold(x.g) + fold(x.h);
    if sum == 1.25 {
        sums[workgroup.x] = sum;
    }
}
