// The normalised Walsh-Hadamard transform of rows in blocks of the largest power of two that divides their length: orthonormal and its
// own inverse, so that products of rotated rows are those of the rows themselves (QuaRot, arXiv 2404.00456). It spreads outliers.

// Rotates `count` rows of `length` elements, `pitch` apart in `rows`; by all invocations of the workgroup.
fn rotate_rows(count: u32, pitch: u32, length: u32, thread: u32) {
    let block = length & (~length + 1u);
    let pairs = length / 2u;
    for (var half = 1u; half < block; half *= 2u) {
        for (var i = thread; i < count * pairs; i += THREADS) {
            let pair = i % pairs;
            let at = i / pairs * pitch + pair / half * half * 2u + pair % half;
            let a = rows[at];
            let b = rows[at + half];
            rows[at] = (a + b) * SQRT_HALF;
            rows[at + half] = (a - b) * SQRT_HALF;
        }
        // The next round pairs elements of other invocations.
        workgroupBarrier();
    }
}

const SQRT_HALF: f32 = 0.7071067811865476;
