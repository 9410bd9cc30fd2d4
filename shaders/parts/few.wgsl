// A tile that is half empty takes fewer rows a lane, as two query tokens of groups of four do.

fn attend_tile(item: WorkItem, kv_head: u32, lane: u32) {
    if item.row_end - item.row_begin <= FEW_ROWS {
        attend_few(item, kv_head, lane);
    } else {
        attend(item, kv_head, lane);
    }
}
