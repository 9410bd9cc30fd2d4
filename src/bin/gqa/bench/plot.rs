//! A report as a picture: the roofline with the points on it, and decode time against length.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use gqa::profile::Row;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::Report;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Colours of the numbers of KV heads, most first: distinct in grey and to colour-blind eyes.
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 90, 160), RGBColor(210, 95, 0), RGBColor(0, 130, 90), RGBColor(120, 60, 140)];

/// Draws `report` into an SVG file.
pub(super) fn draw(report: &Report, path: &Path) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (1200, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let root = root.titled(&report.adapter, ("sans-serif", 20))?;
    let (left, right) = root.split_horizontally(600);
    roofline(report, &left)?;
    time_against_length(report, &right)?;
    root.present()?;
    Ok(())
}

/// Each number of KV heads with its rows and its colour.
fn series(report: &Report) -> Vec<(String, Vec<&Row>, RGBColor)> {
    let mut kv_heads: Vec<(u32, u32)> = report.rows.iter().map(|r| (r.q_heads, r.kv_heads)).collect();
    kv_heads.sort_unstable_by_key(|heads| std::cmp::Reverse(heads.1));
    kv_heads.dedup();
    let rows = |heads| report.rows.iter().filter(|r| (r.q_heads, r.kv_heads) == heads).collect();
    let named = |(i, heads): (usize, (u32, u32))| {
        (format!("{}/{} heads", heads.0, heads.1), rows(heads), COLOURS[i % COLOURS.len()])
    };
    kv_heads.into_iter().enumerate().map(named).collect()
}

fn roofline(report: &Report, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
    let ceilings = &report.ceilings;
    let intensity = |r: &Row| r.flops as f64 / r.bytes as f64;
    let speed = |r: &Row| r.flops as f64 / r.median_s * 1e-9;
    let ridge = ceilings.fma_flops_per_s / ceilings.read_bytes_per_s;
    let xs = span(report.rows.iter().map(intensity).chain([ridge]));
    let ys = span(report.rows.iter().map(speed).chain([ceilings.fma_flops_per_s * 1e-9]));
    let mut chart = ChartBuilder::on(area)
        .caption("Roofline", ("sans-serif", 16))
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
    chart.draw_series(LineSeries::new(
        [xs.start, ridge, xs.end].map(|x| (x, roof(x))),
        BLACK.stroke_width(2),
    ))?;
    for (name, rows, colour) in series(report) {
        chart
            .draw_series(rows.iter().map(|r| {
                // Decodes are full circles, prefills are rings.
                let style = if r.q_len == 1 { colour.filled() } else { colour.stroke_width(2) };
                Circle::new((intensity(r), speed(r)), 5, style)
            }))?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 8, y), 5, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

fn time_against_length(report: &Report, area: &Area<'_>) -> Result<(), Box<dyn Error>> {
    let xs = span(report.rows.iter().map(|r| f64::from(r.kv_len)));
    let ys = span(report.rows.iter().map(|r| r.median_s * 1e3));
    let mut chart = ChartBuilder::on(area)
        .caption("Time against length (full: decode, ring: prefill)", ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(xs.log_scale(), ys.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("keys")
        .y_desc("ms")
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&|y| number(*y))
        .light_line_style(BLACK.mix(0.05))
        .draw()?;
    for (name, rows, colour) in series(report) {
        for decode in [true, false] {
            let of_kind = rows.iter().filter(|r| (r.q_len == 1) == decode);
            let points: Vec<_> = of_kind.map(|r| (f64::from(r.kv_len), r.median_s * 1e3)).collect();
            chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(1)))?;
            let style = if decode { colour.filled() } else { colour.stroke_width(2) };
            let drawn = chart.draw_series(points.into_iter().map(|at| Circle::new(at, 5, style)))?;
            if decode {
                drawn.label(&name).legend(move |(x, y)| Circle::new((x + 8, y), 5, colour.filled()));
            }
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// A range around `values` with some room, for a logarithmic axis.
fn span(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values
        .filter(|v| v.is_finite() && *v > 0.0)
        .fold((f64::MAX, f64::MIN_POSITIVE), |(low, high), v| (low.min(v), high.max(v)));
    if low > high { 1.0..10.0 } else { low / 2.0..high * 3.0 }
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
