// Prefill, many rows, on any adapter.
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup holds ROWS rows and walks the keys of one item, KEYS at a time. Queries, keys and values are staged in
// workgroup memory PART groups of four at a time and shared by all rows of the group. An invocation has a tile of 4 rows x 4 keys
// of the scores, and 4 rows x every PART-th group of four columns of the output.
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: ROWS (a multiple of 4), KEYS = 32, THREADS = ROWS / 4 * PART, K4 = ceil(HEAD_DIM / 4), V4.

const ROW_TEAMS: u32 = ROWS / 4u;
const KEYS_EACH: u32 = KEYS / PART;

var<workgroup> q_part: array<vec4<f32>, ROWS * PITCH>;
// Weights of the tile: key by key, four rows in a vector.
var<workgroup> weights: array<vec4<f32>, KEYS * ROW_TEAMS>;
// What the invocations of a row team have found, four rows in a vector.
var<workgroup> team: array<vec4<f32>, PART * ROW_TEAMS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;
    let x = thread % PART;
    let y = thread / PART;
    measure_queries(item, kv_head, thread);

    var o: array<vec4<f32>, 4u * V_PARTS>;
    for (var i = 0u; i < 4u * V_PARTS; i++) {
        o[i] = vec4(0.0);
    }
    // Sums over this invocation's own keys; they meet at the end.
    var d = vec4(0.0);
    var m = vec4(HIDDEN);
    var rows: array<Row, 4>;
    for (var i = 0u; i < 4u; i++) {
        rows[i] = row_of(item, kv_head, item.row_begin + y * 4u + i);
    }

    for (var tile = item.key_begin; tile < item.key_end; tile += KEYS) {
        let kind = tile_kind(item, kv_head, tile);
        if kind == SKIP {
            continue;
        }
        // dots[j][i]: key x + j * PART, row y * 4 + i.
        var dots: array<vec4<f32>, KEYS_EACH>;
        for (var part = 0u; part < K_PARTS; part++) {
            for (var i = thread; i < ROWS * PART; i += THREADS) {
                q_part[i / PART * PITCH + i % PART] =
                    query_four(item, kv_head, item.row_begin + i / PART, part * PART + i % PART);
            }
            stage_k(item, kv_head, vec3(tile, part, thread));
            // The parts are staged.
            workgroupBarrier();
            for (var c = 0u; c < PART; c++) {
                let q0 = q_part[(y * 4u) * PITCH + c];
                let q1 = q_part[(y * 4u + 1u) * PITCH + c];
                let q2 = q_part[(y * 4u + 2u) * PITCH + c];
                let q3 = q_part[(y * 4u + 3u) * PITCH + c];
                for (var j = 0u; j < KEYS_EACH; j++) {
                    let k = kv_part[(x + j * PART) * PITCH + c];
                    dots[j] += vec4(dot(q0, k), dot(q1, k), dot(q2, k), dot(q3, k));
                }
            }
            // The next part overwrites them.
            workgroupBarrier();
        }

        var best = vec4(HIDDEN);
        for (var j = 0u; j < KEYS_EACH; j++) {
            for (var i = 0u; i < 4u; i++) {
                dots[j][i] = logit(dots[j][i], rows[i], tile + x + j * PART, kind);
            }
            best = max(best, dots[j]);
        }
        team[x * ROW_TEAMS + y] = best;
        // Every invocation's maxima are there.
        workgroupBarrier();
        var top = m;
        for (var l = 0u; l < PART; l++) {
            top = max(top, team[l * ROW_TEAMS + y]);
        }
        let shrink = exp2(m - top);
        m = top;
        d *= shrink;
        for (var i = 0u; i < 4u * V_PARTS; i++) {
            o[i] *= shrink[i % 4u];
        }
        for (var j = 0u; j < KEYS_EACH; j++) {
            var p = vec4(0.0);
            for (var i = 0u; i < 4u; i++) {
                p[i] = weight(dots[j][i], m[i]);
            }
            d += p;
            weights[(x + j * PART) * ROW_TEAMS + y] = p;
        }

        for (var part = 0u; part < V_PARTS; part++) {
            stage_v(item, kv_head, vec3(tile, part, thread));
            // The part is staged, and (first part) the weights are whole.
            workgroupBarrier();
            for (var j = 0u; j < KEYS; j++) {
                let p = weights[j * ROW_TEAMS + y];
                let v = kv_part[j * PITCH + x];
                o[part * 4u] += p.x * v;
                o[part * 4u + 1u] += p.y * v;
                o[part * 4u + 2u] += p.z * v;
                o[part * 4u + 3u] += p.w * v;
            }
            // The next part overwrites it; the next tile overwrites weights and maxima.
            workgroupBarrier();
        }
    }

    team[x * ROW_TEAMS + y] = d;
    // Every invocation's sums are there.
    workgroupBarrier();
    d = vec4(0.0);
    for (var l = 0u; l < PART; l++) {
        d += team[l * ROW_TEAMS + y];
    }
    for (var i = 0u; i < 4u; i++) {
        let row = item.row_begin + y * 4u + i;
        for (var part = 0u; part < V_PARTS; part++) {
            emit(item, kv_head, row, part * PART + x, o[part * 4u + i], vec2(m[i], d[i]));
        }
        if x == 0u {
            emit_sums(item, kv_head, row, vec2(m[i], d[i]));
        }
    }
}
