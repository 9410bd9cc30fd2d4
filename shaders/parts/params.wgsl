// What all items of a step share: the head of every work list. Offsets and strides are in elements.
// MAX_WORKGROUPS (prelude) is what one dispatch dimension holds.

struct Params {
    items: u32,
    slots: u32,
    page_shift: u32,
    page_mask: u32,
    pages: u32,
    k_headers: u32,
    v_headers: u32,
    lse: u32,
    q_offset: u32,
    q_token: u32,
    q_head: u32,
    out_offset: u32,
    out_token: u32,
    out_head: u32,
    lse_offset: u32,
    lse_token: u32,
    lse_head: u32,
    maps: u32,
    tokens: u32,
    // Always 0, which compilers do not know.
    zero: u32,
}

// Items run along x and, past what one dimension holds, along z.
fn item_index(workgroup: vec3<u32>) -> u32 {
    return workgroup.x + workgroup.z * MAX_WORKGROUPS;
}

// Row r of a KV head is token r / GROUP, query head kv_head * GROUP + r % GROUP.
fn query_head(kv_head: u32, row: u32) -> u32 {
    return kv_head * GROUP + row % GROUP;
}
