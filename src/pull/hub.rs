//! What a hub's repository holds, and which of it is meant.
//!
//! `GET ENDPOINT/api/models/ORG/NAME/tree/REVISION?recursive=true` lists files, page by page; for those that are stored
//! beside git (all large ones), `lfs.oid` is their SHA-256. `ENDPOINT/ORG/NAME/resolve/REVISION/PATH` is a file.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use ureq::http::header;

use super::http::{self, Http};
use super::source::{is_inside, type_in};
use super::{Error, HubSource, Options, Part, Wanted, Watch, is_sha256};
use crate::gguf::SplitName;

/// Files of a repository that are looked at.
const FILES: usize = 100_000;

/// An entry of the listing.
#[derive(Clone, Debug, Deserialize)]
struct Listed {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Clone, Debug, Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

/// The files that `source` means.
pub(super) fn wanted(
    http: &Http,
    source: &HubSource,
    options: &Options,
    watch: &dyn Watch,
) -> Result<Vec<Wanted>, Error> {
    let files = list(http, source, &options.endpoint, watch)?;
    let chosen = match options.checkpoint {
        true => checkpoint(source, &files)?,
        false => model(source, &files)?,
    };
    let endpoint = options.endpoint.trim_end_matches('/');
    let wanted = |file: &&Listed| {
        let HubSource {
            repository,
            revision,
            ..
        } = source;
        let path = escape(&file.path);
        Wanted {
            url: format!("{endpoint}/{repository}/resolve/{revision}/{path}"),
            path: Path::new(repository).join(&file.path),
            bytes: Some(file.lfs.as_ref().map_or(file.size, |lfs| lfs.size)),
            sha256: file.lfs.as_ref().map(|lfs| lfs.oid.to_ascii_lowercase()),
        }
    };
    Ok(chosen.iter().map(wanted).collect())
}

/// All files of the repository.
fn list(
    http: &Http,
    source: &HubSource,
    endpoint: &str,
    watch: &dyn Watch,
) -> Result<Vec<Listed>, Error> {
    let HubSource {
        repository,
        revision,
        ..
    } = source;
    let endpoint = endpoint.trim_end_matches('/');
    let mut page = Some(format!(
        "{endpoint}/api/models/{repository}/tree/{revision}?recursive=true"
    ));
    let mut files = Vec::new();
    while let Some(url) = page {
        let wrong = |problem: String| Error::Answer {
            url: super::bare(&url),
            problem,
        };
        let (text, headers) = http.text(&url, watch)?;
        let listed: Vec<Listed> = serde_json::from_str(&text)
            .map_err(|error| wrong(format!("no list of files: {error}")))?;
        for file in listed.into_iter().filter(|file| file.kind == "file") {
            if !is_inside(&file.path) {
                return Err(wrong(format!("lists {:?}, which is no path", file.path)));
            }
            if let Some(lfs) = file.lfs.as_ref().filter(|lfs| !is_sha256(&lfs.oid)) {
                return Err(wrong(format!("{}: {:?} is no SHA-256", file.path, lfs.oid)));
            }
            files.push(file);
        }
        if files.len() > FILES {
            return Err(wrong(format!("lists more than {FILES} files")));
        }
        page = http::text(&headers, header::LINK).and_then(next_page);
    }
    Ok(files)
}

/// The address in `Link: <…>; rel="next"` (RFC 8288).
fn next_page(link: &str) -> Option<String> {
    let next = link.split(',').find(|link| link.contains("rel=\"next\""))?;
    let (_, rest) = next.split_once('<')?;
    Some(rest.split_once('>')?.0.to_owned())
}

/// The path with what a URL does not hold replaced.
fn escape(path: &str) -> String {
    let mut escaped = String::new();
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                escaped.push(byte.into());
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// A GGUF model of the repository: a file, or the splits of one.
struct Model<'a> {
    name: &'a str,
    kind: Option<&'a str>,
    files: Vec<&'a Listed>,
    /// How many files it must have.
    count: usize,
}

impl Model<'_> {
    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }
}

