//! What a report says in few lines.

use std::collections::BTreeMap;

use gqa::profile::{Ceilings, Row};

use super::sets::Section;
use super::table::{is_backward, shape, storage, thousands};

/// A line of the summary, and the numbers in it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub(super) struct Finding {
    /// What it is about.
    pub(super) name: &'static str,
    pub(super) text: String,
    /// Numbers by what they belong to: heads, query tokens, storage.
    pub(super) values: BTreeMap<String, f64>,
}

impl Finding {
    fn new(name: &'static str, text: String, values: impl IntoIterator<Item = (String, f64)>) -> Self {
        Self { name, text, values: values.into_iter().collect() }
    }
}

/// Contexts from which time should be a straight line: below, what a call costs counts.
const LINEAR_FROM: u32 = 4096;
/// The context that heads are compared at, if it was measured.
const AT: u32 = 16_384;

/// All that can be said of `rows`.
pub(super) fn findings(rows: &[Row], ceilings: &Ceilings) -> Vec<Finding> {
    let mut found = vec![Finding::new(
        "ceilings",
        format!(
            "ceilings: read {:.1} GB/s ({}), multiply-add {:.0} GFLOP/s ({})",
            ceilings.read_bytes_per_s * 1e-9,
            ceilings.read_kernel,
            ceilings.fma_flops_per_s * 1e-9,
            ceilings.fma_kernel
        ),
        [("read".to_owned(), ceilings.read_bytes_per_s), ("fma".to_owned(), ceilings.fma_flops_per_s)],
    )];
    let section = |section: Section| rows.iter().filter(move |r| r.section == section.name());
    let contexts: Vec<_> = section(Section::Context).collect();
    found.extend(linear(&contexts));
    found.extend(heads(&contexts, ceilings));
    let storages: Vec<_> = section(Section::Storage).map(|r| (storage(r), r)).collect();
    found.extend(against("storage", "time of storages over that of {}; ", "f16", &storages));
    let batches: Vec<_> = section(Section::Batch).map(|r| (r.batch.to_string(), r)).collect();
    found.extend(against("batch", "time of a batch over that of {} sequence; ", "1", &batches));
    let queries: Vec<_> = section(Section::Queries).map(|r| (r.q_len.to_string(), r)).collect();
    found.extend(against("queries", "time of several query tokens over that of {}; ", "1", &queries));
    found.extend(backward(&section(Section::Backward).collect::<Vec<_>>()));
    if rows.iter().any(|r| r.page.is_some()) {
        let text =
            "keys marked p lie in pages of 16, since the sequence exceeds one storage binding".to_owned();
        found.push(Finding::new("pages", text, []));
    }
    found.extend(above(rows));
    found
}

/// How far times lie from the straight line through the shortest and the longest context, for each pair of heads.
fn linear(rows: &[&Row]) -> Option<Finding> {
    // Most KV heads first.
    let mut of_heads = BTreeMap::<_, Vec<(f64, f64)>>::new();
    for row in rows.iter().filter(|r| r.kv_len >= LINEAR_FROM) {
        let key = (std::cmp::Reverse(row.kv_heads), row.q_heads);
        of_heads.entry(key).or_default().push((f64::from(row.kv_len), row.timing.median_s));
    }
    let lengths = || rows.iter().map(|r| r.kv_len).filter(|len| *len >= LINEAR_FROM);
    let (from, to) = lengths().min().zip(lengths().max())?;
    let mut values = Vec::new();
    for ((kv_heads, q_heads), mut points) in of_heads {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Where a context was left out, the line would be another.
        let is_whole = points.first().zip(points.last()).map(|(a, b)| (a.0, b.0))
            == Some((f64::from(from), f64::from(to)));
        if let Some(deviation) = off_line(&points).filter(|_| is_whole) {
            values.push((format!("{q_heads}/{}", kv_heads.0), deviation));
        }
    }
    if values.is_empty() {
        return None;
    }
    let each: Vec<_> =
        values.iter().map(|(heads, value)| format!("{heads} within {:.1} %", value * 100.0)).collect();
    let text = format!(
        "linear in context, {} to {} keys, off the line through both ends: {}",
        thousands(u64::from(from)),
        thousands(u64::from(to)),
        each.join(", ")
    );
    Some(Finding::new("linear", text, values))
}

