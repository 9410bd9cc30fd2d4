// RMS normalisation of a query or key (arXiv 1910.07467): w x / sqrt(mean x^2 + EPSILON). The factor is the same for the whole
// row, and turning is linear: so a row is measured once, and the factor goes last.
// Prelude: ROWS (rows that a workgroup measures), EPSILON, NORM_AT (the weights w in the table).

var<workgroup> norms: array<f32, ROWS>;

fn measure(slot: u32, source: u32) {
    var sum = 0.0;
    for (var element = 0u; element < HEAD_DIM; element++) {
        let x = raw(source + element);
        sum += x * x;
    }
    norms[slot] = inverseSqrt(sum / f32(HEAD_DIM) + EPSILON);
}

fn norms_measured() {
    // Every row is used by all invocations.
    workgroupBarrier();
}

fn norm_of(slot: u32) -> f32 {
    return norms[slot];
}

fn weighed(source: u32, element: u32) -> f32 {
    return raw(source + element) * table_number(NORM_AT + element);
}
