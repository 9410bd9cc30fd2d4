// A tile of rows and a chunk of keys: an entry of the work lists of `prefill` and `decode`.

struct WorkItem {
    token: u32,
    row_begin: u32,
    row_end: u32,
    key_begin: u32,
    key_end: u32,
    q_start: i32,
    pages: u32,
    state: u32,
    state_stride: u32,
    origin: u32,
    mask: u32,
    mask_head: u32,
    mask_token: u32,
    mask_key: i32,
    map: u32,
    list: u32,
}
