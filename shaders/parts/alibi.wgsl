// ALiBi: -slope * (position of the query - position of the key), Press et al., arXiv 2108.12409. The table has slope * log2(e).

fn slope_of(head: u32) -> f32 {
    return table_number(SLOPES_AT + head);
}

fn biased(logit: f32, row: Row, key: u32) -> f32 {
    return logit - row.slope * f32(row.position - i32(key));
}
