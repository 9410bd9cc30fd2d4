//! What a [`Rope`] may be.

use std::f64::consts::TAU;

use super::{Rope, Scaling};
use crate::error::Error;

impl Rope {
    /// Whether heads of `head_dim` elements can turn so.
    ///
    /// # Errors
    /// [`Error::Field`] names the first field that cannot be, as `rope.dim` or `rope.scaling.factor`.
    pub(crate) fn check(&self, head_dim: u32) -> Result<(), Error> {
        if !self.dim.is_multiple_of(2) || !(2..=head_dim).contains(&self.dim) {
            let needed = format!("it must be even, and lie in 2..={head_dim}");
            return Err(Error::field("rope.dim", self.dim, needed));
        }
        if self.first > head_dim - self.dim {
            let needed = format!("it must lie in 0..={}", head_dim - self.dim);
            return Err(Error::field("rope.first", self.first, needed));
        }
        positive("rope.theta", self.theta)?;
        self.check_scaling()?;
        // Scaling may have moved them: whichever field did it, no angle can be computed from these.
        match self.frequencies().into_iter().find(|&f| !(f64::MIN_POSITIVE..TAU).contains(&f)) {
            Some(f) => {
                let needed = "theta and scaling must leave it above 0 and below 2 pi radians per token";
                Err(Error::field("rope.frequencies", f, needed))
            }
            None => Ok(()),
        }
    }

    fn check_scaling(&self) -> Result<(), Error> {
        match &self.scaling {
            Scaling::None => Ok(()),
            &Scaling::Linear { factor } => check_factor(factor),
            &Scaling::DynamicNtk { factor, original_context, context } => {
                check_factor(factor)?;
                at_least("rope.scaling.original_context", original_context, 1)?;
                at_least("rope.scaling.context", context, 1)?;
                // The base's exponent is dim / (dim - 2).
                at_least("rope.dim", self.dim, 4)
            }
            &Scaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate } => {
                check_factor(factor)?;
                at_least("rope.scaling.original_context", original_context, 1)?;
                positive("rope.scaling.beta_slow", beta_slow)?;
                positive("rope.scaling.beta_fast", beta_fast)?;
                if beta_fast < beta_slow {
                    let needed = format!("it must be at least beta_slow, which is {beta_slow}");
                    return Err(Error::field("rope.scaling.beta_fast", beta_fast, needed));
                }
                if self.theta <= 1.0 {
                    return Err(Error::field("rope.theta", self.theta, "YaRN needs more than 1"));
                }
                // transformers turns its ramp around there: no model can mean that.
                let (low, high) = self.yarn_ramp(original_context, [beta_fast, beta_slow], truncate);
                if low > high {
                    let needed =
                        "some pair must turn more than beta_slow and less than beta_fast times in it";
                    return Err(Error::field("rope.scaling.original_context", original_context, needed));
                }
                attention_factor.map_or(Ok(()), |a| positive("rope.scaling.attention_factor", a))
            }
            &Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                check_factor(factor)?;
                at_least("rope.scaling.original_context", original_context, 1)?;
                positive("rope.scaling.low_freq_factor", low_freq_factor)?;
                positive("rope.scaling.high_freq_factor", high_freq_factor)?;
                if low_freq_factor >= high_freq_factor {
                    let needed = format!("it must be above low_freq_factor, which is {low_freq_factor}");
                    return Err(Error::field("rope.scaling.high_freq_factor", high_freq_factor, needed));
                }
                Ok(())
            }
            Scaling::LongRope { short, long, original_context, context, attention_factor } => {
                for (field, factors) in [("rope.scaling.short", short), ("rope.scaling.long", long)] {
                    if factors.len() != self.dim as usize / 2 {
                        let needed = format!("one for each of the {} pairs is needed", self.dim / 2);
                        return Err(Error::field(field, format!("{} factors", factors.len()), needed));
                    }
                    factors.iter().try_for_each(|&factor| positive(field, factor))?;
                }
                // The attention factor divides by its logarithm.
                at_least("rope.scaling.original_context", *original_context, 2)?;
                at_least("rope.scaling.context", *context, 1)?;
                attention_factor.map_or(Ok(()), |a| positive("rope.scaling.attention_factor", a))
            }
        }
    }
}

/// Shaders compute in f32: what does not fit there is a mistake, too.
fn positive(field: &'static str, value: f64) -> Result<(), Error> {
    if (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&value) {
        Ok(())
    } else {
        Err(Error::field(field, value, "it must be positive and finite, and an f32 must hold it"))
    }
}

fn at_least(field: &'static str, value: u32, least: u32) -> Result<(), Error> {
    if value >= least {
        Ok(())
    } else {
        Err(Error::field(field, value, format!("it must be at least {least}")))
    }
}

