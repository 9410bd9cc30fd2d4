// SCALE_LOG2 (prelude) is scale * log2(e): exp(x) = exp2(x * log2(e)).
fn scaled(dot: f32) -> f32 {
    return dot * SCALE_LOG2;
}
