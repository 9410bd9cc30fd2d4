// The row of a run's token among the step's rotated queries: `[tokens][heads]`.
fn slot_row(item: AppendItem, kv_head: u32, token: u32) -> u32 {
    return (item.token + token) * KV_HEADS + kv_head;
}
