// Prefill, many rows, on adapters whose subgroup size is fixed and small (software: 4 or 8 lanes).
//   s = scale * q k^T;  o = sum exp2(s - m) v;  d = sum exp2(s - m)
// A workgroup is one subgroup, and takes one item: the walk is parts/attend.wgsl, whose lanes own whole rows.
// No workgroup memory, no barrier (but for the norms, once).
//
// Bindings: 0 work list, 1 queries, 2 keys, 3 values, 4 outputs, 5 LSE, 6 states, 7 words, 8 table,
// 9 fetch counter, the last two where a part uses them.
// Prelude: LANES, ROWS (a multiple of LANES), KEYS, K4 = ceil(HEAD_DIM / 4), V4; K_FOURS and V_FOURS (fours of a unit), with the functions that load.

const ROWS_EACH: u32 = ROWS / LANES;
const K_PART: u32 = (K4 + LANES - 1u) / LANES;
const V_PART: u32 = (V4 + LANES - 1u) / LANES;
const K_WIDE: u32 = K_PART * LANES;
const V_WIDE: u32 = V_PART * LANES;
const K_LOADS: u32 = K_PART / K_FOURS;
const V_LOADS: u32 = V_PART / V_FOURS;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let index = item_index(workgroup);
    if index >= work.params.items {
        return;
    }
    let item = work.items[index];
    let kv_head = workgroup.y;

    measure_queries(item, kv_head, lane);

    attend_tile(item, kv_head, lane);
}
