// Prefill, many rows, on matrix units.
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup holds ROWS rows and walks the keys of one item, KEYS at a time. A team (a subgroup) has SIDE rows: their queries and
// outputs stay in its registers as matrices, whose elements no invocation can reach. So logits and weights go through workgroup memory,
// where SHARERS invocations of any team share a row. Outputs shrink only when a row's max has grown by more than LAZY: they have to go
// through workgroup memory, too. Where there are more teams than blocks of SIDE rows, several share a block's columns.
//
// Queries, keys, values and weights are f16; sums are f32.
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: ROWS (a multiple of SIDE), KEYS = 32, THREADS = ROWS * SHARERS, K4 = ceil(HEAD_DIM / 4), V4. Part: `product` (matrix_cooperative, matrix_lanes).

const SIDE: u32 = 16u;
const SIDE4: u32 = 4u;
const BLOCKS: u32 = ROWS / SIDE;
const K_SIDES: u32 = (K4 + SIDE4 - 1u) / SIDE4;
const V_SIDES: u32 = (V4 + SIDE4 - 1u) / SIDE4;
const KEYS4: u32 = KEYS / 4u;
// Pitches in groups of four, padded so that rows start in different banks, and even: a matrix must lie at multiples of 16 bytes. Logits are
// read as they lie, and all has to fit 32 KiB.
const KEYS_PITCH: u32 = K_SIDES * SIDE4 + 2u;
const VALUES_PITCH: u32 = KEYS4 + 2u;
const QUERIES_PITCH: u32 = K_SIDES * SIDE4 + 2u;
const WEIGHTS_PITCH: u32 = KEYS4 + 2u;
const LOGITS_PITCH: u32 = KEYS4;
// Where values begin behind keys.
const VALUES_AT: u32 = KEYS * KEYS_PITCH;
// Invocations that share a row, and groups of four logits that each has.
const SHARERS: u32 = 4u;
const SHARE4: u32 = KEYS4 / SHARERS;
const LAZY: f32 = 8.0;

// Keys row by row, then columns of the values; before the first tile queries row by row.
var<workgroup> staged: array<vec4<Half>, max(VALUES_AT + V_SIDES * SIDE * VALUES_PITCH, ROWS * QUERIES_PITCH)>;
// Row by row.
var<workgroup> weights: array<vec4<Half>, ROWS * WEIGHTS_PITCH>;
var<workgroup> logits: array<vec4<f32>, ROWS * LOGITS_PITCH>;
// Rows of the cache that the keys of a tile are.
var<workgroup> cache_rows: array<u32, KEYS>;
// Whether outputs of any row have to shrink.
var<workgroup> grew: u32;

// Rounds of the loops of all invocations: constants, so that compilers unroll them.
const KEY_ROUNDS: u32 = (KEYS * K_SIDES * SIDE4 + THREADS - 1u) / THREADS;
const VALUE_ROUNDS: u32 = (KEYS4 * V_SIDES * SIDE4 + THREADS - 1u) / THREADS;

// Where the keys of a tile lie; those beyond the item are its last one, which `logit` hides. An item without keys has no pages.
fn find_rows(item: WorkItem, kv_head: u32, tile: u32, thread: u32) {
    if thread < KEYS && item.key_begin < item.key_end {
        cache_rows[thread] = kv_row(item.pages, kv_head, item.origin + min(tile + thread, item.key_end - 1u));
    }
}

fn stage_keys(thread: u32) {
    for (var round = 0u; round < KEY_ROUNDS; round++) {
        let i = round * THREADS + thread;
        let nth = i / (K_SIDES * SIDE4);
        let four = i % (K_SIDES * SIDE4);
        if KEYS * K_SIDES * SIDE4 % THREADS == 0u || nth < KEYS {
            var k = vec4<Half>();
            if K4 % SIDE4 == 0u || four < K4 {
                k = half_k(cache_rows[nth], four);
            }
            staged[nth * KEYS_PITCH + four] = k;
        }
    }
}

