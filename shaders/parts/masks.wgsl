// The step's masks (and maps), and where the mask of a row begins among them.

@group(0) @binding(7) var<storage, read> masks: array<u32>;

fn mask_row(item: WorkItem, head: u32, row: u32) -> u32 {
    return item.mask + head * item.mask_head + row / GROUP * item.mask_token;
}