fn check_factor(factor: f64) -> Result<(), Error> {
    let field = "rope.scaling.factor";
    positive(field, factor)?;
    if factor >= 1.0 { Ok(()) } else { Err(Error::field(field, factor, "it must be at least 1")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled(scaling: Scaling) -> Rope {
        Rope { scaling, ..Rope::new(8) }
    }

    fn yarn(beta_fast: f64, attention_factor: Option<f64>) -> Scaling {
        Scaling::Yarn {
            factor: 4.0,
            original_context: 4096,
            beta_fast,
            beta_slow: 1.0,
            attention_factor,
            truncate: true,
        }
    }

    fn llama3(factor: f64, low_freq_factor: f64, original_context: u32) -> Scaling {
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor: 4.0, original_context }
    }

    fn longrope(short: Vec<f64>, long: Vec<f64>, original_context: u32) -> Scaling {
        Scaling::LongRope { short, long, original_context, context: 8192, attention_factor: None }
    }

    #[test]
    fn what_can_be_passes() {
        let scalings = [
            Scaling::None,
            Scaling::Linear { factor: 1.0 },
            Scaling::DynamicNtk { factor: 2.0, original_context: 1, context: 1 },
            yarn(32.0, Some(0.5)),
            yarn(1.0, None),
            llama3(8.0, 1.0, 8192),
            longrope(vec![1.0; 4], vec![0.5, 1.0, 2.0, 64.0], 2),
        ];
        for scaling in scalings {
            assert_eq!(scaled(scaling.clone()).check(8), Ok(()), "{scaling:?}");
        }
        assert_eq!(Rope { first: 24, ..Rope::new(40) }.check(64), Ok(()));
        assert_eq!(Rope { theta: 1.0, ..Rope::new(64) }.check(64), Ok(()));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let ones = || vec![1.0; 4];
        let late = Scaling::Yarn {
            factor: 4.0,
            original_context: 1,
            beta_fast: 32.0,
            beta_slow: 32.0,
            attention_factor: None,
            truncate: true,
        };
        let table = [
            ("dim", Rope::new(0)),
            ("dim", Rope::new(1)),
            ("dim", Rope::new(7)),
            ("dim", Rope::new(10)),
            ("first", Rope { first: 2, ..Rope::new(8) }),
            ("first", Rope { first: u32::MAX, ..Rope::new(2) }),
            ("theta", Rope { theta: 0.0, ..Rope::new(8) }),
            ("theta", Rope { theta: -1.0, ..Rope::new(8) }),
            ("theta", Rope { theta: f64::NAN, ..Rope::new(8) }),
            ("theta", Rope { theta: f64::INFINITY, ..Rope::new(8) }),
            ("frequencies", Rope { theta: 0.01, ..Rope::new(8) }),
            ("frequencies", scaled(longrope(vec![1.0; 4], vec![0.1, 1.0, 1.0, 1.0], 4096))),
            ("scaling.factor", scaled(Scaling::Linear { factor: 0.5 })),
            ("scaling.factor", scaled(Scaling::Linear { factor: f64::NAN })),
            ("scaling.factor", scaled(Scaling::DynamicNtk { factor: 0.0, original_context: 1, context: 1 })),
            (
                "scaling.original_context",
                scaled(Scaling::DynamicNtk { factor: 2.0, original_context: 0, context: 1 }),
            ),
            ("scaling.context", scaled(Scaling::DynamicNtk { factor: 2.0, original_context: 1, context: 0 })),
            (
                "dim",
                Rope {
                    dim: 2,
                    ..scaled(Scaling::DynamicNtk { factor: 2.0, original_context: 1, context: 1 })
                },
            ),
            ("scaling.beta_fast", scaled(yarn(0.5, None))),
            ("scaling.beta_fast", scaled(yarn(f64::NAN, None))),
            ("scaling.attention_factor", scaled(yarn(32.0, Some(0.0)))),
            ("scaling.attention_factor", scaled(yarn(32.0, Some(1e39)))),
            ("theta", Rope { theta: 1.0, ..scaled(yarn(32.0, None)) }),
            ("scaling.original_context", scaled(late)),
            ("scaling.factor", scaled(llama3(0.9, 1.0, 8192))),
            ("scaling.low_freq_factor", scaled(llama3(8.0, 0.0, 8192))),
            ("scaling.high_freq_factor", scaled(llama3(8.0, 4.0, 8192))),
            ("scaling.original_context", scaled(llama3(8.0, 1.0, 0))),
            ("scaling.short", scaled(longrope(vec![1.0; 8], ones(), 4096))),
            ("scaling.long", scaled(longrope(ones(), vec![], 4096))),
            ("scaling.long", scaled(longrope(ones(), vec![1.0, -1.0, 1.0, 1.0], 4096))),
            ("scaling.original_context", scaled(longrope(ones(), ones(), 1))),
        ];
        for (name, rope) in table {
            match rope.check(8) {
                Err(Error::Field { field, .. }) => assert_eq!(field, format!("rope.{name}"), "{rope:?}"),
                other => panic!("{rope:?} should be refused for {name}: {other:?}"),
            }
        }
    }
}
