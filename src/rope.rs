//! Rotary position embedding: which elements turn, and by how much per token. Pure data, and the definition in f64.

mod check;

use std::f64::consts::{FRAC_1_PI, TAU};

/// Which elements turn together. They count from [`Rope::first`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// `i` with `i + dim / 2`: GPT-NeoX, Llama, most models in Hugging Face's layout (`rotate_half`).
    Half,
    /// `2i` with `2i + 1`: RoFormer, GPT-J (`rotate_every_two`), DeepSeek, Llama in Meta's layout.
    Interleaved,
}

/// Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864): pairs of elements of queries and keys turn by an angle
/// that grows with the position, so that `q k^T` depends on the distance alone.
///
/// ```
/// use gqa::{Rope, Scaling};
/// let scaling = Scaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
/// let llama = Rope { theta: 500_000.0, scaling, ..Rope::new(128) };
/// let mut query = vec![1.0; 128];
/// llama.rotate(&mut query, 7);
/// assert!((query[0] - (7_f64.cos() - 7_f64.sin())).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which elements turn together.
    pub pairing: Pairing,
    /// Elements that turn, an even number from 2 to the head's size less [`Self::first`]; the others stay as they are.
    pub dim: u32,
    /// The first element that turns: 0 for most models.
    pub first: u32,
    /// Base of the frequencies, positive: pair `i` turns by `theta^(-2i / dim)` radians per token before scaling.
    pub theta: f64,
    /// How the frequencies are stretched for contexts longer than those of training.
    pub scaling: Scaling,
}

/// How frequencies differ from `theta^(-2i / dim)`. Formulas are those of `modeling_rope_utils.py` in Hugging Face transformers;
/// contexts are in tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor` (Chen et al., "Position Interpolation", arXiv 2306.15595).
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Dynamic NTK: `theta` grows with the context beyond `original_context`. Keys in a cache are never turned again, so the
    /// frequencies are fixed: those of transformers at a sequence length of `context`. vLLM's are those of
    /// `factor * original_context`. Needs a [`Rope::dim`] of 4 or more.
    DynamicNtk {
        /// At least 1.
        factor: f64,
        /// The context of training (`max_position_embeddings`).
        original_context: u32,
        /// The longest context in use.
        context: u32,
    },
    /// YaRN (Peng et al., arXiv 2309.00071). Needs a [`Rope::theta`] above 1.
    Yarn {
        /// At least 1.
        factor: f64,
        /// The context of training.
        original_context: u32,
        /// Pairs that turn this often or more within `original_context` keep their frequency; 32 in the paper.
        beta_fast: f64,
        /// Pairs that turn this often or less have it divided by `factor`; 1 in the paper.
        beta_slow: f64,
        /// What multiplies sine and cosine; `None` is the paper's `0.1 ln(factor) + 1`. A model with `mscale` and
        /// `mscale_all_dim` (DeepSeek) has `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)`.
        attention_factor: Option<f64>,
        /// Whether the ends of the ramp between the two are rounded outwards to whole pairs: yes, but for gpt-oss.
        truncate: bool,
    },
    /// Llama 3.1 (arXiv 2407.21783; formula from transformers): long wavelengths divided by `factor`, short ones kept, those
    /// between blended.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Pairs that turn less often than this within `original_context` have their frequency divided by `factor`.
        low_freq_factor: f64,
        /// Pairs that turn more often than this keep it; above `low_freq_factor`.
        high_freq_factor: f64,
        /// The context of training.
        original_context: u32,
    },
    /// LongRoPE (Ding et al., arXiv 2402.13753), as in Phi-3: each frequency divided by a factor of its own.
    LongRope {
        /// Where `context <= original_context`: one factor for each pair.
        short: Vec<f64>,
        /// Where `context > original_context`: one factor for each pair.
        long: Vec<f64>,
        /// The context of training, at least 2.
        original_context: u32,
        /// The longest context in use.
        context: u32,
        /// What multiplies sine and cosine; `None` is `sqrt(1 + ln(context / original_context) / ln(original_context))`, and 1
        /// where `context <= original_context`. transformers puts the model's `max_position_embeddings` in the place of
        /// `context`, however short the sequence: where `context` is not that, give its factor here.
        attention_factor: Option<f64>,
    },
}

/// What [`Rope`] does to one element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Which pair, and so which frequency.
    pub(crate) index: u32,
    /// The element it turns with.
    pub(crate) partner: u32,
    /// Whether it is `a` in `(a cos - b sin, b cos + a sin)`.
    pub(crate) first: bool,
}

impl Rope {
    /// `dim` elements from the head's first, paired [`Pairing::Half`], `theta` 10000, no scaling.
    pub fn new(dim: u32) -> Self {
        Self { pairing: Pairing::Half, dim, first: 0, theta: 10_000.0, scaling: Scaling::None }
    }

