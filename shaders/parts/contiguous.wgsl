// Where a key lives: a sequence has `slots` rows for each KV head, one after another.

fn kv_row(item: WorkItem, kv_head: u32, position: u32) -> u32 {
    return item.cache_row + kv_head * work.params.slots + position;
}