/// The models of the repository.
fn models(files: &[Listed]) -> Vec<Model<'_>> {
    let mut models: BTreeMap<(&str, usize), Model<'_>> = BTreeMap::new();
    for file in files {
        let Some(whole) = file.path.strip_suffix(".gguf") else {
            continue;
        };
        // Projectors of vision models and statistics are no models.
        let lower = whole.to_ascii_lowercase();
        if lower.contains("mmproj") || lower.contains("imatrix") {
            continue;
        }
        let split = SplitName::of(Path::new(&file.path));
        let count = split.map_or(1, |split| split.count);
        let tail = match count {
            1 if !whole.ends_with("-00001-of-00001") => 0,
            _ => "-00001-of-00001".len(),
        };
        let name = &whole[..whole.len() - tail];
        let stem = name.rsplit('/').next().unwrap_or(name);
        let model = models.entry((name, count)).or_insert_with(|| Model {
            name,
            kind: type_in(stem),
            files: Vec::new(),
            count,
        });
        model.files.push(file);
    }
    let mut models: Vec<Model<'_>> = models.into_values().collect();
    for model in &mut models {
        model.files.sort_by(|a, b| a.path.cmp(&b.path));
    }
    models
}

/// The files of the model that `source` means.
fn model<'a>(source: &HubSource, files: &'a [Listed]) -> Result<Vec<&'a Listed>, Error> {
    let missing = |problem: String| Error::Missing {
        repository: source.repository.clone(),
        problem,
    };
    let mut models = models(files);
    let repository = &source.repository;
    let all = |models: &[Model<'_>]| {
        let line = |model: &Model<'_>| {
            let what = model.kind.unwrap_or(model.name);
            format!("{what} ({:.2} GB)", model.bytes() as f64 / 1e9)
        };
        models.iter().map(line).collect::<Vec<_>>().join(", ")
    };
    if let Part::File(path) = &source.part {
        let found = |file: &&Listed| file.path == *path;
        let Some(file) = files.iter().find(found) else {
            let there = match models.is_empty() {
                true => String::new(),
                false => format!("; there are {}", all(&models)),
            };
            return Err(missing(format!("has no file {path}{there}")));
        };
        let of_file = |model: &Model<'_>| model.files.iter().any(|other| other.path == *path);
        return match models.into_iter().find(of_file) {
            Some(model) => whole(model, missing),
            None => Ok(vec![file]),
        };
    }
    if models.is_empty() {
        let checkpoint = files.iter().any(|file| file.path.ends_with(".safetensors"));
        return Err(missing(match checkpoint {
            true => format!(
                "holds no GGUF file but a checkpoint: `fewbit pull --checkpoint hf:{repository}`, then fewbit-convert"
            ),
            false => "holds no GGUF file".to_owned(),
        }));
    }
    let there = all(&models);
    let asked = match &source.part {
        Part::Type(kind) => Some(kind),
        _ => None,
    };
    if let Some(kind) = asked {
        models.retain(|model| {
            model
                .kind
                .is_some_and(|other| other.eq_ignore_ascii_case(kind))
        });
    }
    match (models.len(), asked) {
        (1, _) => whole(models.remove(0), missing),
        (0, Some(kind)) => Err(missing(format!("has no {kind}; there are {there}"))),
        (_, Some(kind)) => {
            let names = models
                .iter()
                .map(|model| format!("hf:{repository}/{}", model.files[0].path));
            let names: Vec<_> = names.collect();
            Err(missing(format!(
                "has several {kind}; say which: {}",
                names.join(", ")
            )))
        }
        (_, None) => Err(missing(format!(
            "say which, as in hf:{repository}:{}; there are {there}",
            models.iter().find_map(|model| model.kind).unwrap_or("TYPE")
        ))),
    }
}

/// The files of `model`, if none is missing.
fn whole<'a>(
    model: Model<'a>,
    missing: impl Fn(String) -> Error,
) -> Result<Vec<&'a Listed>, Error> {
    match model.files.len() == model.count {
        true => Ok(model.files),
        false => Err(missing(format!(
            "has {} of the {} files of {}",
            model.files.len(),
            model.count,
            model.name
        ))),
    }
}

