// Where a key lives. For each KV head a shard has `params.pages` pages of `slots` rows; a sequence's page table names the page of every
// `slots` places in turn. Neighbouring pages of a head are neighbours in memory, so a sequence whose pages follow each other is read as
// one stream. A contiguous sequence is one page, as long as its capacity.
//
// `pages` is the table's first word, less the number of pages that the sequence no longer has in front of it.

fn kv_row(pages: u32, kv_head: u32, slot: u32) -> u32 {
    let page = words[pages + (slot >> work.params.page_shift)];
    return (kv_head * work.params.pages + page) * work.params.slots + (slot & work.params.page_mask);
}

// Slots from this one on to the end of its page: their rows lie one behind the other.
fn kv_run(slot: u32) -> u32 {
    return work.params.slots - (slot & work.params.page_mask);
}
