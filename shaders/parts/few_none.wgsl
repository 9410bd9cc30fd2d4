// One walk for all tiles: a lane has one row, or too little stack for the text of two walks (SwiftShader).

fn attend_tile(item: WorkItem, kv_head: u32, lane: u32) {
    attend(item, kv_head, lane);
}
