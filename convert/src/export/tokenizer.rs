//! The tokenizer's files, from a GGUF file's metadata: `tokenizer.json` for transformers' fast tokenizers and vLLM,
//! `tokenizer_config.json`, and of a SentencePiece vocabulary `tokenizer.model` too, which alone holds the scores.

use fewbit::gguf::Metadata;
use fewbit::tokenizer::{TokenKind, pre_tokenizer_patterns};
use serde_json::{Map, Value as Json, json};

use super::config::pretty;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::sentencepiece::{self, Piece, SpmModel};

/// What the metadata says of the vocabulary.
struct Vocabulary<'a> {
    tokens: &'a [String],
    kinds: Vec<TokenKind>,
    merges: &'a [String],
    bos: Option<u32>,
    eos: Option<u32>,
    unk: Option<u32>,
    pad: Option<u32>,
    add_bos: bool,
    add_eos: bool,
}

/// The files, by name.
pub(super) fn files(checkpoint: &Checkpoint) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let meta = &checkpoint.metadata;
    let vocabulary = Vocabulary::read(meta)?;
    let model = meta.require_str("tokenizer.ggml.model")?;
    let mut files = Vec::new();
    let tokenizer = match model {
        "llama" => {
            let spm = vocabulary.sentencepiece(meta)?;
            files.push(("tokenizer.model", sentencepiece::encode(&spm)));
            vocabulary.scored(spm.add_dummy_prefix)
        }
        "gpt2" => vocabulary.byte_level(meta)?,
        other => {
            let problem = format!("{other:?} is not written; llama and gpt2 are");
            return Err(meta.error("tokenizer.ggml.model", problem).into());
        }
    };
    files.push(("tokenizer.json", pretty(&tokenizer)));
    let template = meta.str(fewbit::chat::TEMPLATE_KEY)?;
    files.push((
        "tokenizer_config.json",
        pretty(&vocabulary.settings(meta, model, template)?),
    ));
    Ok(files)
}

impl<'a> Vocabulary<'a> {
    fn read(meta: &'a Metadata) -> Result<Self> {
        const TYPES: &str = "tokenizer.ggml.token_type";
        const MERGES: &str = "tokenizer.ggml.merges";
        let tokens = meta.require_strings("tokenizer.ggml.tokens")?;
        let kinds = meta.require_i32s(TYPES)?;
        let kind = |number: &i32| {
            TokenKind::from_number(*number)
                .ok_or_else(|| meta.error(TYPES, format!("{number} is no kind of token")))
        };
        let kinds = kinds
            .iter()
            .map(kind)
            .collect::<std::result::Result<Vec<_>, _>>()?;
        if kinds.len() != tokens.len() {
            let problem = format!("has {} entries for {} tokens", kinds.len(), tokens.len());
            return Err(meta.error(TYPES, problem).into());
        }
        let merges = meta.strings(MERGES)?.ok_or_else(|| {
            meta.error(
                MERGES,
                "is missing: convert the checkpoint with fewbit-convert, which writes them",
            )
        })?;
        let id = |role: &str| meta.u32(&format!("tokenizer.ggml.{role}_token_id"));
        let bool = |key: &str| meta.bool(&format!("tokenizer.ggml.{key}"));
        Ok(Self {
            tokens,
            kinds,
            merges,
            bos: id("bos")?,
            eos: id("eos")?,
            unk: id("unknown")?,
            pad: id("padding")?,
            add_bos: bool("add_bos_token")?.unwrap_or(false),
            add_eos: bool("add_eos_token")?.unwrap_or(false),
        })
    }

