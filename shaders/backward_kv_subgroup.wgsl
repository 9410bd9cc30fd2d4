// Backward, keys and values, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T,  p = exp2(s - l),  ds = p (dO v^T - delta);  dv = sum p dO,  dk = scale sum ds q
// A workgroup is one subgroup. A lane owns KEYS / LANES whole keys of one KV head and walks the rows of its item, every query head of
// the group in turn, so the sums over the group never leave the lane. The lanes load a query and the gradient of its output together,
// each every LANES-th group of four, and broadcast their parts. No workgroup memory, no barrier.
//
// Loops marked `// written out` are, by the linker, since an array that a loop indexes lies in memory (src/shader/write_out.rs).
// Loops of .._TURNS stay rolled (`ROLLED` in src/shader/prelude.rs), and turns beyond the tile load zeros and add nothing; the walk uses copies of their arrays.
//
// Bindings: 0 work list, 1 rows of `backward_rows`, 2 keys, 3 values, 6 gradients of keys and values, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// An item's `state` is the new token that its first key is. A row of gradients is K4 groups of a key and V4 of its value.
// Prelude: LANES, KEYS (a multiple of LANES), ROWS (of a step), K4 = ceil(HEAD_DIM / 4), V4.

const KEYS_EACH: u32 = KEYS / LANES;
const K_PART: u32 = (K4 + LANES - 1u) / LANES;
const V_PART: u32 = (V4 + LANES - 1u) / LANES;
const K_WIDE: u32 = K_PART * LANES;
const V_WIDE: u32 = V_PART * LANES;
const K_TURNS: u32 = max(KEYS_EACH * K_WIDE, ROLLED);
const V_TURNS: u32 = max(KEYS_EACH * V_WIDE, ROLLED);

