// The state (o, m, d) of a row: unnormalised output, running max in base 2, running sum. Two states merge by
//   m = max(m1, m2),  d = d1 exp2(m1 - m) + d2 exp2(m2 - m),  o = o1 exp2(m1 - m) + o2 exp2(m2 - m)
// in any order (FlashInfer, arXiv 2501.01005). The output is o / d; d = 0 means that the row saw no key: output 0, LSE -inf.
//
// A row of the state buffer is V4 groups of o, then (m, d, 0, 0). Part: `with_sink`.

@group(0) @binding(5) var<storage, read_write> lse: array<u32>;
@group(0) @binding(6) var<storage, read_write> states: array<vec4<f32>>;

const STATE4: u32 = V4 + 1u;

// Sums of a finished row, and what its o is to be multiplied by.
struct Total {
    m: f32,
    d: f32,
    shrink: f32,
}

// Four columns of a finished row, divided. A NaN among the keys that it sees stays NaN.
fn finished(head: u32, o: vec4<f32>, sums: vec2<f32>) -> vec4<f32> {
    let total = with_sink(head, sums.x, sums.y);
    return select(o * total.shrink / total.d, vec4(0.0), total.d == 0.0);
}

fn store_four(token: u32, head: u32, four: u32, value: vec4<f32>) {
    let first = work.params.out_offset + token * work.params.out_token + head * work.params.out_head;
    for (var i = 0u; i < 4u; i++) {
        let element = four * 4u + i;
        if element < V_HEAD_DIM {
            store_out(first + element, value[i]);
        }
    }
}

fn finish_four(token: u32, head: u32, four: u32, o: vec4<f32>, sums: vec2<f32>) {
    store_four(token, head, four, finished(head, o, sums));
}

// log-sum-exp of a finished row, natural. -inf is stored as bits: WGSL has no portable infinity.
fn finish_lse(token: u32, head: u32, sums: vec2<f32>) {
    if work.params.lse == 1u {
        let total = with_sink(head, sums.x, sums.y);
        let index = work.params.lse_offset + token * work.params.lse_token + head * work.params.lse_head;
        var bits = 0xff800000u;
        if total.d != 0.0 {
            bits = bitcast<u32>((total.m + log2(total.d)) * LN_2);
        }
        lse[index] = bits;
    }
}
