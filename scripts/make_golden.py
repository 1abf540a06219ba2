#!/usr/bin/env python3
"""Makes the project's golden cases, tests/golden/*/, with Transformers + PEFT in float32, one in mixed precision.

    make_golden.py [CASE...]      makes these cases anew, all by default

Each case is a tiny randomly initialised model (Llama, Qwen2, Qwen3 or Mistral) with a LoRA adapter that is not at its
zero start, a dozen rows of data, and what a plain loop over Transformers + PEFT + torch.optim.AdamW makes of them:
tests/golden/README.md describes the files. The loop feeds one sample at a time, so that there is no padding anywhere, and follows no trainer's source: the
order, the schedule and the loss average are spelled out here.

Needs torch, transformers, peft, tokenizers and safetensors; the versions used are written into every expected/steps.json.
The same versions on the same kind of processor give the same files, byte for byte; others agree to float32 rounding.
"""

import json
import math
import os
import pathlib
import re
import shutil
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN = ATTENTION + ["gate_proj", "up_proj", "down_proj"]

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TEMPLATES = {
    "alpaca": PREAMBLE + "\n\n### Instruction:\n\n{content}\n\n### Response:\n\n",
    "chinese-alpaca": PREAMBLE + "\n\n### Instruction:\n{content}\n\n### Response: ",
}

# The last two are for validation. Answers begin with a newline here and there, as BELLE's do: nothing may strip them.
ROWS = [
    ("你好，请问今天星期几？", "", "今天星期三。"),
    ("Translate into English.", "明天会下雨。", "It will rain tomorrow."),
    ("写一句关于秋天的话。", "", "\n秋风吹过，树叶落满小路。"),
    ("How many legs does a spider have?", "", " Eight."),
    ("把下面的数字从小到大排列。", "7, 3, 12, 5", "3, 5, 7, 12"),
    ("What do bees make?", "", "Bees make honey and wax."),
    ("给小猫起个名字。", "", "可以叫它“米粒”。"),
    ("Name one planet with rings.", "", "Saturn."),
    ("水在多少度结冰？", "", "\n\n零摄氏度。"),
    ("用“因为……所以……”造句。", "", "因为路上堵车，所以我迟到了。"),
    ("Say thanks in Chinese.", "", "谢谢！"),
    ("这句话是什么语气？", "你怎么才来呀！", "是埋怨的语气。"),
    ("一斤等于多少克？", "", "一斤等于500克。"),
    ("Give a word that rhymes with light.", "", "Night."),
]
N_VALIDATION = 2
# Answers of one token, so that each of the few labels has a large share in the loss, and a large gradient.
SHORT_ROWS = [
    ("Is snow cold? Y or N", "", "Y"),
    ("一加一等于几？", "", "2"),
    ("Which letter follows c?", "", "d"),
    ("冰是热的吗？ Y or N", "", "N"),
]
# Its prompt alone is longer than the case's max_length: with truncation = "cut" there is nothing left to learn.
LONG_ROW = ("请把这段话读一遍：" + "山高水长，" * 60, "", "好的。")