// First group of the gradients of the item's nth key.
fn gradient_row(item: WorkItem, kv_head: u32, nth: u32) -> u32 {
    return ((item.state + nth) * KV_HEADS + kv_head) * (K4 + V4);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;

    var k_loaded: array<vec4<f32>, K_TURNS>;
    for (var i = 0u; i < K_TURNS; i++) {
        let key = item.key_begin + i / K_WIDE * LANES + lane;
        if key < item.key_end && i % K_WIDE < K4 {
            k_loaded[i] = load_k(kv_row(item.pages, kv_head, item.origin + key), i % K_WIDE);
        }
    }
    var v_loaded: array<vec4<f32>, V_TURNS>;
    for (var i = 0u; i < V_TURNS; i++) {
        let key = item.key_begin + i / V_WIDE * LANES + lane;
        if key < item.key_end && i % V_WIDE < V4 {
            v_loaded[i] = load_v(kv_row(item.pages, kv_head, item.origin + key), i % V_WIDE);
        }
    }
    var k: array<vec4<f32>, KEYS_EACH * K_WIDE>;
    var v: array<vec4<f32>, KEYS_EACH * V_WIDE>;
    var dk: array<vec4<f32>, KEYS_EACH * K_WIDE>;
    var dv: array<vec4<f32>, KEYS_EACH * V_WIDE>;
    for (var e = 0u; e < KEYS_EACH; e++) { // written out
        for (var c = 0u; c < K_WIDE; c++) { // written out
            k[e * K_WIDE + c] = k_loaded[e * K_WIDE + c];
            dk[e * K_WIDE + c] = vec4(0.0);
        }
        for (var c = 0u; c < V_WIDE; c++) { // written out
            v[e * V_WIDE + c] = v_loaded[e * V_WIDE + c];
            dv[e * V_WIDE + c] = vec4(0.0);
        }
    }

    for (var row = item.row_begin; row < item.row_end; row += ROWS) {
        let count = min(ROWS, item.row_end - row);
        // All loads come before the products: each brings branches, and LLVM carries products across those through memory.
        var seen: array<Row, ROWS>;
        var sums: array<vec2<f32>, ROWS>;
        var q: array<vec4<f32>, ROWS * K_PART>;
        var d: array<vec4<f32>, ROWS * V_PART>;
        for (var u = 0u; u < ROWS; u++) { // written out
            let here = row + min(u, count - 1u);
            let first = first_four(item, kv_head, here);
            seen[u] = row_of(item, kv_head, here);
            sums[u] = packed[first + K4 + V4].xy;
            for (var i = 0u; i < K_PART; i++) { // written out
                if K4 % LANES == 0u || i * LANES + lane < K4 {
                    q[u * K_PART + i] = packed[first + i * LANES + lane];
                }
            }
            for (var i = 0u; i < V_PART; i++) { // written out
                if V4 % LANES == 0u || i * LANES + lane < V4 {
                    d[u * V_PART + i] = packed[first + K4 + i * LANES + lane];
                }
            }
        }
        var dots: array<vec4<f32>, KEYS_EACH * ROWS>;
        for (var i = 0u; i < K_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, ROWS>;
            for (var u = 0u; u < ROWS; u++) { // written out
                wide[u] = broadcast(q[u * K_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                for (var e = 0u; e < KEYS_EACH; e++) { // written out
                    let x = k[e * K_WIDE + i * LANES + j];
                    for (var u = 0u; u < ROWS; u++) { // written out
                        dots[e * ROWS + u] += x * wide[u][j];
                    }
                }
            }
        }
        var d_weights: array<vec4<f32>, KEYS_EACH * ROWS>;
        for (var i = 0u; i < V_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, ROWS>;
            for (var u = 0u; u < ROWS; u++) { // written out
                wide[u] = broadcast(d[u * V_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                for (var e = 0u; e < KEYS_EACH; e++) { // written out
                    let x = v[e * V_WIDE + i * LANES + j];
                    for (var u = 0u; u < ROWS; u++) { // written out
                        d_weights[e * ROWS + u] += x * wide[u][j];
                    }
                }
            }
        }
        var p: array<f32, KEYS_EACH * ROWS>;
        var ds: array<f32, KEYS_EACH * ROWS>;
        for (var e = 0u; e < KEYS_EACH; e++) { // written out
            for (var u = 0u; u < ROWS; u++) { // written out
                let at = e * ROWS + u;
                let s = dots[at].x + dots[at].y + dots[at].z + dots[at].w;
                let dp = d_weights[at].x + d_weights[at].y + d_weights[at].z + d_weights[at].w;
                let w = weight(logit(s, seen[u], item.key_begin + e * LANES + lane, PARTIAL), sums[u].x);
                // Beyond the count lie none of its rows.
                p[at] = select(0.0, w, u < count);
                ds[at] = select(0.0, w * (dp - sums[u].y) * scaled_slope(s), u < count);
            }
        }
        // Broadcast again: a shuffle costs no more than a load of what was put aside.
        for (var i = 0u; i < K_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, ROWS>;
            for (var u = 0u; u < ROWS; u++) { // written out
                wide[u] = broadcast(q[u * K_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                for (var e = 0u; e < KEYS_EACH; e++) { // written out
                    var sum = vec4(0.0);
                    for (var u = 0u; u < ROWS; u++) { // written out
                        sum += ds[e * ROWS + u] * wide[u][j];
                    }
                    dk[e * K_WIDE + i * LANES + j] += sum;
                }
            }
        }
        for (var i = 0u; i < V_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, ROWS>;
            for (var u = 0u; u < ROWS; u++) { // written out
                wide[u] = broadcast(d[u * V_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                for (var e = 0u; e < KEYS_EACH; e++) { // written out
                    var sum = vec4(0.0);
                    for (var u = 0u; u < ROWS; u++) { // written out
                        sum += p[e * ROWS + u] * wide[u][j];
                    }
                    dv[e * V_WIDE + i * LANES + j] += sum;
                }
            }
        }
    }

    var k_sum: array<vec4<f32>, K_TURNS>;
    var v_sum: array<vec4<f32>, V_TURNS>;
    for (var e = 0u; e < KEYS_EACH; e++) { // written out
        for (var c = 0u; c < K_WIDE; c++) { // written out
            k_sum[e * K_WIDE + c] = dk[e * K_WIDE + c];
        }
        for (var c = 0u; c < V_WIDE; c++) { // written out
            v_sum[e * V_WIDE + c] = dv[e * V_WIDE + c];
        }
    }
    for (var i = 0u; i < K_TURNS; i++) {
        let nth = i / K_WIDE * LANES + lane;
        if item.key_begin + nth < item.key_end && i % K_WIDE < K4 {
            gradients[gradient_row(item, kv_head, nth) + i % K_WIDE] += k_sum[i];
        }
    }
    for (var i = 0u; i < V_TURNS; i++) {
        let nth = i / V_WIDE * LANES + lane;
        if item.key_begin + nth < item.key_end && i % V_WIDE < V4 {
            gradients[gradient_row(item, kv_head, nth) + K4 + i % V_WIDE] += v_sum[i];
        }
    }
}
