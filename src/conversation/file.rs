//! Conversations in files, with their keys and values: little-endian, version 1.
//!
//! ```text
//! "fewbitSF"  version u32  CRC-32 of the head u32  bytes of the head u64
//! head     JSON: the model's fingerprint, how keys and values are kept, messages, settings
//! tokens   u32 each
//! keys and values   [layer][kv_head][keys, values][token][head_dim], as the session keeps them
//! CRC-32 of tokens, keys and values u32
//! ```
//!
//! A file is read into a session of its own, which takes the place of the present one when all of it was sound.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use byteorder::{LittleEndian, ReadBytesExt, WriteBytesExt};
use crc32fast::Hasher;
use serde::{Deserialize, Serialize};

use super::Conversation;
use crate::chat::Message;
use crate::engine;
use crate::gguf::with_suffix;
use crate::sampler::{Position, Settings};

const MAGIC: [u8; 8] = *b"fewbitSF";
const VERSION: u32 = 1;
/// Bytes before the head.
const START: u64 = 24;
/// Bytes of the checksum at the end.
const END: u64 = 4;
/// Bytes of the largest head: that of a million tokens' text takes a tenth.
const MAX_HEAD: u64 = 256 << 20;

/// Why a conversation cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// It holds no conversation, or only what is left of one.
    #[error("{}: byte {offset}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// It belongs to another model, or to another way to run this one.
    #[error("{}: {problem}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Whose it is, and the remedy.
        problem: String,
    },
    /// The session cannot take it.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

/// What keys and values belong to.
#[derive(Serialize, Deserialize)]
struct Owner {
    /// The model's fingerprint, in hexadecimal digits.
    fingerprint: String,
    /// The name of the model's file, for messages.
    model: String,
    /// The type of keys and values.
    kv: String,
}

/// All but the tokens, their keys and values.
#[derive(Serialize, Deserialize)]
struct Head {
    #[serde(flatten)]
    owner: Owner,
    tokens: usize,
    messages: Vec<Message>,
    settings: Settings,
    seed: u64,
    position: Position,
}

/// A file and what fails in it.
struct Place<'p>(&'p Path);

impl Place<'_> {
    fn io(&self, action: &'static str) -> impl Fn(io::Error) -> FileError + '_ {
        move |source| FileError::Io {
            path: self.0.to_owned(),
            action,
            source,
        }
    }

    fn malformed(&self, offset: u64, problem: impl Into<String>) -> FileError {
        FileError::Malformed {
            path: self.0.to_owned(),
            offset,
            problem: problem.into(),
        }
    }

    fn foreign(&self, problem: String) -> FileError {
        FileError::Foreign {
            path: self.0.to_owned(),
            problem,
        }
    }
}

impl Conversation {
    /// What the keys and values of this conversation belong to.
    fn owner(&self) -> Result<Owner, FileError> {
        let engine = self.session.engine();
        let digits = |byte: &u8| format!("{byte:02x}");
        let name = engine.path().file_name().unwrap_or_default();
        let fingerprint = engine.fingerprint();
        let fingerprint = fingerprint.map_err(|source| FileError::Io {
            path: engine.path().to_owned(),
            action: "read the model again",
            source,
        })?;
        Ok(Owner {
            fingerprint: fingerprint.iter().map(digits).collect(),
            model: name.to_string_lossy().into_owned(),
            kv: self.session.kv_kind().block_type().name().to_owned(),
        })
    }

    fn head_of_file(&self) -> Result<Head, FileError> {
        Ok(Head {
            owner: self.owner()?,
            tokens: self.session.tokens().len(),
            messages: self.messages.clone(),
            settings: self.settings().clone(),
            seed: self.settings().seed,
            position: self.sampler.position(),
        })
    }

    /// Writes the conversation to `path`, with all that its session holds: beside it first, then under its name. Others
    /// than the file's owner cannot read it.
    ///
    /// # Errors
    /// Where it cannot be written: what was at `path` is still there.
    pub fn save(&self, path: &Path) -> Result<(), FileError> {
        let partial = &with_suffix(path, &format!(".{}.partial", std::process::id()));
        let place = Place(path);
        let written = self.write_file(partial, &place).and_then(|()| {
            fs::rename(partial, path).map_err(place.io("rename the finished file to it"))
        });
        if written.is_err() {
            // The first error is the one to report.
            let _ = fs::remove_file(partial);
        }
        written
    }

    fn write_file(&self, partial: &Path, place: &Place<'_>) -> Result<(), FileError> {
        let head = self.head_of_file()?;
        let head = serde_json::to_vec(&head).expect("a conversation is JSON");
        let failed = place.io("write the conversation");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(partial).map_err(&failed)?;
        let write = || {
            let mut out = BufWriter::with_capacity(1 << 20, &file);
            out.write_all(&MAGIC)?;
            out.write_u32::<LittleEndian>(VERSION)?;
            out.write_u32::<LittleEndian>(crc32fast::hash(&head))?;
            out.write_u64::<LittleEndian>(head.len() as u64)?;
            out.write_all(&head)?;
            let mut check = Hasher::new();
            for token in self.session.tokens() {
                check.update(&token.to_le_bytes());
                out.write_u32::<LittleEndian>(*token)?;
            }
            for plane in self.session.keys_and_values() {
                check.update(plane);
                out.write_all(plane)?;
            }
            out.write_u32::<LittleEndian>(check.finalize())?;
            out.flush()?;
            drop(out);
            file.sync_data()
        };
        write().map_err(failed)
    }

