// Decode, few rows, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup is one subgroup. It walks the keys of one item, LANES at a time, for all rows of the tile. A lane holds its share of
// q and o of all rows (`k_four`, `v_four` say which), loads its share of each key once, in units, and uses it for all rows.
// KEYS keys make a step, so that outputs are loaded and stored once for all of them where registers run out.
// Lane j keeps the logit of the block's key j, so that maximum, exponential and sum cost one vector operation for LANES keys.
// No workgroup memory, so no barrier (but for the norms, once): on software adapters a barrier costs more than it shares.
//
// Loops marked `// written out` are, by the linker, since an array that a loop indexes lies in memory (src/shader/write_out.rs).
// Loops of .._TURNS stay rolled (`ROLLED` in src/shader/prelude.rs), and rows beyond the tile are zero and go nowhere.
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: LANES, ROWS, KEYS (1 or 2), K4 = ceil(HEAD_DIM / 4), V4; K_FOURS and V_FOURS (fours of a unit), with the functions that load.

const K_PART: u32 = (K4 + LANES - 1u) / LANES;
const V_PART: u32 = (V4 + LANES - 1u) / LANES;
const K_LOADS: u32 = K_PART / K_FOURS;
const V_LOADS: u32 = V_PART / V_FOURS;
const Q_TURNS: u32 = max(ROWS * K_PART, ROLLED);
const O_TURNS: u32 = max(ROWS * V_PART, ROLLED);

// Which four of a row is a lane's nth.
fn k_four(lane: u32, nth: u32) -> u32 {
    return (nth / K_FOURS * LANES + unit_of(lane)) * K_FOURS + nth % K_FOURS;
}

fn v_four(lane: u32, nth: u32) -> u32 {
    return (nth / V_FOURS * LANES + unit_of(lane)) * V_FOURS + nth % V_FOURS;
}

// By shuffles where Mesa's `subgroupAdd` and `subgroupMax` go from lane to lane; SwiftShader, of 4 lanes, is better at its own.
fn lanes_add(x: f32) -> f32 {
    if LANES == 4u {
        return subgroupAdd(x);
    }
    var sum = x + subgroupShuffleXor(x, 1u);
    sum += subgroupShuffleXor(sum, 2u);
    return sum + subgroupShuffleXor(sum, 4u);
}

fn lanes_max(x: f32) -> f32 {
    if LANES == 4u {
        return subgroupMax(x);
    }
    var top = max(x, subgroupShuffleXor(x, 1u));
    top = max(top, subgroupShuffleXor(top, 2u));
    return max(top, subgroupShuffleXor(top, 4u));
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;

    measure_queries(item, kv_head, lane);

    var q: array<vec4<f32>, Q_TURNS>;
    for (var i = 0u; i < Q_TURNS; i++) {
        q[i] = query_four(item, kv_head, item.row_begin + i / K_PART, k_four(lane, i % K_PART));
    }
    var o: array<vec4<f32>, O_TURNS>;
    var m: array<f32, ROWS>;
    var d: array<f32, ROWS>;
    var rows: array<Row, ROWS>;
    for (var r = 0u; r < ROWS; r++) { // written out
        rows[r] = row_of(item, kv_head, item.row_begin + r);
        m[r] = HIDDEN;
        d[r] = 0.0;
        for (var i = 0u; i < V_PART; i++) { // written out
            o[r * V_PART + i] = vec4(0.0);
        }
    }

    var count = 0u;
    var cache_row = 0u;
    var run = 0u;
    for (var block = item.key_begin; block < item.key_end; block += count) {
        // The page table is read once a page.
        if run == 0u {
            cache_row = kv_row(item.pages, kv_head, item.origin + block);
            run = kv_run(item.origin + block);
        }
        // A block lies in one page, and in one tile of the map.
        count = min(min(LANES, item.key_end - block), run);
        if MAPPED {
            count = min(count, MAP_KEYS - (block - item.key_begin) % MAP_KEYS);
        }
        let first = cache_row;
        cache_row += count;
        run -= count;
        let kind = tile_kind(item, kv_head, block);
        if kind == SKIP {
            continue;
        }
        // Lane j keeps the logit of key block + j.
        var s: array<f32, ROWS>;
        for (var j = 0u; j < count; j += KEYS) {
            var k: array<vec4<f32>, KEYS * K_PART>;
            for (var u = 0u; u < KEYS; u++) { // written out
                if u == 0u || j + u < count {
                    for (var i = 0u; i < K_LOADS; i++) { // written out
                        let unit = load_k_unit(first + j + u, i * LANES + unit_of(lane));
                        for (var c = 0u; c < K_FOURS; c++) { // written out
                            k[u * K_PART + i * K_FOURS + c] = unit[c];
                        }
                    }
                }
            }
            for (var r = 0u; r < ROWS; r++) { // written out
                for (var u = 0u; u < KEYS; u++) { // written out
                    var part = vec4(0.0);
                    for (var i = 0u; i < K_PART; i++) { // written out
                        part += q[r * K_PART + i] * k[u * K_PART + i];
                    }
                    let sum = lanes_add(part.x + part.y + part.z + part.w);
                    s[r] = select(s[r], sum, lane == j + u);
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) { // written out
            // Lanes beyond the block hold none of its keys.
            s[r] = select(HIDDEN, logit(s[r], rows[r], block + lane, kind), lane < count);
            let top = lanes_max(s[r]);
            if top > m[r] {
                let shrink = exp2(m[r] - top);
                m[r] = top;
                d[r] *= shrink;
                for (var i = 0u; i < V_PART; i++) { // written out
                    o[r * V_PART + i] *= shrink;
                }
            }
            s[r] = weight(s[r], m[r]);
            d[r] += s[r];
        }
        for (var j = 0u; j < count; j += KEYS) {
            var v: array<vec4<f32>, KEYS * V_PART>;
            for (var u = 0u; u < KEYS; u++) { // written out
                if u == 0u || j + u < count {
                    for (var i = 0u; i < V_LOADS; i++) { // written out
                        let unit = load_v_unit(first + j + u, i * LANES + unit_of(lane));
                        for (var c = 0u; c < V_FOURS; c++) { // written out
                            v[u * V_PART + i * V_FOURS + c] = unit[c];
                        }
                    }
                }
            }
            for (var r = 0u; r < ROWS; r++) { // written out
                for (var u = 0u; u < KEYS; u++) { // written out
                    let p = subgroupShuffle(s[r], j + u);
                    for (var i = 0u; i < V_PART; i++) { // written out
                        o[r * V_PART + i] += p * v[u * V_PART + i];
                    }
                }
            }
        }
    }

    var sums: array<vec2<f32>, max(ROWS, ROLLED)>;
    for (var r = 0u; r < ROWS; r++) { // written out
        sums[r] = vec2(m[r], lanes_add(d[r]));
    }
    for (var i = 0u; i < O_TURNS; i++) {
        let r = i / V_PART;
        emit(item, kv_head, item.row_begin + r, v_four(lane, i % V_PART), o[i], sums[r]);
        if lane == 0u && i % V_PART == 0u {
            emit_sums(item, kv_head, item.row_begin + r, sums[r]);
        }
    }
}
