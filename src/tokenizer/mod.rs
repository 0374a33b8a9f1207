//! Text ⇄ token ids, from GGUF metadata.
//!
//! A text is first cut at the tokens that stand for themselves: user-defined ones always,
//! control tokens only where the caller asks for it. Each stretch between them goes to the model:
//!
//! - `llama`: SentencePiece BPE (`spm`); spaces are `▁`, a stretch at the start of the text or after
//!   a control token gets one `▁` in front where the vocabulary says so (`add_space_prefix`).
//! - `gpt2`: byte-level BPE (`bpe`), the `tokenizers` crate's model behind the pre-tokenizer that
//!   `tokenizer.ggml.pre` names.
//!
//! Cuts, prefixes and defaults are llama.cpp's, so that one file gives the same ids in both.

mod bpe;
mod spm;
mod stream;
mod vocab;

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};

pub use bpe::{piece_of_bytes, pre_tokenizer_name, pre_tokenizer_patterns};
pub use stream::Stream;
pub use vocab::TokenKind;

use crate::gguf::{self, Metadata};
use bpe::ByteLevel;
use spm::SentencePiece;
use vocab::Vocab;

/// The space of SentencePiece's pieces.
const SPACE: char = '▁';

/// What can go wrong with a vocabulary.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key is missing or holds what it must not; names file and key.
    #[error(transparent)]
    Metadata(#[from] gguf::Error),
    /// The `tokenizers` crate refused the vocabulary or the text.
    #[error("tokenizer: {0}")]
    Model(tokenizers::Error),
}

/// Texts ⇄ ids of one vocabulary.
#[derive(Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    model: Model,
    /// Finds user-defined tokens.
    user_defined: Cuts,
    /// Finds user-defined, control and unknown tokens.
    special: Cuts,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    /// Whether a stretch of text that starts a text or follows a control token gets a space in front.
    adds_space: bool,
    /// Ascending.
    ends: Vec<u32>,
}

#[derive(Debug)]
enum Model {
    SentencePiece(Box<SentencePiece>),
    ByteLevel(Box<ByteLevel>),
}

/// A piece of a text on its way to ids.
enum Stretch<'t> {
    Text(&'t str),
    Token(u32, &'t str),
}

/// Texts of tokens that stand for themselves, and their ids.
#[derive(Debug)]
struct Cuts {
    finder: AhoCorasick,
    ids: Vec<u32>,
}

impl Cuts {
    fn new(vocab: &Vocab, chosen: impl Fn(TokenKind) -> bool) -> Result<Cuts, Error> {
        let ids: Vec<u32> = (0..vocab.len() as u32)
            .filter(|&id| chosen(vocab.kind(id)) && !vocab.bytes(id).is_empty())
            .collect();
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(ids.iter().map(|&id| vocab.bytes(id)))
            .map_err(|e| Error::Model(Box::new(e)))?;
        Ok(Cuts { finder, ids })
    }

    /// `text` in order, cut at the tokens; no stretch of text is empty.
    fn cut<'t>(&self, text: &'t str) -> Vec<Stretch<'t>> {
        let mut stretches = Vec::new();
        let mut done = 0;
        for found in self.finder.find_iter(text) {
            if done < found.start() {
                stretches.push(Stretch::Text(&text[done..found.start()]));
            }
            let id = self.ids[found.pattern().as_usize()];
            stretches.push(Stretch::Token(id, &text[found.range()]));
            done = found.end();
        }
        if done < text.len() {
            stretches.push(Stretch::Text(&text[done..]));
        }
        stretches
    }
}

/// Tokens whose text ends an answer wherever they are control or user-defined tokens: files often name only
/// one end in `tokenizer.ggml.eos_token_id`, and a chat model stops at another.
const END_TEXTS: [&str; 9] = [
    "</s>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<EOT>",
];

