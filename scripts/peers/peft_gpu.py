#!/usr/bin/env python3
"""The peers on a GPU: LoRA on a Llama by Transformers + PEFT, in every way that is commonly used. Called by gpu_check.sh.

    peft_gpu.py OUT.json [--shape llama-2-7b] [--vocab 49954] [--lengths FILE] [--update 64] [--warmup 1] [--updates 6] [--r 64]
                [--tokens 16384] [--device cuda] [--dtype bf16] [--seconds 200]

The model has random weights, made on the device; adapters sit on all seven projections, embedding and head are trained. Samples
have the lengths of FILE in the order in which `bellora bench` draws them, their ids are random. An update is --update of
them, forward and backward in micro-batches of at most --tokens tokens, padding included; where the memory does not
suffice, half as many are tried, and so on. Layouts:

    padded        micro-batches of rows in the order of the samples, padded to the longest
    sorted        the same after sorting the update's rows by length
    padding-free  rows one after another with position ids, in one sequence: flash_attention_2 where it is installed, else sdpa,
                  which masks what is not allowed, and then in micro-batches of a quarter of the tokens

each with and without gradient checkpointing, all in pure half precision; the fastest then once more with adapters in fp32
under autocast, as PEFT and the Trainer set it up by themselves. A padding-free combination in which one sample sees another
(older versions of Transformers, without flash attention) does another job and is not counted. The learning rate is 0, so
that all begin from the same weights: their first losses differ by rounding.

tokens_per_s counts real tokens, and is the median over --updates updates, after --warmup others. After each combination OUT.json is written
anew; one that fails is recorded with its error, and the next goes on.
"""

