//! How near a model's sentence embeddings are to another's.

/// Both are 1 for the same embeddings.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quality {
    /// Mean cosine of a sentence's two embeddings.
    pub(crate) cosine: f64,
    /// Spearman's rank correlation of the similarities of all pairs of sentences: whether the same sentences are near each other, which is
    /// what embeddings are for.
    pub(crate) rank: f64,
}

/// Compares embeddings of length 1, row by row.
pub(crate) fn compare(found: &[Vec<f32>], expected: &[Vec<f32>]) -> Quality {
    let cosines = found.iter().zip(expected).map(|(a, b)| dot(a, b));
    let cosine = cosines.sum::<f64>() / found.len() as f64;
    let similarities = |rows: &[Vec<f32>]| -> Vec<f64> {
        let below = |nth: usize| (0..nth).map(move |other| (nth, other));
        (0..rows.len()).flat_map(below).map(|(a, b)| dot(&rows[a], &rows[b])).collect()
    };
    Quality { cosine, rank: correlation(&ranks(&similarities(found)), &ranks(&similarities(expected))) }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// The place of each number among all.
fn ranks(numbers: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.sort_by(|a, b| numbers[*a].total_cmp(&numbers[*b]));
    let mut ranks = vec![0.0; numbers.len()];
    for (rank, index) in order.into_iter().enumerate() {
        ranks[index] = rank as f64;
    }
    ranks
}

/// Pearson's, of numbers with the same mean.
fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = a.iter().sum::<f64>() / a.len() as f64;
    let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>();
    sum(a, b) / (sum(a, a) * sum(b, b)).sqrt()
}
