//! Prompts of the families, for files without a template of their own.

use crate::gguf::Metadata;
use crate::tokenizer::{TokenKind, Tokenizer};

/// A family's way to write a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `[INST] … [/INST] …</s>` in letters: Mistral 7B Instruct v0.1, Mixtral 8x7B Instruct v0.1.
    MistralV1,
    /// `[INST]…[/INST]…</s>` with control tokens: Mixtral 8x22B Instruct and later.
    MistralV3,
    /// `<|im_start|>role … <|im_end|>`: SmolLM2, Hermes, Dolphin.
    ChatMl,
    /// `[INST] <<SYS>> …`: Llama 2 Chat.
    Llama2,
    /// `<|start_header_id|>role<|end_header_id|> … <|eot_id|>`: Llama 3 Instruct.
    Llama3,
    /// `User: … Assistant: …`: models that were never taught another way.
    Plain,
}

const ALL: [Style; 6] = [
    Style::MistralV1,
    Style::MistralV3,
    Style::ChatMl,
    Style::Llama2,
    Style::Llama3,
    Style::Plain,
];

impl Style {
    /// The style of that name.
    pub fn named(name: &str) -> Option<Style> {
        ALL.into_iter().find(|style| style.name() == name)
    }

    /// All names, for messages.
    pub fn names() -> String {
        ALL.map(Style::name).join(", ")
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Style::MistralV1 => "mistral-v1",
            Style::MistralV3 => "mistral-v3",
            Style::ChatMl => "chatml",
            Style::Llama2 => "llama2",
            Style::Llama3 => "llama3",
            Style::Plain => "plain",
        }
    }

    /// What a file without a template most likely was taught: told by its control tokens, then by its name.
    pub(super) fn of(metadata: &Metadata, tokenizer: &Tokenizer) -> Style {
        let control = |piece: &str| {
            let kind = tokenizer.id(piece).and_then(|id| tokenizer.kind(id));
            matches!(kind, Some(TokenKind::Control | TokenKind::UserDefined))
        };
        let name = ["general.name", "general.basename", "general.finetune"]
            .iter()
            .filter_map(|key| metadata.str(key).ok().flatten())
            .collect::<Vec<_>>()
            .join(" ")
            .to_lowercase();
        let named = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        if control("<|start_header_id|>") {
            Style::Llama3
        } else if control("<|im_start|>") {
            Style::ChatMl
        } else if control("[INST]") {
            Style::MistralV3
        } else if named(&["mistral", "mixtral"]) && named(&["instruct", "chat"]) {
            Style::MistralV1
        } else if named(&["llama-2", "llama 2", "llama2", "llama_2"]) && named(&["chat"]) {
            Style::Llama2
        } else {
            Style::Plain
        }
    }

    pub(super) fn source(self) -> &'static str {
        match self {
            Style::MistralV1 => MISTRAL_V1,
            Style::MistralV3 => MISTRAL_V3,
            Style::ChatMl => CHATML,
            Style::Llama2 => LLAMA2,
            Style::Llama3 => LLAMA3,
            Style::Plain => PLAIN,
        }
    }
}

/// The system message leads the first user message. An answer's space is the one that SentencePiece puts before it.
const MISTRAL_V1: &str = "\
{{- bos_token -}}
{%- set told = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set told.system = told.system + message.content + '\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {{- '[INST] ' + told.system + message.content + ' [/INST]' -}}
        {%- set told.system = '' -%}
    {%- elif message.role == 'assistant' -%}
        {{- (' ' + message.content if message.content else '') + eos_token -}}
    {%- else -%}
        {{- raise_exception('roles are system, user and assistant, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
";

/// The system message leads the last user message, and the tools stand before that. No spaces: after a control token the
/// vocabulary adds its own.
const MISTRAL_V3: &str = "\
{{- bos_token -}}
{%- set told = namespace(system='', last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set told.system = told.system + message.content + '\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {%- set told.last = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if tools and loop.index0 == told.last -%}
            {{- '[AVAILABLE_TOOLS]' + tools|tojson + '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]' + (told.system if loop.index0 == told.last else '') + message.content + '[/INST]' -}}
    {%- elif message.role == 'assistant' and message.tool_calls -%}
        {{- '[TOOL_CALLS][' -}}
        {%- for call in message.tool_calls -%}
            {{- '{\"name\": ' + call.function.name|tojson + ', \"arguments\": ' + call.function.arguments|tojson -}}
            {{- (', \"id\": ' + call.id|tojson if call.id else '') + '}' + ('' if loop.last else ', ') -}}
        {%- endfor -%}
        {{- ']' + eos_token -}}
    {%- elif message.role == 'assistant' -%}
        {{- message.content + eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS]{\"content\": ' + message.content|parsed|tojson + ', \"call_id\": ' -}}
        {{- message.tool_call_id|tojson + '}[/TOOL_RESULTS]' -}}
    {%- elif message.role != 'system' -%}
        {{- raise_exception('roles are system, user, assistant and tool, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
";

const CHATML: &str = "\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' -}}
";

/// Every pair of question and answer is a text of its own, from BOS to EOS.
const LLAMA2: &str = "\
{%- set told = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set told.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {{- bos_token + '[INST] ' + told.system + message.content.strip() + ' [/INST]' -}}
        {%- set told.system = '' -%}
    {%- elif message.role == 'assistant' -%}
        {{- ' ' + message.content.strip() + ' ' + eos_token -}}
    {%- else -%}
        {{- raise_exception('roles are system, user and assistant, not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
";

const LLAMA3: &str = "\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
";

const PLAIN: &str = "\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content + '\\n\\n' -}}
    {%- else -%}
        {{- message.role.capitalize() + ': ' + message.content + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{{- 'Assistant:' -}}
";
