//! The plot of a ladder: divergence and perplexity against bits a weight, as SVG.

use std::collections::BTreeMap;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::perplexity::Estimate;

/// A file's place in the plot; of several texts the means.
pub(super) struct Point {
    /// The file's name.
    pub name: String,
    pub bits_per_weight: f64,
    pub ppl: Estimate,
    /// Where there is a base.
    pub kld: Option<Estimate>,
}

pub(super) struct Plot {
    pub points: Vec<Point>,
    /// The base's perplexity.
    pub base_ppl: Option<f64>,
}

const SIZE: (u32, u32) = (960, 480);

const COLORS: [RGBColor; 6] = [
    RGBColor(0x55, 0x5b, 0x66),
    RGBColor(0x1f, 0x6f, 0xb4),
    RGBColor(0xd9, 0x5f, 0x02),
    RGBColor(0x2c, 0x8c, 0x46),
    RGBColor(0x8e, 0x44, 0xad),
    RGBColor(0xb0, 0x2a, 0x37),
];

impl Plot {
    /// The plot as a document that can stand alone or inside HTML.
    pub fn svg(&self) -> anyhow::Result<String> {
        let divergence = |point: &Point| point.kld.filter(|kld| kld.value > 0.0);
        let perplexity = |point: &Point| Some(point.ppl);
        let mut panels: Vec<Panel<'_>> = Vec::new();
        if self.points.iter().any(|point| divergence(point).is_some()) {
            panels.push(Panel {
                title: "mean KLD from the base, nats",
                value: &divergence,
                mark: None,
            });
        }
        panels.push(Panel {
            title: "perplexity",
            value: &perplexity,
            mark: self.base_ppl,
        });
        let mut text = String::new();
        {
            let size = (SIZE.0, SIZE.1 * panels.len() as u32);
            let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
            root.fill(&WHITE)?;
            for (panel, area) in panels.iter().zip(root.split_evenly((panels.len(), 1))) {
                self.draw(&area, panel)?;
            }
            root.present()?;
        }
        Ok(text)
    }

    fn draw(
        &self,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
        panel: &Panel<'_>,
    ) -> anyhow::Result<()> {
        let values = self.points.iter().filter_map(panel.value);
        let values = values.flat_map(|value| {
            let se = if value.se.is_nan() { 0.0 } else { value.se };
            [(value.value - se).max(value.value / 2.0), value.value + se]
        });
        let (low, high) = range(values.chain(panel.mark));
        // A logarithmic axis is labelled at powers of ten and their multiples, of which a short one may hold none.
        if high > 4.0 * low {
            self.draw_along((low / 1.1..high * 1.1).log_scale(), high, area, panel)
        } else {
            let margin = (0.05 * (high - low)).max(0.01 * high);
            self.draw_along(low - margin..high + margin, high, area, panel)
        }
    }

