//! The result as a picture: quality against steps, and quality against what decoding costs.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::decode::CONTEXT;
use crate::{Report, Result, Run};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const FONT: &str = "sans-serif";
/// Pixels of the lines above a chart that say what is what.
const LEGEND: u32 = 58;
/// Of K/V heads: distinct in grey and to colour-blind eyes.
const COLOURS: [RGBColor; 3] = [RGBColor(0, 90, 160), RGBColor(210, 95, 0), RGBColor(0, 130, 90)];

/// Draws `report` into an SVG file.
pub(crate) fn draw(report: &Report, path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, (1240, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let title =
        "MiniLM with fewer K/V heads, uptrained through gqa: how near its embeddings are to the original's";
    let root = root.titled(title, (FONT, 19))?;
    let (left, right) = root.split_horizontally(700);
    steps(report, &left)?;
    cost(report, &right)?;
    root.present()?;
    Ok(())
}

/// The colour of a kind of attention and the shape of a pooling's mark.
fn style(report: &Report, run: &Run) -> (RGBColor, usize) {
    let kinds: Vec<_> = report.decodes.iter().map(|(kv_heads, _)| *kv_heads).collect();
    let nth = kinds.iter().position(|kv_heads| *kv_heads == run.kv_heads).unwrap_or(0);
    (
        COLOURS[nth % COLOURS.len()],
        crate::POOLINGS.iter().position(|(name, _)| *name == run.pooling).unwrap_or(0),
    )
}

/// A filled circle, a triangle or a cross.
fn mark<DB: DrawingBackend>(
    (x, y): (i32, i32),
    (colour, shape): (RGBColor, usize),
    size: i32,
) -> DynElement<'static, DB, (i32, i32)> {
    match shape {
        0 => Circle::new((x, y), size, colour.filled()).into_dyn(),
        1 => TriangleMarker::new((x, y), size + 1, colour.filled()).into_dyn(),
        _ => Cross::new((x, y), size, colour.stroke_width(2)).into_dyn(),
    }
}

fn legend(report: &Report, area: &Area<'_>) -> Result<()> {
    for (nth, run) in report.runs.iter().enumerate() {
        let (x, y) = (80 + 205 * (nth as i32 / 2), 16 + 22 * (nth as i32 % 2));
        area.draw(&mark((x, y), style(report, run), 5))?;
        area.draw(&Text::new(run.name(), (x + 12, y - 6), (FONT, 14)))?;
    }
    Ok(())
}

/// Below the worst and a little above the best, 1.
fn qualities(report: &Report, shown: impl Fn(&Run) -> f64) -> std::ops::Range<f64> {
    let least = report.runs.iter().map(shown).fold(1.0, f64::min);
    (least - 0.08).max(-1.0)..1.06
}

fn steps(report: &Report, area: &Area<'_>) -> Result<()> {
    let (top, area) = area.split_vertically(LEGEND);
    legend(report, &top)?;
    let worst = |run: &Run| run.points.iter().map(|(_, quality)| quality.rank).fold(1.0, f64::min);
    let most = report.runs.iter().flat_map(|run| run.points.iter().map(|(step, _)| *step)).max().unwrap_or(1);
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..most as f64 * 1.02, qualities(report, worst))?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("steps of training").y_desc("rank correlation of similarities, held-out sentences");
    mesh.light_line_style(BLACK.mix(0.05)).draw()?;
    for run in &report.runs {
        let (colour, shape) = style(report, run);
        let points: Vec<_> = run.points.iter().map(|(step, quality)| (*step as f64, quality.rank)).collect();
        chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
        let point = |at| EmptyElement::at(at) + mark((0, 0), (colour, shape), 4);
        chart.draw_series(points.into_iter().map(point))?;
    }
    Ok(())
}

fn cost(report: &Report, area: &Area<'_>) -> Result<()> {
    let (top, area) = area.split_vertically(LEGEND);
    let text = format!("K/V heads; a ring's area is the size of the cache. {CONTEXT} tokens in it.");
    top.draw(&Text::new(text, (60, 10), (FONT, 14)))?;
    let longest = report.decodes.iter().map(|(_, decode)| decode.milliseconds).fold(0.0, f64::max);
    let largest = report.decodes.iter().map(|(_, decode)| decode.bytes_per_token).max().unwrap_or(1) as f64;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..longest * 1.2, qualities(report, |run| run.last().rank))?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("attention of one decoded token, all layers, ms").y_desc("rank correlation after training");
    mesh.light_line_style(BLACK.mix(0.05)).draw()?;
    for (nth, (kv_heads, decode)) in report.decodes.iter().enumerate() {
        let radius = (28.0 * (decode.bytes_per_token as f64 / largest).sqrt()) as i32;
        let colour = COLOURS[nth % COLOURS.len()];
        let runs: Vec<_> = report.runs.iter().filter(|run| run.kv_heads == *kv_heads).collect();
        // The original is as near to itself as can be.
        let mut points: Vec<_> = runs.iter().map(|run| (run.last().rank, style(report, run).1)).collect();
        if nth == 0 {
            points.push((1.0, 0));
        }
        for (rank, shape) in &points {
            let at = [(decode.milliseconds, *rank)];
            let ring = |at| EmptyElement::at(at) + Circle::new((0, 0), radius, colour.stroke_width(1));
            chart.draw_series(at.map(ring))?;
            chart.draw_series(at.map(|at| EmptyElement::at(at) + mark((0, 0), (colour, *shape), 4)))?;
        }
        let name = match (nth, kv_heads) {
            (0, heads) => format!("the original, {heads}"),
            (_, 1) => "MQA, 1".to_owned(),
            (_, heads) => format!("GQA, {heads}"),
        };
        let left = -4 * name.len() as i32 + 10;
        let text = |at| EmptyElement::at(at) + Text::new(name.clone(), (left, 6 + radius), (FONT, 14));
        let below = points.iter().map(|(rank, _)| *rank).fold(1.0, f64::min);
        chart.draw_series([(decode.milliseconds, below)].map(text))?;
    }
    Ok(())
}
