#!/usr/bin/env python3
"""Makes a small Llama with random weights, a tokenizer beside it and a config that trains it; needs Python alone.

    make_random_base.py FOLDER [--hidden 1024] [--layers 4] [--vocabulary 320] [--dtype bf16]

FOLDER/base is the model: two query heads to a key head, the byte-level tokenizer of 320 tokens that the tests have.
FOLDER/random.toml trains it on data/quickstart.jsonl. For gpu_check.sh: whether runs repeat and resume can be seen on any
weights. Thirteen gigabytes, the size of a 7B model: --hidden 4096 --layers 33 --vocabulary 32000 --dtype fp16
"""

import argparse
import array
import json
import math
import pathlib
import random
import shutil
import struct

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests" / "golden" / "attention_rslora_uneven" / "tokenizer"
HEAD_DIM = 32
CONFIG = """
[model]
base = "{folder}/base"
[lora]
r = 16
alpha = 32
dropout = 0.05
modules_to_save = ["embed_tokens", "lm_head"]
[data]
train = ["{root}/data/quickstart.jsonl"]
max_length = 256
truncation = "cut"
[train]
output = "{folder}/run"
global_batch = 8
learning_rate = 1e-3
warmup_steps = 1
"""


def tensors(hidden, intermediate, layers, vocabulary):
    """Names and shapes in the order of the file."""
    yield "model.embed_tokens.weight", [vocabulary, hidden]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", [hidden]
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            yield prefix + f"self_attn.{name}_proj.weight", [rows, hidden]
        yield prefix + "post_attention_layernorm.weight", [hidden]
        yield prefix + "mlp.gate_proj.weight", [intermediate, hidden]
        yield prefix + "mlp.up_proj.weight", [intermediate, hidden]
        yield prefix + "mlp.down_proj.weight", [hidden, intermediate]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocabulary, hidden]


def bf16(value):
    """The upper half of a float's bits."""
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def fp16(value):
    """The bits of a half-precision float."""
    return struct.unpack("<H", struct.pack("<e", value))[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--vocabulary", type=int, default=320, help="rows of the tables, at least the tokenizer's 320")
    arguments = parser.parse_args()
    hidden, intermediate, vocabulary = arguments.hidden, arguments.hidden * 11 // 4, arguments.vocabulary
    layers = arguments.layers
    bits = bf16 if arguments.dtype == "bf16" else fp16
    base = arguments.folder.resolve() / "base"
    base.mkdir(parents=True, exist_ok=True)

    generator = random.Random(0)
    # A stock of draws, of which every tensor takes what comes next: large matrices take it over and over.
    stock = array.array("H", (bits(generator.gauss(0, 1 / math.sqrt(hidden))) for _ in range(100_003)))
    one = array.array("H", [bits(1.0)])
    header, end = {}, 0
    for name, shape in tensors(hidden, intermediate, layers, vocabulary):
        header[name] = {"dtype": arguments.dtype.upper().replace("FP", "F"), "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(base / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(hidden, intermediate, layers, vocabulary):
            n = math.prod(shape)
            if len(shape) == 1:
                file.write((one * n).tobytes())
                continue
            start = generator.randrange(len(stock))
            rotated = stock[start:] + stock[:start]
            file.write((rotated * (n // len(rotated) + 1))[:n].tobytes())

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2, "vocab_size": vocabulary,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, base / name)
    text = CONFIG.strip().format(folder=base.parent, root=ROOT)
    (arguments.folder / "random.toml").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
