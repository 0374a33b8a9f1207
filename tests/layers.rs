//! Imports run one way: from a file's bytes up to the commands, never back.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules in the order of the data's way. A module may use those of lower rank, and not
/// its neighbours of the same rank.
const LAYERS: [&[&str]; 13] = [
    &["quant"],
    &["gguf"],
    &["tokenizer", "plan", "store"],
    &["tensor", "adapter"],
    &["experts", "threads"],
    &["kernels"],
    &["model"],
    &["engine"],
    &["sampler", "draft", "answer"],
    &["generation", "chat", "grammar", "perplexity", "bench"],
    &["calibrate", "conversation"],
    &["serve", "pull"],
    &["cli"],
];

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// All `.rs` files below `dir`.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The modules named after `crate::` in `code`, comments left out; also those of a list,
/// `use crate::{gguf, quant::BlockType}`.
fn used_modules(code: &str) -> BTreeSet<String> {
    let code: String = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut modules = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let word = |text: &str| -> String {
            text.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        let Some(list) = rest.strip_prefix('{') else {
            modules.insert(word(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    modules.insert(word(item.trim()));
                    item.clear();
                }
                _ if depth == 0 => item.push(c),
                _ => {}
            }
        }
        modules.insert(word(item.trim()));
    }
    modules.remove("");
    modules
}

/// What in `module`'s `code` runs against the picture.
fn against_the_picture(module: &str, code: &str) -> Vec<String> {
    let own = rank(module).unwrap_or_else(|| panic!("module {module} has no place in the picture"));
    used_modules(code)
        .into_iter()
        .filter(|used| used != module && rank(used).is_some_and(|rank| rank >= own))
        .collect()
}

#[test]
fn imports_run_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut checked = 0;
    let mut wrong = Vec::new();
    for path in sources(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let first = inside
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_str()
            .unwrap();
        let module = first.trim_end_matches(".rs");
        if ["lib", "main"].contains(&module) {
            continue;
        }
        let against = against_the_picture(module, &fs::read_to_string(&path).unwrap());
        wrong.extend(
            against
                .into_iter()
                .map(|used| format!("{} uses crate::{used}", inside.display())),
        );
        checked += 1;
    }
    assert!(checked > 20, "only {checked} files found");
    assert!(
        wrong.is_empty(),
        "imports against the data's way:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn every_module_has_a_place() {
    let lib = include_str!("../src/lib.rs");
    let declared = lib
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    for module in declared {
        assert!(
            rank(module).is_some(),
            "module {module} has no place in the picture"
        );
    }
}

#[test]
fn an_import_against_the_way_is_noticed() {
    assert_eq!(
        against_the_picture("gguf", "use crate::engine::Engine;"),
        ["engine"]
    );
    assert_eq!(
        against_the_picture("chat", "use crate::{quant::BlockType, perplexity::{A, B}};"),
        ["perplexity"]
    );
    assert_eq!(
        against_the_picture("tensor", "fn f() -> crate::model::Config {}"),
        ["model"]
    );
    assert!(against_the_picture("model", "// crate::engine\nuse crate::{gguf, quant};").is_empty());
}