import argparse
import gc
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = {
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# How far the logits of a sample may be from those that it has alone, as a share of them: rounding of bf16 through 32 blocks
# is a few hundredths, attention to another sample changes them by about their own size.
ISOLATED = 0.2
# The likely fastest first, should the time run out.
COMBINATIONS = [
    ("padding-free", False), ("sorted", False), ("padding-free", True), ("sorted", True), ("padded", False), ("padded", True),
]  # fmt: skip

MASK = (1 << 64) - 1


def split_mix(state):
    """SplitMix64: the next state and its number."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def permutation(n, seed, stream):
    """The order of src/data/order.rs: Fisher-Yates on SplitMix64."""
    state = (split_mix(seed)[1] + stream * 0xD1B54A32D192ED03) & MASK
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        beyond = MASK - MASK % (last + 1)
        while True:
            state, draw = split_mix(state)
            if draw < beyond:
                break
        at = draw % (last + 1)
        order[last], order[at] = order[at], order[last]
    return order


def draw_lengths(path, n, seed):
    """(tokens, learned) of n samples, as `bellora bench` draws them from a file of lengths."""
    entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["lengths"]
    samples = sorted((tokens, learned) for tokens, learned, count in entries for _ in range(count))
    drawn, stream = [], 0
    while len(drawn) < n:
        drawn += [samples[i] for i in permutation(len(samples), seed, stream)]
        stream += 1
    return drawn[:n]


def micro_batches(lengths, layout, n_tokens):
    """The rows of an update in groups that hold at most n_tokens tokens, padding included (a single row always fits)."""
    order = range(len(lengths))
    if layout != "padded":
        order = sorted(order, key=lambda row: -lengths[row][0])
    batches = []
    for row in order:
        longest = max([lengths[row][0]] + [lengths[other][0] for other in (batches[-1] if batches else [])])
        held = sum(lengths[other][0] for other in (batches[-1] if batches else [])) + lengths[row][0]
        size = held if layout == "padding-free" else longest * (len(batches[-1]) + 1 if batches else 1)
        if batches and size <= n_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


class Peer:
    """A model with adapters and its optimizer, which all combinations share."""

    def __init__(self, torch, transformers, peft, arguments):
        self.torch, self.arguments = torch, arguments
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arguments.dtype]
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **SHAPES[arguments.shape], vocab_size=arguments.vocab, tie_word_embeddings=False, use_cache=False,
            bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
        )  # fmt: skip
        torch.set_default_dtype(self.dtype)
        with torch.device(arguments.device):
            base = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=arguments.r, lora_alpha=2 * arguments.r, lora_dropout=0.05,
            target_modules=ALL_SEVEN, modules_to_save=["embed_tokens", "lm_head"],
        )  # fmt: skip
        self.model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False).to(arguments.device).train()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.make_optimizer()
        self.ids = torch.randint(3, arguments.vocab, (1 << 16,))

    def make_optimizer(self):
        fused = self.arguments.device != "cpu"
        self.optimizer = self.torch.optim.AdamW(self.trained.values(), lr=0.0, weight_decay=0.0, fused=fused)

    def attend_by(self, implementation):
        base = self.model.get_base_model()
        if hasattr(base, "set_attn_implementation"):
            base.set_attn_implementation(implementation)
        else:
            base.config._attn_implementation = base.model.config._attn_implementation = implementation

    def checkpoint(self, wanted):
        base = self.model.get_base_model()
        if wanted:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()

    def sample(self, row, tokens, learned):
        """Ids and labels of a sample, the same whatever the layout."""
        start = row * 7919 % (len(self.ids) - tokens)
        ids = self.ids[start : start + tokens]
        labels = ids.clone()
        labels[: tokens - learned] = -100
        return ids, labels

    def inputs(self, rows, lengths, layout):
        """The model's arguments, and the targets of its logits."""
        torch = self.torch
        samples = [self.sample(row, *lengths[row]) for row in rows]
        if layout == "padding-free":
            ids = torch.cat([ids for ids, _ in samples])[None]
            labels = torch.cat([labels for _, labels in samples])[None]
            positions = torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None]
            arguments = {"input_ids": ids, "position_ids": positions}
        else:
            width = max(len(ids) for ids, _ in samples)
            pad = lambda t, filler: torch.nn.functional.pad(t, (0, width - len(t)), value=filler)
            ids = torch.stack([pad(ids, 0) for ids, _ in samples])
            labels = torch.stack([pad(labels, -100) for _, labels in samples])
            arguments = {"input_ids": ids}
            if len({len(ids) for ids, _ in samples}) > 1:
                arguments["attention_mask"] = torch.stack([pad(torch.ones(len(ids), dtype=torch.long), 0) for ids, _ in samples])
        device = self.arguments.device
        return {name: t.to(device) for name, t in arguments.items()}, labels[:, 1:].flatten().to(device)

    def update(self, lengths, layout, n_tokens, autocast):
        """Does one update and gives its loss."""
        torch = self.torch
        loss_sum, n_learned = 0.0, sum(learned for _, learned in lengths)
        for rows in micro_batches(lengths, layout, n_tokens):
            arguments, targets = self.inputs(rows, lengths, layout)
            with torch.autocast(self.arguments.device, dtype=self.dtype, enabled=autocast):
                logits = self.model(**arguments, use_cache=False).logits
            logits = logits[:, :-1].float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / n_learned
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss_sum)

    def isolates(self):
        """Whether a sample behind another in one padding-free sequence has the logits that it has alone."""
        torch = self.torch
        lengths = [(40, 20), (60, 30)]
        with torch.no_grad():
            logits = lambda rows: self.model(**self.inputs(rows, lengths, "padding-free")[0], use_cache=False).logits.float()
            # Dropout plays no part: lora_B is zero.
            behind, alone = logits([0, 1])[0, 40:], logits([1])[0]
        return float((behind - alone).norm() / alone.norm()) < ISOLATED

    def wait(self):
        if self.arguments.device != "cpu":
            self.torch.cuda.synchronize()

    def clean_up(self):
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.arguments.device != "cpu":
            self.torch.cuda.empty_cache()

    def peak_bytes(self, reset=False):
        if self.arguments.device == "cpu":
            return None
        if reset:
            self.torch.cuda.reset_peak_memory_stats()
        return self.torch.cuda.max_memory_allocated()

    def measure(self, updates, layout, n_tokens, autocast):
        self.peak_bytes(reset=True)
        rates, losses = [], []
        for lengths in updates:
            self.wait()
            start = time.perf_counter()
            losses.append(self.update(lengths, layout, n_tokens, autocast))
            self.wait()
            rates.append(sum(tokens for tokens, _ in lengths) / (time.perf_counter() - start))
        return {
            "tokens_per_s": statistics.median(rates[self.arguments.warmup :]),
            "rates": rates,
            "first_loss": losses[0],
            "peak_bytes": self.peak_bytes(),
        }


def is_out_of_memory(error):
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()


def described(error):
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def try_combination(peer, updates, layout, n_tokens, autocast):
    """Measures with n_tokens tokens a micro-batch, or half as many where memory does not suffice, and so on."""
    longest = max(tokens for update in updates for tokens, _ in update)
    tried = []

    def attempt():
        try:
            return peer.measure(updates, layout, n_tokens, autocast), None
        except Exception as error:
            return None, described(error)

    while True:
        measured, error = attempt()
        peer.clean_up()  # what a failed attempt still held is free only now
        result = {"micro_batch_tokens": n_tokens, "out_of_memory_at": tried}
        if error is None:
            return {**result, **measured}
        if not is_out_of_memory(error) or n_tokens // 2 < longest:
            return {**result, "error": error}
        tried = [*tried, n_tokens]
        n_tokens //= 2