    /// Draws a panel along a vertical axis that reaches to `high` or a little further.
    fn draw_along<Y>(
        &self,
        y: Y,
        high: f64,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
        panel: &Panel<'_>,
    ) -> anyhow::Result<()>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let points = || {
            let value = |point| (panel.value)(point).map(|value| (point, value));
            self.points.iter().filter_map(value)
        };
        let (left, right) = range(points().map(|(point, _)| point.bits_per_weight));
        let margin = (0.08 * (right - left)).max(0.05);
        // Room to the right for the last name.
        let x = left - margin..right + 3.0 * margin;
        let mut chart = ChartBuilder::on(area)
            .caption(panel.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(70)
            .build_cartesian_2d(x.clone(), y)?;
        let decimals = if high < 1.0 { 4 } else { 2 };
        chart
            .configure_mesh()
            .x_desc("bits per weight")
            .y_label_formatter(&|y| format!("{y:.decimals$}"))
            .light_line_style(WHITE)
            .draw()?;
        if let Some(mark) = panel.mark {
            let line = PathElement::new(vec![(x.start, mark), (x.end, mark)], BLACK.mix(0.4));
            chart.plotting_area().draw(&line)?;
            let name = Text::new("base", (x.start, mark), ("sans-serif", 13));
            chart.plotting_area().draw(&name)?;
        }
        for (index, (series, mut members)) in series(points()).into_iter().enumerate() {
            let color = COLORS[index % COLORS.len()];
            members.sort_by(|(a, _), (b, _)| a.bits_per_weight.total_cmp(&b.bits_per_weight));
            let at = |(point, value): &(&Point, Estimate)| (point.bits_per_weight, value.value);
            let line = PathElement::new(members.iter().map(at).collect::<Vec<_>>(), color.mix(0.5));
            let style = color.filled();
            chart
                .draw_series([line])?
                .label(series)
                .legend(move |(x, y)| Circle::new((x + 10, y), 4, style));
            for member in &members {
                let (x, y) = at(member);
                let se = if member.1.se.is_nan() {
                    0.0
                } else {
                    member.1.se
                };
                let bar = vec![(x, (y - se).max(y / 2.0)), (x, y + se)];
                let plane = chart.plotting_area();
                plane.draw(&PathElement::new(bar, color))?;
                plane.draw(&Circle::new((x, y), 4, color.filled()))?;
                let name = Text::new(
                    member.0.name.clone(),
                    (6, -13),
                    ("sans-serif", 12).into_font(),
                );
                plane.draw(&(EmptyElement::at((x, y)) + name))?;
            }
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        Ok(())
    }
}

/// One of the two diagrams.
struct Panel<'a> {
    title: &'static str,
    value: &'a dyn Fn(&Point) -> Option<Estimate>,
    /// A level to mark.
    mark: Option<f64>,
}

/// The least and the greatest value.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if low <= high { (low, high) } else { (1.0, 2.0) }
}

/// Files whose names differ in nothing but the type's name and the digits make a line.
fn series<'a>(
    points: impl Iterator<Item = (&'a Point, Estimate)>,
) -> BTreeMap<String, Vec<(&'a Point, Estimate)>> {
    let mut series: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for (point, value) in points {
        let name = series_of(&point.name);
        series.entry(name).or_default().push((point, value));
    }
    series
}

/// A name without its type and bits: `bed-Q4_K_M-gptq` and `bed-IQ4_XS-gptq` are both `bed-gptq`, `bed-fit-4.5` is `bed-fit`.
fn series_of(name: &str) -> String {
    let is_bits = |word: &str| {
        let kind = word.strip_prefix('I').unwrap_or(word);
        let kind = kind.strip_prefix('Q').unwrap_or(kind);
        kind.starts_with(|c: char| c.is_ascii_digit()) || matches!(word, "F16" | "F32" | "BF16")
    };
    let words: Vec<&str> = name.split('-').filter(|word| !is_bits(word)).collect();
    match words.join("-") {
        empty if empty.is_empty() => "all".to_owned(),
        words => words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_differ_in_the_bits_make_a_line() {
        assert_eq!(series_of("bed-Q4_K_M-gptq"), series_of("bed-IQ4_XS-gptq"));
        assert_eq!(series_of("bed-fit-4.5"), "bed-fit");
        assert_ne!(series_of("bed-Q4_0"), series_of("bed-Q4_0-gptq"));
        assert_eq!(series_of("Q4_0"), "all");
    }

    #[test]
    fn a_plot_names_every_file_and_no_value_breaks_it() {
        let estimate = |value, se| Estimate { value, se };
        let point = |name: &str, bits, kld: Option<f64>| Point {
            name: name.to_owned(),
            bits_per_weight: bits,
            ppl: estimate(15.0, f64::NAN),
            kld: kld.map(|kld| estimate(kld, 0.002)),
        };
        let mut plot = Plot {
            points: vec![
                point("a-Q4_0", 4.5, Some(0.01)),
                point("a-Q8_0", 8.5, Some(0.0004)),
                point("a-F32", 32.0, Some(0.0)),
            ],
            base_ppl: Some(14.9),
        };
        let svg = plot.svg().unwrap();
        assert!(svg.contains("a-Q4_0") && svg.contains("mean KLD") && svg.ends_with("</svg>\n"));
        plot.points = vec![point("b", 4.5, None)];
        assert!(!plot.svg().unwrap().contains("mean KLD"));
    }
}
