// The row of a run's token in the cache.
fn slot_row(item: AppendItem, kv_head: u32, token: u32) -> u32 {
    return kv_row(item.pages, kv_head, item.slot + token);
}
