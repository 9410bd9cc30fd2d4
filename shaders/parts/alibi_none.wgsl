// No bias.

fn slope_of(head: u32) -> f32 {
    return 0.0;
}

fn biased(logit: f32, row: Row, key: u32) -> f32 {
    return logit;
}
