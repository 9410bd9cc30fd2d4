// Where a kernel leaves a row: the output where its item holds all keys of the row, else a state for `combine`.

fn state_row(item: WorkItem, kv_head: u32, row: u32) -> u32 {
    return item.state + kv_head * item.state_stride + row;
}

// Four columns of a row, whose running max and sum are `sums`.
fn emit(item: WorkItem, kv_head: u32, row: u32, four: u32, o: vec4<f32>, sums: vec2<f32>) {
    if row >= item.row_end || four >= V4 {
        return;
    }
    if item.state_stride == WHOLE {
        finish_four(item.token + row / GROUP, query_head(kv_head, row), four, o, sums);
    } else {
        states[state_row(item, kv_head, row) * STATE4 + four] = o;
    }
}

// Running max and sum of a row: by one invocation.
fn emit_sums(item: WorkItem, kv_head: u32, row: u32, sums: vec2<f32>) {
    if row >= item.row_end {
        return;
    }
    if item.state_stride == WHOLE {
        finish_lse(item.token + row / GROUP, query_head(kv_head, row), sums);
    } else {
        states[state_row(item, kv_head, row) * STATE4 + V4] = vec4(sums, 0.0, 0.0);
    }
}
