//! A report as text.

use std::fmt::Write as _;

use gqa::profile::Row;

use super::Report;
use super::sets::Section;

/// For people, 100 columns wide.
pub(super) fn table(report: &Report) -> String {
    let mut out = format!("{}\ndriver {}, gqa {}\n", report.adapter, report.driver, report.version);
    for section in Section::ALL {
        let rows: Vec<_> = report.rows.iter().filter(|row| row.section == section.name()).collect();
        if !rows.is_empty() {
            out.push('\n');
            out += &part(section.title(), &rows);
        }
    }
    if !report.left_out.is_empty() {
        out += "\nLeft out\n";
    }
    report.left_out.iter().for_each(|reason| out += &wrapped(reason));
    out += "\nSummary\n";
    report.summary.iter().for_each(|finding| out += &wrapped(&finding.text));
    out
}

/// Columns of the page.
const WIDTH: usize = 100;

/// A text in lines of the page, indented.
fn wrapped(text: &str) -> String {
    let mut lines = vec![" ".to_owned()];
    for word in text.split_whitespace() {
        let full = lines.last().is_some_and(|line| line.len() + 1 + word.len() > WIDTH);
        if full {
            lines.push("   ".to_owned());
        }
        if let Some(line) = lines.last_mut() {
            *line += " ";
            *line += word;
        }
    }
    lines.join("\n") + "\n"
}

/// A column: what it is called, whether it may go to the title, and a cell for each row.
struct Column {
    name: &'static str,
    /// Where all cells are the same, the title says it once.
    foldable: bool,
    cells: Vec<String>,
}

/// A section: its title with what all rows have in common, then columns of what differs.
fn part(title: &str, rows: &[&Row]) -> String {
    let column = |name, foldable, cell: &dyn Fn(&Row) -> String| Column {
        name,
        foldable,
        cells: rows.iter().map(|row| cell(row)).collect(),
    };
    let mha = |row: &Row| speedup(row, rows).map_or_else(|| "-".to_owned(), |s| format!("{s:.2} x"));
    let columns = [
        column("kernel", true, &|r| r.kernel.to_owned()),
        column("heads", false, &|r| format!("{}/{}", r.q_heads, r.kv_heads)),
        column("dim", true, &|r| r.head_dim.to_string()),
        column("K/V", true, &storage),
        column("batch", true, &|r| r.batch.to_string()),
        column("q_len", true, &|r| thousands(u64::from(r.q_len))),
        column("keys", false, &|r| thousands(u64::from(r.kv_len)) + if r.page.is_some() { "p" } else { "" }),
        column("B/token", true, &|r| r.kv_bytes_per_token.to_string()),
        column("median", false, &|r| time(r.timing.median_s)),
        column("+-", false, &|r| format!("{:.1}%", r.timing.spread() * 100.0)),
        column("n", false, &|r| r.timing.samples.to_string()),
        column("GB/s", false, &|r| format!("{:.2}", r.bytes as f64 / r.timing.median_s * 1e-9)),
        column("GFLOP/s", false, &|r| format!("{:.1}", r.flops as f64 / r.timing.median_s * 1e-9)),
        column("ceiling", false, &|r| format!("{:<4} {:>3.0}%", r.ceiling, r.fraction * 100.0)),
        column("vs MHA", false, &mha),
    ];
    let same = |c: &Column| c.foldable && c.cells.iter().all(|cell| *cell == c.cells[0]);
    let common: Vec<_> =
        columns.iter().filter(|c| same(c)).map(|c| format!("{} {}", c.name, c.cells[0])).collect();
    // Nothing is said of MHA where nothing was compared.
    let is_empty =
        |c: &Column| c.name == "vs MHA" && c.cells.iter().all(|cell| cell == "-" || cell == "1.00 x");
    let shown: Vec<_> = columns.iter().filter(|c| !same(c) && !is_empty(c)).collect();

    let width = |c: &Column| c.cells.iter().map(String::len).max().unwrap_or(0).max(c.name.len());
    let total: usize = shown.iter().map(|c| width(c) + 2).sum();
    // What is too wide moves together.
    let gap = if total <= WIDTH { "  " } else { " " };
    let mut lines = vec![String::new(); rows.len() + 1];
    for column in shown {
        let (name, width) = (column.name, width(column));
        let cells = std::iter::once(name).chain(column.cells.iter().map(String::as_str));
        for (line, cell) in lines.iter_mut().zip(cells) {
            let _ = match name {
                "kernel" => write!(line, "{gap}{cell:<width$}"),
                _ => write!(line, "{gap}{cell:>width$}"),
            };
        }
    }
    let common = if common.is_empty() { String::new() } else { format!(": {}", common.join(", ")) };
    format!("{title}{common}\n{}\n", lines.join("\n"))
}

