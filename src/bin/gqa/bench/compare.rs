//! This run against an earlier one.

use std::path::Path;

use gqa::profile::Row;

use super::Report;
use super::table::{is_backward, shape, time};
use crate::Failure;

/// An earlier run, as far as its file tells: older versions wrote fewer fields.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Old {
    adapter: String,
    driver: String,
    ceilings: OldCeilings,
    rows: Vec<OldRow>,
}

#[derive(Debug, serde::Deserialize)]
struct OldCeilings {
    read_bytes_per_s: f64,
    fma_flops_per_s: f64,
}

#[derive(Debug, serde::Deserialize)]
struct OldRow {
    section: Option<String>,
    kernel: Option<String>,
    spec: Option<String>,
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    q_len: u32,
    kv_len: u32,
    batch: u32,
    kv_dtype: String,
    v_dtype: Option<String>,
    #[serde(default)]
    rotated: bool,
    median_s: f64,
    q1_s: Option<f64>,
    q3_s: Option<f64>,
}

impl Old {
    /// What `--format json` wrote.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |e: String| Failure::Usage(format!("{}: {e}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        serde_json::from_str(&text)
            .map_err(|e| failed(format!("not what `gqa bench --format json` writes: {e}")))
    }
}

impl OldRow {
    /// Whether it measured the same. What an old file does not say is taken for granted.
    fn is_of(&self, row: &Row) -> bool {
        let sizes = (self.q_heads, self.kv_heads, self.head_dim, self.q_len, self.kv_len, self.batch);
        sizes == (row.q_heads, row.kv_heads, row.head_dim, row.q_len, row.kv_len, row.batch)
            && self.kv_dtype == row.kv_dtype
            && self.v_dtype.as_ref().unwrap_or(&self.kv_dtype) == row.v_dtype
            && self.rotated == row.rotated
            && self.kernel.as_ref().is_none_or(|kernel| is_backward(kernel) == is_backward(row.kernel))
            && self.spec.as_ref().is_none_or(|spec| *spec == row.spec)
    }
}

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Same,
    Faster,
    Slower,
}

impl Verdict {
    /// Of quartiles and median, old and new: a difference of more than `CHANGE` counts where the quartiles lie apart, too.
    fn of(old: [f64; 3], new: [f64; 3]) -> Self {
        let ratio = new[1] / old[1];
        if ratio > CHANGE && new[0] > old[2] {
            Self::Slower
        } else if ratio < 1.0 / CHANGE && new[2] < old[0] {
            Self::Faster
        } else {
            Self::Same
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Same => "",
            Self::Faster => "FASTER",
            Self::Slower => "SLOWER",
        }
    }
}

/// Ratios of medians up to this are noise.
const CHANGE: f64 = 1.05;
/// Ceilings further apart than this are of another machine, or of a busy one.
const OTHER_MACHINE: f64 = 1.1;

/// A row that both runs have.
#[derive(Debug, serde::Serialize)]
struct Pair {
    section: &'static str,
    shape: String,
    old_s: f64,
    new_s: f64,
    /// New over old: below 1 is faster.
    ratio: f64,
    verdict: Verdict,
}

/// This run against an earlier one.
#[derive(Debug, serde::Serialize)]
pub(super) struct Comparison {
    /// What makes times hard to compare.
    warnings: Vec<String>,
    /// New over old: above 1 is faster.
    read_ceiling_ratio: f64,
    fma_ceiling_ratio: f64,
    rows: Vec<Pair>,
    /// Rows of this run that the earlier one lacks.
    unmatched: usize,
    /// Rows of the earlier run that this one lacks.
    missing: usize,
}

impl Comparison {
    /// Whether a row is slower.
    pub(super) fn has_regressions(&self) -> bool {
        self.count(Verdict::Slower) > 0
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.rows.iter().filter(|pair| pair.verdict == verdict).count()
    }
}