# Conversations for the cases with a chat template. The last one is for validation. "hint" is a key of a message that only
# one of the templates reads.
CONVERSATIONS = [
    [("user", "Hello!"), ("assistant", "Hi. How can I help?"), ("user", "一加一等于几？"), ("assistant", "二。")],
    [("system", "Answer in one word."), ("user", "Is snow cold?"), ("assistant", "Yes.")],
    [("user", "写一个字。"), ("assistant", "\n山"), ("user", "再写一个。"), ("assistant", "水"), ("user", "好！"), ("assistant", "")],
    [("system", "简短地回答。"), ("user", "水在多少度结冰？"), ("assistant", "零度。"), ("user", "And boil?"), ("assistant", "At 100.")],
    [("user", "Name a planet."), ("assistant", "Saturn.", "It has rings."), ("user", "另一个？"), ("assistant", "火星。", "红色的。")],
    [("user", "Count to three."), ("assistant", "1, 2, 3"), ("user", "倒着数。"), ("assistant", "三、二、一")],
    [("user", "谢谢"), ("assistant", " You are welcome. ")],
    [("user", "Y or N?"), ("assistant", "N"), ("user", "Why?"), ("assistant", "因为路上堵车，所以我迟到了。", "想一想")],
    [("user", "What do bees make?"), ("assistant", "Honey."), ("user", "还有呢？"), ("assistant", "Wax, 蜂蜡。")],
]  # fmt: skip
# Two templates written for these cases. The first has a header line for each turn, and shows the hint of an answer after
# the last question alone. The second has marks around a question, a system text only where the conversation ends in a
# question, and writes the answers' texts without the spaces around them.
CHAT_TEMPLATES = {
    "headers": """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- "<|turn|>" + message.role + "\\n" }}
    {%- if message.role == "assistant" and loop.index0 > last.question %}
        {{- "<hint>" + message.hint | default("", true) + "</hint>\\n" }}
    {%- endif %}
    {{- message.content + "<|end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|turn|>assistant\\n" }}{% endif %}
""",
    "marks": """\
{%- set system = "" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content + "\\n\\n" %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("questions and answers must alternate") }}{% endif %}
    {%- if message.role == "user" %}
        {{- "[ASK] " + (system if loop.last else "") + message.content + " [/ASK]" }}
    {%- else %}
        {{- " " + message.content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}
""",
}

# The token that ends a turn.
CHAT_ENDS = {"headers": "<|end|>", "marks": "</s>"}

LLAMA = dict(
    hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    rms_norm_eps=1e-5, max_position_embeddings=1024, initializer_range=0.08, tie_word_embeddings=False,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)  # fmt: skip
LORA = dict(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=ALL_SEVEN)
# What tells an overflow of fp16 from none must be beyond this factor.
OVERFLOW_MARGIN = 1.3
FP16_LARGEST = 65504.0
# Keys and defaults of bellora's [train]; the loop below reads nothing else.
TRAIN = dict(
    epochs=1, max_steps=None, global_batch=4, learning_rate=2e-3, schedule="cosine", warmup_ratio=None,
    warmup_steps=None, weight_decay=0.0, betas=[0.9, 0.999], eps=1e-8, max_grad_norm=1.0,
    loss_average="tokens", loss_group_samples=1,
)  # fmt: skip

