// Backward, keys and values, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T,  p = exp2(s - l),  ds = p (dO v^T - delta);  dv = sum p dO,  dk = scale sum ds q
// A workgroup is one subgroup. A lane owns KEYS / LANES whole keys of one KV head and walks the rows of its item, every query head of
// the group in turn, so the sums over the group never leave the lane. The lanes load a query and the gradient of its output together,
// each every LANES-th group of four, and broadcast their parts. No workgroup memory, no barrier.
//
// Bindings: 0 work list, 1 rows of `backward_rows`, 2 keys, 3 values, 6 gradients of keys and values, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// An item's `state` is the new token that its first key is. A row of gradients is K4 groups of a key and V4 of its value.
// Prelude: LANES, KEYS (a multiple of LANES), K4 = ceil(HEAD_DIM / 4), V4.

const KEYS_EACH: u32 = KEYS / LANES;
const K_PART: u32 = (K4 + LANES - 1u) / LANES;
const V_PART: u32 = (V4 + LANES - 1u) / LANES;
const K_WIDE: u32 = K_PART * LANES;
const V_WIDE: u32 = V_PART * LANES;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;

    var k: array<vec4<f32>, KEYS_EACH * K_WIDE>;
    var v: array<vec4<f32>, KEYS_EACH * V_WIDE>;
    var dk: array<vec4<f32>, KEYS_EACH * K_WIDE>;
    var dv: array<vec4<f32>, KEYS_EACH * V_WIDE>;
    for (var e = 0u; e < KEYS_EACH; e++) {
        let key = item.key_begin + e * LANES + lane;
        let here = key < item.key_end;
        var cache_row = 0u;
        if here {
            cache_row = kv_row(item.pages, kv_head, item.origin + key);
        }
        for (var c = 0u; c < K_WIDE; c++) {
            var four = vec4(0.0);
            if here && c < K4 {
                four = load_k(cache_row, c);
            }
            k[e * K_WIDE + c] = four;
            dk[e * K_WIDE + c] = vec4(0.0);
        }
        for (var c = 0u; c < V_WIDE; c++) {
            var four = vec4(0.0);
            if here && c < V4 {
                four = load_v(cache_row, c);
            }
            v[e * V_WIDE + c] = four;
            dv[e * V_WIDE + c] = vec4(0.0);
        }
    }

    for (var row = item.row_begin; row < item.row_end; row++) {
        let seen = row_of(item, kv_head, row);
        let first = first_four(item, kv_head, row);
        let sums = packed[first + K4 + V4];
        // The whole query and gradient in every lane: their parts are used twice.
        var q: array<vec4<f32>, K_WIDE>;
        var d: array<vec4<f32>, V_WIDE>;
        var dots: array<vec4<f32>, KEYS_EACH>;
        var d_weights: array<vec4<f32>, KEYS_EACH>;
        for (var i = 0u; i < K_PART; i++) {
            var mine = vec4(0.0);
            if K4 % LANES == 0u || i * LANES + lane < K4 {
                mine = packed[first + i * LANES + lane];
            }
            let part = broadcast(mine);
            for (var j = 0u; j < LANES; j++) {
                q[i * LANES + j] = part[j];
                for (var e = 0u; e < KEYS_EACH; e++) {
                    dots[e] += k[e * K_WIDE + i * LANES + j] * part[j];
                }
            }
        }
        for (var i = 0u; i < V_PART; i++) {
            var mine = vec4(0.0);
            if V4 % LANES == 0u || i * LANES + lane < V4 {
                mine = packed[first + K4 + i * LANES + lane];
            }
            let part = broadcast(mine);
            for (var j = 0u; j < LANES; j++) {
                d[i * LANES + j] = part[j];
                for (var e = 0u; e < KEYS_EACH; e++) {
                    d_weights[e] += v[e * V_WIDE + i * LANES + j] * part[j];
                }
            }
        }
        var p: array<f32, KEYS_EACH>;
        var ds: array<f32, KEYS_EACH>;
        for (var e = 0u; e < KEYS_EACH; e++) {
            let s = dots[e].x + dots[e].y + dots[e].z + dots[e].w;
            let dp = d_weights[e].x + d_weights[e].y + d_weights[e].z + d_weights[e].w;
            p[e] = weight(logit(s, seen, item.key_begin + e * LANES + lane, PARTIAL), sums.x);
            ds[e] = p[e] * (dp - sums.y) * scaled_slope(s);
        }
        for (var c = 0u; c < K_WIDE; c++) {
            for (var e = 0u; e < KEYS_EACH; e++) {
                dk[e * K_WIDE + c] += ds[e] * q[c];
            }
        }
        for (var c = 0u; c < V_WIDE; c++) {
            for (var e = 0u; e < KEYS_EACH; e++) {
                dv[e * V_WIDE + c] += p[e] * d[c];
            }
        }
    }

    for (var e = 0u; e < KEYS_EACH; e++) {
        let nth = e * LANES + lane;
        if item.key_begin + nth < item.key_end {
            let first = ((item.state + nth) * KV_HEADS + kv_head) * (K4 + V4);
            for (var c = 0u; c < K4; c++) {
                gradients[first + c] += dk[e * K_WIDE + c];
            }
            for (var c = 0u; c < V4; c++) {
                gradients[first + K4 + c] += dv[e * V_WIDE + c];
            }
        }
    }
}
