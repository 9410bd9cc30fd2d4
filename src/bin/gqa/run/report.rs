//! What is said of a case: a line of a table, or an object of JSON.

use gqa::verify::{Mismatch, Tolerance};
use serde::Serialize;

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    Pass,
    Fail,
    /// A good case of something that the library, or this adapter, cannot do.
    Unsupported,
    /// Not a case.
    Bad,
}

impl Status {
    const ALL: [Self; 4] = [Self::Pass, Self::Fail, Self::Unsupported, Self::Bad];

    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Pass => ("PASS", "passed"),
            Self::Fail => ("FAIL", "failed"),
            Self::Unsupported => ("UNSUPPORTED", "unsupported"),
            Self::Bad => ("BAD", "bad"),
        }
    }
}

/// Where the expected answer is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Source {
    File,
    Reference,
}

/// One case on one adapter.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) file: String,
    pub(super) adapter: Option<String>,
    pub(super) status: Status,
    /// Why there are no figures, or what is wrong beyond them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    #[serde(flatten)]
    pub(super) figures: Option<Figures>,
}

/// What was compared, and how it differs.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    pub(super) dtype: &'static str,
    pub(super) kv_dtype: &'static str,
    pub(super) expected: Source,
    pub(super) out: Option<Check>,
    pub(super) lse: Option<Check>,
}

impl Figures {
    pub(super) fn passes(&self) -> bool {
        [&self.out, &self.lse].into_iter().flatten().all(|check| check.beyond == 0)
    }
}

/// One tensor against its expected values.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    max_abs: f64,
    max_rel: f64,
    /// Frobenius norm of the error over that of what was expected.
    relative: f64,
    beyond: usize,
    atol: f64,
    rtol: f64,
    worst: Worst,
}

/// The element furthest beyond, or nearest to, its tolerance.
#[derive(Debug, Serialize)]
struct Worst {
    /// `[batch, head, token, element]`; an `lse` has no element.
    index: Vec<usize>,
    got: f64,
    expected: f64,
}

impl Check {
    pub(super) fn new(mismatch: &Mismatch, tolerance: Tolerance, relative: f64, index: &[usize]) -> Self {
        let Mismatch { max_abs, max_rel, beyond, got, expected, .. } = *mismatch;
        let worst = Worst { index: index.to_vec(), got, expected };
        Self { max_abs, max_rel, relative, beyond, atol: tolerance.atol, rtol: tolerance.rtol, worst }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { max_abs, max_rel, relative, beyond, atol, rtol, worst } = self;
        write!(f, "max abs {max_abs:.1e} rel {max_rel:.1e} norm {relative:.1e}")?;
        if *beyond > 0 {
            let Worst { index, got, expected } = worst;
            write!(
                f,
                " ({beyond} beyond {atol:.1e} + {rtol:.1e} |x|, worst at {index:?}: got {got:e}, expected {expected:e})"
            )?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.status.words().0, self.file)?;
        if let Some(adapter) = &self.adapter {
            write!(f, " on {adapter}")?;
        }
        write!(f, ": {}", self.reason.as_deref().unwrap_or_default())?;
        let Some(Figures { dtype, kv_dtype, expected, out, lse }) = &self.figures else { return Ok(()) };
        f.write_str(if self.reason.is_some() { "; " } else { "" })?;
        let checks = [("out", out), ("lse", lse)];
        for (name, check) in checks.iter().filter_map(|(name, check)| Some((name, check.as_ref()?))) {
            write!(f, "{name} {check}, ")?;
        }
        write!(f, "{dtype} with {kv_dtype} cache")?;
        match expected {
            Source::File => Ok(()),
            Source::Reference => f.write_str(", expected values from the f64 reference (the file has none)"),
        }
    }
}

/// How many ended how.
#[derive(Debug, Default)]
pub(super) struct Counts([usize; 4]);

impl Counts {
    pub(super) fn add(&mut self, status: Status) {
        for (count, _) in self.0.iter_mut().zip(Status::ALL).filter(|(_, s)| *s == status) {
            *count += 1;
        }
    }

    pub(super) fn of(&self, status: Status) -> usize {
        self.0.iter().zip(Status::ALL).filter(|(_, s)| *s == status).map(|(count, _)| count).sum()
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let words = self.0.iter().zip(Status::ALL).map(|(count, s)| format!("{count} {}", s.words().1));
        f.write_str(&words.collect::<Vec<_>>().join(", "))
    }
}
