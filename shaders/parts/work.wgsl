// The work list of `prefill` and `decode`: one workgroup takes (item, KV head).

struct WorkItem {
    token: u32,
    row_begin: u32,
    row_end: u32,
    key_begin: u32,
    key_end: u32,
    kv_len: u32,
    q_start: i32,
    cache_row: u32,
    state: u32,
}

struct Work {
    params: Params,
    items: array<WorkItem>,
}

@group(0) @binding(0) var<storage, read> work: Work;

// Keys before the returned position are visible to `row`. Rows beyond the tile see none.
fn visible_end(item: WorkItem, row: u32) -> u32 {
    if row >= item.row_end {
        return 0u;
    }
    if CAUSAL {
        let end = item.q_start + i32(row / GROUP) + 1;
        return min(u32(max(end, 0)), item.kv_len);
    }
    return item.kv_len;
}
