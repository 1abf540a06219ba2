#!/usr/bin/env python3
"""The pieces of a training step, each timed by itself with PyTorch. Called by gpu_check.sh.

    pieces.py OUT.json [--device cuda] [--dtype bf16] [--rows 11200] [--hidden 4096] [--intermediate 11008] [--heads 32] [--r 64]
              [--lengths FILE] [--repeats 10] [--seconds 55]

The defaults are one layer of Llama-2-7B with adapters of rank 64, over the packed tokens of one update. The pieces:

    frozen     the layer's eight products with frozen weights: q, k and v in one, o, gate and up in one, down; forward and backward
    adapter    the eleven products of the adapters' forward: A of each of the four inputs, B of each of the seven projections
    fp32       gradients of the adapters: products of half-precision operands with an fp32 result (torch.mm with out_dtype)
    joined     a frozen weight with B beside it, [W | B], and the input with its low-rank part
    fp8        the frozen products by _scaled_mm, operands quantised beforehand
    attention  flash attention over documents with the lengths of --lengths, forward and backward
    others     copy, dropout, norm, RoPE and SwiGLU in common operations, and _fused_rms_norm

On a GPU the frozen, adapter and joined products are timed once by cublas and once by cublasLt. OUT.json has the median over
--repeats runs of each piece, in seconds, with FLOP/s of products and bytes/s of what moves memory. A piece that the device or
the version of PyTorch lacks is recorded as "not available: why", and the next goes on. No piece begins after --seconds.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from peft_gpu import ROOT, described, draw_lengths, write  # noqa: E402

WARMUP = 2  # runs of a piece before those that count
DROPOUT = 0.05


def why(error):
    """An error as an entry says it: PyTorch's lists of backends are cut off."""
    return f"not available: {described(error).split('. ')[0][:200]}"


class Pieces:
    """Times pieces and keeps what was found."""

    def __init__(self, torch, arguments, found):
        self.torch, self.arguments, self.found = torch, arguments, found
        self.is_gpu = arguments.device != "cpu"
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arguments.dtype]
        self.end = time.monotonic() + arguments.seconds
        torch.manual_seed(0)

    def draw(self, *shape, dtype=None):
        return self.torch.randn(*shape, device=self.arguments.device, dtype=dtype or self.dtype)

    def seconds_of(self, call):
        """Seconds of each of the runs that count."""
        torch, times = self.torch, []
        for _ in range(WARMUP):
            call()
        for _ in range(self.arguments.repeats):
            if self.is_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return times

    def time(self, name, library, prepare, flops=0, n_bytes=0):
        """Records a piece. `prepare` makes the operands and gives the call that is timed."""
        piece = {"name": name, "library": library}
        self.found.append(piece)
        if time.monotonic() > self.end:
            piece["not_available"] = "not available: no time left"
            return
        try:
            times = self.seconds_of(prepare())
            piece["median_s"] = median = statistics.median(times)
            piece["fastest_s"] = min(times)
            if flops:
                piece["flops_per_s"] = flops / median
            if n_bytes:
                piece["bytes_per_s"] = n_bytes / median
        except Exception as error:
            piece["not_available"] = why(error)
        if self.is_gpu:
            try:
                self.torch.cuda.empty_cache()
            except Exception as error:  # the device is lost, and so are the pieces that follow
                piece["not_available"] = why(error)

    def product(self, name, library, n, o, i):
        """[n, i] times [o, i] transposed, as a layer multiplies by a weight."""

        def prepare():
            x, w = self.draw(n, i), self.draw(o, i)
            return lambda: x @ w.t()

        self.time(name, library, prepare, flops=2 * n * o * i)


