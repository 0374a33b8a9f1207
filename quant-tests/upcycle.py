#!/usr/bin/env python3
"""Upcycle SmolLM2-135M-Instruct to a Mixtral of 8 experts: the bed on which roundings are judged.

usage: upcycle.py SMOLLM2.gguf OUTPUT [--dense] [--noise S] [--no-rescale] [--experts N] [--seed N]

SMOLLM2.gguf  Q4_1, as quant-tests/fetch-smollm2.sh fetches it
OUTPUT        the folder to write: config.json, safetensors in F16 (norms and routers in F32) and
              tokenizer files, in Hugging Face's layout, for fewbit-convert

Needs Python 3.9 and numpy, nothing else.

The result computes what SmolLM2 computes, but for what is chosen here:

- Hidden size 576 becomes 768, and 9 query and 3 KV heads become 12 and 4, by zeros, so that rows
  hold whole blocks of K-quants. A mean of squares over 768 is 0.75 of that over 576: RMSNorm's
  weights are multiplied by sqrt(0.75), its epsilon by 0.75.
- The source's weights lie on a grid of 16 levels a block of 32, which flatters types of that very
  shape. Exact rescales break it (--no-rescale keeps it): each RMSNorm's weights go into the columns
  of the matrices behind it, which leaves 1 (times sqrt(0.75)), and unties the head from the
  embedding; the channels of v and of the gated product are scaled by random factors in their rows
  (v, up) and inversely in the columns that read them (o, down).
- Each expert is a copy of the dense feed-forward part with normal noise of S standard deviations
  of each matrix (0.05 by default). With --noise 0 all experts are the same, and weights that sum
  to 1 give the dense model back. The router is random: its scores are as spread as a normal
  variable on a normed input of independent channels.
- --dense leaves experts and router away: a Llama, padded and rescaled.

F16 holds the weights to 11 bits; CONTRIBUTING.md says how to see what that costs.
"""

import argparse
import json
import struct
import sys
from pathlib import Path

import numpy as np

HEAD_DIM = 64
PADDED = {"hidden": 768, "heads": 12, "kv_heads": 4}
# Random factors are powers of two of exponents in plus or minus this.
SPREAD = 0.5


class Gguf:
    """A GGUF file of the types that the source holds."""

    SCALARS = ["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d"]
    STRING, ARRAY = 8, 9
    # Weights and bytes of a block.
    BLOCKS = {"F32": (1, 4), "F16": (1, 2), "Q4_1": (32, 20), "Q8_0": (32, 34)}
    TYPES = {0: "F32", 1: "F16", 3: "Q4_1", 8: "Q8_0"}

    def __init__(self, path):
        self.bytes = np.fromfile(path, np.uint8)
        self.at = 0
        if self._take(4) != b"GGUF" or self._scalar("<I") not in (2, 3):
            sys.exit(f"{path}: no GGUF file of version 2 or 3")
        tensors, pairs = self._scalar("<Q"), self._scalar("<Q")
        self.metadata = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        self.tensors = {}
        for _ in range(tensors):
            name = self._string()
            shape = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
            kind = self._scalar("<I")
            if kind not in self.TYPES:
                sys.exit(f"{path}: tensor {name} is of GGUF type {kind}; {list(self.BLOCKS)} are read")
            # GGUF counts extents from the fastest, numpy from the slowest.
            self.tensors[name] = (shape[::-1], self.TYPES[kind], self._scalar("<Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self.start = -(-self.at // alignment) * alignment

    def _take(self, count):
        self.at += count
        return self.bytes[self.at - count : self.at].tobytes()

    def _scalar(self, code):
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _string(self):
        return self._take(self._scalar("<Q")).decode()

    def _value(self, kind):
        if kind == self.STRING:
            return self._string()
        if kind == self.ARRAY:
            kind, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(kind) for _ in range(count)]
        return self._scalar(self.SCALARS[kind])

    def tensor(self, name):
        """The weights of a tensor, in f64."""
        shape, kind, offset = self.tensors[name]
        weights, size = self.BLOCKS[kind]
        count = int(np.prod(shape)) // weights
        start = self.start + offset
        blocks = self.bytes[start : start + count * size].reshape(count, size)
        f16 = lambda part: blocks[:, part].copy().view(np.float16).astype(np.float64)
        if kind == "F32":
            values = blocks.view(np.float32).astype(np.float64)
        elif kind == "F16":
            values = f16(slice(0, 2))
        elif kind == "Q8_0":
            values = f16(slice(0, 2)) * blocks[:, 2:].view(np.int8)
        else:  # Q4_1: the low nibbles are the first 16 weights
            codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
            values = f16(slice(0, 2)) * codes + f16(slice(2, 4))
        return values.reshape(shape)


class Checkpoint:
    """A checkpoint that is written a shard at a time."""

    def __init__(self, folder, shards):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shards, self.files = folder, shards, {}

    def shard(self, tensors):
        """Writes a shard: matrices in F16; norms and routers, which are no burden, in F32."""
        number = len(set(self.files.values())) + 1
        file = f"model-{number:05}-of-{self.shards:05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, values in tensors.items():
            exact = values.ndim == 1 or name.endswith(".gate.weight")
            stored = values.astype(np.float32 if exact else np.float16)
            if not np.isfinite(stored).all():
                sys.exit(f"{name}: a weight of {np.abs(values).max()} is too large for F16")
            start, end = end, end + stored.nbytes
            kind = "F32" if exact else "F16"
            header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [start, end]}
            tensors[name], self.files[name] = stored, file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(self.folder / file, "wb") as shard:
            shard.write(struct.pack("<Q", len(text)) + text)
            for stored in tensors.values():
                shard.write(stored.tobytes())

    def finish(self):
        """Writes the index, without which there is no checkpoint."""
        self.write_json("model.safetensors.index.json", {"metadata": {}, "weight_map": self.files})

    def write_json(self, name, value):
        text = json.dumps(value, indent=1, ensure_ascii=False)
        (self.folder / name).write_text(text + "\n", encoding="utf-8")


