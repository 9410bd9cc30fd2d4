// SCALE_LOG2 (prelude) is scale * log2(e): exp(x) = exp2(x * log2(e)).
fn scaled(dot: f32) -> f32 {
    return dot * SCALE_LOG2;
}

// What a gradient with respect to the (natural) logit is multiplied by to be one with respect to the dot product.
fn scaled_slope(dot: f32) -> f32 {
    return SCALE;
}
