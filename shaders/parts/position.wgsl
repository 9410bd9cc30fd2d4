// Position that a row's query turns to: one token after the other.

fn query_position(item: WorkItem, row: u32) -> i32 {
    return i32(item.origin) + row_place(item, row);
}
