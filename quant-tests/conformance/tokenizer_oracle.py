"""Writes the tokenizers' golden files: ids of the sample by the tokenizers that others trust.

    pip install mistral-common sentencepiece tokenizers
    python tokenizer_oracle.py sample          fixtures/text/tokenizer-sample.json
    python tokenizer_oracle.py mistral         fixtures/golden/mistral-v1-tokens.json, mistral-v1-prompts.json
    python tokenizer_oracle.py fixture         fixtures/golden/tiny-mixtral-{sample,prompts}.json
    python tokenizer_oracle.py byte-bpe TEXT…  fixtures/byte-bpe/, fixtures/golden/byte-bpe-tokens.json
    python tokenizer_oracle.py check           fails where the files of `mistral` and `fixture` are not what the oracles say
    python tokenizer_oracle.py vocabulary      prints the path of mistral-common's tokenizer.model.v1

`mistral` holds SentencePiece's ids of tokenizer.model.v1 (mistral-common ships that file; it is not part of this
repository) and mistral-common's ids of conversations; `fixture` the same of the trained fixture's vocabulary. `byte-bpe` trains a small byte-level BPE on the given texts and
holds the ids of the `tokenizers` package under each pre-tokenizer.
"""

import json
import sys
import tempfile
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SAMPLE = FIXTURES / "text" / "tokenizer-sample.json"

# With `check`, files that differ from what would be written; nothing is written then.
differing = None


def write(path, value):
    items = value if isinstance(value, list) else [value]
    lines = ",\n".join(json.dumps(item, ensure_ascii=True, separators=(",", ":")) for item in items)
    content = f"[\n{lines}\n]\n" if isinstance(value, list) else lines + "\n"
    if differing is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != content:
        differing.append(path.name)


def sample():
    texts = [
        "",
        " ",
        "Hello world",
        " Hello world",
        "  Hello  world  ",
        "The quick brown fox jumps over the lazy dog, doesn't it? I'll say they've HE'S won't.",
        "Portez ce vieux whisky au juge blond qui fume : l'été, où ça, à Noël ; « déjà vu », œuf, naïve.",
        "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. Straßenbahnhaltestelle, Donaudampfschifffahrt!",
        "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia; ¿qué pasó?, ¡añoraba a su niñez!",
        "Pranzo d'acqua fa volti sghembi. Perché no? Cos'è più, così, città, virtù, l'università.",
        "def f(x: int) -> dict[str, list]:\n    if x >= 0x1F and x != 10_000:\n\t\treturn {'a': [x ** 2, -1.5e-3]}\n    # done\n",
        "fn main() {\n    let v: Vec<u8> = b\"abc\".to_vec();\n    println!(\"{:?} {}\", v, v.len() << 3);\n}\n",
        "#include <stdio.h>\r\nint main(void)\r\n{\r\n  puts(\"hi\\n\");\r\n}\r\n",
        "SELECT * FROM t WHERE a <> 'x' AND b LIKE '%y%'; -- comment\n/* ==== **** //// ---- ~~~~ */",
        "<html><body class=\"a-b\">&nbsp;&amp;</body></html>",
        "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt ~/x/../y",
        "😀 😃👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇩🇪🇪🇸🇮🇹 1️⃣ ❤️ ☂",
        "漢字かな交じり文。中文分词测试，你好世界！한국어 텍스트",
        "مرحبا بالعالم، كيف حالك؟ שלום עולם हिन्दी में पाठ ไทย",
        "e\u0301 n\u0303 a\u0308\u0304 Å \u212b ﬁ \u00bd ² ⅷ Ⅻ ٣٤٥ ① ǅ ʰ ª",
        "a\u00a0b\u2003c\u200bd\ufeffe\u00adf\u2028g\u2029h\u0085i",
        "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 2026-11-23 07:08:09 v1.2.3",
        "x" * 300,
        "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogoch" * 4,
        "CamelCaseAndSnake_case_AND_SCREAMING HTTPServerError iPhone McDonald ÉCOLE École",
        "a\tb\t\tc\t\t\td \t e\t ",
        "line\n\nline\n\n\nline\n \n  \n\tline \n",
        "one\rtwo\r\nthree\n\rfour",
        "?!... ---- ==== ____ ((([[[{{{ \"\"\" ''' ``` $$$ ### @@@ %%% ^^^ &&& *** +++ ||| ~~~",
        "=" * 37 + " " + "-" * 41 + "\n" + "*" * 23 + "/" * 19 + "_" * 33 + "." * 29,
        "<s> hi </s> <unk> [INST] what [/INST] <|im_start|>user\nx<|im_end|> <0x0A> <|endoftext|>",
        "<s>[INST] What? [/INST] That.</s> [INST] And? [/INST]",
        "\u2581already\u2581marked\u2581 \u2581",
        "\x00\x01\x1f\x7f control \u0300 first",
        "\U0001d54f\U00010348\U0010fffd\ue000\ufffd",
    ]
    texts += [" " * n for n in range(1, 41)]
    texts += ["a" + " " * n + "b" for n in range(2, 41)]
    texts += ["\n" * n + "x" for n in range(1, 6)]
    texts += ["x\n" + " " * n + "y = 1" for n in (2, 3, 4, 6, 8, 12, 16, 20, 24, 32)]
    write(SAMPLE, texts)


