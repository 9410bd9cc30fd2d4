// Decode, few rows, on any adapter.
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup walks the keys of one item, KEYS at a time, for all rows of the tile. Scores: a team of TEAM invocations reads
// one key together and uses it for every row (q waits in workgroup memory). Values: an invocation owns four columns of all rows;
// the V_TEAMS teams share out the keys of a tile. So a K/V element is fetched once for all rows.
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: THREADS (at least V4), TEAM = 8, ROWS, KEYS (a multiple of TEAMS and of 4), K4 = ceil(HEAD_DIM / 4), V4.
// Part: `team_scores` (reduce_workgroup, reduce_subgroup) adds up a team's dot products and stores the logits.

const TEAMS: u32 = THREADS / TEAM;
const V_TEAMS: u32 = THREADS / V4;

var<workgroup> q_tile: array<vec4<f32>, ROWS * K4>;
// Logits of the tile, later their weights: row by row.
var<workgroup> scores: array<f32, ROWS * KEYS>;
var<workgroup> row_max: array<f32, ROWS>;
var<workgroup> merge_o: array<vec4<f32>, THREADS>;
var<workgroup> merge_d: array<f32, V_TEAMS>;

// Which keys of which tile a call of `team_scores` is about: team t has key tile + pass_key + t.
struct Score {
    tile: u32,
    pass_key: u32,
    thread: u32,
    kv_head: u32,
    kind: u32,
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, invocation: Invocation) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;
    let thread = thread_index(invocation);
    let lane = thread % TEAM;
    let team = thread / TEAM;
    let column = thread % V4;
    let v_team = thread / V4;
    measure_queries(item, kv_head, thread);

    for (var i = thread; i < ROWS * K4; i += THREADS) {
        q_tile[i] = query_four(item, kv_head, item.row_begin + i / K4, i % K4);
    }
    var o: array<vec4<f32>, ROWS>;
    var m: array<f32, ROWS>;
    var d: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        o[r] = vec4(0.0);
        m[r] = HIDDEN;
        d[r] = 0.0;
    }
    // q_tile is read by all.
    workgroupBarrier();

    for (var tile = item.key_begin; tile < item.key_end; tile += KEYS) {
        let kind = tile_kind(item, kv_head, tile);
        if kind == SKIP {
            continue;
        }
        for (var pass_key = 0u; pass_key < KEYS; pass_key += TEAMS) {
            let key = tile + pass_key + team;
            var dots: array<f32, ROWS>;
            if key < item.key_end {
                let cache_row = kv_row(item.pages, kv_head, item.origin + key);
                for (var c = lane; c < K4; c += TEAM) {
                    let k = load_k(cache_row, c);
                    for (var r = 0u; r < ROWS; r++) {
                        dots[r] += dot(q_tile[r * K4 + c], k);
                    }
                }
            }
            team_scores(item, Score(tile, pass_key, thread, kv_head, kind), &dots);
        }
        // The scores of the tile are whole.
        workgroupBarrier();

        for (var r = thread; r < ROWS; r += THREADS) {
            var best = HIDDEN;
            for (var j = 0u; j < KEYS; j++) {
                best = max(best, scores[r * KEYS + j]);
            }
            row_max[r] = best;
        }
        // row_max is read by all.
        workgroupBarrier();

        for (var i = thread; i < ROWS * KEYS; i += THREADS) {
            // The running max before this tile is not shared, so weights are relative to the tile's own.
            scores[i] = weight(scores[i], row_max[i / KEYS]);
        }
        var grow: array<f32, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let top = max(m[r], row_max[r]);
            let shrink = exp2(m[r] - top);
            grow[r] = exp2(row_max[r] - top);
            o[r] *= shrink;
            d[r] *= shrink;
            m[r] = top;
        }
        // The weights of the tile are whole.
        workgroupBarrier();

        if v_team < V_TEAMS {
            for (var j = v_team; j < KEYS && tile + j < item.key_end; j += V_TEAMS) {
                let v = load_v(kv_row(item.pages, kv_head, item.origin + tile + j), column);
                for (var r = 0u; r < ROWS; r++) {
                    let p = scores[r * KEYS + j] * grow[r];
                    o[r] += p * v;
                    d[r] += p;
                }
            }
        }
        // The next tile overwrites the weights.
        workgroupBarrier();
    }

    for (var r = 0u; r < ROWS; r++) {
        if V_TEAMS > 1u {
            merge_o[thread] = o[r];
            if column == 0u && v_team < V_TEAMS {
                merge_d[v_team] = d[r];
            }
            // All teams have left their sums of this row.
            workgroupBarrier();
            if v_team == 0u {
                // A bound that no compiler knows: short heads have up to 63 turns here, and written out they take Mesa ten seconds.
                let teams = V_TEAMS + work.params.zero;
                for (var t = 1u; t < teams; t++) {
                    o[r] += merge_o[t * V4 + column];
                    d[r] += merge_d[t];
                }
            }
            // The next row overwrites them.
            workgroupBarrier();
        }
        if v_team == 0u {
            emit(item, kv_head, item.row_begin + r, column, o[r], vec2(m[r], d[r]));
            if column == 0u {
                emit_sums(item, kv_head, item.row_begin + r, vec2(m[r], d[r]));
            }
        }
    }
}
