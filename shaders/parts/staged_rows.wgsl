// Rows of the way back in workgroup memory, beside the keys and values of `staged`.

var<workgroup> row_part: array<vec4<f32>, ROWS * PITCH>;

// Stages a part of the queries of ROWS rows from `at.x` on: part `at.y`, by invocation `at.z`.
fn stage_q(item: WorkItem, kv_head: u32, at: vec3<u32>) {
    for (var i = at.z; i < ROWS * PART; i += THREADS) {
        row_part[i / PART * PITCH + i % PART] = q_four(item, kv_head, at.x + i / PART, at.y * PART + i % PART);
    }
}

// The same of the gradients of their outputs.
fn stage_d(item: WorkItem, kv_head: u32, at: vec3<u32>) {
    for (var i = at.z; i < ROWS * PART; i += THREADS) {
        row_part[i / PART * PITCH + i % PART] = d_four(item, kv_head, at.x + i / PART, at.y * PART + i % PART);
    }
}
