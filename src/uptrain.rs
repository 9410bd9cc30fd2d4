//! From many KV heads to few: the key and value projections of a checkpoint, pooled.
//!
//! [Ainslie et al. 2023](https://arxiv.org/abs/2305.13245), section 2.1: a model trained with MHA becomes one with GQA or MQA when the
//! heads of a group are replaced by their mean, and when a small part of the training is then repeated (uptraining). Their figure 4
//! compares the three ways of [`Pooling`]: the mean keeps most, then the first head, then fresh random numbers.
//! `gqa convert` applies it to whole checkpoints.

use crate::Error;

/// How the heads of a group become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// The mean of the heads: summed in f64, rounded once to f32.
    Mean,
    /// The first head; the others are dropped.
    First,
    /// Fresh normal numbers around 0, with the standard deviation of all given weights.
    ///
    /// The numbers follow from the seed and are the same on every machine. Sums of twelve uniform numbers, so none lies
    /// further out than six deviations.
    Random {
        /// Where the numbers start; give each tensor its own.
        seed: u64,
    },
}

/// Shape of a projection's weights, `[heads * head_dim, columns]`, row after row, as `torch.nn.Linear` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// KV heads before pooling.
    pub heads: usize,
    /// Rows of a head.
    pub head_dim: usize,
    /// Columns: the model's hidden size, or 1 for a bias.
    pub columns: usize,
}

impl HeadShape {
    /// Numbers of one head.
    fn head(self) -> Option<usize> {
        self.head_dim.checked_mul(self.columns)
    }
}

/// Pools the heads of a key or value projection: `[heads * head_dim, columns]` becomes `[kv_heads * head_dim, columns]`.
///
/// Neighbours are pooled, since neighbouring query heads share a KV head: new head `i` replaces heads `i * group` to
/// `(i + 1) * group - 1`, where `group = heads / kv_heads`. The query and output projections stay as they are.
///
/// ```
/// use gqa::uptrain::{HeadShape, Pooling, pool_heads};
///
/// // Four heads of one row and two columns, to two.
/// let shape = HeadShape { heads: 4, head_dim: 1, columns: 2 };
/// let weights = [0.0, 1.0, 2.0, 3.0, 10.0, 10.0, 20.0, 40.0];
/// assert_eq!(pool_heads(&weights, shape, 2, Pooling::Mean)?, [1.0, 2.0, 15.0, 25.0]);
/// assert_eq!(pool_heads(&weights, shape, 2, Pooling::First)?, [0.0, 1.0, 10.0, 10.0]);
/// # Ok::<(), gqa::Error>(())
/// ```
///
/// # Errors
/// [`Error::Field`] where a number is 0, `kv_heads` does not divide the heads, or the weights are not as many as the shape says.
pub fn pool_heads(
    weights: &[f32],
    shape: HeadShape,
    kv_heads: usize,
    pooling: Pooling,
) -> Result<Vec<f32>, Error> {
    let HeadShape { heads, head_dim, columns } = shape;
    for (field, n) in [("heads", heads), ("head_dim", head_dim), ("columns", columns)] {
        if n == 0 {
            return Err(Error::field(field, n, "it must be at least 1"));
        }
    }
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(Error::field(
            "kv_heads",
            kv_heads,
            format!("it must divide the {heads} heads there are"),
        ));
    }
    let needed = shape.head().and_then(|head| head.checked_mul(heads));
    let Some(head) = shape.head().filter(|_| needed == Some(weights.len())) else {
        let needed = format!("the shape [{heads} * {head_dim}, {columns}] needs as many as it has elements");
        return Err(Error::field("weights.len()", weights.len(), needed));
    };
    let group = heads / kv_heads;
    let groups = weights.chunks_exact(head * group);
    Ok(match pooling {
        Pooling::Mean => groups.flat_map(|group| mean(group, head)).collect(),
        Pooling::First => groups.flat_map(|group| group.iter().take(head).copied()).collect(),
        Pooling::Random { seed } => {
            let deviation = deviation(weights);
            let mut state = seed;
            (0..head * kv_heads).map(|_| (deviation * normal(&mut state)) as f32).collect()
        }
    })
}