/// The largest relative distance from the line through the first and the last of at least three points.
fn off_line(points: &[(f64, f64)]) -> Option<f64> {
    let [(x0, y0), between @ .., (x1, y1)] = points else { return None };
    let off = |(x, y): &(f64, f64)| {
        let line = y0 + (y1 - y0) * (x - x0) / (x1 - x0);
        (y / line - 1.0).abs()
    };
    between.iter().map(off).max_by(f64::total_cmp)
}

/// GQA and MQA against MHA, and against what the ceilings predict, where they are compared.
fn heads(rows: &[&Row], ceilings: &Ceilings) -> Vec<Finding> {
    let at = match rows.iter().any(|r| r.kv_len == AT) {
        true => Some(AT),
        false => rows.iter().map(|r| r.kv_len).max(),
    };
    let here: Vec<_> = rows.iter().filter(|r| Some(r.kv_len) == at).collect();
    let Some(mha) = here.iter().find(|r| r.kv_heads == r.q_heads) else { return Vec::new() };
    let keys = thousands(u64::from(mha.kv_len));
    let mut found = Vec::new();
    for row in here.iter().filter(|r| r.kv_heads < r.q_heads && r.q_heads == mha.q_heads) {
        let (what, name) =
            if row.kv_heads == 1 { ("MQA", "mqa_against_mha") } else { ("GQA", "gqa_against_mha") };
        let times = mha.timing.median_s / row.timing.median_s;
        let allowed = mha.least_s(ceilings) / row.least_s(ceilings);
        let text = format!(
            "{what} {}/{} is {times:.2} x as fast as MHA {}/{} at {keys} keys (ideal: {allowed:.2} x), {:.0} % of its ceiling",
            row.q_heads,
            row.kv_heads,
            mha.q_heads,
            mha.kv_heads,
            row.fraction * 100.0
        );
        let values = [("times", times), ("ideal", allowed), ("fraction", row.fraction)];
        found.push(Finding::new(name, text, values.map(|(name, value)| (name.to_owned(), value))));
    }
    found
}

/// What the way back takes, in times of the way there beside it.
fn backward(rows: &[&Row]) -> Option<Finding> {
    let there = |back: &Row| rows.iter().find(|r| !is_backward(r.kernel) && shape(r) == shape(back));
    let values: Vec<_> = rows
        .iter()
        .filter(|r| is_backward(r.kernel))
        .filter_map(|back| Some((shape(back), back.timing.median_s / there(back)?.timing.median_s)))
        .collect();
    if values.is_empty() {
        return None;
    }
    let each: Vec<_> = values.iter().map(|(shape, times)| format!("{shape} {times:.2} x")).collect();
    let text = format!(
        "backward over forward (2.5 x the operations, where keys and values are of one length): {}",
        each.join(", ")
    );
    Some(Finding::new("backward", text, values))
}

/// Times of rows against the one that is called `base`; `{}` in the text stands for it.
fn against(name: &'static str, text: &str, base: &str, rows: &[(String, &Row)]) -> Option<Finding> {
    let base_s = rows.iter().find(|(key, _)| key == base)?.1.timing.median_s;
    let others = rows.iter().filter(|(key, _)| key != base);
    let values: Vec<_> = others.map(|(key, row)| (key.clone(), row.timing.median_s / base_s)).collect();
    let each: Vec<_> = values.iter().map(|(key, value)| format!("{key}: {value:.2}")).collect();
    let text = text.replace("{}", base) + &each.join(", ");
    (!values.is_empty()).then(|| Finding::new(name, text, values))
}

/// A row above a ceiling shows that the ceiling is none.
fn above(rows: &[Row]) -> Option<Finding> {
    let rows: Vec<_> = rows.iter().filter(|r| r.fraction > 1.0).map(|r| (shape(r), r.fraction)).collect();
    let (worst, fraction) = rows.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let text = format!(
        "WARNING: {} rows exceed their ceiling, most of all {worst}: {:.1} %. The ceilings are too low, or the machine was \
         disturbed while they were measured",
        rows.len(),
        fraction * 100.0
    );
    Some(Finding::new("above_ceilings", text, rows))
}

