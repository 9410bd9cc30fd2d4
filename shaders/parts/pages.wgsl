// Where a key lives. A page has `slots` rows for each KV head; a sequence's page table names the page of every `slots` places in turn.
// A contiguous sequence is one page, as long as its capacity.
//
// `pages` is the table's first word, less the number of pages that the sequence no longer has in front of it.

fn kv_row(pages: u32, kv_head: u32, slot: u32) -> u32 {
    let page = words[pages + (slot >> work.params.page_shift)];
    return (page * KV_HEADS + kv_head) * work.params.slots + (slot & work.params.page_mask);
}

// Slots from this one on to the end of its page: their rows lie one behind the other.
fn kv_run(slot: u32) -> u32 {
    return work.params.slots - (slot & work.params.page_mask);
}
