//! Models in several files, as llama.cpp's `gguf-split` makes them.
//!
//! File `k` of `N` is named `PREFIX-0000k-of-0000N.gguf`; the key `split.no` holds `k − 1`,
//! `split.count` holds `N` and `split.tensors.count` the number of tensors in all. Metadata
//! stands in the first.

use std::path::{Path, PathBuf};

use super::{Error, Gguf, Metadata};

const KEY_NO: &str = "split.no";
const KEY_COUNT: &str = "split.count";
const KEY_TENSORS: &str = "split.tensors.count";

/// A file name of the form `PREFIX-0000k-of-0000N.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitName {
    /// `PREFIX`.
    pub prefix: String,
    /// `k`, from 1.
    pub number: usize,
    /// `N`.
    pub count: usize,
}

impl SplitName {
    /// The parts of `path`'s file name; `None` where it has another form.
    pub fn of(path: &Path) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = five_digits(stem)?;
        let (prefix, number) = five_digits(rest.strip_suffix("-of-")?)?;
        Some(Self {
            prefix: prefix.strip_suffix('-')?.to_owned(),
            number,
            count,
        })
    }

    /// The name of split `number` (from 1) beside `path`.
    fn sibling(&self, path: &Path, number: usize) -> PathBuf {
        path.with_file_name(format!(
            "{}-{number:05}-of-{:05}.gguf",
            self.prefix, self.count
        ))
    }
}

/// Splits five digits off the end.
fn five_digits(text: &str) -> Option<(&str, usize)> {
    let (rest, digits) = text.split_at_checked(text.len().checked_sub(5)?)?;
    let digits = digits
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then_some(digits)?;
    Some((rest, digits.parse().ok()?))
}

/// Refuses a path that names a split other than the first.
pub(super) fn check_is_first(path: &Path) -> Result<(), Error> {
    match SplitName::of(path) {
        Some(name) if name.number != 1 => Err(wrong(path, {
            let first = name.sibling(path, 1);
            format!(
                "is split {} of {}; name the first, {}",
                name.number,
                name.count,
                first.display()
            )
        })),
        _ => Ok(()),
    }
}

/// The splits that follow the first, `path`: none for a model in one file.
pub(super) fn others(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>, Error> {
    let count = metadata.usize(KEY_COUNT)?.unwrap_or(1);
    let name = SplitName::of(path);
    if count <= 1 {
        return match name {
            Some(name) if name.count > 1 => {
                let problem = format!(
                    "is named as split 1 of {}, but {KEY_COUNT} does not say so",
                    name.count
                );
                Err(wrong(path, problem))
            }
            _ => Ok(Vec::new()),
        };
    }
    check_number(0, metadata)?;
    let name = name.filter(|name| name.count == count).ok_or_else(|| {
        let problem = format!(
            "is split 1 of {count}; the files must be named …-00001-of-{count:05}.gguf and so on"
        );
        wrong(path, problem)
    })?;
    let others: Vec<PathBuf> = (2..=count)
        .map(|number| name.sibling(path, number))
        .collect();
    match others.iter().position(|path| !path.exists()) {
        Some(missing) => {
            let problem = format!(
                "is missing: split {} of {count}; put all splits into one folder",
                missing + 2
            );
            Err(wrong(&others[missing], problem))
        }
        None => Ok(others),
    }
}

/// Checks that a file is split `number` (from 0) of the model whose first split is given.
pub(super) fn check_member(
    number: usize,
    metadata: &Metadata,
    first: &Metadata,
) -> Result<(), Error> {
    check_number(number, metadata)?;
    let (count, wanted) = (
        metadata.require_usize(KEY_COUNT)?,
        first.require_usize(KEY_COUNT)?,
    );
    if count != wanted {
        let problem = format!(
            "is {count}, but {wanted} in {}: the splits are not of one model",
            first.file().display()
        );
        return Err(metadata.error(KEY_COUNT, problem));
    }
    Ok(())
}

fn check_number(number: usize, metadata: &Metadata) -> Result<(), Error> {
    let found = metadata.require_usize(KEY_NO)?;
    if found != number {
        let problem = format!("is {found}, needs {number} by the file's name: was it renamed?");
        return Err(metadata.error(KEY_NO, problem));
    }
    Ok(())
}

/// Checks that all splits together hold the tensors that the first announces.
pub(super) fn check_tensor_count(model: &Gguf) -> Result<(), Error> {
    if model.files.len() == 1 {
        return Ok(());
    }
    let announced = model.metadata.require_usize(KEY_TENSORS)?;
    let found = model.tensors.len();
    if announced != found {
        let problem = format!(
            "is {announced}, but the splits hold {found} tensors: they are not of one model"
        );
        return Err(model.metadata.error(KEY_TENSORS, problem));
    }
    Ok(())
}

fn wrong(path: &Path, problem: String) -> Error {
    Error::Split {
        path: path.to_owned(),
        problem,
    }
}
