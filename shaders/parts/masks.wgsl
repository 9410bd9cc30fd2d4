// Where the mask of a row begins among the step's words.

fn mask_row(item: WorkItem, head: u32, row: u32) -> u32 {
    return item.mask + head * item.mask_head + row / GROUP * item.mask_token;
}
