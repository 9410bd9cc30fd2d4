// The work list of `prefill` and `decode`, whose workgroups take an (item, KV head) each.

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
    origin: u32,
    mask: u32,
    mask_head: u32,
    mask_token: u32,
    mask_key: i32,
    map: u32,
}

struct Work {
    params: Params,
    items: array<WorkItem>,
}

@group(0) @binding(0) var<storage, read> work: Work;
