//! What there is to pull, as the command line names it.

use std::str::FromStr;

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A repository of a Hugging Face hub.
    Hub(HubSource),
    /// A file anywhere.
    Url(String),
}

/// Something in a repository of a Hugging Face hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSource {
    /// `org/name`.
    pub repository: String,
    /// A branch, tag or commit.
    pub revision: String,
    /// What of it.
    pub part: Part,
}

/// What of a repository is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The only model that is in it.
    Only,
    /// The model of this type (`Q4_K_M`).
    Type(String),
    /// The file of this path, and its other splits.
    File(String),
}

/// Not a source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no source: it must be hf:ORG/REPOSITORY:TYPE, hf:ORG/REPOSITORY/FILE.gguf or a URL (http:// or https://)"
)]
pub struct NoSource(String);

const REVISION: &str = "main";

impl FromStr for Source {
    type Err = NoSource;

    /// Reads `hf:org/repo`, `hf:org/repo:TYPE`, `hf:org/repo/path/file.gguf`, each with `@REVISION` after the
    /// repository if need be; the address of a file's page or of a repository on huggingface.co; any other URL.
    fn from_str(text: &str) -> Result<Self, NoSource> {
        let wrong = || NoSource(text.to_owned());
        if let Some(rest) = text.strip_prefix("hf:") {
            return hub(rest).map(Self::Hub).ok_or_else(wrong);
        }
        let rest = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .ok_or_else(wrong)?;
        if rest.is_empty() || rest.starts_with('/') || rest.contains(char::is_whitespace) {
            return Err(wrong());
        }
        match page(rest) {
            Some(hub) => Ok(Self::Hub(hub)),
            None => Ok(Self::Url(text.to_owned())),
        }
    }
}

/// `org/repo[@revision][:TYPE]` or `org/repo[@revision]/file`.
fn hub(text: &str) -> Option<HubSource> {
    let (text, kind) = match text.rsplit_once(':') {
        Some((text, kind)) => (text, Some(kind)),
        None => (text, None),
    };
    let mut parts = text.splitn(3, '/');
    let (org, name, file) = (parts.next()?, parts.next()?, parts.next());
    let (name, revision) = name.split_once('@').unwrap_or((name, REVISION));
    let part = match (kind, file) {
        (None, None) => Part::Only,
        (Some(kind), None) if is_word(kind) => Part::Type(kind.to_owned()),
        (None, Some(file)) => Part::File(file.to_owned()),
        _ => return None,
    };
    if let Part::File(file) = &part
        && !is_inside(file)
    {
        return None;
    }
    [org, name, revision]
        .into_iter()
        .all(is_word)
        .then(|| HubSource {
            repository: format!("{org}/{name}"),
            revision: revision.to_owned(),
            part,
        })
}

/// A page of huggingface.co: `org/repo`, `org/repo/blob/REVISION/FILE`, `org/repo/resolve/REVISION/FILE`.
fn page(address: &str) -> Option<HubSource> {
    let path = ["huggingface.co/", "hf.co/", "www.huggingface.co/"]
        .iter()
        .find_map(|host| address.strip_prefix(host))?;
    let path = path.split(['?', '#']).next()?.trim_end_matches('/');
    let parts: Vec<&str> = path.splitn(5, '/').collect();
    match parts[..] {
        [org, name] => hub(&format!("{org}/{name}")),
        [org, name, "blob" | "resolve", revision, file] => {
            hub(&format!("{org}/{name}@{revision}/{file}"))
        }
        _ => None,
    }
}

/// A name that needs no escaping in a URL and leads nowhere else.
fn is_word(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.chars().all(is_plain) && !text.chars().all(|c| c == '.')
}

/// Whether a path from elsewhere stays inside the folder that it is put into, on every system.
pub(super) fn is_inside(path: &str) -> bool {
    let is_name = |part: &str| {
        let is_odd = |c: char| c.is_control() || "\\:*?\"<>|".contains(c);
        !part.is_empty() && part != "." && part != ".." && !part.contains(is_odd)
    };
    path.split('/').all(is_name)
}