impl Tokenizer {
    /// The tokenizer that a file's metadata describes (`tokenizer.ggml.*`).
    ///
    /// Every list's length, every id and every merge is checked; errors name file and key.
    pub fn from_metadata(metadata: &Metadata) -> Result<Tokenizer, Error> {
        let name = metadata.require_str("tokenizer.ggml.model")?;
        let sentencepiece = match name {
            "llama" => true,
            "gpt2" => false,
            _ => {
                return Err(metadata
                    .error(
                        "tokenizer.ggml.model",
                        format!("names the tokenizer {name:?}; supported are \"llama\" (SentencePiece) and \"gpt2\" (byte-level BPE)"),
                    )
                    .into());
            }
        };
        let vocab = Vocab::from_metadata(metadata, sentencepiece)?;
        let (model, adds_bos) = if sentencepiece {
            (
                Model::SentencePiece(Box::new(SentencePiece::from_metadata(metadata, &vocab)?)),
                true,
            )
        } else {
            let model = ByteLevel::from_metadata(metadata, &vocab)?;
            let adds_bos = model.adds_bos();
            (Model::ByteLevel(Box::new(model)), adds_bos)
        };

        // Without the keys, a SentencePiece vocabulary has the ids that SentencePiece gives by default.
        let id = |key: &str, default: Option<u32>| vocab.id_of_key(metadata, key, default);
        let default = |id: u32| (sentencepiece && (id as usize) < vocab.len()).then_some(id);
        let bos = id("tokenizer.ggml.bos_token_id", default(1))?;
        let eos = id("tokenizer.ggml.eos_token_id", default(2))?;
        let adds_bos = metadata
            .bool("tokenizer.ggml.add_bos_token")?
            .unwrap_or(adds_bos && bos.is_some());
        if adds_bos && bos.is_none() {
            return Err(metadata
                .error(
                    "tokenizer.ggml.add_bos_token",
                    "is true, but tokenizer.ggml.bos_token_id is missing",
                )
                .into());
        }
        let adds_space = sentencepiece
            && metadata
                .bool("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(true);

        let mut ends: Vec<u32> = eos.into_iter().collect();
        ends.extend(id("tokenizer.ggml.eot_token_id", None)?);
        ends.extend(id("tokenizer.ggml.eom_token_id", None)?);
        ends.extend(
            END_TEXTS
                .iter()
                .filter_map(|text| vocab.id(text))
                .filter(|&id| {
                    matches!(vocab.kind(id), TokenKind::Control | TokenKind::UserDefined)
                }),
        );
        ends.sort_unstable();
        ends.dedup();

        Ok(Tokenizer {
            user_defined: Cuts::new(&vocab, |kind| kind == TokenKind::UserDefined)?,
            special: Cuts::new(&vocab, |kind| {
                matches!(
                    kind,
                    TokenKind::UserDefined | TokenKind::Control | TokenKind::Unknown
                )
            })?,
            vocab,
            model,
            bos,
            eos,
            adds_bos,
            adds_space,
            ends,
        })
    }

    /// Ids of `text`. With `special`, the texts of control tokens (`<s>`, `<|im_start|>`) become these
    /// tokens; without, they are text like any other. No BOS is added.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, special, &mut ids)?;
        Ok(ids)
    }

    /// As [`encode`](Self::encode), with BOS in front where the vocabulary adds one.
    pub fn encode_with_bos(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        ids.extend(self.bos.filter(|_| self.adds_bos));
        self.encode_into(text, special, &mut ids)?;
        Ok(ids)
    }

    fn encode_into(&self, text: &str, special: bool, ids: &mut Vec<u32>) -> Result<(), Error> {
        let cuts = if special {
            &self.special
        } else {
            &self.user_defined
        };
        self.encode_stretches(cuts.cut(text), None, ids)
    }