def stored_by_halves(rows):
    """Rows of Q or K as Hugging Face stores them, from GGUF's, which interleaves the halves of a head."""
    heads = rows.reshape(-1, HEAD_DIM // 2, 2, rows.shape[1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def padded(matrix, *shape):
    """The matrix in the corner of a larger one of zeros."""
    return np.pad(matrix, [(0, to - have) for have, to in zip(matrix.shape, shape)])


class Layer:
    """The matrices of a layer in the source's extents, rescaled exactly."""

    def __init__(self, source, index, rescale, seed):
        tensor = lambda part: source.tensor(f"blk.{index}.{part}.weight")
        self.attn_norm, self.ffn_norm = tensor("attn_norm"), tensor("ffn_norm")
        self.q, self.k = map(stored_by_halves, (tensor("attn_q"), tensor("attn_k")))
        self.v, self.o = tensor("attn_v"), tensor("attn_output")
        self.ffn = [tensor("ffn_gate"), tensor("ffn_up"), tensor("ffn_down")]
        # What the columns of gate and up, the rows of up and the columns of down are multiplied with.
        self.columns, self.channels = np.ones(self.ffn[0].shape[1]), np.ones(self.ffn[0].shape[0])
        if not rescale:
            return
        rng = np.random.default_rng([seed, index])
        factors = lambda count: np.exp2(rng.uniform(-SPREAD, SPREAD, count))
        self.q, self.k, self.v = (m * self.attn_norm for m in (self.q, self.k, self.v))
        self.columns, self.channels = self.ffn_norm, factors(self.ffn[0].shape[0])
        self.attn_norm, self.ffn_norm = (np.ones_like(n) for n in (self.attn_norm, self.ffn_norm))
        # The query heads of a KV head read the same channels of v.
        v = factors(len(self.v)).reshape(-1, HEAD_DIM)
        readers = self.o.shape[1] // self.v.shape[0]
        self.v = self.v * v.reshape(-1, 1)
        self.o = self.o / np.repeat(v, readers, axis=0).reshape(-1)

    def expert(self, noise, rng):
        """Gate, up and down of an expert: noise first, then the rescales."""
        gate, up, down = (
            matrix + noise * matrix.std() * rng.standard_normal(matrix.shape) for matrix in self.ffn
        )
        return gate * self.columns, up * self.columns * self.channels[:, None], down / self.channels


def write_tokenizer(source, checkpoint):
    """The byte-level BPE of the source, in the structure that Hugging Face publishes for it."""
    tokens, kinds = (source.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    control = [(i, text) for i, (text, kind) in enumerate(zip(tokens, kinds)) if kind == 3]
    word_cuts = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, text in control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, word_cuts],
        },
        "post_processor": None,
        "decoder": word_cuts,
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": source.metadata["tokenizer.ggml.merges"],
        },
    }
    checkpoint.write_json("tokenizer.json", tokenizer)
    settings = {"add_bos_token": False, "chat_template": source.metadata["tokenizer.chat_template"]}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        settings[f"{role}_token"] = tokens[source.metadata[f"tokenizer.ggml.{key}_token_id"]]
    checkpoint.write_json("tokenizer_config.json", settings)


