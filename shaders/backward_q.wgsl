// Backward, queries, on any adapter.
//   s = scale * q k^T,  p = exp2(s - l),  ds = p (dO v^T - delta);  dq = scale ds k
// A workgroup holds ROWS rows and walks the keys of one item, KEYS at a time, as `prefill` does: queries, keys, gradients of outputs
// and values are staged in workgroup memory PART groups of four at a time and shared by all rows of the group. An invocation has a tile
// of 4 rows x 4 keys of the logits, and 4 rows x every PART-th group of four columns of dq.
// Items of one row come from different shards of the cache, in dispatches of their own: each adds to what is there.
//
// Bindings: 0 work list, 1 rows of `backward_rows`, 2 keys, 3 values, 6 gradients of queries, 7 words, 8 table, 9 fetch counter, the last
// two where a part uses them.
// Prelude: ROWS (a multiple of 4), KEYS = 32, THREADS = ROWS / 4 * PART, K4 = ceil(HEAD_DIM / 4), V4.

const ROW_TEAMS: u32 = ROWS / 4u;
const KEYS_EACH: u32 = KEYS / PART;

// Gradients of the tile's logits: key by key, four rows in a vector.
var<workgroup> d_logits: array<vec4<f32>, KEYS * ROW_TEAMS>;

// Adds the products of 4 rows and 4 keys of the staged parts: [j][i] is key x + j * PART, row y * 4 + i.
fn add_dots(dots: ptr<function, array<vec4<f32>, KEYS_EACH>>, x: u32, y: u32) {
    for (var c = 0u; c < PART; c++) {
        let r0 = row_part[(y * 4u) * PITCH + c];
        let r1 = row_part[(y * 4u + 1u) * PITCH + c];
        let r2 = row_part[(y * 4u + 2u) * PITCH + c];
        let r3 = row_part[(y * 4u + 3u) * PITCH + c];
        for (var j = 0u; j < KEYS_EACH; j++) {
            let k = kv_part[(x + j * PART) * PITCH + c];
            (*dots)[j] += vec4(dot(r0, k), dot(r1, k), dot(r2, k), dot(r3, k));
        }
    }
}

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

    var dq: array<array<vec4<f32>, 4>, K_PARTS>;
    var rows: array<Row, 4>;
    var sums: array<vec2<f32>, 4>;
    for (var i = 0u; i < 4u; i++) {
        rows[i] = row_of(item, kv_head, item.row_begin + y * 4u + i);
        sums[i] = sums_of(item, kv_head, item.row_begin + y * 4u + i);
    }
    for (var part = 0u; part < bound(K_PARTS); part++) {
        dq[part] = array(vec4(0.0), vec4(0.0), vec4(0.0), vec4(0.0));
    }

    for (var tile = item.key_begin; tile < item.key_end; tile += KEYS) {
        var dots: array<vec4<f32>, KEYS_EACH>;
        var d_weights: array<vec4<f32>, KEYS_EACH>;
        for (var part = 0u; part < bound(K_PARTS); part++) {
            stage_q(item, kv_head, vec3(item.row_begin, part, thread));
            stage_k(item, kv_head, vec3(tile, part, thread));
            // The parts are staged.
            workgroupBarrier();
            add_dots(&dots, x, y);
            // The next part overwrites them.
            workgroupBarrier();
        }
        for (var part = 0u; part < bound(V_PARTS); part++) {
            stage_d(item, kv_head, vec3(item.row_begin, part, thread));
            stage_v(item, kv_head, vec3(tile, part, thread));
            // The parts are staged.
            workgroupBarrier();
            add_dots(&d_weights, x, y);
            // The next part overwrites them.
            workgroupBarrier();
        }
        for (var j = 0u; j < KEYS_EACH; j++) {
            var ds = vec4(0.0);
            for (var i = 0u; i < 4u; i++) {
                let p = weight(logit(dots[j][i], rows[i], tile + x + j * PART, PARTIAL), sums[i].x);
                ds[i] = p * (d_weights[j][i] - sums[i].y) * scaled_slope(dots[j][i]);
            }
            d_logits[(x + j * PART) * ROW_TEAMS + y] = ds;
        }
        for (var part = 0u; part < bound(K_PARTS); part++) {
            stage_k(item, kv_head, vec3(tile, part, thread));
            // The part is staged, and (first part) the gradients of the logits are whole.
            workgroupBarrier();
            var sum = dq[part];
            for (var j = 0u; j < KEYS; j++) {
                let ds = d_logits[j * ROW_TEAMS + y];
                let k = kv_part[j * PITCH + x];
                for (var i = 0u; i < 4u; i++) {
                    sum[i] += ds[i] * k;
                }
            }
            dq[part] = sum;
            // The next part overwrites it; the next tile overwrites the gradients of the logits.
            workgroupBarrier();
        }
    }

    for (var i = 0u; i < 4u; i++) {
        let row = item.row_begin + y * 4u + i;
        if row < item.row_end {
            let first = row_index(item, kv_head, row) * K4;
            for (var part = 0u; part < bound(K_PARTS); part++) {
                if part * PART + x < K4 {
                    gradients[first + part * PART + x] += dq[part][i];
                }
            }
        }
    }
}
