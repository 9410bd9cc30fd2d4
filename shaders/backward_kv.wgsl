// Backward, keys and values, on any adapter.
//   s = scale * q k^T,  p = exp2(s - l),  ds = p (dO v^T - delta);  dv = sum p dO,  dk = scale sum ds q
// A workgroup holds KEYS keys of one KV head and walks the rows of its item, ROWS at a time: every query head of the group in turn, so
// the sums over the group never leave the workgroup, and no two workgroups write one place. Parts are staged as in `backward_q`. An
// invocation has a tile of 4 keys x 4 rows of the logits, and 4 keys x every PART-th group of four columns of dk and dv.
//
// Bindings: 0 work list, 1 rows of `backward_rows`, 2 keys, 3 values, 6 gradients of keys and values, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// An item's `state` is the new token that its first key is. A row of gradients is K4 groups of a key and V4 of its value.
// Prelude: ROWS = KEYS = 32, THREADS = KEYS / 4 * PART, K4 = ceil(HEAD_DIM / 4), V4.

const KEY_TEAMS: u32 = KEYS / 4u;
const ROWS_EACH: u32 = ROWS / PART;

// Weights of the tile, then gradients of its logits: row by row, four keys in a vector.
var<workgroup> weights: array<vec4<f32>, ROWS * KEY_TEAMS>;

// Adds the products of 4 keys and 4 rows of the staged parts: [j][i] is row x + j * PART, key y * 4 + i.
fn add_dots(dots: ptr<function, array<vec4<f32>, ROWS_EACH>>, x: u32, y: u32) {
    for (var c = 0u; c < PART; c++) {
        let k0 = kv_part[(y * 4u) * PITCH + c];
        let k1 = kv_part[(y * 4u + 1u) * PITCH + c];
        let k2 = kv_part[(y * 4u + 2u) * PITCH + c];
        let k3 = kv_part[(y * 4u + 3u) * PITCH + c];
        for (var j = 0u; j < ROWS_EACH; j++) {
            let r = row_part[(x + j * PART) * PITCH + c];
            (*dots)[j] += vec4(dot(k0, r), dot(k1, r), dot(k2, r), dot(k3, r));
        }
    }
}

// Adds what the staged part of ROWS rows gives to four keys, weighed.
fn add_rows(sum: ptr<function, array<vec4<f32>, 4>>, x: u32, y: u32) {
    for (var r = 0u; r < ROWS; r++) {
        let p = weights[r * KEY_TEAMS + y];
        let four = row_part[r * PITCH + x];
        for (var i = 0u; i < 4u; i++) {
            (*sum)[i] += p[i] * four;
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

    var dk: array<array<vec4<f32>, 4>, K_PARTS>;
    var dv: array<array<vec4<f32>, 4>, V_PARTS>;
    for (var part = 0u; part < bound(K_PARTS); part++) {
        dk[part] = array(vec4(0.0), vec4(0.0), vec4(0.0), vec4(0.0));
    }
    for (var part = 0u; part < bound(V_PARTS); part++) {
        dv[part] = array(vec4(0.0), vec4(0.0), vec4(0.0), vec4(0.0));
    }

    for (var tile = item.row_begin; tile < item.row_end; tile += ROWS) {
        var dots: array<vec4<f32>, ROWS_EACH>;
        var d_weights: array<vec4<f32>, ROWS_EACH>;
        for (var part = 0u; part < bound(K_PARTS); part++) {
            stage_k(item, kv_head, vec3(item.key_begin, part, thread));
            stage_q(item, kv_head, vec3(tile, part, thread));
            // The parts are staged.
            workgroupBarrier();
            add_dots(&dots, x, y);
            // The next part overwrites them.
            workgroupBarrier();
        }
        for (var part = 0u; part < bound(V_PARTS); part++) {
            stage_v(item, kv_head, vec3(item.key_begin, part, thread));
            stage_d(item, kv_head, vec3(tile, part, thread));
            // The parts are staged.
            workgroupBarrier();
            add_dots(&d_weights, x, y);
            // The next part overwrites them.
            workgroupBarrier();
        }
        for (var j = 0u; j < ROWS_EACH; j++) {
            let nth = x + j * PART;
            let row = row_of(item, kv_head, tile + nth);
            let sums = sums_of(item, kv_head, tile + nth);
            var p = vec4(0.0);
            for (var i = 0u; i < 4u; i++) {
                p[i] = weight(logit(dots[j][i], row, item.key_begin + y * 4u + i, PARTIAL), sums.x);
                d_weights[j][i] = p[i] * (d_weights[j][i] - sums.y) * scaled_slope(dots[j][i]);
            }
            weights[nth * KEY_TEAMS + y] = p;
        }
        for (var part = 0u; part < bound(V_PARTS); part++) {
            stage_d(item, kv_head, vec3(tile, part, thread));
            // The part is staged, and (first part) the weights are whole.
            workgroupBarrier();
            var sum = dv[part];
            add_rows(&sum, x, y);
            dv[part] = sum;
            // The next part overwrites it, and the gradients of the logits overwrite the weights.
            workgroupBarrier();
        }
        for (var j = 0u; j < ROWS_EACH; j++) {
            weights[(x + j * PART) * KEY_TEAMS + y] = d_weights[j];
        }
        for (var part = 0u; part < bound(K_PARTS); part++) {
            stage_q(item, kv_head, vec3(tile, part, thread));
            // The part is staged, and (first part) the gradients of the logits are whole.
            workgroupBarrier();
            var sum = dk[part];
            add_rows(&sum, x, y);
            dk[part] = sum;
            // The next part overwrites it; the next tile overwrites the gradients of the logits.
            workgroupBarrier();
        }
    }

    for (var i = 0u; i < 4u; i++) {
        let key = item.key_begin + y * 4u + i;
        if key < item.key_end {
            let first = ((item.state + key - item.key_begin) * KV_HEADS + kv_head) * (K4 + V4);
            for (var part = 0u; part < bound(K_PARTS); part++) {
                if part * PART + x < K4 {
                    gradients[first + part * PART + x] += dk[part][i];
                }
            }
            for (var part = 0u; part < bound(V_PARTS); part++) {
                if part * PART + x < V4 {
                    gradients[first + K4 + part * PART + x] += dv[part][i];
                }
            }
        }
    }
}
