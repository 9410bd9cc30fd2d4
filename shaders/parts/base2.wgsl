// Kernels work in base 2, and without infinities, which are not portable in WGSL: HIDDEN is a large finite negative number.

const HIDDEN: f32 = -3.0e38;
const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
