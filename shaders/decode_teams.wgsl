// Decode, few rows, on adapters whose subgroups have at least TEAM lanes.
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup walks the keys of one item, THREADS at a time, for all rows of the tile. A team of TEAM lanes has TEAM of these keys. Its lanes
// hold the rows' queries and outputs in registers, a part of the elements each, so that a key or value goes from memory
// to registers once and serves every row there. Dot products are added up by halves: of two keys' sums a lane keeps one and gives the other away,
// until lane j has key j's. So masks and exponentials are computed once for each key and row, and handed out by shuffles.
// Teams have maxima and sums of their own, which are merged in the end: no barrier in the loop.
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: THREADS, TEAM (4, 8 or 16), ROWS, K4 = ceil(HEAD_DIM / 4), V4; GUARDED: keys beyond the end are not loaded. Else the last
// key is loaded again in their place, with weight 0: it is at hand, and a branch around each load keeps the loads from going out together.

const TEAMS: u32 = THREADS / TEAM;
const QUADS: u32 = TEAM / 4u;
const K_PART: u32 = (K4 + TEAM - 1u) / TEAM;
const V_PART: u32 = (V4 + TEAM - 1u) / TEAM;

var<workgroup> merge_o: array<vec4<f32>, THREADS * V_PART>;
// Running max and sum of every team and row.
var<workgroup> merge_sums: array<vec2<f32>, ROWS * TEAMS>;

// The sum over two lanes of what one of them keeps: `high` where its number has `bit`.
fn halved(low: f32, high: f32, lane: u32, bit: u32) -> f32 {
    let upper = (lane & bit) != 0u;
    return select(low, high, upper) + subgroupShuffleXor(select(high, low, upper), bit);
}

// What lane j of each of the team's quads has, for its lane j.
fn spread(x: u32, lane: u32) -> array<u32, QUADS> {
    var all: array<u32, QUADS>;
    all[0] = x;
    if TEAM > 4u {
        let other = subgroupShuffleXor(x, 4u);
        let upper = (lane & 4u) != 0u;
        all[0] = select(x, other, upper);
        all[1 % QUADS] = select(other, x, upper);
    }
    if TEAM > 8u {
        let upper = (lane & 8u) != 0u;
        for (var i = 0u; i < 2u; i++) {
            let other = subgroupShuffleXor(all[i], 8u);
            all[(2u + i) % QUADS] = select(other, all[i], upper);
            all[i] = select(all[i], other, upper);
        }
    }
    return all;
}

// What the four lanes of a quad have.
fn of_quad(x: u32) -> vec4<u32> {
    return vec4(quadBroadcast(x, 0u), quadBroadcast(x, 1u), quadBroadcast(x, 2u), quadBroadcast(x, 3u));
}

fn team_max(x: f32) -> f32 {
    var most = max(x, subgroupShuffleXor(x, 1u));
    most = max(most, subgroupShuffleXor(most, 2u));
    if TEAM > 4u {
        most = max(most, subgroupShuffleXor(most, 4u));
    }
    if TEAM > 8u {
        most = max(most, subgroupShuffleXor(most, 8u));
    }
    return most;
}

fn team_sum(x: f32) -> f32 {
    var sum = x + subgroupShuffleXor(x, 1u);
    sum += subgroupShuffleXor(sum, 2u);
    if TEAM > 4u {
        sum += subgroupShuffleXor(sum, 4u);
    }
    if TEAM > 8u {
        sum += subgroupShuffleXor(sum, 8u);
    }
    return sum;
}