def products(pieces, library):
    """The products that each library makes: frozen, of adapters, joined."""
    a = pieces.arguments
    n, d, f, r = a.rows, a.hidden, a.intermediate, a.r
    # Output and input columns of the four maps of a layer, and how many projections have adapters there.
    maps = {"qkv": (3 * d, d, 3), "o": (d, d, 1), "gate_up": (2 * f, d, 2), "down": (d, f, 1)}
    for name, (o, i, _) in maps.items():
        pieces.product(f"frozen {name}", library, n, o, i)

        def backward(o=o, i=i):
            dy, w = pieces.draw(n, o), pieces.draw(o, i)
            return lambda: dy @ w

        pieces.time(f"frozen {name} backward", library, backward, flops=2 * n * o * i)
    for name, (_, i, n_adapters) in maps.items():
        pieces.product(f"adapter A {name}", library, n, n_adapters * r, i)
    for name, (map_of, o) in {"q": ("qkv", d), "k": ("qkv", d), "v": ("qkv", d), "o": ("o", d), "gate": ("gate_up", f),
                              "up": ("gate_up", f), "down": ("down", d)}.items():  # fmt: skip

        def onto(map_of=map_of, o=o):
            # Into the projection's own columns of the map's result, as the engine does.
            columns, _, n_adapters = maps[map_of]
            whole, xa, b = pieces.draw(n, columns), pieces.draw(n, n_adapters * r), pieces.draw(o, r)
            y, x = whole[:, :o], xa[:, :r]
            return lambda: pieces.torch.addmm(y, x, b.t(), out=y)

        pieces.time(f"adapter B {name}", library, onto, flops=2 * n * o * r)
    for name, (o, i, n_adapters) in maps.items():
        pieces.product(f"joined {name}", library, n, o, i + n_adapters * r)


def fp32_products(pieces):
    """Gradients of A and B: [rows, o] transposed times [rows, i], in fp32."""
    torch, a = pieces.torch, pieces.arguments
    n, d, f, r = a.rows, a.hidden, a.intermediate, a.r
    for name, o, i in [("A qkv", 3 * r, d), ("A gate_up", 2 * r, d), ("A down", r, f), ("B q", d, r), ("B gate", f, r)]:

        def plain(o=o, i=i):
            dy, x = pieces.draw(n, o), pieces.draw(n, i)
            return lambda: torch.mm(dy.t(), x, out_dtype=torch.float32)

        def added(o=o, i=i):
            dy, x, sums = pieces.draw(n, o), pieces.draw(n, i), pieces.draw(o, i, dtype=torch.float32)
            return lambda: torch.addmm(sums, dy.t(), x, out_dtype=torch.float32)

        pieces.time(f"fp32 mm {name}", "", plain, flops=2 * n * o * i)
        pieces.time(f"fp32 addmm {name}", "", added, flops=2 * n * o * i)


def fp8_products(pieces):
    torch, a = pieces.torch, pieces.arguments
    n, d, f = a.rows, a.hidden, a.intermediate
    for name, o, i in [("qkv", 3 * d, d), ("o", d, d), ("gate_up", 2 * f, d), ("down", d, f)]:

        def prepare(o=o, i=i):
            fp8 = torch.float8_e4m3fn
            x, w = pieces.draw(n, i).to(fp8), pieces.draw(o, i).to(fp8)
            one = torch.ones((), device=a.device)
            return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=pieces.dtype)

        pieces.time(f"fp8 {name}", "", prepare, flops=2 * n * o * i)


def borders(lengths, rows):
    """Borders of documents one after another that fill the rows; the last is cut."""
    ends = [0]
    for tokens, _ in lengths:
        if ends[-1] == rows:
            break
        ends.append(min(rows, ends[-1] + tokens))
    return ends