/// The files of the checkpoint: what the converter reads.
fn checkpoint<'a>(source: &HubSource, files: &'a [Listed]) -> Result<Vec<&'a Listed>, Error> {
    let is_weights = |file: &&Listed| file.path.ends_with(".safetensors");
    let is_mistrals = |file: &&Listed| file.path.starts_with("consolidated");
    let top: Vec<&Listed> = files
        .iter()
        .filter(|file| !file.path.contains('/'))
        .collect();
    // Mistral's own layout lies beside Hugging Face's in some repositories: one of the two is enough.
    let both = top
        .iter()
        .any(|file| is_weights(file) && !is_mistrals(file));
    let is_part = |file: &&Listed| {
        let small = [".json", ".model", ".jinja", ".txt"]
            .iter()
            .any(|end| file.path.ends_with(end));
        (small || is_weights(file)) && !(both && is_mistrals(file))
    };
    let chosen: Vec<&Listed> = top.iter().copied().filter(is_part).collect();
    match chosen.iter().any(is_weights) {
        true => Ok(chosen),
        false => Err(Error::Missing {
            repository: source.repository.clone(),
            problem: "holds no checkpoint (safetensors)".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<Listed> {
        let file = |path: &&str| Listed {
            kind: "file".to_owned(),
            path: (*path).to_owned(),
            size: 10_000_000,
            lfs: None,
        };
        paths.iter().map(file).collect()
    }

    fn choose(part: &str, paths: &[&str]) -> Result<Vec<String>, String> {
        let source = HubSource {
            repository: "a/b".to_owned(),
            revision: "main".to_owned(),
            part: match part {
                "" => Part::Only,
                file if file.ends_with("gguf") => Part::File(file.to_owned()),
                kind => Part::Type(kind.to_owned()),
            },
        };
        let files = files(paths);
        let chosen = model(&source, &files).map_err(|error| error.to_string())?;
        Ok(chosen.iter().map(|file| file.path.clone()).collect())
    }

    #[test]
    fn a_type_is_found_in_names_with_all_its_splits() {
        let paths = [
            "README.md",
            "x-Q4_K_M.gguf",
            "Q8_0/x-Q8_0-00002-of-00002.gguf",
            "Q8_0/x-Q8_0-00001-of-00002.gguf",
            "mmproj-x-F16.gguf",
            "x.imatrix.gguf",
        ];
        assert_eq!(choose("q4_k_m", &paths).unwrap(), ["x-Q4_K_M.gguf"]);
        let splits = [
            "Q8_0/x-Q8_0-00001-of-00002.gguf",
            "Q8_0/x-Q8_0-00002-of-00002.gguf",
        ];
        assert_eq!(choose("Q8_0", &paths).unwrap(), splits);
        assert_eq!(choose(splits[1], &paths).unwrap(), splits);
        assert_eq!(
            choose("mmproj-x-F16.gguf", &paths).unwrap(),
            ["mmproj-x-F16.gguf"]
        );
        let wrong = choose("Q5_K_M", &paths).unwrap_err();
        assert_eq!(
            wrong,
            "a/b: has no Q5_K_M; there are Q8_0 (0.02 GB), Q4_K_M (0.01 GB)"
        );
        let wrong = choose("", &paths).unwrap_err();
        assert!(wrong.contains("say which, as in hf:a/b:Q8_0"), "{wrong}");
        assert_eq!(choose("", &["x.gguf", "y.txt"]).unwrap(), ["x.gguf"]);
    }

    #[test]
    fn what_is_missing_or_ambiguous_is_said() {
        let wrong = choose("", &["model.safetensors"]).unwrap_err();
        assert!(wrong.contains("--checkpoint"), "{wrong}");
        let wrong = choose("", &["README.md"]).unwrap_err();
        assert_eq!(wrong, "a/b: holds no GGUF file");
        let wrong = choose("Q8_0", &["x-Q8_0.gguf", "y-Q8_0.gguf"]).unwrap_err();
        assert!(
            wrong.contains("hf:a/b/x-Q8_0.gguf, hf:a/b/y-Q8_0.gguf"),
            "{wrong}"
        );
        let wrong = choose("Q8_0", &["x-Q8_0-00001-of-00002.gguf"]).unwrap_err();
        assert!(wrong.contains("has 1 of the 2 files"), "{wrong}");
        let wrong = choose("z.gguf", &["x-Q8_0.gguf"]).unwrap_err();
        assert!(wrong.contains("has no file z.gguf"), "{wrong}");
    }

    #[test]
    fn pages_and_paths() {
        let link = "<https://h/api?cursor=a%3D>; rel=\"next\"";
        assert_eq!(
            next_page(link).as_deref(),
            Some("https://h/api?cursor=a%3D")
        );
        assert_eq!(next_page("<https://h>; rel=\"prev\""), None);
        assert_eq!(escape("a b/c+ä.gguf"), "a%20b/c%2B%C3%A4.gguf");
    }
}
