"""What the silicon allows: measured on this machine, predicted on every other, seen in the binaries.

A chip computes at π FLOP/s and reads at β bytes/s. Work of F FLOPs that moves Q bytes can take no less than

    time ≥ max(F / π, Q / β)          attainable FLOP/s = min(π, I · β)          I = F / Q, FLOPs a byte: the intensity

Where I = π / β the roof has its ridge: left of it memory is the limit, right of it arithmetic. That is the roofline
(Williams, Waterman, Patterson 2009, doi 10.1145/1498765.1498785). Five numbers make the bound a prediction, each
measured once for a chip or a class of chips, never on the row that is predicted:

    name       of       what it is
    MATMUL     chip     best matrix product anyone measured / dense peak on paper; where none is, the vendor's median
    TRAINING   all      what long runs on many chips keep of that product: the median over the published runs
    MEMORY     all      bytes/s that kernels sustain / bandwidth on paper
    LAUNCH     all      seconds from one kernel to the next in a recorded graph
    HOP        all      seconds of one hop of a ring: all-reduce = 2 (n − 1) (HOP + bytes / n / link)       (α–β model)

On this machine nothing is taken from paper: bandwidth by working set, product rates by shape, exponentials a second and
the price of a call are measured, and an op is predicted from the passes over memory that its code really makes.

`python hw_profile.py` measures this machine, holds each op of the project against its roofline, writes roofline.png and
prints the table of accelerators. --compare, --kernels, --model, --plan, --validate: see --help.
"""
import bisect
import concurrent.futures
import difflib
import functools
import hashlib
import json
import math
import operator
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch._library import custom_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import attention as A
import flash
import infer
import mod
import ssm
import train
from train import Parser, UserError


# --- 1. Accelerators: what the vendors print, and what others measured ------------------------------------------------
#
# Dense peaks in TFLOP/s (vendors often print twice that, for matrices half of zeros), GB, TB/s, GB/s of all links one
# way, watts; "best" is the best bfloat16 matrix product that others measured. – is unknown, never zero.
# Sources: stas00/ml-engineering (August 2026), the vendors' pages, AWS Neuron's documents, the JAX scaling book; the
# RTX row from NVIDIA's 321 TOPS (sparse int8; bfloat16 with float32 sums runs at an eighth of that on GeForce).

TABLE = """
name                  vendor year memory bandwidth fp32  tf32   bf16  fp8  int8   fp4  link  watts  best  status
A100 SXM              NVIDIA 2020     80     2.039 19.5   156    312    –   624     –   300    400 271.2  available
H100 SXM              NVIDIA 2022     80      3.35   67 494.5    989 1979  1979     –   450    700 794.5  available
H800 SXM              NVIDIA 2023     80      3.35   67 494.5    989 1979  1979     –   200    700     –  available
H200 SXM              NVIDIA 2024    141      4.80   67 494.5    989 1979  1979     –   450    700     –  available
L40S                  NVIDIA 2023     48      0.86 91.6   183    362  733   733     –  31.5    350     –  available
RTX 4070 Laptop       NVIDIA 2023      8      0.26 15.6     –     40   80   160     –     –    115     –  available
B200 SXM              NVIDIA 2025    180      8.00   80  1125   2250 4500  4500  9000   900   1000  1745  available
B300 SXM              NVIDIA 2025    288      8.00   80  1125   2250 4500   150 12600   900   1000  1769  available
GB200 SXM (per chip)  NVIDIA 2025    186      8.00   80  1250   2500 5000  5000 10000   900   1200  1822  available
GB300 SXM (per chip)  NVIDIA 2025    288      8.00   80  1250   2500 5000   165 15000   900   1400     –  available
Rubin SXM             NVIDIA 2026    288     22.00  130  2000   4000 17500 2500 35000  1800      –     –  announced
MI250X                AMD    2021    128      3.28 95.7     –    383    –   383     –   350    560     –  available
MI300X                AMD    2023    192      5.30 163.4 653.7  1300 2610  2600     –   448    750 668.4  available
MI325X                AMD    2024    256      6.00 163.4 653.7  1300 2610  2600     –   448   1000 784.9  available
MI355X                AMD    2025    288      8.00 157.3    –   2500 5000  5000 10100 535.5   1400  1565  available
MI455X                AMD    2026    432     23.30  315     –   5000 10000 5000 20000  1800      –     –  announced
TPU v4                Google 2021     32      1.20    –     –    275    –   275     –     –      –     –  available
TPU v5e               Google 2023     16      0.82    –     –    197    –   394     –   200      –     –  available
TPU v5p               Google 2023     95      2.76    –     –    459  459   918     –   600      –     –  available
TPU v6e (Trillium)    Google 2024     32      1.60    –     –    918  918  1836     –   400      –     –  available
TPU v7x (Ironwood)    Google 2025    192      7.38    –     –   2307 4614     –     –   600      –     –  available
Gaudi 2               Intel  2022     96      2.46    –     –    432  865     –     –   300    600 418.7  available
Gaudi 3               Intel  2024    128      3.70  229   459   1677 1677     –     –   600    900  1243  available
Trainium2             AWS    2024     96      2.90  181   667    667 1299     –     –   640      –     –  available
TPU 8t                Google 2026    216      6.53    –     –      –    –     – 12600  1200      –     –  announced
TPU 8i                Google 2026    288      8.60    –     –      –    –     – 10100     –      –     –  announced
Trainium3             AWS    2025    144      4.90  183   671    671 2517     –  2517  1280      –     –  available
Ascend 950DT          Huawei 2026     96      4.00    –     –    486  919     –  1783   840      –     –  announced
"""

Accelerator = namedtuple("Accelerator", TABLE.split("\n")[1].split())


def parse_table(text):
    """Rows of words, the name may have blanks → {name: Accelerator}; – becomes None."""
    value = lambda word: None if word == "–" else float(word) if re.fullmatch(r"[\d.]+", word) else word
    chips = {}
    for line in text.strip().splitlines()[1:]:
        words = line.split()
        last = len(Accelerator._fields) - 1
        name = " ".join(words[:-last])
        chips[name] = Accelerator(name, *map(value, words[-last:]))
    return chips


ACCELERATORS = parse_table(TABLE)

# What others measured. Training's model carries the 10¹² tokens after a semicolon and is measured in hours of one chip.

PUBLISHED = """
kind|system|model|hardware|chips|dtype|setting|measured|unit|source
decode|gpt-fast|Llama-2-7B|A100 SXM|1|bf16|batch 1, 330 W|104.9|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-7B|A100 SXM|1|int8|batch 1, 330 W|155.58|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-7B|A100 SXM|1|int4|batch 1, 330 W|196.80|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-70B|A100 SXM|1|int8|batch 1, 330 W|19.13|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-70B|A100 SXM|1|int4|batch 1, 330 W|25.25|tok/s|gpt-fast README
decode|gpt-fast|8B|A100 SXM|1|bf16|batch 1, 330 W|93.89|tok/s|gpt-fast README
decode|gpt-fast|8B|A100 SXM|1|int8|batch 1, 330 W|137.64|tok/s|gpt-fast README
decode|gpt-fast|70B|A100 SXM|1|int8|batch 1, 330 W|18.04|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-7B|A100 SXM|8|bf16|batch 1, 330 W|328.43|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-70B|A100 SXM|8|bf16|batch 1, 330 W|62.50|tok/s|gpt-fast README
decode|gpt-fast|8B|A100 SXM|8|bf16|batch 1, 330 W|276.01|tok/s|gpt-fast README
decode|gpt-fast|70B|A100 SXM|8|bf16|batch 1, 330 W|58.78|tok/s|gpt-fast README
decode|gpt-fast|405B|A100 SXM|8|int8|batch 1, 330 W|15.60|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-7B|MI250X|0.5|bf16|batch 1, one of two dies|76.33|tok/s|gpt-fast README
decode|gpt-fast|Llama-2-7B|MI250X|0.5|int8|batch 1, one of two dies|101.86|tok/s|gpt-fast README
serve|nano-vllm|0.6B|RTX 4070 Laptop|1|bf16|256 requests, 100–1024 in and out|1434.13|tok/s|nano-vllm README
attention|FlashAttention-2|forward|A100 SXM|1|fp16|best of long sequences|230|TFLOP/s|arXiv 2307.08691
attention|FlashAttention-3|forward|H100 SXM|1|fp16|best of long sequences|740|TFLOP/s|arXiv 2407.08608
attention|FlashAttention-3|forward|H100 SXM|1|fp8|best of long sequences|1200|TFLOP/s|arXiv 2407.08608
attention|FlashAttention-4|forward|B200 SXM|1|bf16|best of long sequences|1613|TFLOP/s|FlashAttention-4, March 2026
matmul|torch|best shape found|A100 SXM|1|bf16|–|271.2|TFLOP/s|ml-engineering
matmul|torch|best shape found|H100 SXM|1|bf16|–|794.5|TFLOP/s|ml-engineering
matmul|torch|best shape found|B200 SXM|1|bf16|–|1745|TFLOP/s|ml-engineering
matmul|torch|best shape found|MI300X|1|bf16|–|668.4|TFLOP/s|ml-engineering
matmul|torch|best shape found|MI355X|1|bf16|–|1565|TFLOP/s|ml-engineering
matmul|torch|best shape found|H100 SXM|1|fp8|–|1402.6|TFLOP/s|ml-engineering
matmul|torch|best shape found|B200 SXM|1|fp8|–|3432.5|TFLOP/s|ml-engineering
train|Meta|Llama-2-7B; 2.0|A100 SXM|–|bf16|–|184320|hours|arXiv 2307.09288
train|Meta|Llama-2-13B; 2.0|A100 SXM|–|bf16|–|368640|hours|arXiv 2307.09288
train|Meta|Llama-2-70B; 2.0|A100 SXM|–|bf16|–|1720320|hours|arXiv 2307.09288
train|Meta|8B; 15|H100 SXM|–|bf16|–|1460000|hours|Llama 3.1 model card
train|Meta|70B; 15|H100 SXM|–|bf16|–|7000000|hours|Llama 3.1 model card
train|Meta|405B; 15|H100 SXM|–|bf16|–|30840000|hours|Llama 3.1 model card
train|Meta|405B|H100 SXM|16384|bf16|sequence 8192|41|% MFU|arXiv 2407.21783
train|DeepSeek|DeepSeek-V3; 14.8|H800 SXM|2048|fp8|–|2664000|hours|arXiv 2412.19437
train|Google|PaLM-540B|TPU v4|6144|bf16|–|46.2|% MFU|arXiv 2204.02311
attention|Triton|forward S4096|H100 SXM|1|fp16|batch 4 heads 32|460|TFLOP/s|facebookexperimental/triton PR 205
attention|Triton|forward S16384|H100 SXM|1|fp16|batch 4 heads 32|487|TFLOP/s|facebookexperimental/triton PR 205
attention|FlashAttention-3|forward S8192|H100 SXM|1|bf16|batch 4 heads 48|639|TFLOP/s|tritonbench PR 1254
attention|FlashAttention-3|backward S8192|H100 SXM|1|bf16|batch 4 heads 48|561|TFLOP/s|tritonbench PR 1256
serve|nano-vllm|0.6B|A100 SXM|1|bf16|256 requests, 100–1024 in and out|8670|tok/s|nano-vllm PR 249
matmul|torch|best shape found|GB200 SXM (per chip)|1|bf16|–|1822|TFLOP/s|ml-engineering
matmul|torch|best shape found|MI325X|1|bf16|–|784.9|TFLOP/s|ml-engineering
"""

Measured = namedtuple("Measured", PUBLISHED.split()[0].split("|"))


def parse_published(text):
    """The rows of PUBLISHED, numbers as floats."""
    rows = [Measured(*line.split("|")) for line in text.strip().splitlines()[1:]]
    return [r._replace(chips=1.0 if r.chips == "–" else float(r.chips), measured=float(r.measured)) for r in rows]


PUBLISHED = parse_published(PUBLISHED)

# Exponentials a second: 16 a clock in each multiprocessor (CUDA programming guide, throughput table) × their number ×
# boost clock. Attention needs one a score.
EXPONENTIALS = {"A100 SXM": 108 * 16 * 1.41e9, "H100 SXM": 132 * 16 * 1.83e9, "H800 SXM": 132 * 16 * 1.83e9,
                "H200 SXM": 132 * 16 * 1.83e9, "B200 SXM": 148 * 16 * 1.85e9}

# MEMORY and LAUNCH as aiconfigurator has them for the H100 (arXiv 2601.06288).
MEMORY = 0.8
LAUNCH = 3e-6
HOP = 1.5e-6                                                                 # NVLink, from one chip to the next
RESERVED = 0.1                                                               # of the memory: activations, fragments
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp8": 1, "int8": 1, "fp4": 0.5, "int4": 0.5}
GROUP_SCALE = 2 / 32                                                         # bytes a weight: a scale for 32 of 4 bits


def find(name, names, what):
    """The one of `names` that is meant: itself, or the only one that begins so, its numbers whole. UserError with the
    nearest.
    """
    plain = lambda text: re.sub(r"[\s_-]+", "", text).lower()
    exact = [n for n in names if plain(n) == plain(name)]
    begins = [n for n in names if re.match(re.escape(plain(name)) + r"(?!(?<=\d)[\d.])", plain(n)) and name.strip()]
    if exact or len(begins) == 1:
        return (exact or begins)[0]
    by_plain = {plain(n): n for n in names}
    near = begins or [by_plain[n] for n in difflib.get_close_matches(plain(name), by_plain, 4, 0.3)] or list(names)[:6]
    raise UserError(f"unknown {what} {name!r}; nearest: {', '.join(near[:6])}")


def matmul_share(chip, without=None):
    """MATMUL of a chip: its own best measured product / peak; where there is none, or it is the row `without` to be
    predicted, the median of the other chips of its vendor, or of all.
    """
    if chip.best and chip.name != without:
        return chip.best / chip.bf16
    others = [c for c in ACCELERATORS.values() if c.best and c.name != chip.name and c.name != without]
    return statistics.median([c.best / c.bf16 for c in others if c.vendor == chip.vendor]
                             or [c.best / c.bf16 for c in others])


