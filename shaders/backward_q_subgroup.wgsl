// Backward, queries, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T,  p = exp2(s - l),  ds = p (dO v^T - delta);  dq = scale ds k
// A workgroup is one subgroup. A lane owns ROWS / LANES whole rows; the lanes load a key and its value together, each every LANES-th
// group of four, and broadcast their parts, so a K/V element is fetched once for all rows. No workgroup memory, no barrier.
// Items of one row come from different shards of the cache, in dispatches of their own: each adds to what is there.
//
// Bindings: 0 work list, 1 rows of `backward_rows`, 2 keys, 3 values, 6 gradients of queries, 7 words, 8 table, 9 fetch counter, the last
// two where a part uses them.
// Prelude: LANES, ROWS (a multiple of LANES), K4 = ceil(HEAD_DIM / 4), V4.

const ROWS_EACH: u32 = ROWS / LANES;
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

    var q: array<vec4<f32>, ROWS_EACH * K_WIDE>;
    var d: array<vec4<f32>, ROWS_EACH * V_WIDE>;
    var dq: array<vec4<f32>, ROWS_EACH * K_WIDE>;
    var rows: array<Row, ROWS_EACH>;
    var sums: array<vec2<f32>, ROWS_EACH>;
    for (var r = 0u; r < ROWS_EACH; r++) {
        let row = item.row_begin + r * LANES + lane;
        rows[r] = row_of(item, kv_head, row);
        sums[r] = sums_of(item, kv_head, row);
        for (var c = 0u; c < K_WIDE; c++) {
            q[r * K_WIDE + c] = q_four(item, kv_head, row, c);
            dq[r * K_WIDE + c] = vec4(0.0);
        }
        for (var c = 0u; c < V_WIDE; c++) {
            d[r * V_WIDE + c] = d_four(item, kv_head, row, c);
        }
    }

    var cache_row = 0u;
    var run = 0u;
    for (var key = item.key_begin; key < item.key_end; key++) {
        // The page table is read once a page.
        if run == 0u {
            cache_row = kv_row(item.pages, kv_head, item.origin + key);
            run = kv_run(item.origin + key);
        }
        // The whole key in every lane: its parts are used twice.
        var keys: array<vec4<f32>, K_WIDE>;
        var dots: array<vec4<f32>, ROWS_EACH>;
        for (var i = 0u; i < K_PART; i++) {
            var part = vec4(0.0);
            if K4 % LANES == 0u || i * LANES + lane < K4 {
                part = load_k(cache_row, i * LANES + lane);
            }
            let k = broadcast(part);
            for (var j = 0u; j < LANES; j++) {
                keys[i * LANES + j] = k[j];
                for (var r = 0u; r < ROWS_EACH; r++) {
                    dots[r] += q[r * K_WIDE + i * LANES + j] * k[j];
                }
            }
        }
        var d_weights: array<vec4<f32>, ROWS_EACH>;
        for (var i = 0u; i < V_PART; i++) {
            var part = vec4(0.0);
            if V4 % LANES == 0u || i * LANES + lane < V4 {
                part = load_v(cache_row, i * LANES + lane);
            }
            let v = broadcast(part);
            for (var j = 0u; j < LANES; j++) {
                for (var r = 0u; r < ROWS_EACH; r++) {
                    d_weights[r] += d[r * V_WIDE + i * LANES + j] * v[j];
                }
            }
        }
        var ds: array<f32, ROWS_EACH>;
        for (var r = 0u; r < ROWS_EACH; r++) {
            let s = dots[r].x + dots[r].y + dots[r].z + dots[r].w;
            let dp = d_weights[r].x + d_weights[r].y + d_weights[r].z + d_weights[r].w;
            let p = weight(logit(s, rows[r], key, PARTIAL), sums[r].x);
            ds[r] = p * (dp - sums[r].y) * scaled_slope(s);
        }
        for (var c = 0u; c < K_WIDE; c++) {
            for (var r = 0u; r < ROWS_EACH; r++) {
                dq[r * K_WIDE + c] += ds[r] * keys[c];
            }
        }
        cache_row++;
        run--;
    }

    for (var r = 0u; r < ROWS_EACH; r++) {
        let row = item.row_begin + r * LANES + lane;
        if row < item.row_end {
            let first = row_index(item, kv_head, row) * K4;
            for (var c = 0u; c < K4; c++) {
                gradients[first + c] += dq[r * K_WIDE + c];
            }
        }
    }
}
