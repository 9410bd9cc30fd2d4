//! What samples of a time say: the median, and how far they spread.

/// Seconds of one repetition, over all samples.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Timing {
    /// The median.
    pub median_s: f64,
    /// The least.
    pub min_s: f64,
    /// A quarter of the samples is below.
    pub q1_s: f64,
    /// A quarter of the samples is above.
    pub q3_s: f64,
    /// How many samples there are.
    pub samples: usize,
}

impl Timing {
    /// Sums up samples; without any, all is NaN.
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let [min_s, q1_s, median_s, q3_s] = [0.0, 0.25, 0.5, 0.75].map(|part| quantile(&samples, part));
        Self { median_s, min_s, q1_s, q3_s, samples: samples.len() }
    }

    /// Half the distance of the quartiles, relative to the median.
    pub fn spread(&self) -> f64 {
        (self.q3_s - self.q1_s) / (2.0 * self.median_s)
    }
}

/// The value below which `part` of the numbers lie, which are sorted: between two of them, on the line through both.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let low = at as usize;
    let high = (low + 1).min(last);
    sorted[low] + (sorted[high] - sorted[low]) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_samples_in_any_order() {
        let timing = Timing::of(vec![5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!(timing, Timing { median_s: 3.0, min_s: 1.0, q1_s: 2.0, q3_s: 4.0, samples: 5 });
        assert!((timing.spread() - 1.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn between_two_samples() {
        let timing = Timing::of(vec![2.0, 1.0]);
        assert_eq!((timing.q1_s, timing.median_s, timing.q3_s), (1.25, 1.5, 1.75));
    }

    #[test]
    fn one_sample_has_no_spread() {
        assert_eq!(Timing::of(vec![7.0]).spread(), 0.0);
        assert!(Timing::of(Vec::new()).median_s.is_nan());
    }
}