/// The type that a file's name ends in, as people write it: `Q4_K_M`, `IQ4_XS`, `UD-Q4_K_XL`, `BF16`. `name` is without
/// extension and split number.
pub(super) fn type_in(name: &str) -> Option<&str> {
    let starts = name
        .char_indices()
        .filter(|&(at, _)| at == 0 || name[..at].ends_with(['-', '.', '_']))
        .map(|(at, _)| &name[at..]);
    starts.into_iter().find(|rest| {
        let upper = rest.to_ascii_uppercase();
        let plain = upper.strip_prefix("UD-").unwrap_or(&upper);
        let is_tail = |tail: &str| tail.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        let after = |prefix: &str| plain.strip_prefix(prefix).filter(|tail| is_tail(tail));
        let numbered = |prefix: &str| {
            after(prefix).is_some_and(|tail| tail.starts_with(|c: char| c.is_ascii_digit()))
        };
        matches!(plain, "F32" | "F16" | "BF16" | "FP16" | "FP32")
            || ["Q", "IQ", "TQ"].into_iter().any(numbered)
            || after("MXFP4").is_some()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        let hub = |repository: &str, revision: &str, part| {
            Source::Hub(HubSource {
                repository: repository.to_owned(),
                revision: revision.to_owned(),
                part,
            })
        };
        let file = |path: &str| Part::File(path.to_owned());
        for (text, source) in [
            ("hf:a/b", hub("a/b", "main", Part::Only)),
            (
                "hf:a/b-GGUF:Q4_K_M",
                hub("a/b-GGUF", "main", Part::Type("Q4_K_M".into())),
            ),
            (
                "hf:a/b@v1.0:Q8_0",
                hub("a/b", "v1.0", Part::Type("Q8_0".into())),
            ),
            ("hf:a/b/c.gguf", hub("a/b", "main", file("c.gguf"))),
            ("hf:a/b/d/c.gguf", hub("a/b", "main", file("d/c.gguf"))),
            ("https://huggingface.co/a/b", hub("a/b", "main", Part::Only)),
            (
                "https://huggingface.co/a/b/blob/main/c.gguf",
                hub("a/b", "main", file("c.gguf")),
            ),
            (
                "https://hf.co/a/b/resolve/v2/d/c.gguf?download=true",
                hub("a/b", "v2", file("d/c.gguf")),
            ),
            (
                "http://localhost:1/x.gguf",
                Source::Url("http://localhost:1/x.gguf".into()),
            ),
        ] {
            assert_eq!(text.parse(), Ok(source), "{text}");
        }
        for text in [
            "",
            "hf:",
            "hf:a",
            "hf:a/",
            "hf:a/b:",
            "hf:a/b/../c.gguf",
            "hf:../b",
            "hf:a/b//c",
            "hf:a/b/c.gguf:Q4_0",
            "a/b",
            "ftp://x/y",
            "https://",
            "https:///x",
            "http://a b/c",
            "hf:a/b@:Q4_0",
            "hf:a/b\\c",
        ] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }

    #[test]
    fn types_in_names() {
        for (name, kind) in [
            ("mixtral-8x7b-instruct-v0.1.Q4_K_M", Some("Q4_K_M")),
            ("Mixtral-8x7B-IQ4_XS", Some("IQ4_XS")),
            ("smollm2-135m-instruct-q8_0", Some("q8_0")),
            ("model_Q5_0", Some("Q5_0")),
            ("Qwen-7B-UD-Q4_K_XL", Some("UD-Q4_K_XL")),
            ("model-bf16", Some("bf16")),
            ("model.fp16", Some("fp16")),
            ("gpt-MXFP4_MOE", Some("MXFP4_MOE")),
            ("Q4_0", Some("Q4_0")),
            ("Qwen-7B", None),
            ("model-q4_0-imatrix-x", None),
            ("model", None),
        ] {
            assert_eq!(type_in(name), kind, "{name}");
        }
    }
}
