// Backward, queries, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T,  p = exp2(s - l),  ds = p (dO v^T - delta);  dq = scale ds k
// A workgroup is one subgroup. A lane owns ROWS / LANES whole rows; the lanes load a key and its value together, a unit each, and
// broadcast their parts, so a K/V element is fetched once for all rows. No workgroup memory, no barrier.
// Items of one row come from different shards of the cache, in dispatches of their own: each adds to what is there.
//
// Loops marked `// written out` are, by the linker, since an array that a loop indexes lies in memory (src/shader/write_out.rs).
// Loops of .._TURNS stay rolled (`ROLLED` in src/shader/prelude.rs), and turns beyond the tile load zeros and add nothing; the walk uses copies of their arrays.
//
// Bindings: 0 work list, 1 rows of `backward_rows`, 2 keys, 3 values, 6 gradients of queries, 7 words, 8 table, 9 fetch counter, the last
// two where a part uses them.
// Prelude: LANES, ROWS (a multiple of LANES), KEYS (of a step), K4 = ceil(HEAD_DIM / 4), V4; K_FOURS and V_FOURS (fours of a unit), with the functions that load.

const ROWS_EACH: u32 = ROWS / LANES;
const K_PART: u32 = (K4 + LANES - 1u) / LANES;
const V_PART: u32 = (V4 + LANES - 1u) / LANES;
const K_WIDE: u32 = K_PART * LANES;
const V_WIDE: u32 = V_PART * LANES;
const K_LOADS: u32 = K_PART / K_FOURS;
const V_LOADS: u32 = V_PART / V_FOURS;
const Q_TURNS: u32 = max(ROWS_EACH * K_WIDE, ROLLED);
const D_TURNS: u32 = max(ROWS_EACH * V_WIDE, ROLLED);

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;

    var q_loaded: array<vec4<f32>, Q_TURNS>;
    for (var i = 0u; i < Q_TURNS; i++) {
        q_loaded[i] = q_four(item, kv_head, item.row_begin + i / K_WIDE * LANES + lane, i % K_WIDE);
    }
    var d_loaded: array<vec4<f32>, D_TURNS>;
    for (var i = 0u; i < D_TURNS; i++) {
        d_loaded[i] = d_four(item, kv_head, item.row_begin + i / V_WIDE * LANES + lane, i % V_WIDE);
    }
    var q: array<vec4<f32>, ROWS_EACH * K_WIDE>;
    var d: array<vec4<f32>, ROWS_EACH * V_WIDE>;
    var dq: array<vec4<f32>, ROWS_EACH * K_WIDE>;
    var rows: array<Row, ROWS_EACH>;
    var sums: array<vec2<f32>, ROWS_EACH>;
    for (var r = 0u; r < ROWS_EACH; r++) { // written out
        let row = item.row_begin + r * LANES + lane;
        rows[r] = row_of(item, kv_head, row);
        sums[r] = sums_of(item, kv_head, row);
        for (var c = 0u; c < K_WIDE; c++) { // written out
            q[r * K_WIDE + c] = q_loaded[r * K_WIDE + c];
            dq[r * K_WIDE + c] = vec4(0.0);
        }
        for (var c = 0u; c < V_WIDE; c++) { // written out
            d[r * V_WIDE + c] = d_loaded[r * V_WIDE + c];
        }
    }

    var cache_row = 0u;
    var run = 0u;
    var count = 0u;
    for (var key = item.key_begin; key < item.key_end; key += count) {
        // The page table is read once a page.
        if run == 0u {
            cache_row = kv_row(item.pages, kv_head, item.origin + key);
            run = kv_run(item.origin + key);
        }
        // KEYS keys of one page.
        count = min(min(KEYS, item.key_end - key), run);
        let first = cache_row;
        cache_row += count;
        run -= count;
        // All loads come before the products: each brings branches, and LLVM carries products across those through memory.
        var k: array<vec4<f32>, KEYS * K_PART>;
        var v: array<vec4<f32>, KEYS * V_PART>;
        // In the place of a key beyond the count comes the last one again, but where reads are counted.
        for (var u = 0u; u < KEYS; u++) { // written out
            if !COUNTED || u < count {
                for (var i = 0u; i < K_LOADS; i++) { // written out
                    let unit = load_k_unit(first + min(u, count - 1u), i * LANES + unit_of(lane));
                    for (var c = 0u; c < K_FOURS; c++) { // written out
                        k[u * K_PART + i * K_FOURS + c] = unit[c];
                    }
                }
                for (var i = 0u; i < V_LOADS; i++) { // written out
                    let unit = load_v_unit(first + min(u, count - 1u), i * LANES + unit_of(lane));
                    for (var c = 0u; c < V_FOURS; c++) { // written out
                        v[u * V_PART + i * V_FOURS + c] = unit[c];
                    }
                }
            }
        }
        var dots: array<vec4<f32>, ROWS_EACH * KEYS>;
        for (var i = 0u; i < K_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { // written out
                wide[u] = broadcast(k[u * K_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                const four = (i / K_FOURS * LANES + UNIT_OF[j]) * K_FOURS + i % K_FOURS;
                for (var r = 0u; r < ROWS_EACH; r++) { // written out
                    let x = q[r * K_WIDE + four];
                    for (var u = 0u; u < KEYS; u++) { // written out
                        dots[r * KEYS + u] += x * wide[u][j];
                    }
                }
            }
        }
        var d_weights: array<vec4<f32>, ROWS_EACH * KEYS>;
        for (var i = 0u; i < V_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { // written out
                wide[u] = broadcast(v[u * V_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                const four = (i / V_FOURS * LANES + UNIT_OF[j]) * V_FOURS + i % V_FOURS;
                for (var r = 0u; r < ROWS_EACH; r++) { // written out
                    let x = d[r * V_WIDE + four];
                    for (var u = 0u; u < KEYS; u++) { // written out
                        d_weights[r * KEYS + u] += x * wide[u][j];
                    }
                }
            }
        }
        var ds: array<f32, ROWS_EACH * KEYS>;
        for (var r = 0u; r < ROWS_EACH; r++) { // written out
            for (var u = 0u; u < KEYS; u++) { // written out
                let dot = dots[r * KEYS + u];
                let d_weight = d_weights[r * KEYS + u];
                let s = dot.x + dot.y + dot.z + dot.w;
                let dp = d_weight.x + d_weight.y + d_weight.z + d_weight.w;
                let p = weight(logit(s, rows[r], key + u, PARTIAL), sums[r].x);
                // Beyond the count lie none of its keys.
                ds[r * KEYS + u] = select(0.0, p * (dp - sums[r].y) * scaled_slope(s), u < count);
            }
        }
        // Broadcast again: a shuffle costs no more than a load of what was put aside.
        for (var i = 0u; i < K_PART; i++) { // written out
            var wide: array<array<vec4<f32>, LANES>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { // written out
                wide[u] = broadcast(k[u * K_PART + i]);
            }
            for (var j = 0u; j < LANES; j++) { // written out
                const four = (i / K_FOURS * LANES + UNIT_OF[j]) * K_FOURS + i % K_FOURS;
                for (var r = 0u; r < ROWS_EACH; r++) { // written out
                    var sum = vec4(0.0);
                    for (var u = 0u; u < KEYS; u++) { // written out
                        sum += ds[r * KEYS + u] * wide[u][j];
                    }
                    dq[r * K_WIDE + four] += sum;
                }
            }
        }
    }

    var q_sum: array<vec4<f32>, Q_TURNS>;
    for (var r = 0u; r < ROWS_EACH; r++) { // written out
        for (var c = 0u; c < K_WIDE; c++) { // written out
            q_sum[r * K_WIDE + c] = dq[r * K_WIDE + c];
        }
    }
    for (var i = 0u; i < Q_TURNS; i++) {
        let row = item.row_begin + i / K_WIDE * LANES + lane;
        if row < item.row_end && i % K_WIDE < K4 {
            gradients[row_index(item, kv_head, row) * K4 + i % K_WIDE] += q_sum[i];
        }
    }
}
