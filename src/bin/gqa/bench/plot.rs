//! A report as a picture: time against context, and the roofline with the points on it.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use gqa::profile::Row;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::Report;
use super::sets::Section;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Colours of MHA, GQA and MQA in both charts: distinct in grey and to colour-blind eyes.
const KINDS: [(&str, RGBColor); 3] =
    [("MHA", RGBColor(0, 90, 160)), ("GQA", RGBColor(210, 95, 0)), ("MQA", RGBColor(0, 130, 90))];
/// Pixels of the line in which a chart says what is what: above its data, which it so never covers.
const LEGEND: u32 = 34;
const FONT: &str = "sans-serif";

/// Rows of the same heads, by their name and colour.
type Series<'a> = Vec<(String, Vec<&'a Row>, RGBColor)>;

/// Draws `report` into an SVG file.
pub(super) fn draw(report: &Report, path: &Path) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (1240, 600)).into_drawing_area();
    root.fill(&WHITE)?;
    let headline = report.summary.iter().find(|finding| finding.name == "gqa_against_mha");
    let title = headline.map_or(&report.adapter, |finding| &finding.text);
    let root = root.titled(title, (FONT, 19))?;
    let (left, right) = root.split_horizontally(700);
    time_against_context(report, &left)?;
    roofline(report, &right)?;
    root.present()?;
    Ok(())
}

/// Each pair of heads with its rows and its colour.
fn series<'a>(rows: &[&'a Row]) -> Series<'a> {
    let mut heads: Vec<(u32, u32)> = rows.iter().map(|r| (r.q_heads, r.kv_heads)).collect();
    heads.sort_unstable_by_key(|heads| (std::cmp::Reverse(heads.1), heads.0));
    heads.dedup();
    let of = |heads| rows.iter().copied().filter(|r| (r.q_heads, r.kv_heads) == heads).collect();
    let named = |(q_heads, kv_heads)| {
        let (kind, colour) = KINDS[match kv_heads {
            _ if q_heads == kv_heads => 0,
            1 => 2,
            _ => 1,
        }];
        (format!("{kind} {q_heads}/{kv_heads}"), of((q_heads, kv_heads)), colour)
    };
    heads.into_iter().map(named).collect()
}

/// A line of text with a mark before each of its parts.
fn legend(area: &Area<'_>, marks: &[(Mark, String, RGBColor)]) -> Result<(), Box<dyn Error>> {
    let mut x = 70;
    for (mark, text, colour) in marks {
        let y = LEGEND as i32 / 2;
        match mark {
            Mark::Full => area.draw(&Circle::new((x, y), 5, colour.filled()))?,
            Mark::Ring => area.draw(&Circle::new((x, y), 5, colour.stroke_width(2)))?,
            Mark::Line => {
                area.draw(&PathElement::new(vec![(x - 8, y), (x + 8, y)], colour.stroke_width(1)))?
            }
        }
        area.draw(&Text::new(text.clone(), (x + 13, y - 6), (FONT, 14)))?;
        x += 30 + 8 * text.len() as i32;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Mark {
    Full,
    Ring,
    Line,
}

fn time_against_context(report: &Report, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
    // The headline is about decodes by context; a run without them shows all it has.
    let all: Vec<_> = report.rows.iter().collect();
    let contexts: Vec<_> = report.rows.iter().filter(|r| r.section == Section::Context.name()).collect();
    let rows = if contexts.is_empty() { all } else { contexts };
    let least = |r: &Row| r.least_s(&report.ceilings) * 1e3;
    let series = series(&rows);

    let (top, area) = area.split_vertically(LEGEND);
    let mut marks: Vec<_> =
        series.iter().map(|(name, _, colour)| (Mark::Full, name.clone(), *colour)).collect();
    marks.push((Mark::Line, "least time by the ceilings".to_owned(), RGBColor(90, 90, 90)));
    legend(&top, &marks)?;

    let xs = span(rows.iter().map(|r| f64::from(r.kv_len)));
    let ys = span(rows.iter().flat_map(|r| [r.timing.median_s * 1e3, least(r)]));
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(66)
        .build_cartesian_2d(xs.log_scale(), ys.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("keys of a sequence")
        .y_desc("time of one call, ms")
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&|y| number(*y))
        .light_line_style(BLACK.mix(0.05))
        .draw()?;
    for (_, rows, colour) in series {
        for is_decode in [true, false] {
            let mut rows: Vec<_> = rows.iter().filter(|r| (r.q_len == 1) == is_decode).collect();
            rows.sort_by_key(|r| r.kv_len);
            let keys = |r: &Row| f64::from(r.kv_len);
            chart.draw_series(LineSeries::new(
                rows.iter().map(|r| (keys(r), least(r))),
                colour.mix(0.6).stroke_width(1),
            ))?;
            let points: Vec<_> = rows.iter().map(|r| (keys(r), r.timing.median_s * 1e3)).collect();
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
            let style = if is_decode { colour.filled() } else { colour.stroke_width(2) };
            chart.draw_series(points.into_iter().map(|at| Circle::new(at, 4, style)))?;
        }
    }
    Ok(())
}

fn roofline(report: &Report, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
    let ceilings = &report.ceilings;
    let intensity = |r: &Row| r.flops as f64 / r.bytes as f64;
    let speed = |r: &Row| r.flops as f64 / r.timing.median_s * 1e-9;
    let ridge = ceilings.fma_flops_per_s / ceilings.read_bytes_per_s;
    let xs = span(report.rows.iter().map(intensity).chain([ridge]));
    let ys = span(report.rows.iter().map(speed).chain([ceilings.fma_flops_per_s * 1e-9]));
    let rows: Vec<_> = report.rows.iter().collect();

    let (top, area) = area.split_vertically(LEGEND);
    let grey = RGBColor(90, 90, 90);
    legend(
        &top,
        &[
            (Mark::Full, "one query token".to_owned(), grey),
            (Mark::Ring, "several".to_owned(), grey),
            (Mark::Line, "ceilings".to_owned(), BLACK),
        ],
    )?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(xs.clone().log_scale(), ys.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("operations per byte")
        .y_desc("GFLOP/s")
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&|y| number(*y))
        .light_line_style(BLACK.mix(0.05))
        .draw()?;
    let roof = |x: f64| (x * ceilings.read_bytes_per_s).min(ceilings.fma_flops_per_s) * 1e-9;
    let line = [xs.start, ridge, xs.end].map(|x| (x, roof(x)));
    chart.draw_series(LineSeries::new(line, BLACK.stroke_width(2)))?;
    for (_, rows, colour) in series(&rows) {
        chart.draw_series(rows.iter().map(|r| {
            let style = if r.q_len == 1 { colour.filled() } else { colour.stroke_width(2) };
            Circle::new((intensity(r), speed(r)), 4, style)
        }))?;
    }
    Ok(())
}

/// A range around `values` with some room, for a logarithmic axis.
fn span(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values
        .filter(|v| v.is_finite() && *v > 0.0)
        .fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), v| (low.min(v), high.max(v)));
    if low > high { 1.0..10.0 } else { low / 1.5..high * 1.5 }
}

/// Three digits at most, as people write them.
fn number(x: f64) -> String {
    if x >= 1000.0 {
        format!("{:.0}k", x / 1000.0)
    } else if x >= 1.0 {
        format!("{x:.0}")
    } else {
        format!("{x}")
    }
}