/// Compares what both runs have measured.
pub(super) fn compare(old: &Old, new: &Report) -> Comparison {
    let mut warnings = Vec::new();
    for (what, was, is) in [("adapter", &old.adapter, &new.adapter), ("driver", &old.driver, &new.driver)] {
        if was != is {
            warnings.push(format!("another {what}: it was {was}, it is {is}"));
        }
    }
    let read_ceiling_ratio = new.ceilings.read_bytes_per_s / old.ceilings.read_bytes_per_s;
    let fma_ceiling_ratio = new.ceilings.fma_flops_per_s / old.ceilings.fma_flops_per_s;
    for (what, ratio) in [("reads", read_ceiling_ratio), ("computes", fma_ceiling_ratio)] {
        if !(1.0 / OTHER_MACHINE..=OTHER_MACHINE).contains(&ratio) {
            warnings.push(format!("the machine itself {what} at {ratio:.2} x its former speed"));
        }
    }
    let pairs = || new.rows.iter().filter_map(|row| pair(&old.rows, row));
    let (rows, unmatched) = (pairs().collect::<Vec<_>>(), new.rows.len() - pairs().count());
    let missing = old.rows.iter().filter(|old| !new.rows.iter().any(|row| old.is_of(row))).count();
    if rows.is_empty() {
        warnings.push("nothing was measured in both runs".to_owned());
    }
    Comparison { warnings, read_ceiling_ratio, fma_ceiling_ratio, rows, unmatched, missing }
}