    fn text(&self, id: Option<u32>) -> Option<&'a str> {
        self.tokens.get(id? as usize).map(String::as_str)
    }

    fn sentencepiece(&self, meta: &Metadata) -> Result<SpmModel> {
        const SCORES: &str = "tokenizer.ggml.scores";
        let scores = meta.require_f32s(SCORES)?;
        if scores.len() != self.tokens.len() {
            let problem = format!(
                "has {} entries for {} tokens",
                scores.len(),
                self.tokens.len()
            );
            return Err(meta.error(SCORES, problem).into());
        }
        let parts = self.tokens.iter().zip(scores).zip(&self.kinds);
        let piece = |((text, score), kind): ((&String, f32), &TokenKind)| Piece {
            text: text.clone(),
            score,
            kind: *kind,
        };
        Ok(SpmModel {
            pieces: parts.map(piece).collect(),
            unk: self.unk,
            bos: self.bos,
            eos: self.eos,
            pad: self.pad,
            add_dummy_prefix: meta
                .bool("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(true),
        })
    }

    /// Tokens that text is searched for before anything else.
    fn added(&self) -> Vec<Json> {
        let is_added = |kind: TokenKind| {
            matches!(
                kind,
                TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined
            )
        };
        let entries = self.tokens.iter().zip(&self.kinds).enumerate();
        let added = entries.filter(|(_, (_, kind))| is_added(**kind));
        let entry = |(id, (text, kind)): (usize, (&String, &TokenKind))| {
            json!({
                "id": id,
                "content": text,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind != TokenKind::UserDefined,
            })
        };
        added.map(entry).collect()
    }

    /// The tokens but for those that only fill up the embedding.
    fn vocab(&self) -> Map<String, Json> {
        let entries = self.tokens.iter().zip(&self.kinds).enumerate();
        let used = entries.filter(|(_, (_, kind))| **kind != TokenKind::Unused);
        used.map(|(id, (text, _))| (text.clone(), json!(id)))
            .collect()
    }

    fn merges(&self) -> Vec<Json> {
        let pair = |merge: &String| match merge.split_once(' ') {
            Some((left, right)) => json!([left, right]),
            None => json!(merge),
        };
        self.merges.iter().map(pair).collect()
    }

    /// What puts BOS and EOS around texts.
    fn post_processor(&self) -> Json {
        let bos = self.text(self.bos).filter(|_| self.add_bos);
        let eos = self.text(self.eos).filter(|_| self.add_eos);
        let special =
            |text: &str, sequence: u8| json!({"SpecialToken": {"id": text, "type_id": sequence}});
        let around = |name: &str, sequence: u8| {
            let mut parts = Vec::new();
            parts.extend(bos.map(|text| special(text, sequence)));
            parts.push(json!({"Sequence": {"id": name, "type_id": sequence}}));
            parts.extend(eos.map(|text| special(text, sequence)));
            parts
        };
        if bos.is_none() && eos.is_none() {
            return Json::Null;
        }
        let mut tokens = Map::new();
        for (text, id) in [(bos, self.bos), (eos, self.eos)] {
            if let Some(text) = text {
                let entry = json!({"id": text, "ids": [id], "tokens": [text]});
                tokens.insert(text.to_owned(), entry);
            }
        }
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": ([around("A", 0), around("B", 1)].concat()),
            "special_tokens": tokens,
        })
    }

    fn tokenizer(&self, steps: [Json; 3], model: Json) -> Json {
        let [normalizer, pre_tokenizer, decoder] = steps;
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(),
            "decoder": decoder,
            "model": model,
        })
    }

    fn bpe(&self, scored: bool) -> Json {
        json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": self.text(self.unk).filter(|_| scored),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": scored,
            "byte_fallback": scored,
            "ignore_merges": false,
            "vocab": self.vocab(),
            "merges": self.merges(),
        })
    }

    /// A SentencePiece vocabulary, as transformers' LlamaTokenizerFast has it.
    fn scored(&self, space_in_front: bool) -> Json {
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut normalizers = vec![replace(" ", "▁")];
        let mut decoders = vec![
            replace("▁", " "),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if space_in_front {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let steps = [
            json!({"type": "Sequence", "normalizers": normalizers}),
            Json::Null,
            json!({"type": "Sequence", "decoders": decoders}),
        ];
        self.tokenizer(steps, self.bpe(true))
    }

    fn byte_level(&self, meta: &Metadata) -> Result<Json> {
        const PRE: &str = "tokenizer.ggml.pre";
        let pre = meta.require_str(PRE)?;
        let patterns = pre_tokenizer_patterns(pre).ok_or_else(|| {
            meta.error(PRE, format!("{pre:?} is none of the known pre-tokenizers"))
        })?;
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut steps: Vec<Json> = patterns.iter().map(split).collect();
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        steps.push(bytes(false));
        let steps = [
            Json::Null,
            json!({"type": "Sequence", "pretokenizers": steps}),
            bytes(true),
        ];
        Ok(self.tokenizer(steps, self.bpe(false)))
    }

    /// `tokenizer_config.json`.
    fn settings(&self, meta: &Metadata, model: &str, template: Option<&str>) -> Result<Json> {
        let mut settings = Map::new();
        let mut put = |key: &str, value: Json| settings.insert(key.to_owned(), value);
        put("add_bos_token", json!(self.add_bos));
        put("add_eos_token", json!(self.add_eos));
        let mut added = Map::new();
        for entry in self.added() {
            let mut entry = entry;
            let id = entry
                .as_object_mut()
                .and_then(|entry| entry.shift_remove("id"));
            added.insert(id.unwrap_or_default().to_string(), entry);
        }
        put("added_tokens_decoder", Json::Object(added));
        for (key, id) in [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unk", self.unk),
            ("pad", self.pad),
        ] {
            put(&format!("{key}_token"), json!(self.text(id)));
        }
        put("clean_up_tokenization_spaces", json!(false));
        let context = meta.require_u64("llama.context_length")?;
        put("model_max_length", json!(context));
        // The class that takes tokenizer.json as it is, whatever is in it.
        put("tokenizer_class", json!("PreTrainedTokenizerFast"));
        if model == "llama" {
            put("legacy", json!(true));
        }
        if let Some(template) = template {
            put("chat_template", json!(template));
        }
        Ok(Json::Object(settings))
    }
}
