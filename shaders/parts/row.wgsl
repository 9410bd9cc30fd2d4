// What the logits of a row depend on, and what arithmetic (causality, windows, lengths) lets it see.
// Parts: `slope_of` (alibi), `mask_row` (mask_bits, mask_add).

struct Row {
    // Keys that causality, windows and the item let it see: begin to end.
    begin: u32,
    end: u32,
    // Of its query, counted from key 0 of the sequence or document.
    position: i32,
    slope: f32,
    // First word of its mask, and the mask's column of key 0.
    mask: u32,
    mask_key: i32,
}

// Rows beyond the tile see nothing.
fn row_of(item: WorkItem, kv_head: u32, row: u32) -> Row {
    var seen = Row(0u, 0u, 0, 0.0, 0u, 0);
    if row >= item.row_end {
        return seen;
    }
    seen.position = row_place(item, row);
    var end = i32(item.key_end);
    if CAUSAL {
        end = min(end, seen.position + 1);
    }
    if WINDOW_RIGHT >= 0 {
        end = min(end, seen.position + WINDOW_RIGHT + 1);
    }
    if WINDOW_LEFT >= 0 {
        seen.begin = u32(max(seen.position - WINDOW_LEFT, 0));
    }
    seen.end = u32(max(end, 0));
    let head = query_head(kv_head, row);
    seen.slope = slope_of(head);
    seen.mask = mask_row(item, head, row);
    seen.mask_key = item.mask_key;
    return seen;
}