def peak(chip, dtype):
    """Dense peak FLOP/s of products in `dtype`, or None. Weights in integers are multiplied as bfloat16."""
    value = getattr(chip, {"int4": "bf16", "int8": "bf16"}.get(dtype, dtype))
    return value and value * 1e12


def rate(chip, dtype):
    """FLOP/s that matrix products reach: peak × MATMUL. UserError where the chip's peak is unknown."""
    top = peak(chip, dtype)
    if not top:
        has = ", ".join(d for d in ("fp32", "tf32", "bf16", "fp8", "int8", "fp4") if getattr(chip, d))
        raise UserError(f"--dtype {dtype}: no peak is known for {chip.name}; known: {has}")
    return top * matmul_share(chip)


def derived(chip):
    """Columns that follow from the specification → dict; None where something is unknown."""
    ratio = lambda a, b: a / b if a and b else None
    return dict(ridge={d: ratio(getattr(chip, d), chip.bandwidth) for d in ("fp32", "bf16", "fp8", "int8", "fp4")},
                bytes_per_flop=ratio(chip.memory * 1e9, (chip.bf16 or 0) * 1e12),
                bandwidth_per_flop=ratio(chip.bandwidth, chip.bf16),
                flop_per_joule=ratio((chip.bf16 or 0) * 1e12, chip.watts),
                read_all_seconds=chip.memory / chip.bandwidth / 1e3)


def figure(x, digits=3):
    """A number in few signs; – for None."""
    if x is None:
        return "–"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= max(size, 1e5):
            return f"{x / size:.{digits}g}{unit}" if abs(x) < 1e18 else f"{x:.1e} "
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def short(name):
    """A chip's name as tables have it."""
    return name.split(" (")[0]


def table(head, rows, out=None, gap=2):
    """Print rows under a head: the first column left, the others right."""
    rows = [[str(x) for x in row] for row in rows]
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(row, width))]
        print((" " * gap).join(cells).rstrip(), file=out or sys.stdout)


def show_accelerators(chips, as_json):
    """The table of accelerators, with what follows from it."""
    if as_json:
        for chip in chips:
            print(json.dumps(chip._asdict() | derived(chip)))
        return
    rows = []
    for c in chips:
        d = derived(c)
        rows.append([short(c.name) + ("*" if c.status == "announced" else ""), int(c.year), figure(c.memory),
                     figure(c.bandwidth), figure(c.fp32), figure(c.bf16), figure(c.fp8), figure(c.fp4), figure(c.link),
                     figure(c.watts), figure(d["ridge"]["bf16"]), figure(d["flop_per_joule"]),
                     f"{1e3 * d['read_all_seconds']:.0f}"])
    table(["accelerator", "year", "GB", "TB/s", "fp32", "bf16", "fp8", "fp4", "link", "W", "ridge", "FLOP/J", "ms"],
          rows, gap=1)
    print("dense TFLOP/s; link GB/s one way; ridge FLOP/byte at bf16;\nms: reading all memory; – unknown"
          + ("\n* announced" if any(c.status == "announced" for c in chips) else ""))


def compare(names, as_json):
    """Accelerators side by side, a column each, as many at once as the terminal is wide."""
    chips = [ACCELERATORS[find(n, ACCELERATORS, "accelerator")] for n in names.split(",")]
    if as_json:
        return show_accelerators(chips, True)
    rows = [["status", *(c.status for c in chips)], ["year", *(int(c.year) for c in chips)]]
    units = dict(memory="GB", bandwidth="TB/s", fp32="TFLOP/s", tf32="TFLOP/s", bf16="TFLOP/s", fp8="TFLOP/s",
                 int8="TOP/s", fp4="TFLOP/s", link="GB/s", watts="W", best="TFLOP/s")
    rows += [[f"{name} {unit}", *(figure(getattr(c, name), 5) for c in chips)] for name, unit in units.items()]
    d = [derived(c) for c in chips]
    rows += [[f"ridge {t}, FLOP/byte", *(figure(x["ridge"][t]) for x in d)] for t in ("fp32", "bf16", "fp8", "fp4")]
    rows += [["memory byte / bf16 FLOP/s", *("–" if x["bytes_per_flop"] is None else f"{x['bytes_per_flop']:.1e}"
                                              for x in d)],
             ["byte/s / bf16 FLOP/s", *("–" if x["bandwidth_per_flop"] is None else f"{x['bandwidth_per_flop']:.1e}"
                                         for x in d)],
             ["bf16 FLOP / J", *(figure(x["flop_per_joule"]) for x in d)],
             ["reading all memory, ms", *(f"{1e3 * x['read_all_seconds']:.0f}" for x in d)]]
    head = ["", *(short(c.name) for c in chips)]
    wide = [2 + max(len(str(x)) for x in column) for column in zip(head, *rows)]
    start, room = 1, shutil.get_terminal_size((80, 24)).columns + 2 - wide[0]
    while start < len(head):
        stop = start + 1
        while stop < len(head) and sum(wide[start:stop + 1]) <= room:
            stop += 1
        print(end="\n" * (start > 1))
        table([""] + head[start:stop], [row[:1] + row[start:stop] for row in rows])
        start = stop


# --- 2. Measure: this machine, and each op of the project on it -------------------------------------------------------

def synchronize(device):
    """Wait until the device has done what it was told."""
    {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.split(":")[0], lambda: None)()


def seconds(work, device="cpu", budget=0.03):
    """The best of repeated runs within `budget` seconds: what the machine does undisturbed. At least five runs."""
    work()
    synchronize(device)
    best, count, end = math.inf, 0, time.perf_counter() + budget
    while count < 5 or time.perf_counter() < end:
        t = time.perf_counter()
        work()
        synchronize(device)
        best, count = min(best, time.perf_counter() - t), count + 1
    return best


class Passes(TorchDispatchMode):
    """What a call makes torch do, a `Pass` for each kernel. Views move nothing."""

    def __init__(self):
        super().__init__()
        self.made, self.touched, self.clock = [], {}, 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        own = custom_ops.OPDEFS.get(call._schema.name) if call.namespace == "twin" else None
        if own:                                                              # flash.py's: what counts is inside
            with self:
                return own._init_fn(*args, **(kwargs or {}))
        has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, call.name())
        if has("CompositeImplicitAutograd") and not has("CPU"):
            with self:                                                       # made of others: count those
                out = call.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = call(*args, **(kwargs or {}))
        self.made += [p._replace(moved=self.distances(args, kwargs, out) if p.kind != "view" and i == 0 else p.moved)
                      for i, p in enumerate(passes_of(call, args, kwargs or {}, out))]
        return out

    def distances(self, *trees):
        """How much was moved since each tensor was last touched: what a cache must have held to hold it still → a list
        of (address, bytes, bytes moved since or None). Memory that was let go and taken anew is the same memory.
        """
        sizes = {}
        for x in tree_leaves(trees):
            if isinstance(x, torch.Tensor) and x.layout is torch.strided:
                sizes[x.data_ptr()] = max(sizes.get(x.data_ptr(), 0), math.prod(
                    n for n, step in zip(x.shape, x.stride()) if step) * x.element_size())
        self.clock += sum(sizes.values())
        moved = [(size, self.clock - self.touched[at] if at in self.touched else None) for at, size in sizes.items()]
        self.touched |= dict.fromkeys(sizes, self.clock - sum(sizes.values()))
        return moved


Pass = namedtuple("Pass", "kind flops bytes numbers rows shape moved", defaults=(None,))
SLOW = {"exp": "exp", "exp_": "exp", "log": "exp", "log2": "exp", "exp2": "exp2", "exp2_": "exp2",
        "_softmax": "softmax", "_log_softmax": "log_softmax", "silu": "silu", "sigmoid": "silu",
        "silu_backward": "silu", "tanh": "silu", "tanh_": "silu", "softplus": "silu", "cos": "cos", "sin": "cos",
        "pow": "pow", "linalg_vector_norm": "norm", "masked_fill": "masked", "masked_fill_": "masked",
        "cumsum": "cumsum", "convolution": "conv", "convolution_backward": "conv back"}


