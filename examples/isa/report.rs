//! Tables for a terminal.

use std::fmt::Write as _;

use crate::mix::Mix;
use crate::row::Row;

/// What the columns mean, and what they do not.
const NOTES: &str = "\
waves: subgroups per SIMD as RADV counts (on RDNA its model has half as many of 64 lanes). latency: cycles of a wave alone; inverse: cycles for
64 invocations on a full SIMD, the larger of its busiest unit's and of latency over waves. Both are the compiler's model, in which every
loop runs 8 times (4 times inside another): no measurement. /kFMA: inverse per 1,000 multiply-adds in the code; /kuse: per 1,000 that the
problem needs; nothing but multiply-adds would be about 31 (GCN: 62). Instructions are counted as often as the model runs them, in % of all;
fma to special are part of valu.
";

const DOUBTFUL: &str = "\
! a loop inside the loop over tiles is not unrolled (or work is repeated): the code's multiplications, as the model counts, are more than
  25 % away from the tile's. /kuse is then not to be trusted; /kFMA is less wrong.
";

/// One block of two tables for each family, in the order of the rows.
pub(crate) fn tables(rows: &[Row], with_loops: bool) -> String {
    let mut text = String::new();
    for block in rows.chunk_by(|a, b| a.family == b.family) {
        let first = &block[0];
        let _ = writeln!(text, "{} ({})\n", first.family, first.driver);
        text += &aligned(&figures(block));
        text.push('\n');
        text += &aligned(&instructions(block));
        text.push('\n');
        if with_loops {
            text += &aligned(&loops(block));
            text.push('\n');
        }
    }
    text += NOTES;
    if rows.iter().any(Row::is_doubtful) {
        text += DOUBTFUL;
    }
    text
}

fn figures(rows: &[Row]) -> Vec<Vec<String>> {
    let heads = [
        "kernel, spec",
        "tile",
        "wave",
        "vgpr",
        "sgpr",
        "spill v/s",
        "scratch",
        "lds",
        "waves",
        "code",
        "latency",
        "inverse",
        "/kFMA",
        "/kuse",
    ];
    let mut lines = vec![heads.map(str::to_owned).to_vec()];
    for row in rows {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.0}"));
        let mark = if row.is_doubtful() { "!" } else { "" };
        lines.push(vec![
            row.name.clone(),
            format!("{}x{}/{}", row.rows, row.keys, row.threads),
            row.wave.to_string(),
            row.vgprs.to_string(),
            row.sgprs.to_string(),
            format!("{}/{}", row.spilled_vgprs, row.spilled_sgprs),
            row.scratch.to_string(),
            row.lds.to_string(),
            row.subgroups.to_string(),
            row.code.to_string(),
            row.latency.to_string(),
            row.inverse.to_string(),
            number(row.per_fma),
            format!("{}{mark}", number(row.useful)),
        ]);
    }
    lines
}

/// Names of the kinds of instructions, in the order of [`kinds`].
const KINDS: [&str; 16] = [
    "valu", "fma", "mul", "convert", "select", "copy", "integer", "special", "salu", "smem", "loads",
    "stores", "lds", "waits", "barriers", "branches",
];

fn kinds(mix: &Mix) -> [f64; 16] {
    [
        mix.valu,
        mix.fma,
        mix.mul,
        mix.convert,
        mix.select,
        mix.copy,
        mix.integer,
        mix.special,
        mix.salu,
        mix.smem,
        mix.loads,
        mix.stores,
        mix.lds,
        mix.waits,
        mix.barriers,
        mix.branches,
    ]
}

fn heads(first: &[&str]) -> Vec<String> {
    first.iter().chain(&KINDS).map(|head| (*head).to_owned()).collect()
}

fn instructions(rows: &[Row]) -> Vec<Vec<String>> {
    let mut lines = vec![heads(&["instructions", "in code", "run"])];
    for row in rows {
        let all = total(&row.weighted).max(1.0);
        let mut line = vec![row.name.clone(), format!("{:.0}", total(&row.mix)), format!("{all:.0}")];
        line.extend(kinds(&row.weighted).map(|part| format!("{:.1}", 100.0 * part / all)));
        lines.push(line);
    }
    lines
}

fn loops(rows: &[Row]) -> Vec<Vec<String>> {
    let mut lines = vec![heads(&["one round of a loop", "block", "depth"])];
    for (row, of) in rows.iter().flat_map(|row| row.loops.iter().map(move |of| (row, of))) {
        let mut line = vec![row.name.clone(), format!("BB{}", of.block), of.depth.to_string()];
        line.extend(kinds(&of.mix).map(|part| format!("{part:.0}")));
        lines.push(line);
    }
    lines
}

fn total(mix: &Mix) -> f64 {
    mix.valu
        + mix.salu
        + mix.smem
        + mix.loads
        + mix.stores
        + mix.lds
        + mix.waits
        + mix.barriers
        + mix.branches
}

/// Columns as wide as their widest cell: the first to the left, the others to the right.
fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ =
                if column == 0 { write!(text, "{cell:width$}") } else { write!(text, "  {cell:>width$}") };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_doubtful_is_marked() {
        let row =
            Row { family: "navi21".into(), name: "decode d64".into(), useful: Some(60.4), ..Row::default() };
        let sound = Row { agreement: Some(0.9), ..row.clone() };
        let doubtful = Row { agreement: Some(2.0), ..row };
        assert!(!tables(std::slice::from_ref(&sound), true).contains("60!"));
        let text = tables(&[sound, doubtful], false);
        assert!(text.contains("60!") && text.contains(DOUBTFUL));
        assert_eq!(text.matches("navi21").count(), 1);
    }

    #[test]
    fn columns_are_aligned() {
        let cells = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        assert_eq!(aligned(&[cells("kernel", "lds"), cells("a", "24064")]), "kernel    lds\na       24064\n");
    }
}