/// The mean of the heads of one group.
fn mean(group: &[f32], head: usize) -> Vec<f32> {
    let mut sums = vec![0.0; head];
    for numbers in group.chunks_exact(head) {
        for (sum, x) in sums.iter_mut().zip(numbers) {
            *sum += f64::from(*x);
        }
    }
    let count = (group.len() / head) as f64;
    sums.iter().map(|sum| (sum / count) as f32).collect()
}

/// Standard deviation of all numbers, around their mean.
fn deviation(numbers: &[f32]) -> f64 {
    let count = numbers.len() as f64;
    let mean = numbers.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let squares: f64 = numbers.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
    (squares / count).sqrt()
}

/// A normal number: twelve uniform ones have a variance of 1. Without logarithm or cosine, whose last bits differ
/// between machines.
fn normal(state: &mut u64) -> f64 {
    (0..12).map(|_| uniform(state)).sum::<f64>() - 6.0
}

/// A number in 0..1 of 53 bits, by splitmix64.
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pooling_to_as_many_heads_changes_nothing() {
        let shape = HeadShape { heads: 3, head_dim: 2, columns: 2 };
        let weights: Vec<f32> = (0..12).map(|i| 0.1 * i as f32).collect();
        for pooling in [Pooling::Mean, Pooling::First] {
            assert_eq!(pool_heads(&weights, shape, 3, pooling).unwrap(), weights);
        }
    }

    #[test]
    fn a_mean_in_two_steps_is_the_mean() {
        let shape = HeadShape { heads: 8, head_dim: 3, columns: 5 };
        let weights: Vec<f32> = (0..120).map(|i| (i * i % 64) as f32).collect();
        let four = pool_heads(&weights, shape, 4, Pooling::Mean).unwrap();
        let two = pool_heads(&four, HeadShape { heads: 4, ..shape }, 1, Pooling::Mean).unwrap();
        assert_eq!(two, pool_heads(&weights, shape, 1, Pooling::Mean).unwrap());
    }

    #[test]
    fn random_heads_spread_as_the_weights_did() {
        let shape = HeadShape { heads: 8, head_dim: 64, columns: 128 };
        let mut state = 1;
        let weights: Vec<f32> = (0..8 * 64 * 128).map(|_| 0.02 * normal(&mut state) as f32).collect();
        let pooled = |seed| pool_heads(&weights, shape, 2, Pooling::Random { seed }).unwrap();
        let deviation = deviation(&pooled(7));
        assert!((deviation - 0.02).abs() < 4e-4, "{deviation}");
        assert_eq!(pooled(7), pooled(7));
        assert_ne!(pooled(7), pooled(8));
        let mean = pooled(7).iter().sum::<f32>() / 16384.0;
        assert!(mean.abs() < 1e-3, "{mean}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let shape = HeadShape { heads: 4, head_dim: 1, columns: 2 };
        let refused = |weights: usize, shape, kv_heads| {
            pool_heads(&vec![0.0; weights], shape, kv_heads, Pooling::Mean).unwrap_err().to_string()
        };
        assert!(refused(8, shape, 3).contains("must divide the 4 heads"));
        assert!(refused(8, shape, 0).contains("kv_heads is 0"));
        assert!(refused(8, shape, 8).contains("kv_heads is 8"));
        assert!(refused(7, shape, 2).contains("weights.len() is 7"));
        assert!(refused(0, HeadShape { columns: 0, ..shape }, 2).contains("columns is 0"));
        assert!(refused(8, HeadShape { heads: usize::MAX - 1, ..shape }, 1).contains("weights.len()"));
        assert!(refused(8, HeadShape { head_dim: usize::MAX, ..shape }, 1).contains("weights.len()"));
    }
}