/// The row and its former self: that of the same section, else of any, since rows are compared within a section first.
fn pair(old: &[OldRow], row: &Row) -> Option<Pair> {
    let same = || old.iter().filter(|old| old.is_of(row));
    let old = same().find(|old| old.section.as_deref() == Some(row.section)).or_else(|| same().next())?;
    let timing = &row.timing;
    let quartiles = [old.q1_s.unwrap_or(old.median_s), old.median_s, old.q3_s.unwrap_or(old.median_s)];
    Some(Pair {
        section: row.section,
        shape: shape(row),
        old_s: old.median_s,
        new_s: timing.median_s,
        ratio: timing.median_s / old.median_s,
        verdict: Verdict::of(quartiles, [timing.q1_s, timing.median_s, timing.q3_s]),
    })
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "Against the earlier run (time new / old)")?;
        for warning in &self.warnings {
            writeln!(f, "  WARNING: {warning}")?;
        }
        writeln!(
            f,
            "  ceilings, new / old: read {:.2} x, multiply-add {:.2} x",
            self.read_ceiling_ratio, self.fma_ceiling_ratio
        )?;
        for Pair { section, shape, old_s, new_s, ratio, verdict } in &self.rows {
            let line = format!(
                "  {section:<8} {shape:<42} {:>10} {:>10} {ratio:>7.3}  {}",
                time(*old_s),
                time(*new_s),
                verdict.word()
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        let [slower, faster] = [Verdict::Slower, Verdict::Faster].map(|verdict| self.count(verdict));
        writeln!(
            f,
            "  {} rows: {slower} slower, {faster} faster; {} rows are new, {} of the earlier run are missing",
            self.rows.len(),
            self.unmatched,
            self.missing
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::tests::{ceilings, row};
    use super::*;

    fn report(seconds: f64) -> Report {
        Report {
            adapter: "a".to_owned(),
            driver: "d".to_owned(),
            version: "1",
            ceilings: ceilings(),
            groups: Vec::new(),
            rows: vec![
                row("context", (32, 8), (1, 16_384), seconds),
                row("storage", (32, 8), (1, 16_384), 0.02),
                row("prefill", (32, 8), (512, 512), 0.03),
            ],
            tuned: Vec::new(),
            left_out: Vec::new(),
            summary: Vec::new(),
            comparison: None,
        }
    }

    fn old(report: &Report) -> Old {
        serde_json::from_value(serde_json::to_value(report).unwrap()).unwrap()
    }

    #[test]
    fn a_change_counts_beyond_five_percent_and_both_spreads() {
        let verdict = |old, new| Verdict::of(old, new);
        assert_eq!(verdict([0.99, 1.0, 1.01], [1.03, 1.04, 1.05]), Verdict::Same);
        assert_eq!(verdict([0.99, 1.0, 1.01], [1.05, 1.06, 1.07]), Verdict::Slower);
        assert_eq!(verdict([0.9, 1.0, 1.2], [1.1, 1.3, 1.4]), Verdict::Same);
        assert_eq!(verdict([0.99, 1.0, 1.01], [0.89, 0.9, 0.91]), Verdict::Faster);
        assert_eq!(verdict([0.8, 1.0, 1.01], [0.85, 0.9, 0.91]), Verdict::Same);
    }

    #[test]
    fn a_run_against_itself_is_the_same() {
        let report = report(0.01);
        let comparison = compare(&old(&report), &report);
        assert!(comparison.warnings.is_empty() && !comparison.has_regressions());
        assert!(comparison.rows.iter().all(|pair| (pair.ratio - 1.0).abs() < 1e-12));
        assert_eq!((comparison.rows.len(), comparison.unmatched), (3, 0));
    }

    #[test]
    fn a_slower_row_is_a_regression_and_sections_are_kept_apart() {
        let comparison = compare(&old(&report(0.01)), &report(0.012));
        let verdicts: Vec<_> = comparison.rows.iter().map(|pair| pair.verdict).collect();
        assert_eq!(verdicts, [Verdict::Slower, Verdict::Same, Verdict::Same]);
        assert!(comparison.has_regressions());
        assert!(comparison.to_string().contains("1.200  SLOWER"), "{comparison}");
        assert!(comparison.to_string().lines().all(|line| line.len() <= 100), "{comparison}");
    }

    #[test]
    fn gradients_are_held_against_gradients() {
        let mut report = report(0.01);
        report.rows = [("forward", 0.01), ("backward", 0.03)]
            .map(|(kernel, seconds)| Row { kernel, ..row("backward", (9, 3), (1024, 1024), seconds) })
            .into();
        let comparison = compare(&old(&report), &report);
        assert!(comparison.rows.iter().all(|pair| pair.verdict == Verdict::Same), "{comparison}");
    }

    #[test]
    fn another_machine_is_told() {
        let mut before = old(&report(0.01));
        before.adapter = "b".to_owned();
        before.ceilings.fma_flops_per_s *= 1.5;
        let comparison = compare(&before, &report(0.01));
        assert_eq!(comparison.warnings.len(), 2);
        assert!(comparison.warnings[1].contains("computes at 0.67 x"), "{:?}", comparison.warnings);
    }

    #[test]
    fn files_of_the_first_version_are_understood() {
        let text = r#"{"adapter": "a", "driver": "d", "version": "0.1.0",
            "ceilings": {"read_bytes_per_s": 1e10, "fma_flops_per_s": 1e11},
            "rows": [{"kernel": "decode", "q_heads": 32, "kv_heads": 8, "head_dim": 128, "q_len": 1, "kv_len": 16384, "batch": 1,
                "kv_dtype": "f16", "median_s": 0.01, "min_s": 0.009, "bytes": 1, "flops": 1, "ceiling": "read", "fraction": 0.7,
                "kv_bytes_per_token": 4096}]}"#;
        let comparison = compare(&serde_json::from_str(text).unwrap(), &report(0.01));
        assert_eq!((comparison.rows.len(), comparison.unmatched, comparison.missing), (2, 1, 0));
    }

    #[test]
    fn what_was_not_measured_again_is_told() {
        let mut new = report(0.01);
        new.rows.retain(|row| row.section == "prefill");
        let comparison = compare(&old(&report(0.01)), &new);
        assert_eq!((comparison.rows.len(), comparison.missing), (1, 2));
        assert!(
            comparison.to_string().contains("0 rows are new, 2 of the earlier run are missing"),
            "{comparison}"
        );
        new.rows.iter_mut().for_each(|row| row.head_dim += 1);
        let comparison = compare(&old(&report(0.01)), &new);
        assert!(comparison.warnings.iter().any(|w| w == "nothing was measured in both runs"), "{comparison}");
    }
}