    /// `without` is left out of the text between tokens.
    fn encode_stretches(
        &self,
        stretches: Vec<Stretch<'_>>,
        without: Option<char>,
        ids: &mut Vec<u32>,
    ) -> Result<(), Error> {
        let mut after_token = true;
        for stretch in stretches {
            match stretch {
                Stretch::Token(id, _) => ids.push(id),
                Stretch::Text(text) => {
                    let text = match without {
                        Some(mark) if text.contains(mark) => Cow::Owned(text.replace(mark, "")),
                        _ => Cow::Borrowed(text),
                    };
                    match &self.model {
                        Model::SentencePiece(model) => {
                            let prefix = (self.adds_space && after_token).then_some(' ');
                            let spaced = prefix.into_iter().chain(text.chars());
                            let escaped: String =
                                spaced.map(|c| if c == ' ' { SPACE } else { c }).collect();
                            model.encode(&self.vocab, &escaped, ids);
                        }
                        Model::ByteLevel(model) => model.encode(&text, ids)?,
                    }
                }
            }
            after_token = matches!(stretch, Stretch::Token(..));
        }
        Ok(())
    }

    /// `text` with `mark` set inside every stretch that would be a control token, so that it is none any more.
    /// [`encode_broken`](Self::encode_broken) takes the marks out again. (A control token of a single
    /// character cannot be broken; no vocabulary has one.)
    pub(crate) fn break_control(&self, text: &str, mark: char) -> String {
        let mut text = text.to_owned();
        // A mark set in one token can lay another bare that overlapped it: until none is left.
        loop {
            let mut broken = String::with_capacity(text.len());
            for stretch in self.special.cut(&text) {
                match stretch {
                    Stretch::Token(id, token)
                        if self.is_hidden(id) && token.chars().count() > 1 =>
                    {
                        let mut letters = token.chars();
                        broken.extend(letters.next());
                        broken.push(mark);
                        broken += letters.as_str();
                    }
                    Stretch::Text(text) | Stretch::Token(_, text) => broken += text,
                }
            }
            if broken == text {
                return text;
            }
            text = broken;
        }
    }

    /// Ids of `text` with its control tokens, after which `mark` is taken out of the text between them.
    pub(crate) fn encode_broken(&self, text: &str, mark: char) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_stretches(self.special.cut(text), Some(mark), &mut ids)?;
        Ok(ids)
    }

    /// The text of `ids`; bytes that are no UTF-8 become replacement characters, ids outside the
    /// vocabulary nothing. With `special`, control tokens are written out, else left out. The space that
    /// encoding puts in front of a text is taken off again.
    pub fn decode(&self, ids: &[u32], special: bool) -> String {
        let mut stream = self.stream().at_start();
        if special {
            stream = stream.with_special();
        }
        let mut text = String::new();
        for &id in ids {
            text += &stream.push(id);
        }
        text + &stream.finish()
    }

    /// A streaming decoder of text that continues other text (a leading space stays) and
    /// leaves control tokens out.
    pub fn stream(&self) -> Stream<'_> {
        Stream::new(self)
    }

    /// The bytes that a token stands for (a control token's are its name); empty outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        if (id as usize) < self.vocab.len() {
            self.vocab.bytes(id)
        } else {
            &[]
        }
    }

    /// A token as the vocabulary writes it (`▁the`, `Ġthe`, `<0x0A>`).
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.vocab.piece(id)
    }

    /// The token that the vocabulary writes as `piece`.
    pub fn id(&self, piece: &str) -> Option<u32> {
        self.vocab.id(piece)
    }

    /// What kind of token `id` is.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        ((id as usize) < self.vocab.len()).then(|| self.vocab.kind(id))
    }

    /// Number of tokens.
    pub fn vocab_len(&self) -> usize {
        self.vocab.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a text begins with BOS.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The tokens that end an answer, ascending.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Whether `id` ends an answer (end of text, turn or message).
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Whether `id` is written out only on demand.
    fn is_hidden(&self, id: u32) -> bool {
        matches!(self.kind(id), Some(TokenKind::Control | TokenKind::Unknown))
    }
}