def texts():
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


def vocabulary():
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


CONVERSATIONS = [
    [("user", "Hello, who are you?")],
    [("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3 * 3?")],
    [
        ("system", "Answer in French."),
        ("user", "Name a colour."),
        ("assistant", "Bleu, bien sûr !"),
        ("user", "  Another one?\n\nTwo even.  "),
        ("assistant", "Rouge\n- et vert"),
        ("user", "Merci 😀"),
    ],
    [("user", "Print <s> and </s> and <unk>."), ("assistant", "<s> and </s>"), ("user", "[/INST] no [INST]")],
    [("user", "def f():\n    return 1\n"), ("assistant", "  indented"), ("user", "ok")],
]


def mistral():
    sentencepiece_ids(vocabulary(), "mistral-v1-tokens.json")
    prompts(vocabulary(), "mistral-v1-prompts.json")


def fixture():
    model = FIXTURES / "tiny-mixtral" / "tokenizer.model"
    sentencepiece_ids(model, "tiny-mixtral-sample.json")
    with tempfile.TemporaryDirectory() as folder:
        # mistral-common tells the form of prompts by the file's name.
        versioned = Path(folder) / "tokenizer.model.v1"
        versioned.write_bytes(model.read_bytes())
        prompts(versioned, "tiny-mixtral-prompts.json")


def sentencepiece_ids(path, name):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    write(FIXTURES / "golden" / name, [{"text": t, "ids": model.encode(t)} for t in texts()])


def prompts(path, name):
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    tokenizer = MistralTokenizer.from_file(str(path))
    conversations = []
    for turns in CONVERSATIONS:
        request = ChatCompletionRequest(messages=[kinds[role](content=content) for role, content in turns])
        conversations.append(
            {
                "messages": [{"role": role, "content": content} for role, content in turns],
                "ids": tokenizer.encode_chat_completion(request).tokens,
            }
        )
    write(FIXTURES / "golden" / name, conversations)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_bpe(paths):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def split(pattern):
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    smollm = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = smollm
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train(paths, trainer)
    folder = FIXTURES / "byte-bpe"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(t)): {"content": t, "special": True, "normalized": False} for t in special
        },
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    cases = []
    for name, pre, ignore_merges in [
        ("smollm", smollm, False),
        ("llama-bpe", split(LLAMA3), True),
        ("tekken", split(TEKKEN), True),
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    ]:
        tokenizer.pre_tokenizer = pre
        tokenizer.model.ignore_merges = ignore_merges
        cases += [{"pre": name, "text": t, "ids": tokenizer.encode(t, add_special_tokens=False).ids} for t in texts()]
    write(FIXTURES / "golden" / "byte-bpe-tokens.json", cases)


def check():
    global differing
    differing = []
    mistral()
    fixture()
    if differing:
        sys.exit(f"other ids than the oracles give: {', '.join(differing)}")


def main():
    match sys.argv[1:]:
        case ["sample"]:
            sample()
        case ["mistral"]:
            mistral()
        case ["fixture"]:
            fixture()
        case ["byte-bpe", *paths] if paths:
            byte_bpe(paths)
        case ["check"]:
            check()
        case ["vocabulary"]:
            print(vocabulary())
        case _:
            sys.exit(__doc__)


main()