    /// Takes up the conversation in `path`: its turns, its session, its settings.
    ///
    /// # Errors
    /// Where the file cannot be read, is damaged, belongs to another model, or does not fit into the context. The
    /// conversation is then as it was.
    pub fn load(&mut self, path: &Path) -> Result<(), FileError> {
        let place = Place(path);
        let failed = place.io("read the conversation");
        let file = File::open(path).map_err(&failed)?;
        let len = file.metadata().map_err(&failed)?.len();
        let mut input = BufReader::with_capacity(1 << 20, file);
        let head = self.read_head(&mut input, len, &place)?;

        let Found {
            head,
            end: head_end,
        } = head;
        let body = len - END - head_end;
        let engine = Arc::clone(self.session.engine());
        let wanted = (self.session.kv_bytes(head.tokens))
            .and_then(|bytes| bytes.checked_add(4 * head.tokens as u64));
        if wanted != Some(body) {
            return Err(place.malformed(
                head_end,
                format!(
                    "{body} bytes of {} tokens, their keys and values: it was cut off or changed; start anew",
                    head.tokens
                ),
            ));
        }
        let capacity = self.session.capacity();
        if head.tokens > capacity {
            return Err(place.foreign(format!(
                "holds {} tokens, the context has {capacity}; give --ctx {} or more",
                head.tokens, head.tokens
            )));
        }
        let mut check = Hasher::new();
        let mut session = engine.session(capacity)?;
        let mut bytes = vec![0; 4 * head.tokens];
        input.read_exact(&mut bytes).map_err(&failed)?;
        check.update(&bytes);
        let tokens = bytes.chunks_exact(4).map(|token| {
            let token = token.try_into().expect("four bytes");
            u32::from_le_bytes(token)
        });
        let tokens: Vec<u32> = tokens.collect();
        let damaged = || {
            place.malformed(
                head_end,
                "tokens, keys and values are not what was written; start anew",
            )
        };
        let vocab = engine.shape().vocab;
        if tokens.iter().any(|&token| token as usize >= vocab) {
            return Err(damaged());
        }
        session.restore(tokens, |plane: &mut [u8]| {
            input.read_exact(plane).map_err(&failed)?;
            check.update(plane);
            Ok::<_, FileError>(())
        })?;
        if input.read_u32::<LittleEndian>().map_err(&failed)? != check.finalize() {
            return Err(damaged());
        }

        self.session = session;
        self.messages = head.messages;
        self.change(Settings {
            seed: head.seed,
            ..head.settings
        });
        self.sampler.go_to(head.position);
        Ok(())
    }

    fn read_head(
        &self,
        input: &mut impl Read,
        len: u64,
        place: &Place<'_>,
    ) -> Result<Found, FileError> {
        let failed = place.io("read the conversation");
        let mut magic = [0; 8];
        if len < START + END {
            return Err(place.malformed(0, "no saved conversation of fewbit's: too short"));
        }
        input.read_exact(&mut magic).map_err(&failed)?;
        if magic != MAGIC {
            return Err(place.malformed(0, "no saved conversation of fewbit's"));
        }
        let version = input.read_u32::<LittleEndian>().map_err(&failed)?;
        if version != VERSION {
            let problem =
                format!("version {version}, this program knows {VERSION}; take a newer fewbit");
            return Err(place.malformed(8, problem));
        }
        let check = input.read_u32::<LittleEndian>().map_err(&failed)?;
        let bytes = input.read_u64::<LittleEndian>().map_err(&failed)?;
        if bytes > MAX_HEAD || bytes > len - START - END {
            let problem = format!(
                "a head of {bytes} bytes in a file of {len}: it was cut off or changed; start anew"
            );
            return Err(place.malformed(16, problem));
        }
        let mut head = vec![0; bytes as usize];
        input.read_exact(&mut head).map_err(&failed)?;
        if crc32fast::hash(&head) != check {
            return Err(place.malformed(START, "the head is not what was written; start anew"));
        }
        let head: Head = serde_json::from_slice(&head)
            .map_err(|error| place.malformed(START, format!("the head: {error}; start anew")))?;

        let (theirs, ours) = (&head.owner, self.owner()?);
        if theirs.fingerprint != ours.fingerprint {
            return Err(place.foreign(format!(
                "was written with another model ({}) or other adapters, not with this {}; give -m and --lora as it was written, or start anew",
                theirs.model, ours.model
            )));
        }
        if theirs.kv != ours.kv {
            return Err(place.foreign(format!(
                "keeps keys and values as {}, this conversation as {}; give --kv {}",
                theirs.kv,
                ours.kv,
                theirs.kv.to_lowercase()
            )));
        }
        let end = START + bytes;
        Ok(Found { head, end })
    }
}

/// A head, and where it ends in its file.
struct Found {
    head: Head,
    end: u64,
}
