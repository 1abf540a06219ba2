#!/usr/bin/env python3
"""Turns a Llama model in a GGUF file into a Hugging Face model folder, as `bellora` and Transformers read it.

    make_base.py MODEL.gguf FOLDER

Written for the quickstart's base, SmolLM2-135M-Instruct in Q4_1 (see quickstart_base.sh, which calls it). The weights
are dequantised and stored as bf16: they keep what the four-bit rounding lost. Needs the packages numpy and gguf.
FOLDER is replaced as a whole once everything has been written.
"""

import json
import pathlib
import shutil
import struct
import sys

import gguf
import numpy as np

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Kinds of token in a GGUF vocabulary; any other kind would need a treatment that is not here.
NORMAL, CONTROL = 1, 3


class Metadata:
    """Reads the key-value part of a GGUF file; a key that is needed and absent ends the program with its name."""

    def __init__(self, reader):
        self.fields = reader.fields

    def get(self, key, default=None):
        return self.fields[key].contents() if key in self.fields else default

    def __getitem__(self, key):
        if key not in self.fields:
            sys.exit(f"error: the GGUF file lacks the key {key}")
        return self.fields[key].contents()


def check(meta):
    """Refuses what the conversion below would get wrong."""
    for key, wanted in {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
    }.items():
        if meta[key] != wanted:
            sys.exit(f"error: {key} is {meta[key]!r}; this script knows {wanted!r} alone")
    if meta.get("llama.rope.scaling.type", "none") != "none":
        sys.exit("error: this script knows no RoPE scaling")


def model_config(meta, tied):
    hidden_size, n_heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta.get("llama.rope.dimension_count", hidden_size // n_heads),
        "hidden_act": "silu",
        # Stored in single precision: seven digits give back 1e-05.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": float(f"{meta['llama.rope.freq_base']:.7g}"),
        "rope_scaling": None,
        "max_position_embeddings": meta["llama.context_length"],
        "vocab_size": meta["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        **special_ids(meta),
        "torch_dtype": "bfloat16",
    }


def special_ids(meta):
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id", meta["tokenizer.ggml.eos_token_id"]),
    }


def tokenizer_files(meta):
    """Byte-level BPE with every digit by itself, which is what the pre-tokenizer named "smollm" stands for."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if odd := {kind for kind in kinds if kind not in (NORMAL, CONTROL)}:
        sys.exit(f"error: tokens of kinds that this script does not know: {sorted(odd)}")
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=i, content=tokens[i], **plain) for i, kind in enumerate(kinds) if kind == CONTROL]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [dict(type="Digits", individual_digits=True), byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            # No token holds a space (a byte-level vocabulary writes it as another letter), so one space splits a merge.
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "model_input_names": ["input_ids", "attention_mask"],
        **{name.removesuffix("_id"): tokens[i] for name, i in special_ids(meta).items()},
        "added_tokens_decoder": {str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added},
    }
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config


def tensor_name(name):
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    part, kind = name.split(".")
    return f"{OTHER_NAMES[part]}.{kind}"


def rows_in_halves(weight, n_heads):
    """Undoes GGUF's order of the q and k rows: neighbours there are rotated together, here row i and row i + E/2."""
    n_rows, n_columns = weight.shape
    pairs = weight.reshape(n_heads, n_rows // n_heads // 2, 2, n_columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(n_rows, n_columns)


def to_bf16(values):
    """Rounds float32 to the nearest bf16, ties to even, as 16-bit words. The weights are finite."""
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def tensors(reader, meta):
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            sys.exit("error: this script knows no RoPE scaling (rope_freqs.weight)")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = rows_in_halves(values, heads[part])
        yield tensor_name(tensor.name), to_bf16(values)


def write_safetensors(path, named):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, words in named:
        header[name] = dict(dtype="BF16", shape=list(words.shape), data_offsets=[offset, offset + words.nbytes])
        offset += words.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, words in named:
            words.tofile(file)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    reader = gguf.GGUFReader(source)
    meta = Metadata(reader)
    check(meta)
    weights = sorted(tensors(reader, meta))
    tokenizer, tokenizer_config = tokenizer_files(meta)
    tied = "lm_head.weight" not in dict(weights)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in {
        "config.json": model_config(meta, tied),
        "generation_config.json": special_ids(meta),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }.items():
        (partial / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    write_safetensors(partial / "model.safetensors", weights)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


if __name__ == "__main__":
    main()