    /// Radians per token of each pair, `dim / 2` of them.
    pub fn frequencies(&self) -> Vec<f64> {
        let plain = self.plain_frequencies();
        match &self.scaling {
            // The plain ones, whose base has grown.
            Scaling::None | Scaling::DynamicNtk { .. } => plain.collect(),
            Scaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            &Scaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                let (low, high) = self.yarn_ramp(original_context, [beta_fast, beta_slow], truncate);
                // As in transformers: a ramp of no width is a step.
                let width = if low == high { 0.001 } else { high - low };
                let stretched = |pair: usize| ((pair as f64 - low) / width).clamp(0.0, 1.0);
                let blend =
                    |(pair, f): (usize, f64)| f / factor * stretched(pair) + f * (1.0 - stretched(pair));
                plain.enumerate().map(blend).collect()
            }
            &Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
                .map(|f| {
                    let turns = f64::from(original_context) * f / TAU;
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let kept = kept.clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                })
                .collect(),
            Scaling::LongRope { short, long, original_context, context, .. } => {
                let factors = if context > original_context { long } else { short };
                plain.zip(factors).map(|(f, factor)| f / factor).collect()
            }
        }
    }

    /// What multiplies sine and cosine: the attention factor of YaRN and LongRoPE, otherwise 1.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            Scaling::Yarn { attention_factor: Some(given), .. }
            | Scaling::LongRope { attention_factor: Some(given), .. } => given,
            Scaling::Yarn { factor, .. } => 0.1 * factor.ln() + 1.0,
            Scaling::LongRope { original_context, context, .. } if context > original_context => {
                let original = f64::from(original_context);
                (1.0 + (f64::from(context) / original).ln() / original.ln()).sqrt()
            }
            _ => 1.0,
        }
    }

    /// [`Self::frequencies`] in units of 2^-64 turns per token, rounded to the nearest, as (high, low) words. Such a number times a
    /// position, modulo 2^64, is the angle within its turn, off by 2^-65 turns per token at most; a negative position is its
    /// two's complement.
    pub fn turns(&self) -> Vec<[u32; 2]> {
        let words = |turns: u64| [(turns >> 32) as u32, turns as u32];
        self.frequencies().into_iter().map(|f| words(fixed_turns(f))).collect()
    }

    /// The part that an element has; `None` where it stays as it is.
    pub(crate) fn pair(&self, element: u32) -> Option<Pair> {
        let half = self.dim / 2;
        let place = element.checked_sub(self.first).filter(|&place| place / 2 < half)?;
        let (index, first, distance) = match self.pairing {
            Pairing::Half => (place % half, place < half, half),
            Pairing::Interleaved => (place / 2, place.is_multiple_of(2), 1),
        };
        Some(Pair { index, partner: if first { element + distance } else { element - distance }, first })
    }

    /// Turns one head of one token in place: `(a, b)` becomes `(a cos - b sin, b cos + a sin)` times [`Self::magnitude`], where
    /// the angle is `position` times the pair's frequency.
    ///
    /// # Panics
    /// If `row` ends before the last element that turns, or LongRoPE lacks factors.
    pub fn rotate(&self, row: &mut [f64], position: i64) {
        let (frequencies, magnitude) = (self.frequencies(), self.magnitude());
        for element in self.first..self.first + self.dim {
            let Some(Pair { index, partner, first: true }) = self.pair(element) else { continue };
            let (sin, cos) = (position as f64 * frequencies[index as usize]).sin_cos();
            let (a, b) = (row[element as usize], row[partner as usize]);
            row[element as usize] = (a * cos - b * sin) * magnitude;
            row[partner as usize] = (b * cos + a * sin) * magnitude;
        }
    }

    /// `theta^(-2i / dim)`, where dynamic NTK has its own theta.
    fn plain_frequencies(&self) -> impl Iterator<Item = f64> {
        let dim = f64::from(self.dim);
        let theta = match self.scaling {
            Scaling::DynamicNtk { factor, original_context, context } => {
                let ratio = f64::from(context.max(original_context)) / f64::from(original_context);
                self.theta * (factor * ratio - (factor - 1.0)).powf(dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        (0..self.dim / 2).map(move |pair| 1.0 / theta.powf(f64::from(2 * pair) / dim))
    }

    /// The pairs where YaRN's ramp starts and ends (`find_correction_range` in transformers, whose upper limit it is, too).
    fn yarn_ramp(&self, original_context: u32, [fast, slow]: [f64; 2], truncate: bool) -> (f64, f64) {
        let dim = f64::from(self.dim);
        let pair = |rotations: f64| {
            dim * (f64::from(original_context) / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
        };
        let (low, high) = match truncate {
            true => (pair(fast).floor(), pair(slow).ceil()),
            false => (pair(fast), pair(slow)),
        };
        (low.max(0.0), high.min(dim - 1.0))
    }
}

/// Radians in units of 2^-64 turns, rounded. An f64 of turns would be off by 2^-54 turns per token already.
fn fixed_turns(radians: f64) -> u64 {
    // 1 / (2 pi) in two parts, the product in two as well.
    const RADIAN: [f64; 2] = [FRAC_1_PI / 2.0, -9.839_338_337_591_243e-18];
    let high = radians * RADIAN[0];
    let low = radians.mul_add(RADIAN[0], -high) + radians * RADIAN[1];
    let unit = 2_f64.powi(64);
    let whole = (high * unit).floor();
    let rest = (high * unit - whole) + low * unit;
    (whole as i128).wrapping_add(rest.round() as i128) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_mutual() {
        for pairing in [Pairing::Half, Pairing::Interleaved] {
            let rope = Rope { pairing, first: 3, ..Rope::new(10) };
            let turning: Vec<u32> = (0..20).filter(|&element| rope.pair(element).is_some()).collect();
            assert_eq!(turning, (3..13).collect::<Vec<_>>());
            for element in turning {
                let pair = rope.pair(element).unwrap();
                let back = Pair { partner: element, first: !pair.first, ..pair };
                assert_eq!(rope.pair(pair.partner), Some(back));
                assert_eq!(pair.first, element < pair.partner);
            }
        }
        let pair = |pairing, element| Rope { pairing, ..Rope::new(8) }.pair(element);
        assert_eq!(pair(Pairing::Half, 6), Some(Pair { index: 2, partner: 2, first: false }));
        assert_eq!(pair(Pairing::Interleaved, 6), Some(Pair { index: 3, partner: 7, first: true }));
    }
}