CASES = {
    "tied_gqa_llama3_rope": dict(
        about="grouped queries, a head_dim of its own, Llama-3 RoPE scaling in the older spelling, a tied head, "
        "weight decay, cosine with warm-up by ratio",
        bos=True,
        llama=dict(
            num_key_value_heads=2, head_dim=12, tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        older_rope_spelling=True,
        train=dict(epochs=2, warmup_ratio=0.2, weight_decay=0.05),
        keep=["gradients", "logits", "merged", "greedy"],
    ),
    "grown_tables_by_samples": dict(
        about="a tokenizer larger than the embedding, both tables trained, loss averaged by groups of two samples, "
        "one of them with nothing to learn, a group likewise",
        bos=True,
        grown=["[PAD]", "<|end|>"],
        template="chinese-alpaca",
        max_length=256,
        rows=[*ROWS[:2], LONG_ROW, ROWS[2], LONG_ROW, LONG_ROW, *ROWS[3:-N_VALIDATION]],
        llama=dict(hidden_size=24, intermediate_size=56, num_attention_heads=3, num_key_value_heads=3),
        lora=dict(r=4, lora_alpha=8, modules_to_save=["embed_tokens", "lm_head"]),
        train=dict(max_steps=5, warmup_ratio=0.001, loss_average="samples", loss_group_samples=2),
        keep=["merged"],
    ),
    "attention_rslora_uneven": dict(
        about="attention alone, rank-stabilised scale, one key-value head, base stored in bf16, linear schedule, no "
        "clipping, a last update of an epoch that is smaller than the others",
        bos=False,
        base_dtype=torch.bfloat16,
        rows=ROWS[:10],
        llama=dict(num_key_value_heads=1),
        lora=dict(r=6, lora_alpha=9, use_rslora=True, target_modules=ATTENTION),
        train=dict(epochs=2, schedule="linear", warmup_ratio=0.3, max_grad_norm=0.0),
        keep=[],
    ),
    "three_layers_clipped": dict(
        about="q, v and down alone, three layers in sharded files, constant schedule after a warm-up by steps, every "
        "update clipped, Adam's constants not the usual ones, steps that span epochs",
        bos=False,
        shard_size="40KB",
        llama=dict(hidden_size=40, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2),
        lora=dict(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"]),
        train=dict(
            epochs=None, max_steps=7, global_batch=5, schedule="constant", warmup_steps=2, learning_rate=5e-3,
            betas=[0.8, 0.95], eps=1e-6, max_grad_norm=0.05,
        ),
        keep=["gradients"],
    ),
    "fp16_overflows": dict(
        about="mixed precision: fp16 base and products, fp32 masters, a loss scale that overflows at first and once "
        "more, the head trained",
        bos=True,
        dtype="fp16",
        base_dtype=torch.float16,
        head_gain=52.0,
        rows=[*ROWS[:8], *SHORT_ROWS],
        llama=dict(
            hidden_size=24, intermediate_size=56, num_attention_heads=3, num_key_value_heads=3, initializer_range=0.01,
        ),
        lora=dict(r=4, lora_alpha=4, modules_to_save=["lm_head"]),
        train=dict(max_steps=12, warmup_steps=2, weight_decay=0.02),
        keep=[],
    ),
    "qwen2_biases": dict(
        about="Qwen2: biases on q, k and v, a tied head, embedding rows beyond the tokenizer's, a sliding window that is "
        "switched off and shorter than the samples",
        family="qwen2",
        bos=False,
        spare_rows=9,
        llama=dict(
            num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=False, sliding_window=16,
            max_window_layers=1,
        ),
        train=dict(epochs=2, warmup_steps=1),
        keep=["gradients", "logits", "merged"],
    ),
    "qwen3_chat": dict(
        about="Qwen3: norms over each head of q and k, a head_dim of its own; conversations with every answer learned, "
        "by a template that shows an answer otherwise once another question follows",
        family="qwen3",
        bos=False,
        chat="headers",
        llama=dict(num_key_value_heads=2, head_dim=12, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        lora=dict(r=4, lora_alpha=8),
        train=dict(epochs=2, warmup_steps=1),
        keep=["gradients", "logits", "merged", "greedy"],
    ),
    "mistral_chat": dict(
        about="Mistral: a sliding window as long as the longest sample allowed; conversations by a template that leaves "
        "out a system text and has no generation prompt of its own",
        family="mistral",
        bos=True,
        chat="marks",
        llama=dict(num_key_value_heads=1, head_dim=10, sliding_window=512),
        lora=dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"]),
        train=dict(epochs=2, schedule="linear", warmup_steps=0),
        keep=["gradients"],
    ),
    "llama_every_bias": dict(
        about="Llama with biases on all seven projections",
        bos=True,
        llama=dict(attention_bias=True, mlp_bias=True, num_key_value_heads=2),
        lora=dict(r=4, lora_alpha=8),
        train=dict(epochs=1, warmup_steps=1),
        keep=["gradients", "logits", "merged"],
    ),
}  # fmt: skip


def make_tokenizer(folder, with_bos, grown, chat):
    """Byte-level BPE with a few dozen merges learnt from the rows. `grown` are tokens past the base's embedding; `chat`
    names a chat template, which goes into the folder, or is None."""
    special = ["<unk>", "<s>", "</s>"] + (["<|turn|>", "<|end|>"] if chat == "headers" else [])
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Words are not split where answers follow a line break: there the break and one that begins an answer are one token.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=chat != "headers")
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    texts = [*TEMPLATES.values(), *("\n".join(row) for row in ROWS)]
    texts += ["\n\n"] * (20 if chat == "headers" else 0)
    tokenizer.train_from_iterator(texts, trainer)
    base_vocab_size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(grown)
    if with_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if "[PAD]" in grown:
        config["pad_token"] = "[PAD]"
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES[chat], encoding="utf-8")
        config["eos_token"] = CHAT_ENDS[chat]
    write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == base_vocab_size + len(grown), "Transformers sees another vocabulary"
    return loaded, base_vocab_size


def encode(tokenizer, row, template, max_length):
    instruction, extra, output = row
    content = instruction + ("\n" + extra if extra else "")
    prompt_ids = tokenizer(TEMPLATES[template].replace("{content}", content))["input_ids"]
    answer_ids = tokenizer(output, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    labels = [-100] * len(prompt_ids) + answer_ids
    return (prompt_ids + answer_ids)[:max_length], labels[:max_length]


def conversation_messages(conversation):
    messages = []
    for role, content, *hint in conversation:
        messages.append(dict(role=role, content=content, **({"hint": hint[0]} if hint else {})))
    return messages


def encode_conversation(tokenizer, conversation, end):
    """Ids of the whole conversation, and labels of every token that overlaps what an answer adds to its prompt, up to and
    with the token that ends it."""
    messages = conversation_messages(conversation)
    render = lambda of, prompt: tokenizer.apply_chat_template(of, tokenize=False, add_generation_prompt=prompt)
    text, spans = render(messages, False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(render(messages[:i], True))
        if text[:start] != render(messages[:i], True):  # the template rewrites earlier turns: by the question's end mark
            n_before = sum(other["role"] == "assistant" for other in messages[:i])
            start = [m.end() for m in re.finditer(re.escape("[/ASK]"), text)][n_before]
        spans.append((start, text.index(end, start) + len(end)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    learned = [any(a < last and b > first for first, last in spans) for a, b in encoded["offset_mapping"]]
    return ids, [i if yes else -100 for i, yes in zip(ids, learned)]


def make_base(folder, case, vocab_size):
    config = transformers.AutoConfig.for_model(
        case.get("family", "llama"),
        **{**LLAMA, **case["llama"]}, vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms that are not all ones and biases that are not zero, or a forgotten one would go unnoticed
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            if name.endswith(".bias"):
                tensor.normal_(std=0.2)
        model.lm_head.weight.mul_(case.get("head_gain", 1.0))
    model.to(case.get("base_dtype", torch.float32))
    model.save_pretrained(folder, max_shard_size=case.get("shard_size", "1GB"))
    (folder / "generation_config.json").unlink()
    if "use_sliding_window" in case["llama"]:  # as the models' own files: Transformers drops the unused window, and lists layers
        config = read_json(folder / "config.json")
        del config["layer_types"]
        write_json(folder / "config.json", {**config, "sliding_window": case["llama"]["sliding_window"]})
    if case.get("older_rope_spelling"):
        config = read_json(folder / "config.json")
        rope = config.pop("rope_parameters")
        config["rope_theta"], config["torch_dtype"] = rope.pop("rope_theta"), config.pop("dtype")
        config["rope_scaling"] = rope
        write_json(folder / "config.json", config)
    return load_base(folder)


def load_base(folder, vocab_size=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if vocab_size and vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return model


def save_adapter(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = "base"
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set, whose order differs from run to run
    write_json(folder / "adapter_config.json", config)


def peft_names(model):
    """Names of the trainable parameters as PEFT saves them."""
    return {
        name: name.replace(".default", "").replace(".modules_to_save", "")
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }


def sample_loss_sum(model, sample):
    """Sum of the cross entropies over a sample's label tokens, and their number."""
    ids, labels = torch.tensor([sample[0]]), torch.tensor([sample[1]])
    logits = model(input_ids=ids).logits[0, :-1].float()
    n_labels = int((labels[0, 1:] != -100).sum())
    return F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum"), n_labels


def backward_over(model, samples, train):
    """Leaves the gradient of the global batch in the parameters and returns its loss."""
    counts = [sum(label != -100 for label in labels[1:]) for _, labels in samples]
    if train["loss_average"] == "tokens":
        weights = [1.0 / sum(counts)] * len(samples)
    else:
        size = train["loss_group_samples"]
        groups = [sum(counts[start : start + size]) for start in range(0, len(samples), size)]
        n_groups = sum(total > 0 for total in groups)
        weights = [1.0 / (n_groups * groups[i // size]) if counts[i] else 0.0 for i in range(len(samples))]
    loss = 0.0
    for sample, weight, count in zip(samples, weights, counts):
        if count:
            part = sample_loss_sum(model, sample)[0] * weight
            part.backward()
            loss += part.item()
    return loss


def lr_factor(update, total, train):
    """Factor of the learning rate at an update counted from 0."""
    warmup = train["warmup_steps"]
    if warmup is None:
        warmup = math.ceil(total * train["warmup_ratio"])
    if update < warmup:
        return update / max(1, warmup)
    progress = (update - warmup) / max(1, total - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[train["schedule"]]


def updates_of(samples, train):
    """The samples of every update: file order, epoch after epoch; an epoch's last update may be short."""
    size = train["global_batch"]
    epoch = [samples[start : start + size] for start in range(0, len(samples), size)]
    total = train["max_steps"] or len(epoch) * train["epochs"]
    return [epoch[i % len(epoch)] for i in range(total)]


def run_updates(model, samples, train):
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), betas=train["betas"], eps=train["eps"], weight_decay=train["weight_decay"]
    )
    updates, steps, first_gradients = updates_of(samples, train), [], None
    for i, batch in enumerate(updates):
        lr = train["learning_rate"] * lr_factor(i, len(updates), train)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = backward_over(model, batch, train)
        if first_gradients is None:
            names = peft_names(model)
            first_gradients = {names[name]: tensor.grad.clone() for name, tensor in parameters.items()}
        limit = train["max_grad_norm"] or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(dict(step=i + 1, loss=loss, grad_norm=grad_norm, lr=lr))
    return steps, first_gradients


def scaled_gradients(model, copies, samples, train, loss_scale):
    """The loss of the global batch and the sums of its scaled gradients by name: fp16 within a sample, fp32 over them."""
    sums = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in copies.items()}
    loss = 0.0
    counts = [sum(label != -100 for label in labels[1:]) for _, labels in samples]
    for sample in samples:
        part = sample_loss_sum(model, sample)[0] / sum(counts)
        (part * loss_scale).backward()
        loss += part.item()
        for name, tensor in copies.items():
            sums[name] += tensor.grad
            tensor.grad = None
    return loss, sums


def norm_of(gradients):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in gradients.values()))


def assert_clear_outcome(model, copies, samples, train, loss_scale, gradients):
    """Whether an update overflows must not hang on the rounding of one program, nor on how it packs its samples."""
    for margin in (1 / OVERFLOW_MARGIN, OVERFLOW_MARGIN):
        _, others = scaled_gradients(model, copies, samples, train, loss_scale * margin)
        same = math.isfinite(norm_of(others)) == math.isfinite(norm_of(gradients))
        assert same, f"at {margin:.2f} times the loss scale {loss_scale} it is another outcome"
    if math.isfinite(norm_of(gradients)):
        largest = max(float(tensor.abs().max()) for tensor in gradients.values())
        assert largest * OVERFLOW_MARGIN < FP16_LARGEST, f"a sum over all samples reaches {largest}"


def run_updates_fp16(model, samples, train):
    """The updates in mixed precision, spelled out: the model's parameters become fp16 and are what its products read;
    masters, sums of gradients over samples, clipping and AdamW are fp32. An update whose gradients overflow is skipped:
    its samples are consumed, neither the schedule nor Adam moves, and the loss scale is halved. (It would be doubled
    after 2000 good updates, more than a case has.) Returns the masters too."""
    assert train["loss_average"] == "tokens"
    copies = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    masters = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in copies.items()}
    for tensor in model.parameters():  # not model.half(), which would round the rotary frequencies too
        tensor.data = tensor.data.half()
    optimizer = torch.optim.AdamW(
        masters.values(), betas=train["betas"], eps=train["eps"], weight_decay=train["weight_decay"]
    )
    updates, steps, first_gradients = updates_of(samples, train), [], None
    n_applied, loss_scale = 0, 2.0**16
    for i, batch in enumerate(updates):
        lr = train["learning_rate"] * lr_factor(n_applied, len(updates), train)
        loss, gradients = scaled_gradients(model, copies, batch, train, loss_scale)
        assert_clear_outcome(model, copies, batch, train, loss_scale, gradients)
        skipped = not math.isfinite(norm_of(gradients))
        step = dict(step=i + 1, loss=loss, grad_norm=None, lr=lr, loss_scale=loss_scale, skipped=skipped)
        steps.append(step)
        if skipped:
            loss_scale = max(loss_scale / 2, 1.0)
            continue
        for name, master in masters.items():
            master.grad = gradients[name] / loss_scale
        if first_gradients is None:
            names = peft_names(model)
            first_gradients = {names[name]: tensor.grad.clone() for name, tensor in masters.items()}
        limit = train["max_grad_norm"] or math.inf
        step["grad_norm"] = torch.nn.utils.clip_grad_norm_(masters.values(), limit).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        n_applied += 1
        for name, tensor in copies.items():
            tensor.data.copy_(masters[name].data)
    pattern = "".join("x" if step["skipped"] else "." for step in steps)
    assert "xx" in pattern and ".x." in pattern, f"overflows at the start and later are wanted, not {pattern}"
    return steps, first_gradients, masters


def eval_loss(model, samples):
    with torch.no_grad():
        sums = [sample_loss_sum(model, sample) for sample in samples]
    return float(sum(total.double() for total, _ in sums)) / sum(n_labels for _, n_labels in sums)


def greedy(model, prompt_ids, n_tokens):
    """The most likely next token, again and again, with the smallest lead over the second choice (a near tie would make
    the case depend on rounding)."""
    ids, lead = list(prompt_ids), math.inf
    for _ in range(n_tokens):
        with torch.no_grad():
            top = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        lead = min(lead, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    assert lead > 1e-3, f"a near tie: {lead}"
    return dict(prompt_ids=list(prompt_ids), ids=ids[len(prompt_ids) :], smallest_lead=lead)


def toml_value(value):
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value) if isinstance(value, (str, bool)) else repr(value)


def write_config(path, name, case, lora, train):
    sections = {
        "model": dict(
            base="{case}/base", tokenizer="{case}/tokenizer", dtype=case.get("dtype", "fp32"), device="cpu",
            init_adapter="{case}/init_adapter", resize_vocab=bool(case.get("grown")),
        ),
        "lora": dict(
            r=lora["r"], alpha=lora["lora_alpha"], dropout=0.0, target_modules=lora["target_modules"],
            modules_to_save=lora.get("modules_to_save") or [], use_rslora=lora.get("use_rslora", False),
        ),
        "data": dict(
            train=["{case}/data.jsonl"], validation=["{case}/validation.jsonl"],
            template="chat" if case.get("chat") else case.get("template", "alpaca"),
            max_length=case.get("max_length", 512), truncation="cut", shuffle=False,
        ),
        "train": dict(output="{out}", **train),
    }  # fmt: skip
    lines = [f"# {name}: {case['about']}.", "# Made by scripts/make_golden.py; {case} and {out} are filled in by the test."]
    for section, values in sections.items():
        lines += ["", f"[{section}]"] + [f"{k} = {toml_value(v)}" for k, v in values.items() if v is not None]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(name, seed):
    case = CASES[name]
    folder, expected = GOLDEN / name, GOLDEN / name / "expected"
    shutil.rmtree(folder, ignore_errors=True)
    expected.mkdir(parents=True)
    torch.manual_seed(seed)
    lora, train = {**LORA, **case.get("lora", {})}, {**TRAIN, **case["train"]}
    if train["max_steps"]:
        train["epochs"] = None
    tokenizer, base_vocab_size = make_tokenizer(
        folder / "tokenizer", case["bos"], case.get("grown", []), case.get("chat")
    )

    rows = {"data": case.get("rows", ROWS[:-N_VALIDATION]), "validation": ROWS[-N_VALIDATION:]}
    if case.get("chat"):
        rows = {"data": CONVERSATIONS[:-1], "validation": CONVERSATIONS[-1:]}
    encoded = {}
    for which, those in rows.items():
        if case.get("chat"):
            records = [dict(messages=conversation_messages(row)) for row in those]
        else:
            records = [dict(zip(("instruction", "input", "output"), row)) for row in those]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{which}.jsonl").write_text(text, encoding="utf-8")
        encoded[which] = [
            encode_conversation(tokenizer, row, CHAT_ENDS[case["chat"]])
            if case.get("chat")
            else encode(tokenizer, row, case.get("template", "alpaca"), case.get("max_length", 512))
            for row in those
        ]
    samples = encoded["data"]
    write_config(folder / "config.toml", name, case, lora, train)

    make_base(folder / "base", case, base_vocab_size + case.get("spare_rows", 0))
    model = peft.get_peft_model(
        load_base(folder / "base", len(tokenizer)), peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    )
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            if "lora_B" in parameter:
                tensor.normal_(std=0.05)
    save_adapter(model, folder / "init_adapter")
    model.eval()  # no dropout anywhere, so that training and evaluation are the same function
    if "logits" in case["keep"]:
        ids = torch.tensor(samples[0][0][:48])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        save_file({"input_ids": ids.to(torch.int32), "logits": logits.contiguous()}, expected / "logits.safetensors")

    result = dict(made_with={m.__name__: m.__version__ for m in (torch, transformers, peft, tokenizers)})
    masters = {}
    if case.get("dtype") == "fp16":
        result["steps"], gradients, masters = run_updates_fp16(model, samples, train)
    else:
        result["steps"], gradients = run_updates(model, samples, train)
    result["eval_loss"] = eval_loss(model, encoded["validation"])
    for key, tensor in model.named_parameters():
        tensor.data = masters.get(key, tensor).data.float()
    if "greedy" in case["keep"]:
        ids, labels = encoded["validation"][0]
        prompt_ids = ids[: next(i for i, label in enumerate(labels) if label != -100)]
        result["greedy"] = greedy(model, prompt_ids, 24)
    write_json(expected / "steps.json", result)
    lines = [json.dumps(dict(input_ids=ids, labels=labels)) + "\n" for ids, labels in samples]
    (expected / "tokens.jsonl").write_text("".join(lines))
    if "gradients" in case["keep"]:
        save_file({k: v.contiguous() for k, v in gradients.items()}, expected / "gradients.safetensors")
    save_adapter(model, expected / "adapter")
    if "merged" in case["keep"]:
        merged = model.merge_and_unload()
        tied = merged.config.tie_word_embeddings
        state = {k: v.contiguous() for k, v in merged.state_dict().items() if not (tied and k == "lm_head.weight")}
        save_file(state, expected / "merged.safetensors", metadata={"format": "pt"})
    report(name, result, gradients, folder)


def report(name, result, gradients, folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 300_000, "a file is too large to be committed"
    silent = [key for key, value in gradients.items() if not value.abs().max() > 0]
    assert not silent, f"no gradient reaches {silent}"
    init = load_file(folder / "init_adapter" / "adapter_model.safetensors")
    final = load_file(folder / "expected" / "adapter" / "adapter_model.safetensors")
    assert init.keys() == final.keys() == gradients.keys()
    first, last = result["steps"][0], result["steps"][-1]
    norms = [step["grad_norm"] for step in result["steps"] if step["grad_norm"] is not None]
    print(
        f"{name}: {len(result['steps'])} updates, loss {first['loss']:.4f} to {last['loss']:.4f}, grad norm "
        f"{min(norms):.3f} to {max(norms):.3f}, "
        f"eval loss {result['eval_loss']:.4f}, {len(files)} files, {sum(sizes) / 1000:.0f} kB"
    )


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def main():
    names = sys.argv[1:] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        sys.exit(f"error: no such case: {', '.join(unknown)}\nhint: the cases are {', '.join(CASES)}")
    torch.set_num_threads(1)  # sums in one fixed order
    transformers.logging.set_verbosity_error()
    for name in names:
        make(name, seed=11 + list(CASES).index(name))


if __name__ == "__main__":
    main()
