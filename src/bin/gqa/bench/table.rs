//! A report as text.

use std::fmt::Write as _;

use gqa::profile::Row;

use super::Report;

/// For people, 100 columns wide.
pub(super) fn table(report: &Report) -> String {
    let mut out = String::new();
    let ceilings = &report.ceilings;
    let _ = writeln!(out, "{}, driver {}, gqa {}", report.adapter, report.driver, report.version);
    let _ = writeln!(
        out,
        "ceilings: read {:.1} GB/s, multiply-add {:.0} GFLOP/s\n",
        ceilings.read_bytes_per_s * 1e-9,
        ceilings.fma_flops_per_s * 1e-9
    );
    let _ = writeln!(
        out,
        "{:16} {:>6} {:>5} {:>7} {:>7} {:>10} {:>8} {:>9} {:>10} {:>8} {:>7}",
        "kernel",
        "heads",
        "batch",
        "q_len",
        "kv_len",
        "median",
        "GB/s",
        "GFLOP/s",
        "ceiling",
        "KV B/tok",
        "vs MHA"
    );
    for row in &report.rows {
        let vs_mha = speedup(row, &report.rows).map_or_else(|| "-".to_owned(), |s| format!("{s:.2} x"));
        let _ = writeln!(
            out,
            "{:16} {:>6} {:>5} {:>7} {:>7} {:>10} {:>8.2} {:>9.1} {:>5} {:>3.0}% {:>8} {:>7}",
            row.kernel,
            format!("{}/{}", row.q_heads, row.kv_heads),
            row.batch,
            row.q_len,
            row.kv_len,
            time(row.median_s),
            row.bytes as f64 / row.median_s * 1e-9,
            row.flops as f64 / row.median_s * 1e-9,
            row.ceiling,
            row.fraction * 100.0,
            row.kv_bytes_per_token,
            vs_mha,
        );
    }
    out
}

/// The rows alone, under the names of the JSON.
pub(super) fn csv(report: &Report) -> String {
    let mut out =
        "kernel,q_heads,kv_heads,head_dim,q_len,kv_len,batch,kv_dtype,median_s,min_s,bytes,flops,ceiling,\
                   fraction,kv_bytes_per_token\n"
            .to_owned();
    for r in &report.rows {
        let _ = writeln!(
            out,
            "{},{},{},{},{},{},{},{},{:e},{:e},{},{},{},{:.4},{}",
            r.kernel,
            r.q_heads,
            r.kv_heads,
            r.head_dim,
            r.q_len,
            r.kv_len,
            r.batch,
            r.kv_dtype,
            r.median_s,
            r.min_s,
            r.bytes,
            r.flops,
            r.ceiling,
            r.fraction,
            r.kv_bytes_per_token,
        );
    }
    out
}

/// How many times faster than MHA with as many query heads, where that was measured too.
fn speedup(row: &Row, rows: &[Row]) -> Option<f64> {
    let key = |r: &Row| (r.q_heads, r.q_len, r.kv_len, r.batch);
    let mha = rows.iter().find(|r| r.kv_heads == r.q_heads && key(r) == key(row))?;
    Some(mha.median_s / row.median_s)
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}
