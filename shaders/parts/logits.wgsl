// From a dot product to a logit in base 2: scale, (later: softcap, bias), mask, in that order.
//
// Infinities are not portable in WGSL: HIDDEN is a large finite negative number, and no weight is taken from it:
// `weight` selects 0 where the logit is hidden, so a row that has seen no key keeps d = 0.
// SCALE_LOG2 (prelude) is scale * log2(e): exp(x) = exp2(x * log2(e)).

const HIDDEN: f32 = -3.0e38;
const LN_2: f32 = 0.6931471805599453;

fn logit(dot: f32, key: u32, end: u32) -> f32 {
    return select(HIDDEN, dot * SCALE_LOG2, key < end);
}

fn weight(logit: f32, row_max: f32) -> f32 {
    return select(exp2(logit - row_max), 0.0, logit == HIDDEN);
}
