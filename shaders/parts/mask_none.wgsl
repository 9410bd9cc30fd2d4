// No mask but arithmetic.

fn mask_row(item: WorkItem, head: u32, row: u32) -> u32 {
    return 0u;
}

fn masked(logit: f32, row: Row, key: u32, kind: u32) -> f32 {
    return logit;
}
