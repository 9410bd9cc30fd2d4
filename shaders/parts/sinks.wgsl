// A sink is one more logit of the head, without a value: a state (0, sink, 1), merged when a row is finished. A row that has seen
// no key stays empty.
fn with_sink(head: u32, m: f32, d: f32) -> Total {
    if d == 0.0 {
        return Total(m, d, 1.0);
    }
    // The table has sink * log2(e).
    let sink = table_number(SINKS_AT + head);
    let top = max(m, sink);
    let shrink = exp2(m - top);
    return Total(top, d * shrink + exp2(sink - top), shrink);
}
