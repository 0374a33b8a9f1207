//! The report of a ladder: its table and plot in a file, in the form that the file's name ends with.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::plot::Plot;
use crate::cli::common::Usage;
use crate::gguf::with_suffix;

/// What a report may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// The table.
    Markdown,
    /// The plot.
    Svg,
    /// Both, in a page that needs nothing else.
    Html,
}

impl Form {
    fn of(path: &Path) -> Result<Self, Usage> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("md") => Ok(Self::Markdown),
            Some("svg") => Ok(Self::Svg),
            Some("html") => Ok(Self::Html),
            _ => Err(Usage(
                "--out: the report's name must end in .md, .svg or .html",
            )),
        }
    }
}

/// What goes into a report.
pub(super) struct Content {
    /// What the figures were made from: a paragraph.
    pub about: String,
    /// The table, its header first.
    pub table: Vec<Vec<String>>,
    pub plot: Plot,
}

/// A report under way: a file beside the final one, made before the work begins so that a path
/// that cannot be written fails at once, and renamed when whole; deleted if it never is.
pub(super) struct Report {
    path: PathBuf,
    form: Form,
    partial: PathBuf,
    file: File,
}

impl Report {
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let form = Form::of(path)?;
        anyhow::ensure!(
            !path.is_dir(),
            "{}: is a folder; name a file for the report",
            path.display()
        );
        let partial = with_suffix(path, ".partial");
        let file = File::create(&partial).with_context(|| cannot_write(path))?;
        let path = path.to_owned();
        Ok(Self {
            path,
            form,
            partial,
            file,
        })
    }

    pub fn finish(mut self, content: &Content) -> anyhow::Result<()> {
        let text = match self.form {
            Form::Markdown => {
                let Content { about, table, .. } = content;
                format!("# Ladder\n\n{about}\n\n{}", markdown(table))
            }
            Form::Svg => content.plot.svg()?,
            Form::Html => html(content)?,
        };
        self.file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.sync_all())
            .and_then(|()| std::fs::rename(&self.partial, &self.path))
            .with_context(|| cannot_write(&self.path))
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        // Nothing is there any more once it has been renamed.
        let _ = std::fs::remove_file(&self.partial);
    }
}

fn cannot_write(path: &Path) -> String {
    format!("{}: cannot write the report", path.display())
}

/// A Markdown table, its columns padded so that it reads well in a terminal too.
pub(super) fn markdown(lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut table = String::new();
    for (index, line) in lines.iter().enumerate() {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Names to the left, figures to the right.
            let _ = if column == 0 {
                write!(table, "| {cell:<width$} ")
            } else {
                write!(table, "| {cell:>width$} ")
            };
        }
        table.push_str("|\n");
        if index == 0 {
            for (column, width) in widths.iter().enumerate() {
                let _ = if column == 0 {
                    write!(table, "|:{:-<1$}", "", width + 1)
                } else {
                    write!(table, "|{:-<1$}:", "", width + 1)
                };
            }
            table.push_str("|\n");
        }
    }
    table
}

const STYLE: &str = "body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto }
svg { max-width: 100%; height: auto }";

fn html(content: &Content) -> anyhow::Result<String> {
    let escaped = |text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        text.replace('>', "&gt;")
    };
    let mut rows = String::new();
    for (index, line) in content.table.iter().enumerate() {
        let cell = if index == 0 { "th" } else { "td" };
        rows.push_str("<tr>");
        for text in line {
            let _ = write!(rows, "<{cell}>{}</{cell}>", escaped(text));
        }
        rows.push_str("</tr>\n");
    }
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>Ladder</title>\n<style>{STYLE}</style>\n\
         <h1>Ladder</h1>\n<p>{}</p>\n{}\n<div class=\"wide\"><table>\n{rows}</table></div>\n</html>\n",
        escaped(&content.about),
        content.plot.svg()?
    ))
}