// Four keys by four columns at a time, transposed.
fn stage_values(thread: u32) {
    for (var round = 0u; round < VALUE_ROUNDS; round++) {
        let i = round * THREADS + thread;
        let first = i / (V_SIDES * SIDE4);
        let four = i % (V_SIDES * SIDE4);
        if KEYS4 * V_SIDES * SIDE4 % THREADS == 0u || first < KEYS4 {
            var v: array<vec4<Half>, 4>;
            if V4 % SIDE4 == 0u || four < V4 {
                for (var j = 0u; j < 4u; j++) {
                    v[j] = half_v(cache_rows[first * 4u + j], four);
                }
            }
            for (var c = 0u; c < 4u; c++) {
                staged[VALUES_AT + (four * 4u + c) * VALUES_PITCH + first] = vec4(v[0][c], v[1][c], v[2][c], v[3][c]);
            }
        }
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, invocation: Invocation) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;
    let thread = thread_of(invocation);
    measure_queries(item, kv_head, thread);

    let team = team_of(invocation);
    let base = team.nth % BLOCKS * SIDE;
    let part = team.nth / BLOCKS;
    let parts = team.count / BLOCKS;
    // The row that this invocation turns into weights, and its share of the keys.
    let slot = thread / SHARERS;
    let share = thread % SHARERS;
    let row = row_of(item, kv_head, item.row_begin + slot);

    find_rows(item, kv_head, item.key_begin, thread);
    for (var four = share; four < K_SIDES * SIDE4; four += SHARERS) {
        staged[slot * QUERIES_PITCH + four] = halves(query_four(item, kv_head, item.row_begin + slot, four));
    }
    // The queries are staged, and the rows of the first tile are found.
    workgroupBarrier();
    var q: array<Left, K_SIDES>;
    for (var side = 0u; side < K_SIDES; side++) {
        q[side] = load_queries(base * QUERIES_PITCH + side * SIDE4, team);
    }
    // Keys overwrite them.
    workgroupBarrier();
    var o: array<Sums, V_SIDES>;
    for (var side = 0u; side < V_SIDES; side++) {
        o[side] = Sums();
    }
    var m = HIDDEN;
    // Of this invocation's share alone.
    var d = 0.0;

    for (var tile = item.key_begin; tile < item.key_end; tile += KEYS) {
        let kind = tile_kind(item, kv_head, tile);
        if kind == SKIP {
            find_rows(item, kv_head, tile + KEYS, thread);
            // The rows of the next tile are found.
            workgroupBarrier();
            continue;
        }
        stage_keys(thread);
        stage_values(thread);
        if thread == 0u {
            grew = 0u;
        }
        // Keys and values are staged.
        workgroupBarrier();
        for (var column = 0u; column < KEYS / SIDE; column++) {
            if parts == 1u || column % parts == part {
                var s = Sums();
                for (var side = 0u; side < K_SIDES; side++) {
                    s = product(q[side], load_keys(column * SIDE * KEYS_PITCH + side * SIDE4), s, team);
                }
                store_sums(base * LOGITS_PITCH + column * SIDE4, s, team);
            }
        }
        // The logits are there; nobody stages any more.
        workgroupBarrier();
        find_rows(item, kv_head, tile + KEYS, thread);
        var mine: array<vec4<f32>, SHARE4>;
        var top = HIDDEN;
        for (var i = 0u; i < SHARE4; i++) {
            let four = share * SHARE4 + i;
            let dots = logits[slot * LOGITS_PITCH + four];
            for (var e = 0u; e < 4u; e++) {
                mine[i][e] = logit(dots[e], row, tile + four * 4u + e, kind);
                top = max(top, mine[i][e]);
            }
        }
        top = shared_max(top, thread);
        var shrink = 1.0;
        if top > m + LAZY || m == HIDDEN {
            if m != HIDDEN {
                shrink = exp2(m - top);
                d *= shrink;
                grew = 1u;
            }
            m = top;
        }
        for (var i = 0u; i < SHARE4; i++) {
            var p = vec4(0.0);
            for (var e = 0u; e < 4u; e++) {
                p[e] = weight(mine[i][e], m);
            }
            let half = halves(p);
            weights[slot * WEIGHTS_PITCH + share * SHARE4 + i] = half;
            // As they are multiplied: what rounding takes from the outputs it takes from their sum.
            d += dot(vec4<f32>(half), vec4(1.0));
        }
        // The barrier in it: the weights are there, and all know whether outputs shrink.
        if workgroupUniformLoad(&grew) == 1u {
            for (var side = 0u; side < V_SIDES; side++) {
                if parts == 1u || side % parts == part {
                    store_sums(base * LOGITS_PITCH, o[side], team);
                }
                // The outputs are there.
                workgroupBarrier();
                logits[slot * LOGITS_PITCH + share] *= shrink;
                // They have shrunk.
                workgroupBarrier();
                if parts == 1u || side % parts == part {
                    o[side] = load_sums(base * LOGITS_PITCH, team);
                }
                // The next part overwrites them.
                workgroupBarrier();
            }
        }
        for (var column = 0u; column < KEYS / SIDE; column++) {
            let p = load_weights(base * WEIGHTS_PITCH + column * SIDE4, team);
            for (var side = 0u; side < V_SIDES; side++) {
                if parts == 1u || side % parts == part {
                    o[side] = product(p, load_values(VALUES_AT + side * SIDE * VALUES_PITCH + column * SIDE4), o[side], team);
                }
            }
        }
        // The next tile overwrites keys, values and weights; its rows are found.
        workgroupBarrier();
    }

    d = shared_sum(d, thread);
    if share == 0u {
        emit_sums(item, kv_head, item.row_begin + slot, vec2(m, d));
    }
    for (var side = 0u; side < V_SIDES; side++) {
        if parts == 1u || side % parts == part {
            store_sums(base * LOGITS_PITCH, o[side], team);
        }
        // The outputs are there.
        workgroupBarrier();
        emit(item, kv_head, item.row_begin + slot, side * SIDE4 + share, logits[slot * LOGITS_PITCH + share], vec2(m, d));
        // The next part overwrites them.
        workgroupBarrier();
    }
}
