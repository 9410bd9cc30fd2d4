// Tiles of one row a lane have none smaller.

fn attend_tile(item: WorkItem, kv_head: u32, lane: u32) {
    attend(item, kv_head, lane);
}
