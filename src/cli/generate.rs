//! `generate`: shell completions and man pages, of both commands.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap_complete::Shell;

use crate::gguf::with_suffix;

/// Options of `generate`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Completions for a shell, on standard output
    Completions {
        /// Its name
        shell: Shell,
    },
    /// Man pages, one a command
    Man {
        /// Folder to write them to; made if it is not there
        folder: PathBuf,
    },
}

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Standard output is closed or full.
    #[error("standard output: cannot write: {0}")]
    Stdout(#[source] io::Error),
    /// A page or the folder cannot be written.
    #[error("{}: cannot write: {source}", path.display())]
    Page {
        /// The page.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Generates what `args` ask for, of `command`.
///
/// # Errors
/// Where it cannot be written.
pub fn run(args: &Args, mut command: clap::Command) -> Result<(), Error> {
    match &args.what {
        What::Completions { shell } => {
            let mut script = Vec::new();
            let name = command.get_name().to_owned();
            clap_complete::generate(*shell, &mut command, name, &mut script);
            let mut out = io::stdout().lock();
            (out.write_all(&script))
                .and_then(|()| out.flush())
                .map_err(Error::Stdout)
        }
        What::Man { folder } => {
            let made = fs::create_dir_all(folder);
            made.map_err(|source| Error::Page {
                path: folder.clone(),
                source,
            })?;
            let mut command = command.disable_help_subcommand(true);
            command.build();
            pages(command, folder)
        }
    }
}

/// Writes the page of `command` and those of its own commands.
fn pages(command: clap::Command, folder: &Path) -> Result<(), Error> {
    for inner in command
        .get_subcommands()
        .filter(|inner| !inner.is_hide_set())
    {
        pages(inner.clone(), folder)?;
    }
    let page = clap_mangen::Man::new(command);
    let path = folder.join(page.get_filename());
    let partial = with_suffix(&path, ".partial");
    let mut text = Vec::new();
    page.render(&mut text)
        .and_then(|()| fs::write(&partial, &text))
        .and_then(|()| fs::rename(&partial, &path))
        .map_err(|source| Error::Page { path, source })
}
