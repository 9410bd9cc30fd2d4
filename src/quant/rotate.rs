//! Rotation of rows before they are quantised: an outlier is spread over its whole block.

use std::ops::{Add, Sub};

/// Turns a row by the Walsh-Hadamard transform, in blocks of the largest power of two that divides its length. It is orthonormal
/// and its own inverse, so `q k^T` of turned rows is that of the rows (QuaRot, arXiv 2404.00456).
pub fn rotate(row: &mut [f32]) {
    let factor = 1.0 / (butterflies(row) as f32).sqrt();
    row.iter_mut().for_each(|x| *x *= factor);
}

/// [`rotate`] in f64.
pub fn rotate_f64(row: &mut [f64]) {
    let factor = 1.0 / (butterflies(row) as f64).sqrt();
    row.iter_mut().for_each(|x| *x *= factor);
}

/// The transform without its factor; returns the length of a block.
fn butterflies<T: Copy + Add<Output = T> + Sub<Output = T>>(row: &mut [T]) -> usize {
    // The lowest bit that is set. An empty row has none.
    let block = (row.len() & row.len().wrapping_neg()).max(1);
    let mut half = 1;
    while half < block {
        for pair in row.chunks_exact_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (a, b) in left.iter_mut().zip(right) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin() * 3.0).collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn it_is_its_own_inverse_and_keeps_dot_products() {
        for len in [0, 1, 2, 3, 16, 33, 64, 80, 96, 128, 576] {
            let (a, b) = (row(len, 0.7), row(len, 1.3));
            let (mut ra, mut rb) = (a.clone(), b.clone());
            rotate(&mut ra);
            rotate(&mut rb);
            assert!((dot(&ra, &rb) - dot(&a, &b)).abs() <= 1e-6 * dot(&a, &a), "{len}");
            rotate(&mut ra);
            assert!(ra.iter().zip(&a).all(|(x, y)| (x - y).abs() < 1e-5), "{len}");
            let mut wide: Vec<f64> = b.iter().map(|x| f64::from(*x)).collect();
            rotate_f64(&mut wide);
            assert!(wide.iter().zip(&rb).all(|(x, y)| (x - f64::from(*y)).abs() < 1e-5), "{len}");
        }
    }

    #[test]
    fn blocks_are_powers_of_two() {
        // Sylvester's matrix: element (i, j) is negative where i and j share an odd number of bits.
        let mut one = vec![0.0; 12];
        one[6] = 2.0;
        rotate(&mut one);
        assert_eq!(one, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]);
        let mut odd = vec![1.0, 2.0, 3.0];
        rotate(&mut odd);
        assert_eq!(odd, [1.0, 2.0, 3.0]);
    }
}