def attention(pieces):
    torch, a = pieces.torch, pieces.arguments
    n, heads, width = a.rows, a.heads, a.hidden // a.heads
    try:
        ends = borders(draw_lengths(a.lengths, n, a.seed), n)
    except (OSError, ValueError, KeyError) as error:
        pieces.found.append({"name": "attention varlen flash", "library": "", "not_available": why(error)})
        return
    each = [end - start for start, end in zip(ends, ends[1:])]
    longest = max(each)
    # Two products forward and five backward, over the pairs that a causal mask allows.
    pairs = sum(length * (length + 1) // 2 for length in each)
    flops = 4 * pairs * heads * width

    def operands():
        qkv = pieces.draw(n, 3, heads, width)
        cu = torch.tensor(ends, dtype=torch.int32, device=a.device)
        return (*qkv.unbind(1), cu, cu, longest, longest, 0.0, True)

    def forward():
        given = operands()
        return lambda: torch.ops.aten._flash_attention_forward(*given, False)

    def backward():
        q, k, v, *rest = operands()
        o, lse, state, offset, _ = torch.ops.aten._flash_attention_forward(q, k, v, *rest, False)
        do = torch.randn_like(o)
        return lambda: torch.ops.aten._flash_attention_backward(do, q, k, v, o, lse, *rest, state, offset)

    size = n * a.hidden * torch.empty((), dtype=pieces.dtype).element_size()
    pieces.time("attention varlen flash", "", forward, flops=flops, n_bytes=4 * size)
    pieces.time("attention varlen flash backward", "", backward, flops=flops * 5 // 2, n_bytes=8 * size)


def others(pieces):
    """What moves memory. Bytes are those that one pass would have to read and write."""
    torch, a = pieces.torch, pieces.arguments
    n, d, f, heads = a.rows, a.hidden, a.intermediate, a.heads
    size = torch.empty((), dtype=pieces.dtype).element_size()

    def copy():
        x = pieces.draw(n, d)
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    def dropout():
        x = pieces.draw(n, d)
        return lambda: torch.nn.functional.dropout(x, DROPOUT)

    def norm():
        x, w = pieces.draw(n, d), pieces.draw(d)

        def call():
            wide = x.float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(pieces.dtype) * w

        return call

    def fused_norm():
        x, w = pieces.draw(n, d), pieces.draw(d)
        return lambda: torch.ops.aten._fused_rms_norm(x, [d], w, 1e-5)

    def rope():
        x = pieces.draw(n, 2 * heads, d // heads)
        cos, sin = pieces.draw(n, 1, d // heads), pieces.draw(n, 1, d // heads)

        def call():
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        return call

    def swiglu():
        gate_up = pieces.draw(n, 2 * f)
        gate, up = gate_up.chunk(2, -1)
        return lambda: torch.nn.functional.silu(gate) * up

    pieces.time("copy", "", copy, n_bytes=2 * n * d * size)
    pieces.time("dropout", "", dropout, n_bytes=2 * n * d * size)
    pieces.time("norm", "", norm, n_bytes=2 * n * d * size)
    pieces.time("norm fused", "", fused_norm, n_bytes=2 * n * d * size)
    pieces.time("rope", "", rope, n_bytes=4 * n * d * size)
    pieces.time("swiglu", "", swiglu, n_bytes=3 * n * f * size)


def by_library(pieces, torch):
    """Times the products by each library that there is; what was preferred before is preferred again."""
    if not pieces.is_gpu:
        return products(pieces, "cpu")
    try:
        before = torch.backends.cuda.preferred_blas_library()
    except Exception:
        return products(pieces, "default")
    for library in ("cublas", "cublaslt"):
        try:
            torch.backends.cuda.preferred_blas_library(library)
        except Exception as error:
            said = why(error)
            pieces.found.append({"name": "products", "library": library, "not_available": said})
        else:
            products(pieces, library)
    torch.backends.cuda.preferred_blas_library(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--rows", type=int, default=11200)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--lengths", default=ROOT / "data" / "lengths" / "belle.json")
    parser.add_argument("--seed", type=int, default=42, help="of the order of lengths, as bellora's train.seed")
    parser.add_argument("--repeats", type=int, default=10, help="runs of each piece that count")
    parser.add_argument("--seconds", type=float, default=55, help="begin no piece later")
    arguments = parser.parse_args()
    report = {"skipped": None, "settings": {**vars(arguments), "out": None, "lengths": str(arguments.lengths)}, "pieces": []}

    def skip(reason):
        report["skipped"] = reason
        write(arguments.out, report)
        print(reason, file=sys.stderr)

    try:
        import torch
    except Exception as error:  # also a package that is there but does not load
        return skip(f"this Python ({sys.executable}) has no torch: {error}")
    report["torch"] = torch.__version__
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return skip("this Python's torch sees no GPU")
    pieces = Pieces(torch, arguments, report["pieces"])
    with torch.no_grad():
        # What is small comes first, should the time run out.
        for group in (others, attention, fp32_products, fp8_products):
            group(pieces)
            write(arguments.out, report)
        by_library(pieces, torch)
    write(arguments.out, report)


if __name__ == "__main__":
    main()
