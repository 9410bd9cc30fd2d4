// Decode, few rows, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup is one subgroup. It walks the keys of one item, LANES at a time, for all rows of the tile. A lane holds every
// LANES-th group of four elements of q and o of all rows, loads its part of each key once and uses it for all rows.
// Lane j keeps the logit of the block's key j, so that maximum, exponential and sum cost one vector operation for LANES keys.
// No workgroup memory, so no barrier (but for the norms, once): on software adapters a barrier costs more than it shares.
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: LANES, ROWS, K4 = ceil(HEAD_DIM / 4), V4.

const K_PART: u32 = (K4 + LANES - 1u) / LANES;
const V_PART: u32 = (V4 + LANES - 1u) / LANES;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;

    measure_queries(item, kv_head, lane);

    var q: array<vec4<f32>, ROWS * K_PART>;
    var o: array<vec4<f32>, ROWS * V_PART>;
    var m: array<f32, ROWS>;
    var d: array<f32, ROWS>;
    var rows: array<Row, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        rows[r] = row_of(item, kv_head, item.row_begin + r);
        m[r] = HIDDEN;
        d[r] = 0.0;
        for (var i = 0u; i < K_PART; i++) {
            q[r * K_PART + i] = query_four(item, kv_head, item.row_begin + r, i * LANES + lane);
        }
        for (var i = 0u; i < V_PART; i++) {
            o[r * V_PART + i] = vec4(0.0);
        }
    }

    var count = 0u;
    for (var block = item.key_begin; block < item.key_end; block += count) {
        // A block lies in one page, and in one tile of the map.
        let slot = item.origin + block;
        count = min(min(LANES, item.key_end - block), kv_run(slot));
        if MAPPED {
            count = min(count, MAP_KEYS - (block - item.key_begin) % MAP_KEYS);
        }
        let kind = tile_kind(item, kv_head, block);
        if kind == SKIP {
            continue;
        }
        let cache_row = kv_row(item.pages, kv_head, slot);
        // Lane j keeps the logit of key block + j.
        var s: array<f32, ROWS>;
        for (var j = 0u; j < count; j++) {
            var k: array<vec4<f32>, K_PART>;
            for (var i = 0u; i < K_PART; i++) {
                if K4 % LANES == 0u || i * LANES + lane < K4 {
                    k[i] = load_k(cache_row + j, i * LANES + lane);
                }
            }
            for (var r = 0u; r < ROWS; r++) {
                var part = vec4(0.0);
                for (var i = 0u; i < K_PART; i++) {
                    part += q[r * K_PART + i] * k[i];
                }
                let sum = subgroupAdd(part.x + part.y + part.z + part.w);
                s[r] = select(s[r], sum, lane == j);
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            // Lanes beyond the block hold none of its keys.
            s[r] = select(HIDDEN, logit(s[r], rows[r], block + lane, kind), lane < count);
            let top = max(m[r], subgroupMax(s[r]));
            let shrink = exp2(m[r] - top);
            m[r] = top;
            s[r] = weight(s[r], top);
            d[r] = d[r] * shrink + s[r];
            for (var i = 0u; i < V_PART; i++) {
                o[r * V_PART + i] *= shrink;
            }
        }
        for (var j = 0u; j < count; j++) {
            var v: array<vec4<f32>, V_PART>;
            for (var i = 0u; i < V_PART; i++) {
                if V4 % LANES == 0u || i * LANES + lane < V4 {
                    v[i] = load_v(cache_row + j, i * LANES + lane);
                }
            }
            for (var r = 0u; r < ROWS; r++) {
                let p = subgroupShuffle(s[r], j);
                for (var i = 0u; i < V_PART; i++) {
                    o[r * V_PART + i] += p * v[i];
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        d[r] = subgroupAdd(d[r]);
    }

    for (var r = 0u; r < ROWS; r++) {
        for (var i = 0u; i < V_PART; i++) {
            emit(item, kv_head, item.row_begin + r, i * LANES + lane, o[r * V_PART + i], vec2(m[r], d[r]));
        }
        if lane == 0u {
            emit_sums(item, kv_head, item.row_begin + r, vec2(m[r], d[r]));
        }
    }
}
