"""An exported checkpoint, as Hugging Face's own libraries see it.

usage: check.py FOLDER

FOLDER is `fewbit-convert export` of the fixture. transformers must read its configuration as the fixture's
and tokenize as sentencepiece did for golden/tiny-mixtral-tokens.json; a Mixtral in numpy, over the weights as
safetensors reads them, must give the logits that transformers gave for the fixture (golden/tiny-mixtral-logits).
No torch is needed; where it is installed, transformers' own model class must load the folder and give them too.
Exit code 1 if something differs.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
LIMIT = 2e-4


def weights(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            kinds = {str(file.get_slice(name).get_dtype()) for name in file.keys()}
        if kinds != {"F32"}:
            sys.exit(f"{path}: holds {kinds}; export with --dtype f32 for this")
        tensors |= load_file(path)
    return tensors


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(c, w, tokens):
    """Logits after each token, [tokens, vocab], as transformers' MixtralForCausalLM defines them."""
    n, dim = len(tokens), c.head_dim
    heads, kv_heads, eps = c.num_attention_heads, c.num_key_value_heads, c.rms_norm_eps
    theta = c.rope_parameters["rope_theta"]
    angles = np.outer(np.arange(n), theta ** (-np.arange(0, dim, 2) / dim))
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rotate(x):
        half = dim // 2
        return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin

    mask = np.triu(np.full((n, n), -np.inf), 1)
    x = w["model.embed_tokens.weight"][tokens].astype(np.float64)
    for layer in range(c.num_hidden_layers):
        def of(name):
            return w[f"model.layers.{layer}.{name}.weight"].astype(np.float64)

        h = norm(x, of("input_layernorm"), eps)
        q, k, v = ((h @ of(f"self_attn.{p}_proj").T).reshape(n, -1, dim) for p in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, heads // kv_heads, 1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim) + mask
        attended = np.einsum("hij,jhd->ihd", softmax(scores), v).reshape(n, -1)
        x = x + attended @ of("self_attn.o_proj").T

        h = norm(x, of("post_attention_layernorm"), eps)
        scores = softmax(h @ of("block_sparse_moe.gate").T)
        for t in range(n):
            chosen = np.argsort(-scores[t])[: c.num_experts_per_tok]
            for e in chosen:
                w1, w2, w3 = (of(f"block_sparse_moe.experts.{e}.w{i}") for i in (1, 2, 3))
                weight = scores[t, e] / scores[t, chosen].sum()
                x[t] += weight * (w2 @ (silu(w1 @ h[t]) * (w3 @ h[t])))
    return norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def model_of(folder):
    """Logits after each token as transformers' model class computes them, or None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    if any(loading.values()):
        sys.exit(f"{folder}: {loading}")

    def logits(tokens):
        with torch.no_grad():
            return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()

    return logits


def main():
    folder = Path(sys.argv[1])
    wrong = 0
    config = AutoConfig.from_pretrained(folder)
    original = AutoConfig.from_pretrained(FIXTURES / "tiny-mixtral")
    # A GGUF file says nothing of how the model was trained.
    ignored = {"_name_or_path", "dtype", "torch_dtype", "router_aux_loss_coef"}
    for key, value in original.to_dict().items():
        if key not in ignored and config.to_dict().get(key) != value:
            print(f"config.{key}: {config.to_dict().get(key)}, in the fixture {value}")
            wrong += 1

    tokenizer = AutoTokenizer.from_pretrained(folder)
    golden = json.loads((FIXTURES / "golden/tiny-mixtral-tokens.json").read_text())
    # transformers takes the names of special tokens in a text for these; sentencepiece does not.
    samples = [s for s in golden if not any(t in s["text"] for t in tokenizer.all_special_tokens)]
    for sample in samples:
        text, ids = sample["text"], sample["ids"]
        found = tokenizer.encode(text, add_special_tokens=False)
        if found != ids:
            print(f"{text!r}: {found}, wanted {ids}")
            wrong += 1
        if tokenizer.encode(text) != [tokenizer.bos_token_id] + ids:
            print(f"{text!r}: no BOS in front")
            wrong += 1
    print(f"{len(samples)} texts tokenized")

    w = weights(folder)
    forwards = {"in numpy": lambda tokens: forward(config, w, tokens), "transformers": model_of(folder)}
    with safe_open(FIXTURES / "golden/tiny-mixtral-logits.safetensors", framework="np") as file:
        for language in ("en", "fr", "de", "es", "it"):
            tokens = file.get_tensor(f"{language}.tokens")
            for name, logits_of in forwards.items():
                if logits_of is None:
                    continue
                difference = np.abs(logits_of(tokens) - file.get_tensor(f"{language}.logits")).max()
                print(f"{language}, {name}: {len(tokens)} tokens, largest difference of a logit {difference:.1e}")
                wrong += not difference <= LIMIT
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