def passes_of(call, args, kwargs, out):
    """One dispatched call of torch → its Passes (one each for the tensors of a list)."""
    name = call._schema.name.split("::")[1]
    into = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.layout is torch.strided]
    outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    size = lambda x: math.prod(n for n, step in zip(x.shape, x.stride()) if step) * x.element_size()
    numbers, shape = sum(x.numel() for x in outs), None
    changed = call._schema.is_mutable
    shares = {x.untyped_storage().data_ptr() for x in into if x.numel()}
    if name.startswith(("empty", "new_empty", "_unsafe_view", "detach")) or not outs or (
            not changed and all(x.untyped_storage().data_ptr() in shares for x in outs)):
        return [Pass("view", 0, 0, 0, 0, None)]
    if name.startswith("_foreach"):
        share = sum(map(size, into)) + sum(map(size, outs or into))
        count = max(1, len(outs) or len(into) // 2)
        return [Pass("pass", 0, share / count, 0, 0, None)] * count
    bytes = sum(map(size, {id(x): x for x in [*into, *outs]}.values())) + (size(into[0]) if changed and into else 0)
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
        a, b = into[-2:] if not name.startswith(("add", "badd")) else into[1:3]
        batch = a.shape[0] if a.ndim == 3 else 1
        shape = (a.shape[-2], b.shape[-1], a.shape[-1], batch)
        return [Pass("matmul", 2 * math.prod(shape), bytes, 0, 0, shape)]
    if name in ("mv", "addmv", "addmv_"):
        shape = (*into[-2].shape, 1, 1)
        return [Pass("matmul", 2 * math.prod(shape), bytes, 0, 0, shape)]
    if name == "_linear_pointwise":                                          # weights packed for few rows (infer.py)
        K, N = into[0].shape[-1], outs[0].shape[-1]
        shape = (outs[0].numel() // N, N, K, 1)
        return [Pass("matmul", 2 * math.prod(shape), bytes + K * N * outs[0].element_size(), 0, 0, shape)]
    if "scaled_dot_product" in name:
        return [attention_pass(name, args, kwargs, into, bytes)]
    if name in ("embedding", "index", "index_select", "gather"):
        bytes, rows = 2 * sum(map(size, outs)), numbers // max(outs[0].shape[-1], 1)
        return [Pass("index" if name == "index" else "pass", 0, bytes, numbers, rows, None)]
    if name in ("fill_", "zero_", "zeros", "zeros_like", "ones", "ones_like", "full", "arange", "scalar_tensor"):
        return [Pass("pass", 0, sum(map(size, outs)), numbers, 0, None)]
    most = max([*into, *outs], key=lambda x: x.numel())
    rows, even = loops(into, outs[0])
    types = {x.dtype for x in into if x.shape == outs[0].shape}
    kind = SLOW.get(name) or ("transposed" if not even else "mixed" if len(types) > 1 else "pass")
    return [Pass(kind, most.numel(), bytes, most.numel(), rows if name not in SLOW else 0, None)]


def loops(into, out):
    """How an elementwise kernel goes through its operands: how many loops it begins, each over numbers that follow each
    other evenly in all of them, and whether in such a loop they are neighbours (or one, repeated). A sum over the last
    axis begins a loop for each number of its result.
    """
    if not out.numel() or any(x.ndim > out.ndim or any(n not in (1, m) for n, m in zip(x.shape[::-1], out.shape[::-1]))
                              for x in into):                                # no broadcast: a sum, a concatenation
        most = max([*into, out], key=lambda x: x.numel())
        sums = most.ndim and most.numel() > out.numel() and most.shape[-1:] != out.shape[-1:]
        return (out.numel() if sums else 0), most.numel() < 4096 or most.stride(-1) == 1
    every = [x.expand(out.shape) for x in [*into, out]]
    axes = sorted((d for d, n in enumerate(out.shape) if n > 1), key=out.stride)
    if not axes:
        return 0, True
    length = out.shape[axes[0]]
    for d in axes[1:]:
        if any(x.stride(d) != x.stride(axes[0]) * length for x in every):
            break
        length *= out.shape[d]
    count = out.numel() // length
    return count if count > 1 else 0, all(x.stride(axes[0]) < 2 for x in every)


def attention_pass(name, args, kwargs, into, bytes):
    """torch's attention on a CPU: 32, 64 or 256 queries against blocks of 512 keys, whole up to the diagonal."""
    back = "backward" in name
    q, k = (into[1], into[2]) if back else (into[0], into[1])
    (B, H, T, D), S = q.shape, k.shape[2]
    causal = any(x is True for x in (*args, *kwargs.values()))
    block = 256 if T >= 768 else 64 if T >= 192 else 32
    seen = sum((min(i + block, T) - i) * (min(-(-(i + block) // 512) * 512, S) if causal else S)
               for i in range(0, T, block))
    kind = "attention back" if back else "attention" if T > 8 else "attention few"
    return Pass(kind, B * H * seen * D * (10 if back else 4), bytes, B * H * seen, 0,
                (min(block, T), min(512, S), D, B * H))


GRAIN = 2 ** 15                                                              # numbers that torch gives a CPU's thread


@dataclass
class Bench:
    """What was measured: machine (train.Machine), curves of bytes/s by working set, FLOP/s by (least, mean of the other
    two sizes), seconds a number of slow functions, a row of a strided pass, a call.
    """
    machine: train.Machine
    bandwidth: list                                                          # (working set bytes, bytes/s) of a + b
    reading: list                                                            # of a sum
    products: dict                                                           # (least, size) → FLOP/s, float32
    batched: dict                                                            # the same of many small ones at once
    columns: dict                                                            # of many with few columns
    weights: list                                                            # as `bandwidth`, of products of 4 rows
    attention: dict                                                          # kind → (head size, FLOP/s) of torch's own
    slow: dict                                                               # kind → seconds a number
    row: float
    call: float                                                              # without gradients
    call_train: float                                                        # of a forward and backward pass
    link: float = None

    def bytes_per_second(self, working_set, curve=None):
        """Interpolated in the logarithm of the working set."""
        x, y = zip(*(curve or self.bandwidth))
        return float(np.exp(np.interp(math.log(max(working_set, 1)), np.log(x), np.log(y))))

    def product_rate(self, m, n, k, batch=1):
        """Interpolated in the logarithms of the least size and of the mean of the others; of many, of the next size."""
        least, next, most = sorted((m, n, k))
        size = math.sqrt(next * most) if batch == 1 else next
        rates = self.products if batch == 1 else self.columns if n < m else self.batched
        xs, ys = (sorted({key[i] for key in rates}) for i in (0, 1))
        by_size = [np.interp(math.log(size), np.log(ys), [math.log(rates[x, y]) for y in ys]) for x in xs]
        return float(np.exp(np.interp(math.log(least), np.log(xs), by_size)))

    def seconds(self, p, all=0):
        """One Pass, without the price of its call: the longest of its bytes, its products and its slow numbers. What a
        call had not touched before was touched when it ran last: `all` its bytes ago.
        """
        few = p.kind == "attention few" or p.kind == "matmul" and p.shape[0] <= 8 and p.shape[3] == 1
        curve = self.weights if few else self.bandwidth
        memory = p.bytes / self.bytes_per_second(p.bytes, curve)
        if p.moved:
            share = p.bytes / max(sum(size for size, _ in p.moved), 1)       # written where it was read: twice
            memory = share * sum(size / self.bytes_per_second(max(ago or all, p.bytes), curve) for size, ago in p.moved)
        if p.kind == "view":
            return 0.0
        if p.kind == "matmul":
            return max(memory, p.flops / self.product_rate(*p.shape))
        if p.kind in self.attention:
            sizes, rates = zip(*self.attention[p.kind])
            return max(memory, p.flops / min(float(np.interp(p.shape[2], sizes, rates)),
                                             self.product_rate(*p.shape[:3])))
        threads = torch.get_num_threads() if self.machine.device == "cpu" else 1
        alone = threads / min(threads, -(-p.numbers // GRAIN) or 1)          # a few numbers are one thread's work
        return max(memory, p.numbers * self.slow.get(p.kind, 0) * alone) + p.rows * self.row

    def predict(self, passes, trained):
        """Seconds of a call: its passes, and the price of calling each."""
        all = sum(size for p in passes for size, _ in p.moved or ())
        return sum(self.seconds(p, all) for p in passes) + len(passes) * (self.call_train if trained else self.call)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def reference_calls(layers, x):
    """A few of torch's calls as a module makes them, on tensors so small that only the calls cost."""
    for a, b in layers:
        y = a(x).view(2, 4, -1).transpose(0, 1)
        if y.shape[1:] != (2, 16) or not torch.is_floating_point(y):
            raise ValueError(f"reference_calls: {tuple(y.shape)}")
        out = torch.empty_like(y, requires_grad=False)
        out[:, 0] = y[torch.arange(4), 1].detach()
        y = y + out[:, :1].to(x.dtype)
        x = _Twice.apply(b((y * y).transpose(0, 1).reshape(8, -1))) + x
    return x


def call_prices():
    """Seconds a dispatched call of torch costs, without and with gradients, from `reference_calls`."""
    layers = [(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)) for _ in range(4)]
    x, prices = torch.ones(8, 8), []

    def forward():
        with torch.no_grad():
            reference_calls(layers, x)
    for work in (forward, lambda: reference_calls(layers, x).sum().backward()):
        with Passes() as passes:
            work()
        prices.append(seconds(work, budget=0.2) / len(passes.made))
    return prices


def bench(device, bar):
    """Measure → Bench. `bar` is moved on."""
    step = lambda text: (bar.set_description(text), bar.update())
    machine = train.measure(device)
    step("bandwidth by working set")
    kind, curve, reading = machine.device, [], []
    largest = 28 if kind == "cpu" else 31
    for power in range(14, largest + 1):
        a, b, c = torch.ones(3, 2 ** power // 12, device=kind)
        t = seconds(lambda: torch.add(a, b, out=c), kind)
        tiny = seconds(lambda: torch.add(a[:1], b[:1], out=c[:1]), kind, 0.003)
        curve.append((12 * len(a), 12 * len(a) / max(t - tiny, t / 8)))
        a = torch.ones(2 ** power // 4, device=kind)
        t = seconds(a.sum, kind, 0.015)
        reading.append((4 * len(a), 4 * len(a) / max(t - tiny, t / 4)))
    step("products by shape")
    products = {}                                                            # as they lie in a pass and its backward
    for least in (1, 4, 16, 64, 256, 1024):
        for size in (32, 64, 128, 256, 512, 1024) if kind == "cpu" else (256, 1024, 4096):
            a, b = torch.randn(least, size, device=kind), torch.randn(size, size, device=kind)
            out, a_t = torch.empty(least, size, device=kind), a.T.contiguous().T
            spent = statistics.mean(seconds(lambda: torch.mm(x, y, out=out), kind, 0.01)
                                    for x, y in ((a, b), (a, b.T), (a_t, b)))
            products[least, size] = 2 * least * size * size / spent
    batched, columns = {}, {}
    for least in (1, 16, 64, 256):
        for size in (16, 64, 256):
            many = min(256, 2 ** 18 // size ** 2)                            # 1 MB
            a, b = torch.randn(many, least, size, device=kind), torch.randn(many, size, size, device=kind)
            rate = lambda x, y: 2 * many * least * size * size / seconds(lambda: torch.bmm(x, y), kind, 0.01)
            batched[least, size] = statistics.harmonic_mean([rate(a, b), rate(a, b.mT)])
            columns[least, size] = rate(b, torch.randn(many, size, least, device=kind))
    weights, x = [], torch.randn(4, 256, device=kind)
    for count in (1, 4, 16, 64):                                             # 1 MB each, read in turn
        many = torch.randn(count, 1024, 256, device=kind).unbind()
        spent = seconds(lambda: [torch.nn.functional.linear(x, w) for w in many], kind)
        weights.append((2 ** 20 * count, 2 ** 20 * count / spent))
    attention = {"attention": [], "attention back": [], "attention few": []}
    for D in (32, 128):                                                      # a primitive as `mm` is, at its own sizes
        q = torch.randn(1, 2, 384, D, device=kind, requires_grad=True)
        work = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)
        y = work()
        forward, back = seconds(work, kind), seconds(lambda: torch.autograd.grad(y, q, y, retain_graph=True), kind)
        attention["attention"].append((D, 2 * 384 * 384 * D * 4 / forward))
        attention["attention back"].append((D, 2 * 384 * 384 * D * 10 / back))
        few, keys = torch.randn(4, 2, 2, D, device=kind), torch.randn(4, 2, 256, D, device=kind)
        spent = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(few, keys, keys), kind)
        attention["attention few"].append((D, 8 * 2 * 256 * D * 4 / spent))
    step("slow functions, rows, calls")
    x, y = torch.rand(512, 256, device=kind), torch.empty(512, 256, device=kind)                     # for all threads
    z = x.double() if kind != "mps" else x
    each = lambda work: seconds(work, kind) / x.numel()
    some, at = x > 0.5, torch.arange(512, device=kind)
    line, w = torch.rand(1, 512, 256, device=kind, requires_grad=True), torch.rand(512, 1, 4, device=kind)
    conv = lambda: torch.nn.functional.conv1d(line, w.requires_grad_(), groups=512)
    made = conv()
    slow = dict(exp=each(lambda: torch.exp(x, out=y)), exp2=each(lambda: torch.exp2(x, out=y)),
                silu=each(lambda: torch.nn.functional.silu(x)), log_softmax=each(lambda: torch.log_softmax(x, -1)),
                softmax=each(lambda: torch.softmax(x, -1)), cos=each(lambda: torch.cos(z)),
                pow=each(lambda: torch.pow(x, 3)), norm=each(lambda: torch.linalg.vector_norm(x, dim=-1)),
                masked=each(lambda: y.masked_fill_(some, 0.0)), index=each(lambda: x[at]),
                cumsum=each(lambda: x.cumsum(0)), conv=each(conv), mixed=each(lambda: some * x),
                transposed=each(lambda: y.copy_(x.view(256, 512).T)),
                **{"conv back": each(lambda: torch.autograd.grad(made, (line, w), made, retain_graph=True))})
    wide, flat = torch.rand(1024, 64, device=kind)[:, :32], torch.rand(1024, 32, device=kind)
    out = torch.empty(1024, 32, device=kind)
    row = max(seconds(lambda: torch.mul(wide, flat, out=out), kind) - seconds(lambda: torch.mul(flat, flat, out=out),
                                                                              kind), 0) / 1024
    call, call_train = call_prices()
    return Bench(machine, curve, reading, products, batched, columns, weights, attention, slow, row, call, call_train,
                 link_rate())


def link_rate():
    """Bytes/s from one GPU to the next, or None where there are not two."""
    if torch.cuda.device_count() < 2:
        return None
    a, b = (torch.empty(2 ** 28, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
    return 2 ** 28 / seconds(lambda: b.copy_(a), "cuda", 0.1)


# Each op with its FLOPs and bytes as formulas: the least that any implementation in float32 must do. `s` holds the
# sizes B, T, H, G, D, C, F, V; forward and backward together where `trained`.

Op = namedtuple("Op", "name trained flops bytes make")


def ops(s):
    """The ops of the project at the sizes `s` → [Op]; make(device) → a function that calls it."""
    N = s.B * s.T
    q, kv = N * s.H * s.D, N * s.G * s.D

    def t(device, *shape):
        return torch.randn(shape, device=device).requires_grad_()

    def back(work, *tensors):
        """Forward and backward of work(), gradients let go."""
        def call():
            y = work()
            torch.autograd.backward(y, [torch.ones_like(x) for x in y] if isinstance(y, tuple) else torch.ones_like(y))
            for x in tensors:
                x.grad = None
        return call

    def rms(device):
        x, w = t(device, N, s.C), t(device, s.C)
        return back(lambda: A.rms_norm(x, w), x, w)

    def rms_residual(device):
        x, w, r = t(device, N, s.C), t(device, s.C), t(device, N, s.C)
        return back(lambda: A.rms_norm(x, w, residual=r), x, w, r)

    def rotary(device):
        x, y, at = t(device, s.B, s.H, s.T, s.D), t(device, s.B, s.G, s.T, s.D), torch.arange(s.T, device=device)
        return back(lambda: A.rotary(x, y, at), x, y)

    def swiglu(device):
        a, b = t(device, N, s.F), t(device, N, s.F)
        return back(lambda: A.swiglu(a, b), a, b)

    def loss(device):
        x, w = t(device, N, s.C), (torch.randn(s.V, s.C, device=device) / s.C ** 0.5).requires_grad_()
        goal = torch.zeros(N, dtype=torch.long, device=device)
        return back(lambda: A.linear_cross_entropy(x, w, goal), x, w)

    def attend(op, **options):
        def make(device):
            q, k, v = t(device, s.B, s.H, s.T, s.D), t(device, s.B, s.G, s.T, s.D), t(device, s.B, s.G, s.T, s.D)
            return back(lambda: op(q, k, v, **options), q, k, v)
        return make

    def forward(device):
        q, k, v = (t(device, s.B, n, s.T, s.D).detach() for n in (s.H, s.G, s.G))
        return lambda: flash.flash_attention(q, k, v)

    def decode(device):
        pages = [torch.randn(s.B * s.T // 16, 16, s.G, s.D, device=device) for _ in range(2)]
        places = torch.arange(s.B * s.T // 16, dtype=torch.int32, device=device).view(s.B, -1)
        lengths = torch.full((s.B,), s.T, dtype=torch.int32, device=device)
        q = torch.randn(s.B, s.H, s.D, device=device)
        return lambda: flash.flash_decode(q, *pages, places, lengths)

    def block(letter, device):
        m, x = train.Model(small_config(s, letter)).initialize(0).to(device).blocks[0], t(device, s.B, s.T, s.C)
        at = torch.arange(s.T, device=device)
        return back(lambda: m(x, at), x, *(w for name, w in m.named_parameters() if not name.startswith("predictor")))

    def conv(device):
        x, w, bias = t(device, s.B, s.T, E), t(device, E, 4), t(device, E)
        return back(lambda: ssm.causal_conv1d(x, w, bias)[0], x, w, bias)

    def faded(device, *shape):
        return -torch.rand(shape, device=device).requires_grad_()

    def recurrence(op, step, make):
        """An op of ssm.py forward and backward, and its one-token form; make(device, *leading sizes, state or not)."""
        def whole(device):
            tensors = make(device, (s.B, s.T))
            return back(lambda: op(*tensors)[0], *tensors)

        def one(device):
            *tensors, state = (x.detach() for x in make(device, (s.B,), True))
            return lambda: step(*tensors, state=state)
        return whole, one

    def scan_tensors(device, at, state=False):
        dt = torch.rand(*at, E, device=device).requires_grad_()
        return [t(device, *at, E), dt, faded(device, E, 16), t(device, *at, 16), t(device, *at, 16),
                *([t(device, s.B, E, 16)] if state else [])]

    def ssd_tensors(device, at, state=False):
        dt = torch.rand(*at, H, device=device).requires_grad_()
        return [t(device, *at, H, P), dt, faded(device, H), t(device, *at, 1, S), t(device, *at, 1, S),
                *([t(device, s.B, H, P, S)] if state else [])]

    def delta_tensors(device, at, state=False):
        q, k = (torch.nn.functional.normalize(torch.randn(*at, s.H, s.D, device=device), dim=-1).requires_grad_()
                for _ in range(2))
        beta = torch.rand(*at, s.H, device=device).requires_grad_()
        return [q, k, t(device, *at, s.H, s.D), faded(device, *at, s.H), beta,
                *([t(device, s.B, s.H, s.D, s.D)] if state else [])]

    def rows(device):
        x, weight = t(device, N, s.C), t(device, M)
        at = torch.arange(M, device=device) * (N // M)
        return back(lambda: mod.scatter_add_rows(x, at, mod.gather_rows(x, at), weight), x, weight)

    shape = small_shape(s)
    k, scores = cost(shape, s.T), 2 * s.B * s.H * s.T * s.T * s.D            # causal: half of 4
    pairs, weights = 2 * q + 2 * kv, k["params"]
    one, routed = ((cost(c, s.T)["flops"] - 2 * s.V * s.C) / len(c.layers)
                   for c in (shape, config_shape(small_config(s, "A").raw)))
    block_weights = (weights - 2 * s.V * s.C) / len(shape.layers)
    E, (H, P, S) = 2 * s.C, operator.itemgetter("num_heads", "head_dim", "state_size")(train.mamba2_sizes(s.C))
    M, held = N // 8, dict(scan=E * 16, ssd=E * S, delta=s.H * s.D * s.D)    # rows taken, and numbers of a state
    scan, scan_step = recurrence(ssm.selective_scan, ssm.selective_scan_step, scan_tensors)
    ssd, ssd_step = recurrence(ssm.ssd, ssm.ssd_step, ssd_tensors)
    delta, delta_step = recurrence(ssm.gated_delta, ssm.gated_delta_step, delta_tensors)
    return [
        Op("rms_norm", True, 12 * N * s.C, 4 * 5 * N * s.C, rms),
        Op("rms_norm + residual", True, 14 * N * s.C, 4 * 8 * N * s.C, rms_residual),
        Op("rotary", True, 6 * (q + kv), 4 * 4 * (q + kv), rotary),
        Op("swiglu", True, 14 * N * s.F, 4 * 8 * N * s.F, swiglu),
        Op("linear_cross_entropy", True, 6 * N * s.C * s.V, 4 * (4 * N * s.C + 3 * s.V * s.C), loss),
        Op("attention", True, 3.5 * scores, 4 * 3 * pairs, attend(A.attention)),
        Op("attention window", True, 3.5 * 4 * s.B * s.H * s.T * s.W * s.D, 4 * 3 * pairs,
           attend(A.attention, window=s.W)),
        Op("flash_attention", False, scores, 4 * pairs, forward),
        Op("flash_attention", True, 3.5 * scores, 4 * 3 * pairs, attend(flash.flash_attention)),
        Op("flash_attention window", True, 3.5 * 4 * s.B * s.H * s.T * s.W * s.D, 4 * 3 * pairs,
           attend(flash.flash_attention, window=s.W)),
        Op("flash_decode", False, 4 * s.B * s.H * s.T * s.D, 4 * 2 * kv, decode),
        Op("causal_conv1d", True, (6 * 4 + 12) * N * E, 4 * 5 * N * E, conv),
        # The recurrences: FLOPs a number of the state and a step, as they are written, and twice as many backwards.
        Op("selective_scan", True, 3 * 9 * N * held["scan"], 4 * N * (8 * E + 6 * 16), scan),
        Op("ssd", True, 3 * 5 * N * held["ssd"], 4 * N * (5 * E + 6 * S + 3 * H), ssd),
        Op("gated_delta", True, 3 * 7 * N * held["delta"], 4 * (9 * q + 6 * N * s.H + 2 * q), delta),
        Op("selective_scan_step", False, 9 * s.B * held["scan"], 4 * s.B * (2 * held["scan"] + 3 * E), scan_step),
        Op("ssd_step", False, 5 * s.B * held["ssd"], 4 * s.B * (2 * held["ssd"] + 2 * E + 2 * S), ssd_step),
        Op("gated_delta_step", False, 7 * s.B * held["delta"], 4 * s.B * (2 * held["delta"] + 4 * s.H * s.D),
           delta_step),
        Op("gather, scatter rows", True, 6 * M * s.C, 4 * (4 * N + 5 * M) * s.C, rows),
        Op("block", True, 3 * N * one, 4 * (3 * block_weights + 30 * N * s.C), functools.partial(block, "a")),
        Op("routed block", True, 3 * N * routed, 4 * (3 * block_weights + (30 * M + 5 * N) * s.C),
           functools.partial(block, "A")),
        Op("train step", True, 3 * N * k["flops"], 4 * (9 * weights + 30 * N * s.C * len(shape.layers)),
           functools.partial(train_step, s)),
        Op("decode step", False, s.B * k["flops"], 4 * (weights + s.B * s.T * k["cache"]),
           functools.partial(decode_step, s)),
    ]


Sizes = namedtuple("Sizes", "B T H G D C F V W layers")
SMALL, LARGE = Sizes(4, 256, 4, 2, 64, 256, 704, 4096, 64, 3), Sizes(8, 2048, 16, 8, 128, 2048, 6144, 32768, 512, 4)


def small_config(s, layers=None):
    raw = train.our_config(layers or "a" * s.layers, s.C, s.H, s.G, s.V, s.T, [0])
    return train.parse_config(raw | dict(intermediate_size=s.F, head_dim=s.D))


def small_shape(s):
    return config_shape(small_config(s).raw, "small")


def small_model(s, device):
    return train.Model(small_config(s)).initialize(0).to(device)


def train_step(s, device):
    """A step of train.py: forward, loss, backward, clipped, and the optimizer."""
    model = small_model(s, device)
    optimizer, tokens = train.Optimizer(model), torch.zeros(s.B, s.T, dtype=torch.long, device=device)

    def step():
        h = model.hidden(tokens).flatten(0, 1)
        A.linear_cross_entropy(h, model.head.weight, tokens.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step(1.0)
        for w in model.parameters():
            w.grad = None
    return step


def decode_step(s, device):
    """A token for each of B sequences that hold T − 1 others."""
    model = infer.quicken(small_model(s, device).eval())
    states, at = model.new_states(s.B, s.T), torch.tensor([s.T - 1], device=device)
    for state in states:
        state.k.zero_(), state.v.zero_()
    tokens = torch.zeros(s.B, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def step():
        for state in states:
            state.length = s.T - 1
        return model(tokens, at, states)
    return step


def hold(bench, op, device):
    """An op measured and predicted → dict."""
    work = op.make(device)
    work()                                                                   # caches and first gradients apart
    with Passes() as passes:
        work()
    if device == "cpu":
        predicted = bench.predict(passes.made, op.trained)
    else:                                                                    # our kernels do what the formula says
        flops, bandwidth = bench.machine.flops[torch.float32], bench.machine.bandwidth
        predicted = max(op.flops / flops, op.bytes / bandwidth) + len(passes.made) * bench.call
    measured = seconds(work, device, 0.4)
    roof = max(op.flops / max(bench.machine.flops.values()), op.bytes / bench.machine.bandwidth)
    return dict(op=op.name, trained=op.trained, flops=op.flops, bytes=op.bytes, intensity=op.flops / op.bytes,
                passes=sum(p.kind != "view" for p in passes.made), measured=measured, predicted=predicted,
                ratio=predicted / measured, flops_per_second=op.flops / measured, roof_share=roof / measured)


ON_PAPER = ("A100 SXM", "H100 SXM", "B200 SXM", "MI300X", "MI355X", "TPU v7x (Ironwood)")


def op_on(op, chip):
    """Seconds of an op (its formulas, in bfloat16: half the bytes) on an accelerator, as one kernel."""
    return max(op.flops / rate(chip, "bf16"), op.bytes / 2 / (chip.bandwidth * 1e12 * MEMORY)) + LAUNCH


def check_out(path):
    """UserError where no picture can be written: before the measurement, not after."""
    try:
        if not path or os.path.isdir(path):
            raise ValueError("a folder, not a file")
        tempfile.NamedTemporaryFile(prefix=f".{Path(path).name}.", dir=Path(path).parent).close()
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None


def profile(args):
    """Measure this machine, hold the ops against it, draw the roofline, print the accelerators."""
    device = train.pick_device(args.device)
    check_out(args.out)
    train.keep_memory()
    sizes = SMALL if device == "cpu" else LARGE
    todo, results = ops(sizes), []
    with tqdm(total=3 + len(todo), leave=False, file=sys.stderr, disable=None) as bar:
        b = bench(device, bar)
        for op in todo:
            bar.set_description(op.name)
            results.append(hold(b, op, device))
            bar.update()
    draw_roofline(b, results, args.out)
    if args.json:
        print(json.dumps(dict(device=device, flops={str(d)[6:]: f for d, f in b.machine.flops.items()},
                              bandwidth=b.machine.bandwidth, bandwidth_by_bytes=b.bandwidth, call=b.call,
                              call_train=b.call_train, link=b.link)))
        for row in results:
            print(json.dumps(row))
        return
    show_bench(b)
    show_ops(results)
    print()
    show_accelerators(list(ACCELERATORS.values()), False)
    print(f"\nroofline: {args.out}")


def show_bench(b):
    """This machine's figures."""
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    print(f"{b.machine.device}: best products " + ", ".join(f"{name[d]} {figure(f)}FLOP/s" for d, f in
                                                          b.machine.flops.items())
          + f"\nmemory read at {figure(b.machine.bandwidth)}B/s\na call of torch {1e6 * b.call:.1f} µs, with gradients "
          f"{1e6 * b.call_train:.1f}; exponentials {figure(1 / b.slow['exp'])}/s"
          + (f"; link {figure(b.link)}B/s" if b.link else "") + "\n")
    top = max(y for _, y in b.bandwidth)
    print("working set   a + b → c, GB/s                                reading, GB/s")
    for (x, y), (_, r) in list(zip(b.bandwidth, b.reading))[::2]:
        print(f"{figure(x, 2) + 'B':>11}   {'█' * max(1, round(36 * y / top)):<36} {y / 1e9:6.1f}      {r / 1e9:6.1f}")
    xs, ys = (sorted({key[i] for key in b.products}) for i in (0, 1))
    print("\nfloat32 products, GFLOP/s: [rows × size] · [size × size]")
    table(["rows", *map(str, ys)], [[x, *(figure(b.products[x, y] / 1e9) for y in ys)] for x in xs])


def show_ops(results):
    """Each op measured, predicted, as a share of its roof; and on accelerators."""
    print()
    table(["op (float32)", "FLOPs", "bytes", "FLOP/B", "passes", "µs", "said", "ratio", "roof"],
          [[r["op"] + "′" * r["trained"], figure(r["flops"]), figure(r["bytes"]), figure(r["intensity"]), r["passes"],
            figure(1e6 * r["measured"]), figure(1e6 * r["predicted"]), f"{r['ratio']:.2f}", f"{r['roof_share']:.0%}"]
           for r in results])
    good = [sum(1 / x <= r["ratio"] <= x for r in results) for x in (1.25, 1.5)]
    print(f"′ forward and backward; FLOPs and bytes: the least there is; passes: kernels run\nsaid: µs predicted; "
          f"roof: share reached; ratio within 1.25×: {good[0]} of {len(results)}, 1.5×: {good[1]}\n")
    chips = [ACCELERATORS[n] for n in ON_PAPER]
    big = ops(LARGE)
    table(["µs (bf16)", *(short(c.name) for c in chips)],
          [[op.name + "′" * op.trained, *(figure(1e6 * op_on(op, c)) for c in chips)] for op in big])
    print(f"B {LARGE.B}, T {LARGE.T}, C {LARGE.C}")


def draw_roofline(b, results, path):
    """The roofs of this machine and the ops under them → a picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    x = np.logspace(-2, 3.5, 300)
    tops = {str(d)[6:]: f for d, f in b.machine.flops.items()}
    best = max(tops.values())
    for name, top in tops.items():
        axes.loglog(x, np.minimum(top, x * b.machine.bandwidth), lw=2, label=f"{name} {figure(top)}FLOP/s, memory "
                    f"{figure(b.machine.bandwidth)}B/s")
    cache = max(y for _, y in b.bandwidth)
    axes.loglog(x, np.minimum(best, x * cache), "--", color="gray", lw=1, label=f"cache {figure(cache)}B/s")
    for i, r in enumerate(results):
        axes.plot(r["intensity"], r["flops_per_second"], ("so" if i < 20 else "D^")[r["trained"]], ms=8, mec="black",
                  mew=0.5, color=plt.cm.tab20(i % 20), label=r["op"] + (", trained" if r["trained"] else ""))
    axes.set(xlabel="FLOPs a byte (the least bytes there are)", ylabel="FLOP/s", title=f"Roofline of this machine "
             f"({b.machine.device})", ylim=(min(r["flops_per_second"] for r in results) / 3, 3 * best))
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with train.replacing(path) as beside:
        figure_.savefig(beside, format="png", dpi=120)
    plt.close(figure_)


# --- 3. Binaries: what the compiler made of each kernel, for chips that need not be there -----------------------------
#
# Each op is called once with tensors of zeros and a driver that compiles what would be launched, and launches nothing:
# so the signatures, constants and tiles are those that the op takes on that chip.

def launches_attention(A, t):
    for C in (1024, 4096):
        yield dict(C=C), lambda: A.rms_norm(t(9, C), t(C)).sum().backward()
    yield dict(D=128), lambda: sum(y.sum() for y in A.rotary(t(2, 32, 5, 128), t(2, 8, 5, 128),
                                                             torch.arange(5))).backward()
    yield dict(F=11008), lambda: A.swiglu(t(4, 11008), t(4, 11008)).sum().backward()
    yield dict(S=4096), lambda: A.attention(t(1, 2, 1, 64), t(1, 1, 4096, 64), t(1, 1, 4096, 64), softcap=2.0,
                                            alibi=torch.ones(2), window=9).sum().backward()
    yield dict(V=131072), lambda: A.linear_cross_entropy(t(4, 8), t(131072, 8),
                                                         torch.zeros(4, dtype=torch.long)).backward()


def launches_flash(F, t):
    places, lengths = torch.zeros(2, 2048, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for D in (64, 128):
        pages, scales = t(9, 16, 2, D), torch.ones(9, 16, 2)
        yield dict(D=D), lambda: F.flash_attention(t(1, 4, 4096, D), t(1, 2, 4096, D),
                                                   t(1, 2, 4096, D)).sum().backward()
        yield dict(D=D, cache="bf16"), lambda: F.flash_decode(t(2, 16, D), pages, pages, places, lengths)
        yield dict(D=D, cache="int8"), lambda: F.flash_decode(t(2, 16, D), pages.char(), pages.char(), places, lengths,
                                                              scales, scales)


def launches_ssm(S, t):
    f = lambda *shape: torch.zeros(shape, requires_grad=True)
    less = lambda *shape: (-torch.ones(shape)).requires_grad_()              # the scan looks: A < 0
    yield dict(K=4), lambda: S.causal_conv1d(t(1, 256, 2048), t(2048, 4), t(2048))[0].sum().backward()
    yield dict(N=16), lambda: S.selective_scan(t(1, 256, 2048), f(1, 256, 2048), less(2048, 16), t(1, 256, 16),
                                               t(1, 256, 16), f(2048))[0].sum().backward()
    yield dict(P=64, N=128), lambda: S.ssd(t(1, 256, 8, 64), f(1, 256, 8), f(8), t(1, 256, 1, 128), t(1, 256, 1, 128),
                                           f(8))[0].sum().backward()
    yield dict(K=128, V=128), lambda: S.gated_delta(t(1, 256, 4, 128), t(1, 256, 4, 128), t(1, 256, 4, 128),
                                                    f(1, 256, 4), f(1, 256, 4))[0].sum().backward()
    now = lambda step, *tensors: step(*(x.detach() for x in tensors))
    yield dict(P=64, N=128), lambda: now(S.ssd_step, t(2, 8, 64), f(2, 8), f(8), t(2, 1, 128), t(2, 1, 128), f(8),
                                         f(2, 8, 64, 128))
    yield dict(K=128, V=128), lambda: now(S.gated_delta_step, t(2, 4, 128), t(2, 4, 128), t(2, 4, 128), f(2, 4),
                                          f(2, 4), f(2, 4, 128, 128))


def launches_mod(M, t):
    rows, weight = torch.arange(8), torch.zeros(8, requires_grad=True)
    yield dict(C=1024), lambda: M.gather_rows(t(64, 1024), rows).sum().backward()
    yield dict(C=1024), lambda: M.scatter_add_rows(t(64, 1024), rows, t(8, 1024), weight).sum().backward()


LAUNCHES = {"attention": launches_attention, "flash": launches_flash, "ssm": launches_ssm, "mod": launches_mod}
# name: backend, architecture, lanes; on a multiprocessor: KB of shared memory, warps at most; its matrix instructions
TARGETS = {
    "sm_80": ("cuda", 80, 32, 164, 64, r"HMMA|IMMA"),
    "sm_90": ("cuda", 90, 32, 228, 64, r"HGMMA|QGMMA|IGMMA|HMMA|IMMA"),
    "sm_100": ("cuda", 100, 32, 228, 64, r"UTC\w*MMA|HMMA|IMMA"),
    "gfx942": ("hip", "gfx942", 64, 64, 32, r"v_mfma\w*"),
    "gfx950": ("hip", "gfx950", 64, 160, 32, r"v_mfma\w*"),
}


class NoDevice:
    """The driver of a chip that is not there."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_ahead(name):
    """In a process of its own: compile all kernels for a target and print a JSON object for each."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    backend, arch, lanes, *_ = TARGETS[name]
    driver.set_active(NoDevice(GPUTarget(backend, arch, lanes)))
    made, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        made.append((kernel, run(kernel, *args, grid=grid, warmup=True, **options)))
        return made[-1][1]
    JITFunction.run = compile_only
    tensor = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    for file, launches in LAUNCHES.items():
        try:
            module = importlib.import_module(file)
        except ImportError as error:
            print(json.dumps(dict(skipped=f"{file}.py: not here ({error})")), flush=True)
            continue
        module.on_kernel = A.on_kernel = flash.on_kernel = lambda x: True
        seen = set()
        for config, launch in launches(module, tensor):
            made.clear()
            try:
                launch()
            except Exception as error:                                       # what a compiler raises is its own affair
                print(json.dumps(dict(skipped=f"{file}.py {config} for {name}: {type(error).__name__}: "
                                              f"{str(error).splitlines()[0][:90] if str(error) else ''}")), flush=True)
            for kernel, binary in made:
                constants = {kernel.arg_names[path[0]]: value for path, value in binary.src.constants.items()
                             if len(path) == 1 and isinstance(value, int) and kernel.arg_names[path[0]].isupper()}
                row = dict(kernel=kernel.__name__, file=f"{file}.py",
                           config=config | constants | dict(warps=binary.metadata.num_warps,
                                                            stages=binary.metadata.num_stages), target=name)
                if repr(row) not in seen:
                    seen.add(repr(row))
                    print(json.dumps(row | read_binary(binary, name)), flush=True)


def read_binary(binary, name):
    """A compiled kernel → its numbers: registers a thread, spilled bytes, shared memory, share of the warps that a
    multiprocessor could hold, matrix instructions, exponentials a thread, and what holds it up.
    """
    backend, arch, lanes, shared_kb, most, matrix = TARGETS[name]
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    if backend == "hip":
        text = binary.asm["amdgcn"]
        number = lambda key: max(map(int, re.findall(rf"\.{key}:\s*(\d+)", text)), default=0)
        registers, spills = number("vgpr_count"), 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
        by_registers = 4 * min(8, 512 // max(-(-registers // 8) * 8, 8)) // warps
        exponentials = len(re.findall(r"\bv_exp_f32", text))
        each = shared
    else:
        tools = Path(A.triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(binary.asm["cubin"])
            call = lambda *words: subprocess.run([*words, path], capture_output=True, text=True).stdout
            usage, text = call(tools / "cuobjdump", "--dump-resource-usage"), call(tools / "nvdisasm", "-c")
        registers = max(map(int, re.findall(r"REG:(\d+)", usage)), default=0)
        spills = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
        by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps) if registers else most
        exponentials = text.count("MUFU.EX2")
        each = shared + 1024
    found = re.findall(rf"\b({matrix})\b((?:\.\w+)*)", text)
    kinds = statistics.mode(kind for kind, _ in found) if found else None
    rooms = dict(registers=by_registers, shared=shared_kb * 1024 // each if each else most, threads=most // warps)
    programs = min(rooms.values())
    return dict(registers=registers, spills=spills, shared_bytes=shared, occupancy=round(programs * warps / most, 3),
                matrix_instruction=kinds, matrix_count=len(found), exponentials=exponentials,
                occupancy_limit=min(rooms, key=rooms.get), limit=limit(name, found, exponentials, spills))


def limit(name, found, exponentials, spills):
    """What holds a kernel up there: spills; memory where nothing is multiplied by matrix units; else the longer of the
    products and the exponentials, in clocks of a multiprocessor.
    """
    if spills:
        return "spills"
    if not found:
        return "memory"
    clocks = 0
    for kind, form in found:
        m, n, k = (int(x) for x in re.findall(r"\d+", re.search(r"\.(\d+x\d+x\d+)|$", form)[0] or "") or (0, 0, 0))
        if kind == "HGMMA":
            clocks += 2 * m * n * k / 4096 / 4                               # four warps share one, here a warp's part
        elif kind == "HMMA":
            clocks += 4096 / (2048 if name == "sm_80" else 4096)             # 16 x 8 x 16
        else:
            return "products"                                                # its size stands in no register
    return "exponentials" if 2 * exponentials > clocks else "products"       # 16 a clock: 2 clocks a warp


def kernel_rows():
    """All kernels × targets → (rows, lines about what was skipped), from the cache where no source has changed."""
    if A.triton is None:
        raise UserError("Triton is not installed (it runs on Linux): the binaries cannot be made here")
    here = Path(__file__).resolve().parent
    sources = [here / f"{name}.py" for name in ("hw_profile", *LAUNCHES)]
    key = hashlib.sha256(A.triton.__version__.encode()
                         + b"".join(p.read_bytes() if p.exists() else b"-" for p in sources)).hexdigest()[:16]
    kept = train.cache_folder() / "kernels" / f"{key}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    rows, skipped = [], []

    def work(name):
        program = f"import hw_profile; hw_profile.compile_ahead({name!r})"
        child = subprocess.Popen([sys.executable, "-c", program], cwd=here, env=env, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for line in child.stdout:
            row = json.loads(line)
            rows.append(row) if "kernel" in row else skipped.append(row["skipped"])
            bar.update()
        error = child.stderr.read()
        if child.wait():
            skipped.append(f"{name}: {(error.strip().splitlines() or ['failed'])[-1]}")

    with tqdm(desc="compile", unit=" kernels", leave=False, file=sys.stderr, disable=None) as bar:
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(work, TARGETS))
    rows.sort(key=lambda r: (list(LAUNCHES).index(r["file"][:-3]), list(TARGETS).index(r["target"])))
    result = rows, sorted(set(skipped))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with train.replacing(kept) as path:
        path.write_text(json.dumps(result))
    return result


def show_kernels(as_json):
    """The table of binaries."""
    rows, skipped = kernel_rows()
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    sizes = lambda config: " ".join(f"{k.replace('BLOCK_', '')}{v}" for k, v in config.items()
                                    if k in ("C", "D", "F", "S", "V", "K", "N", "P", "BLOCK_M", "BLOCK_N", "cache"))
    table(["kernel", "sizes", "chip", "regs", "kB", "occ.", "by", "matrix", "exp", "limit"],
          [[r["kernel"].strip("_").replace("linear_cross", "cross")[:17], sizes(r["config"])[:11], r["target"],
            r["registers"], -(-r["shared_bytes"] // 1024), f"{r['occupancy']:.0%}", r["occupancy_limit"][:3],
            f"{r['matrix_count']} {(r['matrix_instruction'] or '–')[:6]}", r["exponentials"],
            figure(r["spills"]) + " B" if r["spills"] else r["limit"][:8]] for r in rows], gap=1)
    print("regs, exp: a thread; kB: shared by a program; occ.: warps at once / most, and\nwhat bounds it; exp: 2^x "
          "written in the code; limit: what holds it up, by clocks\nof products and exponentials, or bytes spilled")


# --- 4. Model cost: parameters, FLOPs and bytes by letter of the layer ------------------------------------------------

@dataclass
class Shape:
    """The sizes that cost: a letter a block (a attention, s Mamba-2, m Mamba-1, d gated delta; a capital is routed)."""
    name: str
    layers: str
    dim: int
    vocab: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    context: int = 8192
    norms: int = 2                                                           # of a block with attention, each C weights
    # Latent attention (DeepSeek): widths of the compressed queries and keys, of a head's rotated part, of its values.
    latent_q: int = 0
    latent: int = 0
    rotated: int = 0
    value_dim: int = 0
    # Experts: how many, how many a token visits, their width; the width of what all visit, and whether it has a gate;
    # the first blocks have one MLP.
    experts: int = 0
    active: int = 0
    expert_hidden: int = 0
    shared: int = 0
    shared_gate: bool = False
    dense: int = 0
    # Recurrent layers: {letter: what its function in LAYERS is called with}. Mixture of Depths: mod.py's two.
    mixers: dict = field(default_factory=dict)
    capacity: float = 0.125
    routing: str = "topk"


def llama(name, layers, dim, heads, kv_heads, hidden, vocab=128256, **rest):
    return Shape(name, "a" * layers, dim, vocab, heads, kv_heads, dim // heads, hidden, **rest)


def qwen3(name, layers, dim, heads, kv_heads, hidden, tied):
    return Shape(name, "a" * layers, dim, 151936, heads, kv_heads, 128, hidden, tied, qk_norm=True, context=40960)


MODELS = {m.name: m for m in (                                               # their config.json
    qwen3("0.6B", 28, 1024, 16, 8, 3072, True), qwen3("1.7B", 28, 2048, 16, 8, 6144, True),
    qwen3("4B", 36, 2560, 32, 8, 9728, True), qwen3("14B", 40, 5120, 40, 8, 17408, False),
    qwen3("32B", 64, 5120, 64, 8, 25600, False),
    qwen3("Qwen3-8B", 36, 4096, 32, 8, 12288, False),
    llama("8B", 32, 4096, 32, 8, 14336, context=131072), llama("70B", 80, 8192, 64, 8, 28672, context=131072),
    llama("405B", 126, 16384, 128, 8, 53248, context=131072),
    llama("Llama-2-7B", 32, 4096, 32, 32, 11008, 32000, context=4096),
    llama("Llama-2-13B", 40, 5120, 40, 40, 13824, 32000, context=4096),
    llama("Llama-2-70B", 80, 8192, 64, 8, 28672, 32000, context=4096),
    Shape("PaLM-540B", "a" * 118, 18432, 256000, 48, 1, 256, 73728, True, context=2048),
    replace(qwen3("30B-A3B", 48, 2048, 32, 4, 6144, False), experts=128, active=8, expert_hidden=768),
    Shape("DeepSeek-V3", "a" * 61, 7168, 129280, 128, 128, 128, 18432, latent_q=1536, latent=512, rotated=64,
          value_dim=128, experts=256, active=8, shared=2048, expert_hidden=2048, dense=3, context=163840),
    Shape("Mamba2-1.3B", "s" * 48, 2048, 50288, tied=True, mixers=dict(s=dict(H=64, P=64, N=128, G=1, K=4))),
    Shape("Mamba2-2.7B", "s" * 64, 2560, 50288, tied=True, mixers=dict(s=dict(H=80, P=64, N=128, G=1, K=4))),
    Shape("Mamba-2.8B", "m" * 64, 2560, 50280, tied=True, mixers=dict(m=dict(E=5120, N=16, K=4))))}

FULL = {("Qwen3-" if m.qk_norm else "Llama-3.1-") + m.name: m for m in MODELS.values() if m.name[0].isdigit()}


def model_shape(name):
    """A name of MODELS, a folder or a config.json → Shape. UserError with the nearest names."""
    if os.path.isdir(name) or name.endswith(".json"):
        path = Path(name, "config.json") if os.path.isdir(name) else Path(name)
        return config_shape(train.read_json(path), path.parent.name or str(path))
    return (MODELS | FULL)[find(name, MODELS | FULL, "model")]


# model_type: what its config.json may leave out or never says. Those alone whose parameters are counted as transformers
# counts them: another kind would be costed as what it is not.
COUNTED = {kind: dict(kv_heads=None, head_dim="quotient", qk_norm=False, tied=False, norms=2) | own for kind, own in (
    train.KINDS | dict(
        mamba2={}, mamba=dict(tied=True), phi3={}, granite={}, smollm3=dict(kv_heads=4, tied=True),
        gemma=dict(head_dim=256, tied=True), gemma2=dict(kv_heads=4, head_dim=256, tied=True, norms=4),
        gemma3_text=dict(kv_heads=4, head_dim=256, tied=True, norms=4, qk_norm=True), mixtral=dict(kv_heads=8),
        qwen2_moe={}, qwen3_moe=dict(kv_heads=4, qk_norm=True), deepseek_v2={}, deepseek_v3={})).items()}


def config_shape(raw, name="config"):
    """config.json as a dict, of a kind in COUNTED → Shape. UserError where a size is missing, or is none."""
    def refuse(key, why):
        raise UserError(f"{name}: its config.json says {key} = {str(raw.get(key))[:50]!r}: {why}")

    def get(*keys, default=None, kind=int, least=1, most=10 ** 9):
        key = next((k for k in keys if raw.get(k) is not None), keys[0])
        value = default if raw.get(key) is None else raw[key]
        if value is None:
            raise UserError(f"{name}: its config.json lacks {key}")
        if type(value) is not kind or kind is int and not least <= value <= most:
            refuse(key, f"no {kind.__name__}" + f" from {least} to {most}" * (kind is int))
        return value
    flag, kind = functools.partial(get, kind=bool, default=False), get("model_type", default="", kind=str)
    if kind not in COUNTED:
        refuse("model_type", f"counted are {', '.join(COUNTED)}")
    known, dim, count = COUNTED[kind], get("hidden_size", "d_model"), get("num_hidden_layers", "n_layer", most=10 ** 5)
    latent, plain = kind.startswith("deepseek"), dict(mamba2="s", mamba="m").get(kind, "a") * count
    expert, layers = latent or kind.endswith("_moe") or kind == "mixtral", get("layers", default=plain, kind=str)
    types, capacity = raw.get("layer_types") or count * ["full_attention"], raw.get("capacity", 0.125)
    if kind != "twin" and layers != plain:
        refuse("layers", f"{count} blocks of {plain[0]}")
    if type(types) is not list or len(types) != count or set(map(str, types)) - {"full_attention", "sliding_attention"}:
        refuse("layer_types", f"{count} blocks of full_attention or sliding_attention")
    if type(capacity) not in (int, float) or not 0 < capacity <= 1:
        refuse("capacity", "no share of the tokens")
    for key, value in dict(decoder_sparse_step=1, moe_layer_freq=1, mlp_only_layers=[], attention_bias=False).items():
        if expert and raw.get(key, value) not in (value, None):
            refuse(key, f"only {value} is counted")
    heads, head_dim, kv_heads, mixers, own = 0, 0, 0, {}, {}
    if kind in ("mamba2", "twin"):
        for key in ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "expand"):
            get(key, default=1)
        mixers = train.parse_config(raw).mixers
        mixers.get("s", {}).pop("eps", None), mixers.get("s", {}).pop("dt_limit", None)
        if any(v > 10 ** 9 for sizes in mixers.values() for v in sizes.values()):
            refuse("layers", "a size above 1000000000")
    elif kind == "mamba":
        mixers = dict(m=dict(E=get("intermediate_size", default=get("expand", default=2) * dim),
                             N=get("state_size", default=16), K=get("conv_kernel", default=4),
                             R=None if raw.get("time_step_rank") in (None, "auto") else get("time_step_rank"),
                             bias=flag("use_bias"), conv_bias=flag("use_conv_bias", default=True)))
    if plain[0] == "a":
        heads = get("num_attention_heads")
        kv_heads = get("num_key_value_heads", default=known["kv_heads"] or heads, most=heads)
        head_dim = get("qk_nope_head_dim") if latent else get("head_dim", default=(
            dim // heads if known["head_dim"] == "quotient" else known["head_dim"]))
    if latent:
        rank = get("q_lora_rank", default=0 if "q_lora_rank" in raw else 1536, least=0)
        own = dict(latent_q=rank, latent=get("kv_lora_rank"), rotated=get("qk_rope_head_dim"),
                   value_dim=get("v_head_dim"), dense=get("first_k_dense_replace", least=0, most=count))
    if expert:
        width, experts = get("moe_intermediate_size" if kind != "mixtral" else "intermediate_size"), get(
            "num_local_experts", "num_experts", "n_routed_experts")
        own |= dict(experts=experts, active=get("num_experts_per_tok", most=experts), expert_hidden=width,
                    shared=get("n_shared_experts", default=0, least=0) * width if latent else
                    get("shared_expert_intermediate_size") if kind == "qwen2_moe" else 0,
                    shared_gate=kind == "qwen2_moe")
    bias = kind in ("llama", "qwen3", "granite", "smollm3", "gemma", "gemma2", "gemma3_text") and flag("attention_bias")
    return Shape(
        name, layers, dim, get("vocab_size"), heads, kv_heads, head_dim,
        get("intermediate_size") if set(layers.lower()) & set("ad") and (not expert or own.get("dense")) else 0,
        tied=flag("tie_word_embeddings", default=known["tied"]), qk_norm=known["qk_norm"], norms=known["norms"],
        qkv_bias=bias or kind == "qwen2" or kind == "qwen2_moe" and flag("qkv_bias", default=True), out_bias=bias,
        mlp_bias=kind in ("llama", "granite", "smollm3") and flag("mlp_bias"), mixers=mixers, **own, capacity=capacity,
        context=get("max_position_embeddings", default=8192), routing=get("routing", default="topk", kind=str))


# What a block costs, by its letter: weights in matrices, those of them that a token visits and that Muon updates, all
# other weights; `mixing`(T): FLOPs a token, beyond its matrices, forward, in a sequence of T, and `key`: those of a
# decoded token for each key it sees; `kept`(T): numbers that such a sequence leaves for the backward pass on a CPU;
# `cache` values a token, `state` values a sequence, and the kernels of a decoded token. FLOPs are those of products,
# all T keys counted, as torch's counter has them.

Layer = namedtuple("Layer", "matrices visited muon other mixing key kept cache state kernels")


def mlp_layer(c, dense):
    """The half of a block after its mixer: norm, gate and up, SwiGLU, down; or experts."""
    C, F, norms = c.dim, c.hidden, c.dim * c.norms // 2
    kept = lambda T: T * (2 * C + 1 + 4 * F)                                 # x, normed; gate, up, silu, their product
    if c.experts and not dense:
        F, beside = c.active * c.expert_hidden + c.shared, C * (c.experts + 3 * c.shared + c.shared_gate)
        stored = 3 * C * c.experts * c.expert_hidden + beside
        return Layer(stored, 3 * C * c.active * c.expert_hidden + beside, stored, norms, None, 0, kept, 0, 0, 4)
    return Layer(3 * C * F, 3 * C * F, 3 * C * F, norms + (2 * F + C) * c.mlp_bias, None, 0, kept, 0, 0, 4)


def with_mlp(c, dense, mixer):
    """A mixer's costs and those of the MLP after it."""
    mlp = mlp_layer(c, dense)
    return Layer(*(a + b for a, b in zip(mixer[:4], mlp)), mixer.mixing, mixer.key,
                 lambda T: mixer.kept(T) + mlp.kept(T), mixer.cache, mixer.state, mixer.kernels + mlp.kernels)


def attention_layer(c, dense):
    """Norm, qkv, norms and rotary, attention and merge, out: attention.py's, or with keys and values compressed."""
    C, H, G, D = c.dim, c.heads, c.kv_heads, c.head_dim
    products, other = C * (H + 2 * G) * D + H * D * C, 2 * D * c.qk_norm + (H + 2 * G) * D * c.qkv_bias + C * c.out_bias
    wide, cache, key = 2 * D, 2 * G * D, 4 * H * D
    if c.latent:
        key = 2 * H * (2 * c.latent + c.rotated)                             # a decoded query looks at the latents
        rows, other, cache = H * (D + c.rotated), c.latent_q + c.latent, c.latent + c.rotated
        q, wide = C * c.latent_q + c.latent_q * rows if c.latent_q else C * rows, D + c.rotated + c.value_dim
        products = q + C * (c.latent + c.rotated) + c.latent * H * (D + c.value_dim) + H * c.value_dim * C
    # x, normed; q, k, v as they came, q and k rotated, the output as [H, T, D] and merged; a number a row of each norm
    # and of each softmax
    kept = 2 * C + (H + 2 * G) * D + (H + G) * D + 2 * H * D + 1 + (H + G) * c.qk_norm + H
    return with_mlp(c, dense, Layer(products, products, products, C * c.norms // 2 + other, lambda T: 2 * T * H * wide,
                                    key, lambda T: T * kept, cache, 0, 6))


def recurrent(c, widths, K, state, out, other, mixing, kept, kernels, bias=False, conv_bias=True, inner=0, plain=0):
    """What the recurrent layers share: norm, in, convolution, out (`ssm.Mixer`). `inner`: weights of matrices between,
    `plain` of them not Muon's.
    """
    C, width, conv = c.dim, sum(widths), widths[1]
    products = C * width + out * C + inner
    # kept: x, normed; what `in` gave; into the convolution, before SiLU and after
    return Layer(products, products, products - plain, C + conv * (K + conv_bias) + (width + C) * bias + other,
                 lambda T: 2 * K * conv + mixing(T), 0,
                 lambda T: T * (2 * C + 1 + width + 3 * conv) + conv * (K - 1) + kept(T),
                 0, state + conv * (K - 1), kernels)


def chunked(flops, T, l=ssm.CPU_CHUNK):
    """FLOPs a token of T in equal chunks of at most l, as torch's text has them; `flops`: of a chunk of so many."""
    T = max(T, 1)
    chunks = -(-T // l)
    return chunks * flops(-(-T // chunks)) / T


def mamba2_layer(c, dense, H, P, N, G, K, bias=False, conv_bias=True):
    E = H * P
    flops = lambda l: 2 * l * l * (G * N + E) + 4 * l * E * N                # C Bᵀ, times Δx; states made and read
    return recurrent(c, (E, E + 2 * G * N, H), K, E * N, E, 3 * H + E, lambda T: chunked(flops, T),
                     lambda T: T * ((4 + (G > 1)) * E + 6 * H + G) + (1 + -(-T // ssm.CPU_CHUNK)) * E * N, 6, bias,
                     conv_bias)


def mamba_layer(c, dense, E, N, K, R=None, bias=False, conv_bias=True):
    R = R or -(-c.dim // 16)
    return recurrent(c, (E, E, 0), K, E * N, E, E * N + 2 * E, lambda T: 9 * E * N,        # as its paper counts a scan
                     lambda T: T * (6 * E + R + 2 * N) + -(-T // ssm.STEPS) * E * N, 8, bias, conv_bias,
                     E * (R + 2 * N) + R * E, R * E)


def gated_delta_layer(c, dense, H, K_dim, V_dim, K):
    k, v = H * K_dim, H * V_dim
    flops = lambda l: (2 * l * l * (3 * k + 2 * v) + 6 * l * k * V_dim       # k kᵀ, T k, q kᵀ, T v, times u; states
                       + H * 2 * (l ** 3 - l) / 3)                           # erased, made, read; (I + A)⁻¹
    return with_mlp(c, dense, recurrent(
        c, (v, 2 * k + v, 2 * H), K, k * V_dim, v, 2 * H + V_dim, lambda T: chunked(flops, T),
        lambda T: T * (2 * k + 4 * v + 13 * H) + (1 + -(-T // ssm.CPU_CHUNK)) * k * V_dim, 6, conv_bias=False))


LAYERS = dict(a=attention_layer, s=mamba2_layer, m=mamba_layer, d=gated_delta_layer)


def blocks(c):
    """→ [(Layer, whether it is routed, how many such blocks)]."""
    count = Counter((letter, i < c.dense) for i, letter in enumerate(c.layers))
    return [(LAYERS[letter.lower()](c, dense, **c.mixers.get(letter.lower(), {})), letter.isupper(), n)
            for (letter, dense), n in count.items()]


def taken(c, T):
    """How many of T tokens a routed block takes."""
    return math.ceil(c.capacity * T)


def decision_weights(c):
    """Weights of a routed block's router and predictor: (in matrices, in all else)."""
    wide = mod.predictor_width(c.dim)
    return (c.dim, 0) if c.routing == "threshold" else (c.dim + c.dim * wide + wide + 1, wide + 1)


def cost(c, context):
    """What a model costs → dict: params, active (that multiply a token; the head with them), visits (those in parts:
    {share of the tokens that visit: weights}), muon (that Muon updates), flops (forward, a token of a sequence of
    `context`; decode: of one that is decoded after it), score and key (of them, for a key that a query sees), cache
    (values a token), state (values a sequence), kernels (that a decode step launches).
    """
    k = dict(params=c.vocab * c.dim * (1 if c.tied else 2) + c.dim, active=c.vocab * c.dim, muon=0,
             visits=Counter({1: c.vocab * c.dim}), flops=2 * c.vocab * c.dim, score=0, key=0, cache=0, state=0,
             kernels=3)
    for layer, routed, n in blocks(c):
        seen, share = (taken(c, context), c.capacity) if routed else (context, 1)
        decide, beside = decision_weights(c) if routed else (0, 0)
        part = seen / context if context else share
        k["params"] += n * (layer.matrices + layer.other + decide + beside)
        k["active"] += n * (share * layer.visited + decide)
        experts = (layer.matrices - layer.visited) * c.experts // max(c.experts - c.active, 1)
        for visit, weights in ((1, decide), (share, layer.matrices - experts),
                               (share * c.active / max(c.experts, 1), experts)):
            k["visits"][visit] += n * weights
        k["muon"] += n * layer.muon
        k["flops"] += n * (part * (2 * layer.visited + layer.mixing(seen)) + 2 * decide)
        k["score"] += n * share ** 2 * layer.mixing(1) if layer.cache else 0
        k["key"] += n * share ** 2 * layer.key
        k["cache"] += n * share * layer.cache
        k["state"] += n * layer.state
        k["kernels"] += n * (layer.kernels + 4 * routed)                     # router, choice, gather and scatter
    return k | dict(decode=k["flops"] + context * (k["key"] - k["score"]))


def weights_read(k, tokens):
    """Weights that a pass over so many tokens reads, as is to be expected: E experts of which each token visits k are
    E (1 − (1 − k / E)^tokens), and so is a block that takes a share of the tokens.
    """
    return sum(weights * (1 - (1 - share) ** tokens) for share, weights in k["visits"].items())


def weight_bytes(dtype, params):
    """Bytes of the weights in memory; quantized to integers of 4 bits they carry a scale for each 32."""
    return params * (BYTES[dtype] + (GROUP_SCALE if dtype in ("int4", "fp4") else 0))


def activation_floats(c, T):
    """Numbers that each kind of block keeps of a sequence of T for its backward pass, on a CPU in float32 → list. A
    routed one: x, normed, the predictor's layers and loss; of what it takes the update, plain and weighted.
    """
    wide, kept = mod.predictor_width(c.dim), []
    for layer, routed, n in blocks(c):
        k = taken(c, T)
        decide = 0 if c.routing == "threshold" else c.dim + 2 * wide + 3
        kept += n * [layer.kept(k) + T * (c.dim + decide) + k * (2 * c.dim + 1) if routed else layer.kept(T)]
    return kept


def training_memory(c, batch, context, recompute, dtype="bf16"):
    """Bytes of training by train.py → dict: weights and gradients; optimizer (Muon's momentum, AdamW's two moments of
    what is no hidden matrix, and a float32 copy of weights of fewer bits); activations; logits.
    """
    k, size, kept = cost(c, context), BYTES[dtype], activation_floats(c, context)
    floats = len(kept) * c.dim * context + max(kept) if recompute else sum(kept)
    optimizer = (8 + 4 * (size < 4)) * k["params"] - 4 * k["muon"]
    return dict(weights=2 * size * k["params"], optimizer=optimizer, activations=batch * size * floats,
                logits=4 * 2 ** 20 * 2)


def all_reduce(chip, size, devices):
    """Seconds in which a ring adds up `size` bytes over devices: 2 (n − 1) hops, each with 1/n of them."""
    if devices <= 1:
        return 0.0
    link = (chip.link or 32) * 1e9 * MEMORY                                  # unknown: as slow as PCIe
    return 2 * (devices - 1) * (HOP + size / devices / link)


def decode_seconds(c, chip, dtype, batch, context, devices=1):
    """One token for each of `batch` sequences with `context` tokens each → seconds. Weights and caches are read once;
    two all-reduces a block where it is cut over devices.
    """
    k = cost(c, context)
    quantity = weight_bytes(dtype, weights_read(k, batch)) + batch * 2 * (k["cache"] * context + 2 * k["state"])
    memory = quantity / devices / (chip.bandwidth * 1e12 * MEMORY)
    compute = batch * k["decode"] / devices / rate(chip, dtype)
    talk = 2 * len(c.layers) * all_reduce(chip, 2 * batch * c.dim, devices)
    return max(memory, compute) + k["kernels"] * LAUNCH + talk


def prefill_seconds(c, chip, dtype, batch, tokens, devices=1):
    """All tokens of the prompts at once → seconds. Half of attention's scores lie in the future and are left out."""
    k = cost(c, tokens / 2)
    head = 2 * c.vocab * c.dim                                               # of the last token alone
    flops = batch * (tokens * (k["flops"] - head) + head)
    memory = weight_bytes(dtype, weights_read(k, batch * tokens)) / devices / (chip.bandwidth * 1e12 * MEMORY)
    talk = 2 * len(c.layers) * all_reduce(chip, 2 * batch * tokens * c.dim, devices)
    return max(flops / devices / rate(chip, dtype), memory) + k["kernels"] * LAUNCH + talk


def devices_needed(c, chip, dtype, batch, context):
    """The fewest chips, a power of two, whose memory holds weights and caches."""
    k = cost(c, context)
    need = weight_bytes(dtype, k["params"]) + batch * 2 * (k["cache"] * context + k["state"])
    return 2 ** max(0, math.ceil(math.log2(need / (chip.memory * 1e9 * (1 - RESERVED)))))


def compute_bound_batch(c, chip, dtype, context):
    """The smallest batch whose decode step takes longer to multiply than to read; None where its caches grow faster."""
    k, bandwidth = cost(c, context), chip.bandwidth * 1e12 * MEMORY
    row = k["decode"] / rate(chip, dtype) - 2 * (k["cache"] * context + 2 * k["state"]) / bandwidth
    if row <= 0:
        return None
    weights = lambda batch: weight_bytes(dtype, weights_read(k, batch)) / bandwidth
    most = math.ceil(weights(math.inf) / row)
    return 1 + bisect.bisect_left(range(1, most), True, key=lambda n: n * row >= weights(n))


def model_cost(c, chip, dtype="bf16", batch=1, prompt_tokens=512, context=None, devices=None):
    """A model on an accelerator → the dict that --json prints."""
    context = context or prompt_tokens
    k = cost(c, context)
    n = devices or devices_needed(c, chip, dtype, batch, context)
    step = decode_seconds(c, chip, dtype, batch, context, n)
    speed = batch / step
    return dict(
        model=c.name, accelerator=chip.name, dtype=dtype, batch=batch, prompt_tokens=prompt_tokens, context=context,
        params=k["params"], flops_per_token=round(k["flops"]), weight_bytes=round(weight_bytes(dtype, k["params"])),
        cache_bytes_per_token=round(2 * k["cache"]), prefill_seconds=prefill_seconds(c, chip, dtype, batch,
                                                                                     prompt_tokens, n),
        decode_seconds_per_token=step, tokens_per_second=speed,
        tokens_per_joule=speed / (n * chip.watts) if chip.watts else None, devices=n,
        state_bytes=round(2 * k["state"]), compute_bound_batch=compute_bound_batch(c, chip, dtype, context))


def achieved(row):
    """FLOP/s a chip of a published training run, as a share of the chip's peak in bfloat16."""
    if row.unit == "% MFU":
        return row.measured / 100
    name, tokens = row.model.split("; ")
    c = MODELS[name]
    context = {"8B": 8192, "70B": 8192, "405B": 8192}.get(name, 4096)        # trained at, not the longest
    flops = 3 * cost(c, context)["flops"] * float(tokens) * 1e12
    return flops / (row.measured * 3600) / peak(ACCELERATORS[row.hardware], "bf16")


def training_share(without=None):
    """TRAINING: what a long run on many chips keeps of the best matrix product, all stops counted: the median over the
    published runs, the row `without` left out.
    """
    return statistics.median(achieved(row) / matmul_share(ACCELERATORS[row.hardware])
                             for row in PUBLISHED if row.kind == "train" and row is not without)


def train_rate(chip, c, context, share=None):
    """Tokens/s that a chip trains in bfloat16, at a share of its peak; at TRAINING of its best product if None."""
    speed = rate(chip, "bf16") * training_share() if share is None else peak(chip, "bf16") * share
    return speed / (3 * cost(c, context)["flops"])


def able(chips, dtype, asked):
    """The chips whose peak in `dtype` is known; the others, if asked for, are named on stderr. UserError if none is."""
    left = [c.name for c in chips if not peak(c, dtype)]
    if len(left) == len(chips):
        rate(chips[0], dtype)
    if left and asked:
        print(f"left out, no peak is known in {dtype}: {', '.join(left)}", file=sys.stderr)
    return [c for c in chips if c.name not in left]


def show_model(c, chips, args):
    """A model's sizes, and what it costs on each accelerator."""
    rows = [model_cost(c, chip, args.dtype, args.batch, args.prompt_tokens, args.context, args.devices)
            for chip in able(chips, args.dtype, args.accelerator)]
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return
    context = rows[0]["context"]
    k = cost(c, context)
    size = training_memory(c, 1, context, False)
    kept, small = (x["activations"] / context for x in (size, training_memory(c, 1, context, True)))
    print(f"{c.name}: {figure(k['params'], 4)} parameters, {figure(k['active'], 4)} multiply a token\nforward "
          f"{figure(k['flops'], 4)}FLOP a token at {context}, training {figure(3 * k['flops'], 4)}FLOP\n"
          f"weights {figure(rows[0]['weight_bytes'])}B in {args.dtype}; cache {figure(2 * k['cache'])}B a token, state "
          f"{figure(2 * k['state'])}B a sequence\n"
          f"training, bf16: weights and gradients {figure(size['weights'])}B, optimizer {figure(size['optimizer'])}B, "
          f"activations\n{figure(kept)}B a token, {figure(small)}B recomputed\n")
    table(["accelerator", "chips", "prefill s", "ms/token", "tokens/s", "tokens/J", "bound", "Mtok/day"],
          [[short(chip.name), figure(r["devices"]), figure(r["prefill_seconds"]),
            figure(1e3 * r["decode_seconds_per_token"]), figure(r["tokens_per_second"]), figure(r["tokens_per_joule"]),
            figure(r["compute_bound_batch"]) if r["compute_bound_batch"] else "never",
            figure(peak(chip, "bf16") and train_rate(chip, c, context) * 86400 / 1e6)]
           for r, chip in zip(rows, [ACCELERATORS[r["accelerator"]] for r in rows])])
    print(f"{args.dtype}, batch {args.batch}, prompt {args.prompt_tokens}, context {context}; bound: the batch from\n"
          f"which arithmetic holds up a step; Mtok/day: trained in bf16, a chip, at\n{training_share():.0%} of its "
          "best product")


# --- 5. On paper: a service and a training run ------------------------------------------------------------------------

class Silent:
    """What stands for a request's text where only lengths count."""

    def push(self, token):
        return False

    def close(self):
        return False


class NoCache:
    """What stands for keys and values where only their blocks are counted."""

    def open(self, r):
        pass

    close = home = open


def simulate(c, chip, dtype, requests, devices=1, max_num_seqs=256, max_num_batched_tokens=8192, block_size=16):
    """infer.py's own scheduler, handed a clock and a runner that takes the time the roofline says → dict.

    requests: (arrival seconds, prompt tokens, new tokens), in order of arrival. As many run at once as have room for
    recurrent states, if there are any, beside blocks for the longest. ValueError where one can never fit.
    """
    k = cost(c, 0)
    free = devices * chip.memory * 1e9 * (1 - RESERVED) - weight_bytes(dtype, k["params"])
    block, state = max(2 * k["cache"] * block_size, 1), 2 * k["state"]
    longest = max(-(-(prompt + new) // block_size) for _, prompt, new in requests)
    if state:
        max_num_seqs = min(max_num_seqs, int(free // (state + longest * block)))
    total = int(free // block)
    if total < longest or max_num_seqs < 1:
        raise ValueError(f"simulate: {c.name} and one request of {longest * block_size} tokens do not fit "
                         f"{devices} x {chip.name}")
    scheduler = infer.Scheduler(infer.Blocks(min(total, max_num_seqs * longest), block_size, caching=False), NoCache(),
                                max_num_seqs, max_num_batched_tokens)
    coming = [(at, infer.Request([0] * prompt, infer.Sampling(ignore_eos=True), 0, 0, new, Silent()))
              for at, prompt, new in requests]
    first, last, clock, i, steps = {}, {}, 0.0, 0, 0
    while i < len(coming) or scheduler.waiting or scheduler.running:
        if not (scheduler.waiting or scheduler.running):
            clock = max(clock, coming[i][0])
        while i < len(coming) and coming[i][0] <= clock:
            scheduler.add(coming[i][1])
            i += 1
        segments = scheduler.plan()
        clock += pass_seconds(c, k, chip, dtype, segments, devices)
        steps += 1
        ready = [r for r, _, stop in segments if stop == len(r.ids)]
        scheduler.advance(segments)
        for r in ready:
            r.accept(0, ())
            first.setdefault(r, clock)
            if r.finish_reason:
                last[r] = clock
                scheduler.leave(r)
    waits = sorted(first[r] - at for at, r in coming)
    paces = sorted((last[r] - first[r]) / max(r.limit - 1, 1) for _, r in coming)
    new = sum(r.limit for _, r in coming)
    at = lambda values, share: values[min(int(share * len(values)), len(values) - 1)]
    return dict(seconds=clock, steps=steps, tokens_per_second=new / (clock - coming[0][0]),
                preemptions=scheduler.preemptions, first_token_p50=at(waits, 0.5), first_token_p95=at(waits, 0.95),
                per_token_p50=at(paces, 0.5), per_token_p95=at(paces, 0.95))


def pass_seconds(c, k, chip, dtype, segments, devices):
    """Seconds of one pass over the weights for the scheduler's segments. `k`: the model's cost at a context of 0."""
    tokens = sum(stop - start for _, start, stop in segments)
    seen = sum((stop - start) * (start + stop) / 2 * k["key" if stop - start == 1 else "score"]
               for _, start, stop in segments)                               # keys of all queries
    held = sum(stop for _, _, stop in segments)
    head = 2 * c.vocab * c.dim
    flops = tokens * (k["flops"] - head) + len(segments) * head + seen
    quantity = weight_bytes(dtype, weights_read(k, tokens)) + 2 * (k["cache"] * held + 2 * k["state"] * len(segments))
    talk = 2 * len(c.layers) * all_reduce(chip, 2 * tokens * c.dim, devices)
    return (max(flops / devices / rate(chip, dtype), quantity / devices / (chip.bandwidth * 1e12 * MEMORY))
            + k["kernels"] * LAUNCH + talk)


def arrivals(speed, count, prompt_tokens, new_tokens, seed=0):
    """`count` requests at `speed` a second, gaps drawn exponentially, lengths from a half to one and a half of those
    given → [(second, prompt tokens, new tokens)].
    """
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / speed, count))
    around = lambda n: rng.integers(max(1, n // 2), n + n // 2 + 1, count).tolist()
    return list(zip(at.tolist(), around(prompt_tokens), around(new_tokens)))


def plan_service(c, chip, args):
    """How many chips a service needs → dict, or None where no number of them keeps the goals. A replica is cut over as
    few chips as hold it and keep both goals. Its load is what the simulation still keeps them under, found by halving
    its logarithm 7 times, and no more than it answers in the long run: few requests at once end in time at any rate.
    """
    least = devices_needed(c, chip, args.dtype, 1, args.prompt_tokens + args.new_tokens)
    for n in (least, 2 * least, 4 * least):
        keeps = lambda load: kept(c, chip, args, n, load)
        high = min(args.requests, saturated(c, chip, args, n)) if n <= 64 else 0
        low = min(0.01, high)
        if high and keeps(high):
            low = high
        elif not high or not keeps(low):
            continue
        else:
            for _ in range(7):
                middle = math.sqrt(low * high)
                low, high = (middle, high) if keeps(middle) else (low, middle)
        replicas = math.ceil(args.requests / low)
        run = kept(c, chip, args, n, args.requests / replicas) or kept(c, chip, args, n, low)
        return dict(model=c.name, accelerator=chip.name, dtype=args.dtype, chips_a_replica=n, replicas=replicas,
                    devices=n * replicas, parallelism=f"tensor {n} x replicas {replicas}",
                    kilowatts=n * replicas * chip.watts / 1e3 if chip.watts else None, **run)
    return None


def saturated(c, chip, args, devices):
    """Requests a second that a replica answers of 1,024 at once, or of 2²⁴ tokens if they are long; 0: none fits."""
    count = max(96, min(1024, 2 ** 24 // (args.prompt_tokens + args.new_tokens)))
    burst = [(0.0, prompt, new) for _, prompt, new in arrivals(1, count, args.prompt_tokens, args.new_tokens)]
    try:
        return count / simulate(c, chip, args.dtype, burst, devices)["seconds"]
    except ValueError:
        return 0


def kept(c, chip, args, devices, load, count=96):
    """A replica under `load` requests a second, simulated → what came out if it keeps the goals, else None."""
    try:
        run = simulate(c, chip, args.dtype, arrivals(load, count, args.prompt_tokens, args.new_tokens), devices)
    except ValueError:
        return None
    return run if run["first_token_p95"] <= args.first_token and run["per_token_p95"] <= args.per_token else None


def plan_training(c, chip, args):
    """How many chips train a model on so many tokens in so many days, and how it is cut → dict, or None where a window
    does not fit. Each holds its part of weights, gradients and moments, the activations of a window and one block's
    weights whole, the last two cut over the chips of a tensor-parallel group: the group that needs the fewest chips.
    """
    context = args.context or min(c.context, 4096)
    speed = train_rate(chip, c, context, args.mfu)
    k, size = cost(c, context), training_memory(c, 1, context, True)
    state = size["weights"] + size["optimizer"]
    whole = 2 * max(c.vocab * c.dim, *(layer.matrices + layer.other for layer, _, _ in blocks(c)))
    room = lambda tensor: chip.memory * 1e9 * (1 - RESERVED) - size["logits"] - (size["activations"] + whole) / tensor
    cuts = [(-(-max(math.ceil(args.tokens / (args.days * 86400) / speed), math.ceil(state / room(t))) // t) * t, t)
            for t in (1, 2, 4, 8)[:4 if chip.link else 1] if room(t) > 0]
    if not cuts:
        return None
    chips, tensor = min(cuts)
    sums = all_reduce(chip, 2 * k["params"] / tensor, chips // tensor)       # the gradients of a step, in bfloat16
    days = args.tokens / speed / chips / 86400
    return dict(model=c.name, accelerator=chip.name, tokens=args.tokens, context=context, devices=chips, tensor=tensor,
                data=chips // tensor, days=days, mfu=speed * 3 * k["flops"] / peak(chip, "bf16"),
                parallelism=f"tensor {tensor} x data {chips // tensor}, weights and optimizer cut over all (FSDP)",
                state_bytes_a_chip=state / chips, activation_bytes_a_window=size["activations"] / tensor,
                gathered_bytes=whole / tensor, gradient_sum_seconds=sums,
                megawatts=chips * chip.watts / 1e6 if chip.watts else None,
                megawatt_hours=chips * chip.watts * days * 24 / 1e6 if chip.watts else None)


def show_plan(c, chips, args):
    """A service or a training run on each accelerator."""
    flag, asked, make = (("--context", args.context or 1, plan_training) if args.plan == "train" else
                         ("--prompt-tokens and --new-tokens", args.prompt_tokens + args.new_tokens, plan_service))
    if c.heads and asked > c.context:
        raise UserError(f"{flag}: {asked} tokens; {c.name} has a context of {c.context}")
    chips = able(chips, args.dtype, args.accelerator)
    plans = [(chip, make(c, chip, args)) for chip in tqdm(chips, desc="plan", leave=False, file=sys.stderr,
                                                          disable=len(chips) == 1 or None)]
    if args.json:
        for chip, plan in plans:
            print(json.dumps(plan or dict(model=c.name, accelerator=chip.name, devices=None)))
    elif args.plan == "serve":
        table(["accelerator", "chips", "each", "kW", "tokens/s", "first s", "ms/token", "set back"],
              [[short(chip.name), figure(p["devices"]), p["chips_a_replica"], figure(p["kilowatts"]),
                figure(p["tokens_per_second"]), figure(p["first_token_p95"]), figure(1e3 * p["per_token_p95"]),
                p["preemptions"]] if p else [short(chip.name), "goals", "out", "of", "reach", "", "", ""]
               for chip, p in plans])
        print(f"{c.name} in {args.dtype}: {args.requests:g} requests/s of {args.prompt_tokens} + {args.new_tokens} "
              f"tokens; first token within {args.first_token:g} s,\nthen {1e3 * args.per_token:g} ms a token, for 95%; "
              "each: chips of a replica, whose tokens/s these are")
    else:
        table(["accelerator", "chips", "days", "of peak", "tensor x data", "MW", "MWh", "state GB"],
              [[short(chip.name), figure(p["devices"]), figure(p["days"]), f"{p['mfu']:.0%}",
                f"{p['tensor']} x {figure(p['data'])}", figure(p["megawatts"]), figure(p["megawatt_hours"]),
                figure(p["state_bytes_a_chip"] / 1e9)] if p else
               [short(chip.name), "does", "not", "fit", "", "", "", ""] for chip, p in plans])
        print(f"{c.name} on {args.tokens:.2e} tokens in bf16, in windows of {args.context or min(c.context, 4096)};\n"
              "state: weights, gradients and moments, cut over all chips, a chip's part")


# --- 6. Validation: the predictor against what others measured --------------------------------------------------------

# Two tiles in turn: one multiplies while the other takes exponentials.
OVERLAPPED = ("FlashAttention-3", "FlashAttention-4")


def predict_attention(row):
    """TFLOP/s: a score costs 4 D FLOPs and an exponential; designs that overlap them pay the longer, others both."""
    chip, D = ACCELERATORS[row.hardware], 128
    dtype = "bf16" if row.dtype == "fp16" else row.dtype
    products = 4 * D / rate(chip, dtype)
    exponential = 1 / EXPONENTIALS[row.hardware]
    score = max(products, exponential) if row.system in OVERLAPPED else products + exponential
    return 4 * D / score / 1e12


def predict_serving(row):
    """Tokens/s of 256 requests at once, by the simulation."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 1025, (256, 2)).tolist()
    requests = [(0.0, prompt, new) for prompt, new in lengths]
    return simulate(MODELS[row.model], ACCELERATORS[row.hardware], row.dtype, requests,
                    max_num_batched_tokens=16384)["tokens_per_second"]


def predict(row):
    """What the predictor says to a published row, which it does not look at → a figure in the row's unit."""
    chip = ACCELERATORS[row.hardware]
    if row.kind == "matmul":
        top = peak(chip, row.dtype)
        return top * matmul_share(chip, without=chip.name) / 1e12
    if row.kind == "attention":
        return predict_attention(row)
    if row.kind == "serve":
        return predict_serving(row)
    if row.kind == "decode":
        die = chip._replace(bandwidth=chip.bandwidth * min(row.chips, 1), bf16=chip.bf16 * min(row.chips, 1))
        name = row.model
        return 1 / decode_seconds(MODELS[name], die, row.dtype, 1, 100, max(1, round(row.chips)))
    share = training_share(without=row) * matmul_share(chip)
    return 100 * share if row.unit == "% MFU" else row.measured * achieved(row) / share


def validate(as_json):
    """Each published measurement beside its prediction, and the distribution of the errors."""
    results = []
    for row in tqdm(PUBLISHED, desc="predict", leave=False, file=sys.stderr, disable=None):
        results.append((row, predict(row)))
    errors = {}
    for row, predicted in results:
        errors.setdefault(row.kind, []).append(abs(predicted / row.measured - 1))
    if as_json:
        for row, p in results:
            print(json.dumps(dict(kind=row.kind, system=row.system, model=row.model, hardware=row.hardware,
                                  setting=f"{row.chips:g} x {row.dtype}, {row.setting}", measured=row.measured,
                                  predicted=p, ratio=p / row.measured)))
    else:
        table(["what", "chip", "dtype", "measured", "predicted", "unit", "ratio"],
              [[f"{r.system} {r.model}".replace("FlashAttention", "Flash").split(";")[0],
                f"{r.chips:g}x {re.sub(' SXM| Laptop', '', short(r.hardware))}", r.dtype,
                figure(r.measured, 4), figure(p, 4), r.unit, f"{p / r.measured:.2f}"] for r, p in results])
    out = sys.stderr if as_json else sys.stdout
    whole = sorted(e for kind in errors.values() for e in kind)
    print(file=out)
    table(["error", "rows", "median", "three quarters", "worst", "within 25%"],
          [[kind, len(e), *(f"{q:.0%}" for q in (statistics.median(e), np.quantile(e, 0.75), max(e))),
            f"{sum(x <= 0.25 for x in e)} of {len(e)}"] for kind, e in [*errors.items(), ("all", whole)]], out)
    return statistics.median(whole)


# --- 7. The command line ----------------------------------------------------------------------------------------------

READ = dict(   # what is asked for: the flags that it reads
    compare="", kernels="", validate="",
    serve="model accelerator dtype prompt_tokens new_tokens requests first_token per_token",
    train="model accelerator context tokens days mfu",
    model="accelerator dtype batch prompt_tokens context devices", accelerator="", profile="device out")


def between(least, most, kind=float):
    """An argparse type: a number within limits."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    parse.__name__ = f"({kind.__name__} from {least:g} to {most:g})"
    return parse


def arguments():
    """The command line, as a parser."""
    p = Parser(prog="hw_profile.py", description="What this machine can do, how close each op comes, and what a model "
                                                 "would cost on the accelerators of 2020 to 2026.")
    does = p.add_mutually_exclusive_group()
    does.add_argument("--compare", metavar="A,B,…", help="accelerators side by side")
    does.add_argument("--kernels", action="store_true", help="every Triton kernel, compiled for five chips")
    does.add_argument("--validate", action="store_true", help="the predictor against published measurements")
    does.add_argument("--plan", choices=["serve", "train"], help="how many chips a service or a training run needs (of "
                      "8B, without --model)")
    p.add_argument("--model", help=f"a model's cost: {', '.join(MODELS)}, a folder or a config.json")
    p.add_argument("--accelerator", metavar="A,B,…", help="(all that are on sale)")
    p.add_argument("--dtype", choices=["fp32", "tf32", "bf16", "fp8", "int8", "int4", "fp4"], default="bf16",
                   help="of the weights (%(default)s)")
    count = functools.partial(between, 1, kind=int)
    p.add_argument("--batch", type=count(10 ** 6), default=1, help="sequences decoded at once (%(default)s)")
    p.add_argument("--prompt-tokens", type=count(2 ** 20), default=512, help="(%(default)s)")
    p.add_argument("--new-tokens", type=count(2 ** 20), default=256, help="of --plan serve (%(default)s)")
    p.add_argument("--context", type=count(2 ** 30), help="tokens that a decoded one looks at (the prompt); of --plan "
                   "train: of a window (4096, or as many as the model has)")
    p.add_argument("--devices", type=count(10 ** 6), help="chips that share the model (as few as hold it)")
    p.add_argument("--requests", type=between(1e-6, 1e9), default=10.0, help="a second, of --plan serve (%(default)s)")
    p.add_argument("--first-token", type=between(1e-9, 1e9), default=1.0, help="seconds, for 95%% (%(default)s)")
    p.add_argument("--per-token", type=between(1e-9, 1e9), default=0.05, help="seconds, for 95%% (%(default)s)")
    p.add_argument("--tokens", type=between(1, 1e18), default=1e12, help="of --plan train (%(default)s)")
    p.add_argument("--days", type=between(1e-3, 1e6), default=30.0, help="of --plan train (%(default)s)")
    p.add_argument("--mfu", type=between(1e-3, 1), help="share of the peak that training reaches (from published runs)")
    p.add_argument("--device", help="what to measure: cpu, cuda, mps (the best there is)")
    p.add_argument("--out", default="roofline.png", help="the picture of this machine's roofline (%(default)s)")
    p.add_argument("--json", action="store_true", help="an object a line on stdout")
    return p


def chips_asked(names):
    """--accelerator → a list of Accelerators; without it all that are on sale."""
    if names is not None:
        return [ACCELERATORS[find(n, ACCELERATORS, "accelerator")] for n in names.split(",")]
    return [c for c in ACCELERATORS.values() if c.status == "available"]


def mode_of(parser, args):
    """What is asked for: a key of READ. UserError for a flag that it does not read."""
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    mode = args.plan or next((name for name in READ if name in given), "profile")
    for name in sorted(given - {mode, "plan", "json", *READ[mode].split()}):
        what = dict(serve="--plan serve", train="--plan train", profile="a measurement").get(mode, f"--{mode}")
        raise UserError(f"--{name.replace('_', '-')} is not read by {what}")
    return mode


def main(argv=None):
    """Answer by command-line flags → exit code."""
    try:
        parser = arguments()
        args = parser.parse_args(argv)
        mode, chips = mode_of(parser, args), chips_asked(args.accelerator)
        if mode == "compare":
            compare(args.compare, args.json)
        elif mode == "kernels":
            show_kernels(args.json)
        elif mode == "validate":
            validate(args.json)
        elif args.plan:
            show_plan(model_shape("8B" if args.model is None else args.model), chips, args)
        elif mode == "model":
            show_model(model_shape(args.model), chips, args)
        elif mode == "accelerator":
            show_accelerators(chips, args.json)
        else:
            profile(args)
        return 0
    except UserError as error:
        print(f"hw_profile.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    A.leave(main)