// A subgroup's lanes follow each other; local_invocation_index need not follow them.
@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) place: u32,
) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;
    let thread = subgroup * size + place;
    let lane = thread % TEAM;
    let team = thread / TEAM;
    measure_queries(item, kv_head, thread);

    var q: array<vec4<f32>, ROWS * K_PART>;
    var o: array<vec4<f32>, ROWS * V_PART>;
    var m: array<f32, ROWS>;
    var d: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        m[r] = HIDDEN;
        d[r] = 0.0;
        for (var i = 0u; i < K_PART; i++) {
            q[r * K_PART + i] = query_four(item, kv_head, item.row_begin + r, lane * K_PART + i);
        }
        for (var i = 0u; i < V_PART; i++) {
            o[r * V_PART + i] = vec4(0.0);
        }
    }

    let last = item.key_end - 1u;
    for (var tile = item.key_begin; tile < item.key_end; tile += THREADS) {
        if MAPPED {
            var seen = false;
            for (var at = tile; at < min(tile + THREADS, item.key_end); at += MAP_KEYS) {
                seen = seen || tile_kind(item, kv_head, at) != SKIP;
            }
            if !seen {
                continue;
            }
        }
        // The key whose logits this lane has, and the team's first. A team's keys are in one tile of the map.
        let key = tile + thread;
        let first = tile + team * TEAM;
        let kind = tile_kind(item, kv_head, min(key, last));
        let cache_rows = spread(kv_row(item.pages, kv_head, item.origin + min(key, last)), lane);
        var keys = 0u;
        if kind != SKIP && first < item.key_end {
            keys = item.key_end - first;
        }

        var sums: array<f32, QUADS * ROWS>;
        for (var quad = 0u; quad < QUADS; quad++) {
            let row = of_quad(cache_rows[quad]);
            var dots: array<vec4<f32>, ROWS>;
            for (var j = 0u; j < 4u; j++) {
                var k: array<vec4<f32>, K_PART>;
                if !GUARDED || quad * 4u + j < keys {
                    for (var i = 0u; i < K_PART; i++) {
                        if K4 % TEAM == 0u || lane * K_PART + i < K4 {
                            k[i] = load_k(row[j], lane * K_PART + i);
                        }
                    }
                }
                for (var r = 0u; r < ROWS; r++) {
                    var dot = 0.0;
                    for (var i = 0u; i < K_PART; i++) {
                        dot = fma(q[r * K_PART + i].x, k[i].x, dot);
                        dot = fma(q[r * K_PART + i].y, k[i].y, dot);
                        dot = fma(q[r * K_PART + i].z, k[i].z, dot);
                        dot = fma(q[r * K_PART + i].w, k[i].w, dot);
                    }
                    dots[r][j] = dot;
                }
            }
            for (var r = 0u; r < ROWS; r++) {
                let low = halved(dots[r].x, dots[r].z, lane, 2u);
                let high = halved(dots[r].y, dots[r].w, lane, 2u);
                sums[quad * ROWS + r] = halved(low, high, lane, 1u);
            }
        }
        if TEAM > 8u {
            for (var i = 0u; i < 2u * ROWS; i++) {
                sums[i] = halved(sums[i], sums[2u * ROWS + i], lane, 8u);
            }
        }
        if TEAM > 4u {
            for (var r = 0u; r < ROWS; r++) {
                sums[r] = halved(sums[r], sums[ROWS + r], lane, 4u);
            }
        }
        var weights: array<u32, QUADS * ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            let row = row_of(item, kv_head, item.row_begin + r);
            let s = select(HIDDEN, logit(sums[r], row, key, kind), kind != SKIP);
            let top = max(m[r], team_max(s));
            let shrink = exp2(m[r] - top);
            m[r] = top;
            let p = weight(s, top);
            d[r] = d[r] * shrink + p;
            for (var i = 0u; i < V_PART; i++) {
                o[r * V_PART + i] *= shrink;
            }
            let all = spread(bitcast<u32>(p), lane);
            for (var quad = 0u; quad < QUADS; quad++) {
                weights[quad * ROWS + r] = all[quad];
            }
        }

        for (var quad = 0u; quad < QUADS; quad++) {
            let row = of_quad(cache_rows[quad]);
            var p: array<vec4<f32>, ROWS>;
            for (var r = 0u; r < ROWS; r++) {
                p[r] = bitcast<vec4<f32>>(of_quad(weights[quad * ROWS + r]));
            }
            for (var j = 0u; j < 4u; j++) {
                var v: array<vec4<f32>, V_PART>;
                if !GUARDED || quad * 4u + j < keys {
                    for (var i = 0u; i < V_PART; i++) {
                        if V4 % TEAM == 0u || lane * V_PART + i < V4 {
                            v[i] = load_v(row[j], lane * V_PART + i);
                        }
                    }
                }
                for (var r = 0u; r < ROWS; r++) {
                    for (var i = 0u; i < V_PART; i++) {
                        o[r * V_PART + i] += p[r][j] * v[i];
                    }
                }
            }
        }
    }

    for (var r = 0u; r < ROWS; r++) {
        d[r] = team_sum(d[r]);
        if lane == 0u {
            merge_sums[r * TEAMS + team] = vec2(m[r], d[r]);
        }
    }
    // The sums of all teams are there.
    workgroupBarrier();
    for (var r = 0u; r < ROWS; r++) {
        var top = HIDDEN;
        for (var t = 0u; t < TEAMS; t++) {
            top = max(top, merge_sums[r * TEAMS + t].x);
        }
        var sum = 0.0;
        for (var t = 0u; t < TEAMS; t++) {
            let of_team = merge_sums[r * TEAMS + t];
            sum += of_team.y * weight(of_team.x, top);
        }
        let grow = weight(m[r], top);
        for (var i = 0u; i < V_PART; i++) {
            merge_o[thread * V_PART + i] = o[r * V_PART + i] * grow;
        }
        // All teams have left their outputs of this row.
        workgroupBarrier();
        for (var c = thread; c < V4; c += THREADS) {
            var whole = vec4(0.0);
            for (var t = 0u; t < TEAMS; t++) {
                whole += merge_o[t * TEAM * V_PART + c];
            }
            emit(item, kv_head, item.row_begin + r, c, whole, vec2(top, sum));
        }
        if thread == 0u {
            emit_sums(item, kv_head, item.row_begin + r, vec2(top, sum));
        }
        // The next row overwrites them.
        workgroupBarrier();
    }
}
