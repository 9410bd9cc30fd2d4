// Prefill, many rows, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup is one subgroup. A lane owns ROWS / LANES whole rows; the lanes load a key together, a unit
// each, and broadcast their parts, so a K/V element is fetched once for all rows. No workgroup memory, no barrier (but for the norms, once).
// The running max moves only when a logit exceeds it by 8 (FlashAttention-4): weights stay below 2^8.
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: LANES, ROWS (a multiple of LANES), K4 = ceil(HEAD_DIM / 4), V4; K_FOURS and V_FOURS (fours of a unit), with the functions that load.

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

    measure_queries(item, kv_head, lane);

    var q: array<vec4<f32>, ROWS_EACH * K_WIDE>;
    var o: array<vec4<f32>, ROWS_EACH * V_WIDE>;
    var m: array<f32, ROWS_EACH>;
    var d: array<f32, ROWS_EACH>;
    var rows: array<Row, ROWS_EACH>;
    for (var r = 0u; r < ROWS_EACH; r++) {
        let row = item.row_begin + r * LANES + lane;
        rows[r] = row_of(item, kv_head, row);
        m[r] = HIDDEN;
        d[r] = 0.0;
        for (var c = 0u; c < K_WIDE; c++) {
            q[r * K_WIDE + c] = query_four(item, kv_head, row, c);
        }
        for (var c = 0u; c < V_WIDE; c++) {
            o[r * V_WIDE + c] = vec4(0.0);
        }
    }

    var kind = PARTIAL;
    var cache_row = 0u;
    var run = 0u;
    for (var key = item.key_begin; key < item.key_end; key++) {
        if MAPPED && (key - item.key_begin) % MAP_KEYS == 0u {
            kind = tile_kind(item, kv_head, key);
            if kind == SKIP {
                key += MAP_KEYS - 1u;
                run = 0u;
                continue;
            }
        }
        // The page table is read once a page.
        if run == 0u {
            cache_row = kv_row(item.pages, kv_head, item.origin + key);
            run = kv_run(item.origin + key);
        }
        var sum: array<vec4<f32>, ROWS_EACH>;
        for (var i = 0u; i < K_PART; i += K_FOURS) {
            let unit = load_k_unit(cache_row, lane, i);
            for (var c = 0u; c < K_FOURS; c++) {
                let k = broadcast(unit[c]);
                for (var j = 0u; j < LANES; j++) {
                    for (var r = 0u; r < ROWS_EACH; r++) {
                        sum[r] += q[r * K_WIDE + k_four(j, i + c)] * k[j];
                    }
                }
            }
        }
        var p: array<f32, ROWS_EACH>;
        for (var r = 0u; r < ROWS_EACH; r++) {
            let s = logit(sum[r].x + sum[r].y + sum[r].z + sum[r].w, rows[r], key, kind);
            if s > m[r] + 8.0 {
                let shrink = exp2(m[r] - s);
                for (var c = 0u; c < V_WIDE; c++) {
                    o[r * V_WIDE + c] *= shrink;
                }
                d[r] *= shrink;
                m[r] = s;
            }
            p[r] = weight(s, m[r]);
            d[r] += p[r];
        }
        for (var i = 0u; i < V_PART; i += V_FOURS) {
            let unit = load_v_unit(cache_row, lane, i);
            for (var c = 0u; c < V_FOURS; c++) {
                let v = broadcast(unit[c]);
                for (var j = 0u; j < LANES; j++) {
                    for (var r = 0u; r < ROWS_EACH; r++) {
                        o[r * V_WIDE + v_four(j, i + c)] += p[r] * v[j];
                    }
                }
            }
        }
        cache_row++;
        run--;
    }

    for (var r = 0u; r < ROWS_EACH; r++) {
        let row = item.row_begin + r * LANES + lane;
        for (var c = 0u; c < V4; c++) {
            emit(item, kv_head, row, c, o[r * V_WIDE + c], vec2(m[r], d[r]));
        }
        emit_sums(item, kv_head, row, vec2(m[r], d[r]));
    }
}
