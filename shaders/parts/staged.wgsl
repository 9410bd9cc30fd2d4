// Keys and values in workgroup memory, PART groups of four of KEYS rows at a time.

const PART: u32 = 8u;
// One group of padding, so that the rows of a part start in different banks.
const PITCH: u32 = PART + 1u;
const K_PARTS: u32 = (K4 + PART - 1u) / PART;
const V_PARTS: u32 = (V4 + PART - 1u) / PART;

var<workgroup> kv_part: array<vec4<f32>, KEYS * PITCH>;

// Stages a part of the keys from `at.x` on: part `at.y`, by invocation `at.z`. Zero beyond the item and beyond HEAD_DIM.
fn stage_k(item: WorkItem, kv_head: u32, at: vec3<u32>) {
    for (var i = at.z; i < KEYS * PART; i += THREADS) {
        let key = at.x + i / PART;
        let four = at.y * PART + i % PART;
        var k = vec4(0.0);
        if key < item.key_end && four < K4 {
            k = load_k(kv_row(item.pages, kv_head, item.origin + key), four);
        }
        kv_part[i / PART * PITCH + i % PART] = k;
    }
}

// The same of their values.
fn stage_v(item: WorkItem, kv_head: u32, at: vec3<u32>) {
    for (var i = at.z; i < KEYS * PART; i += THREADS) {
        let key = at.x + i / PART;
        let four = at.y * PART + i % PART;
        var v = vec4(0.0);
        if key < item.key_end && four < V4 {
            v = load_v(kv_row(item.pages, kv_head, item.origin + key), four);
        }
        kv_part[i / PART * PITCH + i % PART] = v;
    }
}