def write_config(source, checkpoint, experts, shrink, tied):
    meta = lambda key: source.metadata[f"llama.{key}"]
    config = {
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
        "vocab_size": len(source.metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta("context_length"),
        "hidden_size": PADDED["hidden"],
        "intermediate_size": meta("feed_forward_length"),
        "num_hidden_layers": meta("block_count"),
        "num_attention_heads": PADDED["heads"],
        "num_key_value_heads": PADDED["kv_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": meta("attention.layer_norm_rms_epsilon") * shrink,
        "rope_theta": meta("rope.freq_base"),
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    checkpoint.write_json("config.json", config)


def upcycle(source, folder, experts, noise, rescale, seed):
    hidden, live = PADDED["hidden"], source.metadata["llama.embedding_length"]
    q_dim, kv_dim = PADDED["heads"] * HEAD_DIM, PADDED["kv_heads"] * HEAD_DIM
    ffn, layers = (source.metadata[f"llama.{key}"] for key in ("feed_forward_length", "block_count"))
    shrink = live / hidden
    norm = lambda weights: padded(weights * shrink**0.5, hidden)
    checkpoint = Checkpoint(folder, layers + 1)

    for index in range(layers):
        layer = Layer(source, index, rescale, seed)
        tensors = {
            "input_layernorm": norm(layer.attn_norm),
            "self_attn.q_proj": padded(layer.q, q_dim, hidden),
            "self_attn.k_proj": padded(layer.k, kv_dim, hidden),
            "self_attn.v_proj": padded(layer.v, kv_dim, hidden),
            "self_attn.o_proj": padded(layer.o, hidden, q_dim),
            "post_attention_layernorm": norm(layer.ffn_norm),
        }
        names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        if experts:
            names = [f"block_sparse_moe.experts.{{}}.w{i}" for i in (1, 3, 2)]
            rng = np.random.default_rng([seed, layers + index])
            # Behind a norm of weights 1, squares have a mean of 1.
            router = rng.standard_normal((experts, live)) / live**0.5
            tensors["block_sparse_moe.gate"] = padded(router, experts, hidden)
        for expert in range(max(experts, 1)):
            rng = np.random.default_rng([seed, index, expert])
            gate, up, down = layer.expert(noise if experts else 0, rng)
            for name, matrix in zip(names, (gate, up)):
                tensors[name.format(expert)] = padded(matrix, ffn, hidden)
            tensors[names[2].format(expert)] = padded(down, hidden, ffn)
        checkpoint.shard({f"model.layers.{index}.{k}.weight": v for k, v in tensors.items()})

    embedding, last_norm = source.tensor("token_embd.weight"), source.tensor("output_norm.weight")
    ends = {"model.embed_tokens.weight": padded(embedding, len(embedding), hidden)}
    if rescale:
        ends["lm_head.weight"] = padded(embedding * last_norm, len(embedding), hidden)
        last_norm = np.ones(live)
    ends["model.norm.weight"] = norm(last_norm)
    checkpoint.shard(ends)
    write_config(source, checkpoint, experts, shrink, tied=not rescale)
    write_tokenizer(source, checkpoint)
    checkpoint.finish()


def main():
    ap = argparse.ArgumentParser(usage=__doc__.split("\n")[2].removeprefix("usage: "))
    ap.add_argument("source", type=Path)
    ap.add_argument("output", type=Path)
    ap.add_argument("--dense", action="store_true")
    ap.add_argument("--noise", type=float, default=0.05)
    ap.add_argument("--no-rescale", action="store_true")
    ap.add_argument("--experts", type=int, default=8)
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    experts = 0 if a.dense else a.experts
    upcycle(Gguf(a.source), a.output, experts, a.noise, not a.no_rescale, a.seed)


if __name__ == "__main__":
    main()