#[cfg(test)]
pub(super) mod tests {
    use gqa::profile::Timing;

    use super::*;

    /// A row of f16, 128 elements a head, one sequence, that took `seconds`.
    pub(in super::super) fn row(
        section: &'static str,
        (q_heads, kv_heads): (u32, u32),
        (q_len, kv_len): (u32, u32),
        seconds: f64,
    ) -> Row {
        let timing = Timing::of(vec![seconds * 0.99, seconds, seconds * 1.01]);
        Row {
            section,
            spec: format!("{q_heads}/{kv_heads}"),
            kernel: if q_len == 1 { "decode" } else { "prefill" },
            q_heads,
            kv_heads,
            head_dim: 128,
            q_len,
            kv_len,
            batch: 1,
            kv_dtype: "f16",
            v_dtype: "f16",
            rotated: false,
            page: None,
            timing,
            bytes: u64::from(kv_heads) * 512 * u64::from(kv_len),
            flops: u64::from(q_heads) * 512 * u64::from(kv_len),
            ceiling: "read",
            fraction: 0.5,
            kv_bytes_per_token: u64::from(kv_heads) * 512,
        }
    }

    pub(in super::super) fn ceilings() -> Ceilings {
        Ceilings {
            read_bytes_per_s: 1e10,
            fma_flops_per_s: 1e11,
            read_kernel: "vec4<f32>, 64 threads, 16 each side by side, 32 MiB".to_owned(),
            fma_kernel: "vec4<f32>, fma(x, y, z), 64 threads".to_owned(),
        }
    }

    #[test]
    fn distance_from_the_line_through_both_ends() {
        let off = |middle| off_line(&[(1.0, 1.0), (2.0, middle), (3.0, 3.0)]);
        assert_eq!(off(2.0), Some(0.0));
        assert!(off(2.2).is_some_and(|d| (d - 0.1).abs() < 1e-12));
        assert_eq!(off_line(&[(1.0, 1.0), (2.0, 2.0)]), None);
    }

    #[test]
    fn the_headline() {
        let contexts = [4096, 16_384, 131_072];
        let of = |kv_heads: u32, unit: f64| {
            contexts.map(|len| row("context", (32, kv_heads), (1, len), f64::from(len) * unit))
        };
        let rows: Vec<_> = [of(32, 4e-6), of(8, 1.25e-6), of(1, 1e-6)].concat();
        let found = findings(&rows, &ceilings());
        let texts: Vec<_> = found.iter().map(|f| f.text.as_str()).collect();
        assert!(texts[1].ends_with("32/32 within 0.0 %, 32/8 within 0.0 %, 32/1 within 0.0 %"), "{texts:?}");
        assert!(
            texts[2].starts_with("GQA 32/8 is 3.20 x as fast as MHA 32/32 at 16,384 keys (ideal: 4.00 x)"),
            "{texts:?}"
        );
        assert!(texts[3].starts_with("MQA 32/1 is 4.00 x"), "{texts:?}");
        assert!((found[2].values["times"] - 3.2).abs() < 1e-9);
    }

    #[test]
    fn rows_against_their_base() {
        let rows: Vec<_> = [(1, 0.1), (4, 0.15), (64, 0.8)]
            .map(|(q_len, seconds)| row("queries", (32, 8), (q_len, 8192), seconds))
            .into();
        let found = findings(&rows, &ceilings());
        assert_eq!(found[1].text, "time of several query tokens over that of 1; 4: 1.50, 64: 8.00");
    }

    #[test]
    fn what_exceeds_a_ceiling_is_told() {
        let mut rows = vec![row("batch", (32, 8), (1, 1024), 0.1)];
        assert_eq!(above(&rows), None);
        rows[0].fraction = 1.03;
        assert!(above(&rows).is_some_and(|f| f.text.contains("32/8 of 128, f16, 1 on 1,024: 103.0 %")));
    }
}