/// The rows alone, under the names of the JSON.
pub(super) fn csv(report: &Report) -> String {
    let mut out =
        "kernel,q_heads,kv_heads,head_dim,q_len,kv_len,batch,kv_dtype,median_s,min_s,bytes,flops,ceiling,\
                   fraction,kv_bytes_per_token,v_dtype,rotated,q1_s,q3_s,samples,section\n"
            .to_owned();
    for r in &report.rows {
        let t = &r.timing;
        let _ = writeln!(
            out,
            "{},{},{},{},{},{},{},{},{:e},{:e},{},{},{},{:.4},{},{},{},{:e},{:e},{},{}",
            r.kernel,
            r.q_heads,
            r.kv_heads,
            r.head_dim,
            r.q_len,
            r.kv_len,
            r.batch,
            r.kv_dtype,
            t.median_s,
            t.min_s,
            r.bytes,
            r.flops,
            r.ceiling,
            r.fraction,
            r.kv_bytes_per_token,
            r.v_dtype,
            r.rotated,
            t.q1_s,
            t.q3_s,
            t.samples,
            r.section,
        );
    }
    out
}

/// How many times faster than MHA with as many query heads, where that was measured too.
fn speedup(row: &Row, rows: &[&Row]) -> Option<f64> {
    let key =
        |r: &Row| (r.q_heads, r.head_dim, r.q_len, r.kv_len, r.batch, storage(r), is_backward(r.kernel));
    let mha = rows.iter().find(|r| r.kv_heads == r.q_heads && key(r) == key(row))?;
    Some(mha.timing.median_s / row.timing.median_s)
}

/// Whether a row of this kernel is of gradients: its shape is that of the forward row beside it.
pub(super) fn is_backward(kernel: &str) -> bool {
    kernel == "backward"
}

/// How K and V are stored.
pub(super) fn storage(row: &Row) -> String {
    let value = if row.v_dtype == row.kv_dtype { String::new() } else { format!("/{}", row.v_dtype) };
    format!("{}{value}{}", row.kv_dtype, if row.rotated { " rot" } else { "" })
}

/// A row's shape in few words.
pub(super) fn shape(row: &Row) -> String {
    let Row { q_heads, kv_heads, head_dim, q_len, kv_len, batch, .. } = row;
    let batch = if *batch == 1 { String::new() } else { format!("{batch} x ") };
    format!(
        "{q_heads}/{kv_heads} of {head_dim}, {}, {batch}{} on {}",
        storage(row),
        thousands(u64::from(*q_len)),
        thousands(u64::from(*kv_len))
    )
}

pub(super) fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

/// 131,072.
pub(super) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::summary::tests::row;
    use super::*;

    #[test]
    fn digits_in_threes() {
        assert_eq!([0, 64, 512, 8192, 131_072].map(thousands), ["0", "64", "512", "8,192", "131,072"]);
    }

    #[test]
    fn what_all_rows_share_is_said_once() {
        let (mha, gqa) =
            (row("context", (32, 32), (1, 131_072), 0.2), row("context", (32, 8), (1, 131_072), 0.05));
        let text = part("Decode", &[&mha, &gqa]);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("Decode: kernel decode, dim 128, K/V f16, batch 1, q_len 1"), "{text}");
        assert!(lines[3].contains("32/8") && lines[3].ends_with("4.00 x"), "{text}");
        assert!(lines.iter().all(|line| line.len() <= 100), "{text}");
    }

    #[test]
    fn long_lines_are_wrapped() {
        let text = wrapped(&"eight888 ".repeat(24));
        assert_eq!(text.lines().count(), 3);
        assert!(text.lines().all(|line| line.len() <= WIDTH && line.starts_with("  ")), "{text}");
    }

    #[test]
    fn rows_that_differ_in_everything_still_fit() {
        let mut other = row("prefill", (128, 8), (8192, 131_072), 0.000_2);
        (other.head_dim, other.batch, other.kv_dtype, other.kernel) = (64, 64, "q4", "decode_lanes");
        let text = part("All", &[&row("prefill", (32, 32), (1, 128), 0.2), &other]);
        assert!(text.lines().all(|line| line.len() <= 110), "{text}");
    }

    #[test]
    fn mha_is_of_the_same_kind() {
        let mha = row("heads", (9, 9), (1, 8192), 0.3);
        let mut gqa = row("heads", (9, 3), (1, 8192), 0.1);
        assert!(speedup(&gqa, &[&mha, &gqa]).is_some_and(|s| (s - 3.0).abs() < 1e-9));
        gqa.kv_dtype = "q8";
        assert_eq!(speedup(&gqa, &[&mha, &gqa]), None);
    }
}
