// logit = c tanh(scale dot / c), in base 2. Prelude: SCALE_PER_CAP = scale / c, CAP_LOG2 = c log2(e).
//
// tanh x = (1 - t) / (1 + t), t = exp(-2|x|), which cannot overflow (WGSL's own tanh may); near 0, where that would cancel, the
// series x - x^3/3 + 2x^5/15 - 17x^7/315.
fn scaled(dot: f32) -> f32 {
    let x = dot * SCALE_PER_CAP;
    let t = exp2(-2.0 * LOG2_E * abs(x));
    let far = sign(x) * (1.0 - t) / (1.0 + t);
    let s = x * x;
    let near = x + x * s * (-0.33333333 + s * (0.13333333 - s * 0.053968254));
    return CAP_LOG2 * select(far, near, abs(x) < 0.2);
}

// What a gradient with respect to the (natural) logit is multiplied by to be one with respect to the dot product: scale (1 - tanh^2),
// where 1 - tanh^2 x = 4t / (1 + t)^2.
fn scaled_slope(dot: f32) -> f32 {
    let t = exp2(-2.0 * LOG2_E * abs(dot * SCALE_PER_CAP));
    return SCALE * 4.0 * t / ((1.0 + t) * (1.0 + t));
}
