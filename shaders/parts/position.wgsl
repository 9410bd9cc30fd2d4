// Position of a row's query in its sequence: one token after the other.

fn query_position(item: WorkItem, row: u32) -> i32 {
    return i32(item.origin) + item.q_start + i32(row / GROUP);
}