def fastest_of(path):
    """Layout and checkpointing of the fastest combination in pure half precision of a report; None where there is none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError):
        return None
    counted = [result for result in results if "tokens_per_s" in result and not result["autocast"]]
    best = max(counted, key=lambda result: result["tokens_per_s"], default=None)
    return best and (best["layout"], best["checkpointing"])


def write(path, report):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--vocab", type=int, default=49954)
    parser.add_argument("--lengths", default=ROOT / "data" / "lengths" / "belle.json")
    parser.add_argument("--seed", type=int, default=42, help="of the order of lengths, as bellora's train.seed")
    parser.add_argument("--update", type=int, default=64, help="samples an update")
    parser.add_argument("--warmup", type=int, default=1, help="updates before those that count")
    parser.add_argument("--updates", type=int, default=6, help="updates that count")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a micro-batch at first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--again", type=pathlib.Path, help="measure only the fastest combination of this report, once more")
    parser.add_argument("--seconds", type=float, default=200, help="begin no combination that would likely end later")
    arguments = parser.parse_args()
    started = time.monotonic()
    report = {"skipped": None, "settings": {**vars(arguments), "out": None, "lengths": str(arguments.lengths)}, "results": []}
    report["settings"]["again"] = str(arguments.again) if arguments.again else None
    combinations = COMBINATIONS
    if arguments.again:
        fastest = fastest_of(arguments.again)
        if fastest is None:
            report["skipped"] = f"{arguments.again.name} has no speed to measure again"
            write(arguments.out, report)
            print(report["skipped"], file=sys.stderr)
            return
        combinations = [fastest]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
        import transformers
        import peft
    except Exception as error:  # also a package that is there but does not load
        report["skipped"] = f"this Python ({sys.executable}) has not all of torch, transformers and peft: {error}"
        write(arguments.out, report)
        print(report["skipped"], file=sys.stderr)
        return
    report["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    if arguments.device == "cuda" and not torch.cuda.is_available():
        report["skipped"] = "this Python's torch sees no GPU"
        write(arguments.out, report)
        print(report["skipped"], file=sys.stderr)
        return
    if arguments.device == "cuda":
        report["device"] = torch.cuda.get_device_name()

    try:
        has_flash = arguments.device == "cuda" and transformers.utils.is_flash_attn_2_available()
    except AttributeError:
        has_flash = False
    lengths = draw_lengths(arguments.lengths, arguments.update * (arguments.warmup + arguments.updates), arguments.seed)
    updates = [lengths[i : i + arguments.update] for i in range(0, len(lengths), arguments.update)]
    report["tokens"] = [sum(tokens for tokens, _ in update) for update in updates]
    peer = Peer(torch, transformers, peft, arguments)
    report["trained_parameters"] = sum(p.numel() for p in peer.trained.values())
    report["ready_after_s"] = time.monotonic() - started
    print(f"model ready after {report['ready_after_s']:.0f} s", file=sys.stderr, flush=True)

    longest = 0.0

    def attempt(layout, checkpointing, autocast):
        nonlocal longest
        attention = "flash_attention_2" if has_flash and layout == "padding-free" else "sdpa"
        result = {"layout": layout, "checkpointing": checkpointing, "autocast": autocast, "attention": attention}
        report["results"].append(result)
        begun = time.monotonic()
        if begun - started + longest > arguments.seconds:
            result["error"] = "not run: no time left"
        else:
            try:
                peer.attend_by(attention)
                peer.checkpoint(checkpointing)
                if layout == "padding-free" and not peer.isolates():
                    result["error"] = "another job: samples see each other here"
                else:
                    # Without a kernel for it, padding-free attention costs the square of what is packed together.
                    n_tokens = arguments.tokens // 4 if layout == "padding-free" and not has_flash else arguments.tokens
                    result.update(try_combination(peer, updates, layout, n_tokens, autocast))
            except Exception as error:
                result["error"] = described(error)
            longest = max(longest, time.monotonic() - begun)
        said = f"{result['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in result else result["error"]
        print(f"{layout}, checkpointing {checkpointing}, autocast {autocast}, {attention}: {said}", file=sys.stderr, flush=True)
        write(arguments.out, report)
        return result

    for layout, checkpointing in combinations:
        attempt(layout, checkpointing, False)
    counted = [result for result in report["results"] if "tokens_per_s" in result]
    if counted and arguments.dtype != "fp32" and not arguments.again:
        best = max(counted, key=lambda result: result["tokens_per_s"])
        for name, parameter in peer.trained.items():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        peer.make_optimizer()
        attempt(best["layout"], best["checkpointing"], True)


if __name__ == "__main__":
    main()
