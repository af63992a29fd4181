"""Train a language model: one dial, `--minutes`, and a folder that any Hugging Face library loads.

    text → tokens → model → loss → gradients → optimizer → …  until the clock says stop

    loss        −log p(next token), the mean over all tokens, in nats; in bits per byte it compares across tokenizers:
                bits per byte = total nats / ln 2 / bytes of text
    the dial    this machine's speed (FLOP/s, measured) × minutes = FLOPs to spend; they set the size of the model, and
                the clock sets the learning rate: constant, then falling in a line to a twentieth by the end
    Muon        for matrices. A gradient's few large directions drown the rest; the momentum M = U Σ Vᵀ is replaced by
                U Vᵀ, all directions alike, by a few steps of X ← aX + (b XXᵀ + c (XXᵀ)²) X (Newton–Schulz), products
                only. Jordan 2024, kellerjordan.github.io/posts/muon; Polar Express, arXiv 2505.16932
    AdamW       for all else (embedding, head, gains): arXiv 1711.05101

What lies in the folder afterwards: config.json, model.safetensors and tokenizer.json (a Qwen3, for infer.py and for any
library that reads those), state.pt (all that `--resume` needs), log.jsonl and loss.png.
"""
import time

START = time.monotonic()                                                     # --minutes counts from here, with imports

import argparse
import bz2
import codeop
import contextlib
import ctypes
import glob
import hashlib
import itertools
import json
import lzma
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import sysconfig
import tempfile
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import tiktoken
import tokenizers
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                                          # Windows
    fcntl = None

from attention import MLP, Attention, Block, KVCache, RMSNorm, Rotary, attention, leave, linear_cross_entropy
from flash import flash_attention
from mod import MixtureOfDepths, RoutedState, agreement
from ssm import GatedDelta, Mamba, Mamba2, MixerBlock


class UserError(ValueError):
    """Something the user can put right: shown as one line, exit code 2."""


# --- 1. The machine and the dial --------------------------------------------------------------------------------------

@dataclass
class Machine:
    """What this machine can do: matmul FLOP/s by dtype, memory bytes/s, measured."""
    device: str
    flops: dict                                                              # {torch.dtype: FLOP/s}
    bandwidth: float                                                         # bytes/s, read


def measure(device=None, seconds=0.6):
    """Measure this machine's matmul peak (float32, bfloat16; float16 on GPUs) and memory bandwidth → Machine.

    Each figure is the best of repeated tries within `seconds` in all: a peak is what the machine reaches undisturbed.
    """
    device = pick_device(device)
    sync = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.split(":")[0], lambda: None)

    def best(work, share):
        times, end = [], time.perf_counter() + share * seconds
        while not times or time.perf_counter() < end:
            t = time.perf_counter()
            work()
            sync()
            times.append(time.perf_counter() - t)
        return min(times)

    flops = {}
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device != "cpu" else [])
    for dtype in dtypes:
        flops[dtype] = 0.0
        for n in (128, 1024) if device == "cpu" else (4096,):                # where 128 is slow, 1024 takes seconds
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            if n == 1024 and flops[dtype] < flops[torch.float32] / 8:
                break
            a @ b
            flops[dtype] = max(flops[dtype], 2 * n ** 3 / best(lambda: a @ b, 0.15))
    big = torch.ones(2 ** 25 if device == "cpu" else 2 ** 28, device=device)  # 128 MB: beyond any CPU's caches
    return Machine(device, flops, big.numel() * 4 / best(big.sum, 0.3))


class Processes:
    """The processes that torchrun started, each with its share of every batch; just this one without torchrun."""

    def __init__(self):
        try:
            self.rank, self.size, self.local = (int(os.environ.get(name, default)) for name, default in (
                ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
            if self.size > 1 and not dist.is_initialized():
                if torch.cuda.is_available():
                    torch.cuda.set_device(self.local)
                dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE and the like are torchrun's to set, all of them ({error})") from None

    def agree(self, *values):
        """The first process's values, for all: what depends on its clock must not differ."""
        if self.size == 1:
            return values
        box = [values]
        dist.broadcast_object_list(box)
        return box[0]

    def first_here(self, work):
        """Do work in one process of each machine first, then in the others, which find what it left in the cache."""
        if self.size > 1 and self.local:
            dist.barrier()
        result = work()
        if self.size > 1 and not self.local:
            dist.barrier()
        return result

    def sum(self, tensors):
        """Replace each tensor by its sum over the processes: all in one message."""
        if self.size > 1 and tensors:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))


def shard(model, processes, device):
    """Cut every weight by rows, a piece for each process (FSDP2): a block's are gathered while it computes and let go
    again, so that a model may outgrow one device. Gradients arrive as pieces too, summed over the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh               # a second to import: not for everyone
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.split(":")[0], (processes.size,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)                                 # a sum, not a mean,
        part.set_force_sum_reduction_for_comms(True)                         # and by plain addition, which gloo has
    register_fsdp_forward_method(model, "hidden")


def is_cut(x):
    """Whether a tensor is cut over the processes (a DTensor)."""
    return hasattr(x, "full_tensor")


def whole(x):
    """A tensor that is cut over the processes, whole; any other as it is. All processes must ask at once."""
    return x.full_tensor() if is_cut(x) else x


def gathered(x, keep):
    """The same for all tensors in dicts and lists, on the CPU; None in the processes that don't `keep` them."""
    if isinstance(x, dict):
        return {k: gathered(v, keep) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [gathered(v, keep) for v in x]
    if is_cut(x):
        x = x.full_tensor()
        return x.cpu() if keep else None
    return x


def memory_ended(error):
    """Whether an exception says that there is no memory left: on a CPU torch has no class for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def pick_device(device=None):
    """The device to use: the one asked for, else CUDA, else MPS, else the CPU. UserError if it is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind, _, number = str(device).partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there.get(kind) or number and not (number.isdecimal() and int(number) < count):
        raise UserError(f"--device {device}: not on this machine; it has {', '.join(d for d in there if there[d])}")
    return str(device) if kind == "cuda" else kind


# How many FLOPs a run has → the shape to spend them on. Small batches, so many steps, come first: at these budgets they
# pay more than width. Rows of up to 6e13 were tried on a CPU (README), those below extrapolate.
SHAPES = [   # FLOPs up to, layers, dim, context, batch, vocab (of bpe)
    (1e11, 2, 64, 64, 8, 512),
    (1.3e13, 3, 128, 128, 8, 2048),
    (6e13, 4, 128, 256, 4, 2048),
    (4e14, 6, 192, 256, 8, 4096),
    (4e15, 8, 384, 512, 16, 8192),
    (1e17, 10, 512, 512, 32, 16384),
    (5e18, 12, 768, 1024, 128, 32768),
    (math.inf, 24, 1024, 2048, 256, 32768),
]


def shape_for(flops):
    """FLOPs to spend → dict of layers, dim, context, batch, vocab."""
    row = next(row for row in SHAPES if flops <= row[0])
    return dict(layers="a" * row[1], dim=row[2], context=row[3], batch=row[4], vocab=row[5])


# --- 2. Text and tokens -----------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"

# How text is cut into pieces before pairs are merged: a word with the space and up to four signs before it; a line's
# end with the indentation and the word after it; signs; blanks. So the merges may learn "\n    return" or "(self." as
# one token, which takes 13% fewer tokens than GPT-2's cut. All classes are spelled out, there is no look-ahead, every
# run is bounded: every regex engine cuts alike, in linear time, and no input makes a long piece.
_SIGN = r"[!-/:-@\[-\^`{-~]"                                                 # ASCII punctuation but _
_WORD = r"[^\x00-@\[-\^`{-\x7f][^\x00-/:-@\[-\^`{-\x7f]{0,31}"               # letters, _, all beyond ASCII; then digits
_LINE = r"[\r\n]{1,8}[ \t]{0,32}"
_NEXT = rf"{_SIGN}{{0,4}} ?(?:{_WORD}|[0-9]{{1,3}})"
PATTERN = (rf" ?{_SIGN}{{0,4}}{_LINE}(?:{_NEXT})?| ?{_NEXT}| ?{_SIGN}{{1,32}}(?:{_LINE})?"
           r"|[ \t]{1,32}|[\x00-\x1f\x7f]{1,32}")


class Tokenizer:
    """A folder's tokenizer.json: text ↔ ids. Ours run on tiktoken, others on the `tokenizers` library as they are."""

    def __init__(self, source, eos_ids=None):
        """source: the text of a tokenizer.json; eos_ids: the ids that end a text, if the configuration has them."""
        try:
            self.library = tokenizers.Tokenizer.from_str(source)
            self.read(json.loads(source), eos_ids)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:                                       # the library raises bare Exceptions, and
            raise UserError(f"tokenizer.json is not one that is known here: {error}") from None  # panics in Rust
        self.source, self.beside, self._bytes = source, {}, {}               # beside: chat template and the like

    def read(self, spec, eos_ids):
        """Take over what a tokenizer.json says."""
        self.added = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        self.special = {t["content"]: t["id"] for t in spec.get("added_tokens") or [] if t["special"]}
        self.vocab_size = 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_ids = list(eos_ids) if eos_ids else [self.special[END_OF_TEXT]] if END_OF_TEXT in self.special else []
        self.fast = self.chars = None
        model, cut = spec["model"], ((spec.get("pre_tokenizer") or {}).get("pretokenizers") or [{}])[0].get("pattern")
        if cut == {"Regex": PATTERN} and spec.get("normalizer") is None:     # one of ours
            ranks = {_from_byte_level(t): i for t, i in model["vocab"].items()}
            self.fast = tiktoken.Encoding("twin", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special)
        elif model["type"] == "WordLevel" and all(len(t) == 1 for t in model["vocab"]):
            self.chars = model["vocab"]
        self.byte_level = "ByteLevel" in str(spec.get("decoder"))
        self.start_ids = []                                                  # the folder's own start token
        if spec.get("post_processor"):
            framed, plain = (self.library.encode("a", add_special_tokens=frame).ids for frame in (True, False))
            self.start_ids = framed[:framed.index(plain[0])] if plain and plain[0] in framed else []

    def encode(self, text, special=False):
        """text → list of ids. Special tokens written in the text are plain text unless `special`; nothing is added."""
        text = mend(text)
        if self.fast:
            return self.fast.encode(text, allowed_special="all") if special else self.fast.encode_ordinary(text)
        if self.chars:
            return self._encode_chars(text, special)
        self.library.encode_special_tokens = not special
        return self.library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """texts → list of arrays of ids, on all cores."""
        if self.fast:
            rows = self.fast.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        elif self.chars:
            rows = [self._encode_chars(text, False) for text in texts]
        else:
            self.library.encode_special_tokens = True
            rows = [e.ids for e in self.library.encode_batch(texts, add_special_tokens=False)]
        return [np.asarray(row, dtype=np.uint32) for row in rows]

    def _encode_chars(self, text, special):
        parts = (re.split("(" + "|".join(map(re.escape, self.special)) + ")", text) if special and self.special
                 else [text])
        ids = []
        for part in parts:
            if special and part in self.special:
                ids.append(self.special[part])
            else:
                try:
                    ids.extend(map(self.chars.__getitem__, part))
                except KeyError as error:
                    char = error.args[0]
                    raise UserError(f"the character {char!r} (U+{ord(char):04X}) is not among the {len(self.chars)} of "
                                    "this tokenizer (--tokenizer chars knows the characters "
                                    "of its training data)") from None
        return ids

    def decode(self, ids):
        """ids → str; bytes that are no UTF-8 become U+FFFD; special tokens are kept; an id without a token is ''."""
        if self.fast or self.chars:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return self.library.decode([i for i in ids if self.library.id_to_token(i) is not None],
                                   skip_special_tokens=False)

    def token_bytes(self, id):
        """The bytes that a token stands for (b'' for an id without one)."""
        if id not in self._bytes:
            token = self.library.id_to_token(id)
            if token is None:
                self._bytes[id] = b""
            elif self.chars or token in self.added:
                self._bytes[id] = token.encode("utf-8", errors="replace")
            elif self.byte_level:
                self._bytes[id] = _from_byte_level(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):                     # SentencePiece's byte fallback
                self._bytes[id] = bytes([int(token[3:5], 16)])
            else:
                self._bytes[id] = token.replace("▁", " ").encode()
        return self._bytes[id]


def mend(text):
    """Proper surrogate pairs are joined, a lone surrogate becomes U+FFFD: after this every text can be encoded."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")


def _byte_level_alphabet():
    """GPT-2's printable stand-in for each of the 256 bytes, as tokenizer.json writes them: {char: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(other)}


BYTE_LEVEL = _byte_level_alphabet()


def _from_byte_level(token):
    return bytes(map(BYTE_LEVEL.__getitem__, token))


def _byte_level_tokenizer(vocab, merges, pattern):
    """A byte-level BPE of the tokenizers library: vocab {token: id}, merges [(left, right)] in order."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def make_tokenizer(kind, vocab, texts):
    """Build the tokenizer that --tokenizer names → Tokenizer. `texts`: a list of str, for bpe and chars."""
    alphabet = {char: i for i, char in enumerate(sorted(BYTE_LEVEL))}
    if kind == "bpe":
        if vocab < 257:
            raise UserError(f"--vocab {vocab}: a byte-level vocabulary holds 256 bytes and {END_OF_TEXT}, "
                            "so at least 257")
        tokenizer = _byte_level_tokenizer(alphabet, [], PATTERN)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab - 1, show_progress=False,
                                                 initial_alphabet=sorted(BYTE_LEVEL))
        tokenizer.train_from_iterator(texts, trainer)
    elif kind == "bytes":
        tokenizer = _byte_level_tokenizer(BYTE_LEVEL, [], PATTERN)           # the id of a byte is its value
    elif kind == "chars":
        chars = sorted(set().union(*map(set, texts)))
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token=""))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = tokenizers.decoders.Fuse()
    else:
        return tiktoken_tokenizer(kind)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return Tokenizer(tokenizer.to_str())


def tiktoken_tokenizer(name):
    """tiktoken's own `gpt2` or `o200k_base` as a tokenizer.json. UserError where neither network nor cache has it."""
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:
        raise UserError(f"--tokenizer {name}: tiktoken needs the network once to fetch it ({type(error).__name__}); "
                        "use --tokenizer bpe, or set TIKTOKEN_CACHE_DIR to a folder that has it") from None
    ranks = encoding._mergeable_ranks
    to_char = {byte: char for char, byte in BYTE_LEVEL.items()}
    spell = lambda token: "".join(map(to_char.__getitem__, token))
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        # Every pair that makes a token becomes a merge: tiktoken knows no other rule.
        if len(token) > 1:
            merges += [(spell(token[:i]), spell(token[i:])) for i in range(1, len(token))
                       if token[:i] in ranks and token[i:] in ranks]
    vocab = {spell(t): r for t, r in ranks.items()} | encoding._special_tokens  # ids of their own, with gaps
    tokenizer = _byte_level_tokenizer(vocab, merges, encoding._pat_str)
    tokenizer.add_special_tokens(list(encoding._special_tokens))
    return Tokenizer(tokenizer.to_str())


def find_files(data):
    """--data (None: the Python standard library) → (root, files in order). UserError where there are none."""
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        left_out = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idle_test", "lib2to3"}
        files = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
        if not files:
            raise UserError(f"this Python has no source of its standard library in {root}; give --data a path to text")
        return root, files
    path = Path(data).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        hidden = lambda p: any(part.startswith(".") or part == "__pycache__" for part in p.relative_to(path).parts)
        runs = {p.parent for p in path.rglob("state.pt")}                    # what a run wrote is no text
        files = sorted(p for p in path.rglob("*") if p.is_file() and not hidden(p) and not runs & {*p.parents})
        if not files:
            raise UserError(f"--data {data}: the folder holds no files")
        return path, files
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not files:
        raise UserError(f"--data {data}: there is no such file or folder, and no file that matches")
    return Path(os.path.commonpath([p.parent for p in files])), files


def read_bytes(path):
    """A file's bytes. UserError names the file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path):
    """A file's text: UTF-8, without a byte-order mark, line ends as they are. UserError with file and offset."""
    try:
        return read_bytes(path).removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8), or train on raw bytes "
                        "with --tokenizer bytes") from None


@dataclass
class Corpus:
    """Tokens on disk: `train` and `val` are flat memmaps; the rest describes the text they came from."""
    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    files: int
    train_bytes: int
    val_bytes: int
    val_text: bytes                                                          # its first VAL_TEXT bytes
    digest: str                                                              # of the tokens to train on


def cache_folder():
    """Where tokenized corpora are kept from run to run: $TWIN_CACHE, else the user's cache folder."""
    try:
        return Path(os.environ.get("TWIN_CACHE")
                    or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "twin")
    except RuntimeError:
        raise UserError("this user has no home folder: set TWIN_CACHE to a folder that can hold the tokens") from None


def compiled_folder():
    """Where torch.compile keeps its code from run to run, unless the user has said where."""
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled")))


def validation_files(root, files):
    """One file in ten by a hash of its path (at least one): on the same side on every machine, in every run."""
    name = lambda p: p.relative_to(root).as_posix().encode(errors="surrogateescape")
    keys = {p: int(hashlib.sha256(name(p)).hexdigest()[:8], 16) for p in files}
    chosen = {p for p in files if keys[p] % 10 == 0}
    return chosen if chosen and len(chosen) < len(files) else {min(files, key=keys.get)}


def documents(root, files, read):
    """Yield (is validation, text, whether a document ends here). One single file: its last tenth is for validation."""
    if len(files) == 1:
        text = read(files[0])
        cut = len(text) * 9 // 10
        yield False, text[:cut], False
        yield True, text[cut:], True
    else:
        chosen = validation_files(root, files)
        for path in files:
            yield path in chosen, read(path), True


def load_corpus(data, kind, vocab, tokenizer=None):
    """--data and a kind of tokenizer → Corpus. Tokens are written once and kept in the cache folder.

    `tokenizer` (of a folder that training starts from) is used instead of building one of the kind.
    """
    try:
        root, files = find_files(data)
        stamp = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    except (OSError, RuntimeError) as error:                                 # RuntimeError: ~ of no one
        raise UserError(f"--data {data}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    recipe = tokenizer.source if tokenizer else [kind, vocab if kind == "bpe" else None, PATTERN]
    key = hashlib.sha256(json.dumps([str(root.resolve()), stamp, recipe]).encode()).hexdigest()[:24]
    folder = cache_folder() / key
    made = None
    try:
        if kept_tokens(folder) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=folder.parent))
            write_tokens(made, root, files, kind, vocab, tokenizer)
            if kept_tokens(folder) is None:                                  # else another run was quicker
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
        if (about := kept_tokens(folder)) is None:
            raise OSError("what was written there is gone again")
        tokenizer = tokenizer or Tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
        train, val = (np.memmap(folder / f"{part}.bin", dtype=about["dtype"], mode="r") if about["sizes"][f"{part}.bin"]
                      else np.zeros(0, about["dtype"]) for part in ("train", "val"))
        return Corpus(tokenizer, train, val, len(files), about["train_bytes"], about["val_bytes"],
                      (folder / "val.txt").read_bytes(), about["digest"])
    except OSError as error:
        raise UserError(f"{folder.parent}: does not hold the tokens ({error.strerror or error}); set "
                        "TWIN_CACHE to a folder that can") from None
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)


def kept_tokens(folder):
    """What about.json says of a corpus in the cache; None where not all of it is there."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        there = all((folder / name).stat().st_size == size for name, size in about["sizes"].items())
        return about if there and about["digest"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


VAL_TEXT = 2 ** 21                                                           # as much as compressors need seconds for


def write_tokens(folder, root, files, kind, vocab, tokenizer=None):
    """Tokenize `files` into folder: train.bin, val.bin, val.txt (for the compressors), tokenizer.json, about.json."""
    read = read_bytes if kind == "bytes" and not tokenizer else read_text
    total = sum(p.stat().st_size for p in files)
    if total == 0:
        raise UserError(f"the data holds no text: {files[0] if len(files) == 1 else root} is empty")
    if tokenizer is None:
        texts = []
        if kind == "chars":                                                  # the last tenth's characters are known too
            texts = [text for _, text, _ in documents(root, files, read)]
        if kind == "bpe":
            texts = spread((text for val, text, _ in documents(root, files, read) if not val), total)
        tokenizer = make_tokenizer(kind, vocab, texts)
        if kind == "bpe" and tokenizer.vocab_size < vocab:
            print(f"  the text gives only {tokenizer.vocab_size} tokens, fewer than --vocab {vocab}")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
    end = np.asarray(tokenizer.eos_ids[:1], dtype)
    sizes, batch, waiting, digest = {"train": 0, "val": 0}, [], 0, hashlib.sha256()
    with contextlib.ExitStack() as stack:
        out = {part: stack.enter_context(open(folder / f"{part}.bin", "wb")) for part in sizes}
        val_text = stack.enter_context(open(folder / "val.txt", "wb"))
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="tokens", leave=False,
                                       **quiet_bar()))

        def flush():
            nonlocal batch, waiting
            texts = [text for _, text, _ in batch]
            rows = ([np.frombuffer(t, np.uint8) for t in texts] if texts and isinstance(texts[0], bytes)
                    else tokenizer.encode_batch(texts))
            for (val, text, ends), row in zip(batch, rows):
                raw = text if isinstance(text, bytes) else text.encode("utf-8")
                part = "val" if val else "train"
                row = np.concatenate([row.astype(dtype), end]) if ends else row.astype(dtype)
                row.tofile(out[part])
                sizes[part] += len(raw)
                if val:
                    val_text.write(raw[:VAL_TEXT - val_text.tell()])
                else:
                    digest.update(row)
                bar.update(len(raw))
            batch, waiting = [], 0

        for val, text, ends in documents(root, files, read):
            for piece, last in pieces(text):
                batch.append((val, piece, ends and last))
                waiting += len(piece)
                if waiting > 2 ** 21:
                    flush()
        flush()
    (folder / "tokenizer.json").write_text(tokenizer.source, encoding="utf-8")
    about = dict(dtype=dtype.name, train_bytes=sizes["train"], val_bytes=sizes["val"], digest=digest.hexdigest(),
                 sizes={p.name: p.stat().st_size for p in folder.iterdir()})
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def spread(texts, total, wanted=2 ** 22):
    """Of texts of `total` bytes about 4 MB, which teach a tokenizer's merges as well as all: one piece in so many."""
    every = max(1, round(total / wanted))
    cut = (text[i:i + 2 ** 16] for text in texts for i in range(0, len(text), 2 ** 16))
    return list(itertools.islice(cut, 0, None, every)) if every > 1 else list(texts)


def pieces(text, size=2 ** 20):
    """Cut a long text after line breaks into pieces of about `size`: (piece, whether it is the last)."""
    start = 0
    while len(text) - start > size:
        newline = text.rfind(b"\n" if isinstance(text, bytes) else "\n", start, start + size)
        stop = newline if newline > start else start + size                 # a line break begins a piece, as in PATTERN
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def quiet_bar():
    """tqdm's options: on a terminal ten times a second, in a log file every ten seconds."""
    return dict(file=sys.stderr, mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True,
                disable=os.environ.get("RANK", "0") != "0")


def compressors(text):
    """Bits per byte that the standard library's compressors need for `text` (bytes) → {name: bits per byte}."""
    packed = {"zlib -9": zlib.compress(text, 9), "bz2 -9": bz2.compress(text, 9),
              "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(data) / max(len(text), 1) for name, data in packed.items()}


# --- 3. The model, and folders in and out -----------------------------------------------------------------------------

@dataclass
class Config:
    """What `Model` is built from; `raw` is the config.json it was read from, and is written back."""
    model_type: str
    layers: str                                                              # a letter a block: see KNOWN
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    windows: list                                                            # a window or None for each layer
    inv_freq: torch.Tensor
    rotary_factor: float = 1.0
    eps: float = 1e-6
    tied: bool = False
    qk_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    mixers: dict = field(default_factory=dict)                               # letter → what its layer is built with
    capacity: float = 0.125                                                  # of routed blocks, the capital letters
    routing: str = "topk"
    eos_ids: list = field(default_factory=list)
    raw: dict = field(default_factory=dict)


KNOWN = dict(a="attention + MLP", s="Mamba-2", m="Mamba", d="gated delta rule + MLP")        # capitals: routed


def our_config(layers, dim, heads, kv_heads, vocab, context, eos_ids, capacity=0.125, routing="topk"):
    """The config.json of a model of ours → dict: a Qwen3 where all blocks are a, a Mamba-2 where all are s, else a
    "twin", which says its layers and what they are built with.
    """
    if set(layers) == {"s"}:
        return mamba2_config(layers, dim, vocab, context, eos_ids)
    raw = qwen3_config(layers, dim, heads, kv_heads, vocab, context, eos_ids)
    if set(layers) != {"a"}:
        raw.update(architectures=["TwinForCausalLM"], model_type="twin")
        kinds = set(layers.lower())
        raw.update({key: value for letter, key, value in (
            ("s", "mamba2", mamba2_sizes(dim)), ("m", "mamba", dict(expand=2, state_size=16, conv_kernel=4)),
            ("d", "gated_delta", dict(num_heads=heads, head_k_dim=dim // heads, head_v_dim=dim // heads,
                                      conv_kernel=4))) if letter in kinds})
        if layers != layers.lower():
            raw.update(capacity=capacity, routing=routing)
    return raw


def mamba2_sizes(dim):
    """A Mamba-2 layer of ours: twice as wide inside, heads of 64 channels or what of 64 divides them, one group."""
    head_dim = math.gcd(2 * dim, 64)
    return dict(num_heads=2 * dim // head_dim, head_dim=head_dim, state_size=64, n_groups=1, conv_kernel=4)


def mamba2_config(layers, dim, vocab, context, eos_ids):
    """The config.json of an all-s model of ours, a Mamba-2 → dict."""
    return dict(
        architectures=["Mamba2ForCausalLM"], model_type="mamba2", layers=layers, hidden_size=dim, expand=2,
        num_hidden_layers=len(layers), vocab_size=vocab, max_position_embeddings=context, **mamba2_sizes(dim),
        use_bias=False, use_conv_bias=True, hidden_act="silu", layer_norm_epsilon=1e-6, residual_in_fp32=False,
        chunk_size=64, tie_word_embeddings=False,
        bos_token_id=None, pad_token_id=None, eos_token_id=eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        dtype="float32", torch_dtype="float32")


def qwen3_config(layers, dim, heads, kv_heads, vocab, context, eos_ids, rope_theta=10000.0, tied=False):
    """The config.json of a model of ours, a Qwen3 → dict."""
    return dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", layers=layers, hidden_size=dim, head_dim=dim // heads,
        intermediate_size=-(-8 * dim // 3 // 32) * 32, num_hidden_layers=len(layers), num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=context, hidden_act="silu",
        rms_norm_eps=1e-6, attention_bias=False, use_sliding_window=False, sliding_window=None,
        tie_word_embeddings=tied, rope_theta=rope_theta, rope_scaling=None,
        rope_parameters=dict(rope_type="default", rope_theta=rope_theta),
        bos_token_id=None, eos_token_id=eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        dtype="float32", torch_dtype="float32")


KINDS = {   # model_type: what its config.json may leave out (None: the number of heads; "quotient": dim / heads)
    "qwen3": dict(kv_heads=32, head_dim=128, windowed=True, qk_norm=True),
    "qwen2": dict(kv_heads=32, head_dim="quotient", windowed=True, qk_norm=False),
    "llama": dict(kv_heads=None, head_dim="quotient", windowed=False, qk_norm=False),
    "mistral": dict(kv_heads=8, head_dim="quotient", windowed=False, qk_norm=False),
    "twin": dict(kv_heads=None, head_dim="quotient", windowed=False, qk_norm=True),
}


def foreign_bits(raw):
    """Whether a config.json speaks of weights in another's fewer bits."""
    about = raw.get("quantization_config")
    return bool(about) and not (isinstance(about, dict) and about.get("quant_method") == "twin")


def parse_config(raw, generation=None):
    """config.json (and generation_config.json) of a Qwen3, Qwen2, Llama, Mistral or Mamba-2 folder, any dialect, or of
    a mixed stack of ours → Config.

    UserError names what is not supported: nothing is loaded that would compute something else.
    """
    try:
        c = (parse_mamba2 if raw.get("model_type") == "mamba2" else parse_attention)(raw, generation)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json: a value is none of its kind ({error})") from None
    for name, value in dict(hidden_size=c.dim, vocab_size=c.vocab, max_position_embeddings=c.context,
                            num_attention_heads=c.heads).items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"config.json: {name} is {value!r}: it must be a whole number from 1")
    if not isinstance(c.capacity, (int, float)) or not 0 < c.capacity <= 1 or c.routing not in ("topk", "threshold"):
        raise UserError(f"config.json: capacity {c.capacity!r} must lie above 0 and at most at 1, and routing "
                        f"{c.routing!r} be topk or threshold")
    if wrong := [i for i in c.eos_ids if not isinstance(i, int) or not 0 <= i < c.vocab]:
        raise UserError(f"config.json: eos_token_id {wrong[0]!r} is none of the {c.vocab} tokens")
    return c


def parse_attention(raw, generation):
    """config.json of the folders that `parse_config` names, but for Mamba-2's → Config."""
    kind = raw.get("model_type")
    if kind not in KINDS:
        raise UserError(f"model_type {kind!r} is not supported; supported are {', '.join(KINDS)}, mamba2")
    defaults, missing = KINDS[kind], [k for k in ("hidden_size", "num_attention_heads", "num_hidden_layers",
                                                  "intermediate_size", "vocab_size") if not isinstance(raw.get(k), int)]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")

    def refuse(key, why):
        raise UserError(f"config.json: {key} = {json.dumps(raw.get(key))} is not supported: {why}")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu")
    if foreign_bits(raw):
        refuse("quantization_config", "only folders of plain weights, and those of infer.py --quantize --save")
    dim, heads, n = raw["hidden_size"], raw["num_attention_heads"], raw["num_hidden_layers"]
    head_dim = raw.get("head_dim") or (dim // heads if defaults["head_dim"] == "quotient" or "head_dim" in raw
                                       else defaults["head_dim"])
    kv_heads = raw.get("num_key_value_heads", defaults["kv_heads"] or heads) or heads
    if heads % kv_heads:
        refuse("num_key_value_heads", f"it must divide the {heads} heads")
    if head_dim % 2:
        refuse("head_dim", "rotary needs an even head size")
    layers = raw.get("layers", "a" * n)
    kinds = KNOWN if kind == "twin" else "a"
    letters = str(layers).lower() if kind == "twin" else layers
    if not isinstance(layers, str) or len(layers) != n or set(letters) - set(kinds):
        refuse("layers", f"{n} blocks of kind {' '.join(kinds)} are known")

    window = raw.get("sliding_window", 4096 if defaults["windowed"] or kind == "mistral" else None)
    if kind == "llama" or defaults["windowed"] and not raw.get("use_sliding_window", False):
        window = None
    first = raw.get("max_window_layers", 28) if defaults["windowed"] else 0
    types = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    if len(types) != n or set(types) - {"sliding_attention", "full_attention"}:
        refuse("layer_types", f"one of full_attention and sliding_attention for each of the {n} layers")
    inv_freq, factor = parse_rope(raw, head_dim)
    bias = bool(raw.get("attention_bias", raw.get("bias", False))) and kind in ("llama", "qwen3")
    return Config(
        model_type=kind, layers=layers, dim=dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        hidden=raw["intermediate_size"], vocab=raw["vocab_size"], context=raw.get("max_position_embeddings", 2048),
        windows=[window if t == "sliding_attention" else None for t in types], inv_freq=inv_freq, rotary_factor=factor,
        eps=float(raw.get("rms_norm_eps", 1e-6)), tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=defaults["qk_norm"], qkv_bias=bias or kind == "qwen2", out_bias=bias,
        mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)), mixers=parse_mixers(raw, layers, dim),
        capacity=raw.get("capacity", 0.125), routing=raw.get("routing", "topk"), eos_ids=end_ids(raw, generation),
        raw=raw)


def end_ids(raw, generation):
    """The ids that end a text, of both files → sorted list."""
    ids = [(source or {}).get("eos_token_id") for source in (raw, generation)]
    return sorted({i for x in ids if x is not None for i in (x if isinstance(x, list) else [x])})


def parse_mixers(raw, layers, dim):
    """What the recurrent layers of a mixed stack are built with → {letter: arguments}."""
    def sizes(letter, key, **names):
        if letter not in layers.lower():
            return {}
        given = raw.get(key)
        if not isinstance(given, dict) or set(given) != set(names) or not all(
                isinstance(v, int) and v > 0 for v in given.values()):
            raise UserError(f"config.json: {key} must say {', '.join(names)}, whole numbers from 1: "
                            f"layers {layers!r} need it")
        return {letter: {names[name]: value for name, value in given.items()}}
    mixers = (sizes("s", "mamba2", num_heads="H", head_dim="P", state_size="N", n_groups="G", conv_kernel="K")
              | sizes("m", "mamba", expand="E", state_size="N", conv_kernel="K")
              | sizes("d", "gated_delta", num_heads="H", head_k_dim="K_dim", head_v_dim="V_dim", conv_kernel="K"))
    if "m" in mixers:
        mixers["m"]["E"] *= dim
    return mixers


def parse_mamba2(raw, generation):
    """config.json of a Mamba-2 folder → Config; what it leaves out is as transformers has it."""
    c = dict(num_heads=128, head_dim=64, vocab_size=32768, hidden_size=4096, state_size=128, num_hidden_layers=64,
             layer_norm_epsilon=1e-5, expand=2, conv_kernel=4, n_groups=8, use_bias=False, use_conv_bias=True,
             hidden_act="silu", time_step_limit=(0.0, math.inf)) | raw

    def refuse(key, why):
        raise UserError(f"config.json: {key} = {json.dumps(c[key])} is not supported: {why}")
    n, layers = c["num_hidden_layers"], raw.get("layers", "s" * c["num_hidden_layers"])
    if layers != "s" * n:
        refuse("layers", f"{n} blocks of kind s make a mamba2")
    if c["hidden_act"] not in ("silu", "swish"):
        refuse("hidden_act", "only silu")
    if foreign_bits(raw):
        refuse("quantization_config", "only folders of plain weights, and those of infer.py --quantize --save")
    if c["num_heads"] * c["head_dim"] != c["expand"] * c["hidden_size"]:
        refuse("num_heads", "times head_dim it must be expand times hidden_size")
    if c["num_heads"] % c["n_groups"]:
        refuse("n_groups", f"it must divide the {c['num_heads']} heads")
    mixer = dict(H=c["num_heads"], P=c["head_dim"], N=c["state_size"], G=c["n_groups"], K=c["conv_kernel"],
                 bias=c["use_bias"], conv_bias=c["use_conv_bias"], eps=c["layer_norm_epsilon"],
                 dt_limit=tuple(map(float, c["time_step_limit"])))
    return Config(
        model_type="mamba2", layers=layers, dim=c["hidden_size"], heads=c["num_heads"], kv_heads=1, head_dim=0,
        hidden=0, vocab=c["vocab_size"], context=raw.get("max_position_embeddings", 2048), windows=[None] * n,
        inv_freq=torch.zeros(0), eps=float(c["layer_norm_epsilon"]), tied=bool(raw.get("tie_word_embeddings", False)),
        mixers=dict(s=mixer), eos_ids=end_ids(raw, generation), raw=raw)


def rope_of(raw):
    """What a config.json says of rotary positions, in either dialect → dict, and the kind of scaling."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    return rope, rope.get("rope_type") or rope.get("type") or "default"


def parse_rope(raw, D):
    """The rotary wavelengths of a config.json, old keys (rope_theta, rope_scaling) and new (rope_parameters) merged.

    → inv_freq [D/2] float32, and the factor on cos and sin. Scalings: linear, llama3, yarn (arXiv 2309.00071).
    """
    rope, kind = rope_of(raw)
    base = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("config.json: rope_parameters of its own for each layer type is not supported")
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1) != 1:
        raise UserError("config.json: partial_rotary_factor is not supported: only heads that rotate whole")
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
              "yarn": [], "default": []}
    if kind not in needed:
        raise UserError(f"config.json: rotary scaling {kind!r} is not supported; supported are {', '.join(needed)}")
    if missing := [key for key in needed[kind] if not rope.get(key)]:
        raise UserError(f"config.json: rotary scaling {kind} needs {', '.join(missing)}")
    inv_freq = base ** (-np.arange(0, D, 2) / D)
    length = (rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
              or raw.get("max_position_embeddings", 2048))
    factor = rope.get("factor") or raw.get("max_position_embeddings", length) / length
    attention_factor = 1.0
    if kind == "linear":
        inv_freq = inv_freq / factor
    elif kind == "llama3":                                                   # long waves slowed, short kept; a ramp
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = length * inv_freq / (2 * math.pi)                            # turns within the original context
        ramp = np.clip((turns - low) / (high - low), 0, 1)
        inv_freq = (1 - ramp) * inv_freq / factor + ramp * inv_freq
    elif kind == "yarn":
        def dimension(turns):                                                # the pair that turns so often in `length`
            return D * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
        low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        ramp = np.clip((np.arange(D // 2) - low) / (high - low if high != low else 0.001), 0, 1)
        inv_freq = ramp * inv_freq / factor + (1 - ramp) * inv_freq

        def scale(m=1.0):
            return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
        attention_factor = rope.get("attention_factor")
        if attention_factor is None:
            m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
            attention_factor = scale(m) / scale(m_all) if m and m_all else scale()
    return torch.tensor(inv_freq, dtype=torch.float32), float(attention_factor)


def attend(q, k, v, **options):
    """The attention of every block: on a GPU flash.py's, which never stores the scores."""
    return (flash_attention if q.is_cuda else attention)(q, k, v, **options)


def run_block(block, x, positions, state=None):
    """One function for all blocks, so that it need be compiled only once."""
    return block(x, positions, state)


def make_block(c, letter, window, rotary):
    """One block of a stack by its letter; a capital routes it."""
    if letter.isupper():
        return MixtureOfDepths(make_block(c, letter.lower(), window, rotary), c.capacity, c.routing, c.dim)
    if letter == "a":
        mixer = Attention(c.dim, c.heads, c.kv_heads, c.head_dim, rotary, c.qk_norm, c.qkv_bias, c.out_bias, window,
                          c.eps, attend)
    else:
        mixer = dict(s=Mamba2, m=Mamba, d=GatedDelta)[letter](c.dim, **c.mixers[letter])
    if letter in "ad":
        return Block(mixer, MLP(c.dim, c.hidden, c.mlp_bias), c.dim, c.eps)
    return MixerBlock(mixer, c.dim, c.eps)


def parts(block):
    """A block without its routing, and its mixer: attention or a recurrent layer."""
    block = block.block if isinstance(block, MixtureOfDepths) else block
    return block, block.mixer if isinstance(block, MixerBlock) else block.attention


class Model(nn.Module):
    """tokens [B, T] → logits [B, T, V]: an embedding, blocks, a norm, a head. `states`: one a block (`new_states`)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        rotary = Rotary(c.inv_freq, c.rotary_factor)
        self.embed = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList(make_block(c, *kind, rotary) for kind in zip(c.layers, c.windows))
        self.norm = RMSNorm(c.dim, c.eps)
        self.head = nn.Linear(c.dim, c.vocab, bias=False)
        self.recompute = False                                               # of a block, keep its input alone
        self.compiled = None                                                 # `run_block`, compiled, for training
        if c.tied:
            self.head.weight = self.embed.weight

    def hidden(self, tokens, positions=None, states=None):
        """tokens [B, T] → what the head reads, [B, T, C]. positions [T] or [B, T]; 0 … T − 1 if None."""
        x, kind = self.embed(tokens), tokens.device.type
        if torch.is_autocast_enabled(kind):                                  # then all of the residual stream: half the
            x = x.to(torch.get_autocast_dtype(kind))                         # memory to move
        positions = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        learns = torch.is_grad_enabled() and states is None
        call = self.compiled if self.compiled and learns else run_block
        for letter, block, state in zip(self.config.layers, self.blocks, states or [None] * len(self.blocks)):
            step = call if letter == "a" else run_block                      # the others have loops that are no graphs
            x = (checkpoint(step, block, x, positions, use_reentrant=False) if self.recompute and learns
                 else step(block, x, positions, state))
        return self.norm(x)

    def forward(self, tokens, positions=None, states=None):
        return self.head(self.hidden(tokens, positions, states))

    def new_states(self, B, capacity):
        """Empty states for B sequences of up to `capacity` tokens → a list, one a block."""
        def new(block, B):
            mixer, w = parts(block)[1], self.embed.weight
            return (KVCache(B, mixer.G, capacity, mixer.D, w.dtype, w.device) if isinstance(mixer, Attention)
                    else mixer.new_state(B))
        return [RoutedState([new(block, 1) for _ in range(B)]) if isinstance(block, MixtureOfDepths) else new(block, B)
                for block in self.blocks]

    def matrices(self):
        """The hidden matrices, as (parameter, first row, last row): fused ones in the parts that mean something."""
        for block in self.blocks:
            block, a = parts(block)
            if isinstance(a, Attention):
                H, G = a.H * a.D, a.G * a.D
                yield from ((a.qkv.weight, i, j) for i, j in ((0, H), (H, H + G), (H + G, H + 2 * G)))
                yield a.out.weight, 0, len(a.out.weight)
            else:
                yield from a.matrices()
            if isinstance(block, Block):
                half, down = block.mlp.down.weight.shape[1], block.mlp.down.weight
                yield from ((block.mlp.gate_up.weight, i, j) for i, j in ((0, half), (half, 2 * half)))
                yield down, 0, len(down)

    def initialize(self, seed):
        """Random weights: outputs of blocks and head start at zero, so the first step sees a clean gradient."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, w in self.named_parameters():
                if w.ndim == 1:
                    w.fill_(0.0 if name.endswith("bias") else 1.2 if name.endswith(("q_norm", "k_norm")) else 1.0)
                elif name == "embed.weight":
                    w.copy_(torch.randn(w.shape, generator=generator) * EMBED_STD)
                elif name.endswith(("qkv.weight", "gate_up.weight", "in_proj.weight", "x_proj.weight")):
                    w.copy_((torch.rand(w.shape, generator=generator) * 2 - 1) * (INIT_SCALE * (3 / w.shape[1]) ** 0.5))
                else:
                    w.zero_()
            for block in self.blocks:
                for part in (block, parts(block)[1]):
                    if hasattr(part, "initialize"):
                        part.initialize(generator)
        return self


EMBED_STD, INIT_SCALE = 1.0, 0.7


def first_layers(model, n):
    """A model of another's first n blocks, with its embedding, norm and head: the same weights, not copies."""
    c, part = model.config, Model.__new__(Model)
    nn.Module.__init__(part)
    part.config = replace(c, layers=c.layers[:n], windows=c.windows[:n])
    part.embed, part.blocks, part.norm, part.head = model.embed, model.blocks[:n], model.norm, model.head
    part.recompute, part.compiled = False, None
    return part.eval()


def folder_tensors(model):
    """A model's weights under their Hugging Face names, as views: written to save, filled to load → {name: tensor}."""
    c = model.config
    top, embed, norm = (("backbone", "embeddings", "norm_f") if c.model_type == "mamba2" else
                        ("model", "embed_tokens", "norm"))
    named = {f"{top}.{embed}.weight": model.embed.weight, f"{top}.{norm}.weight": model.norm.weight}
    if not c.tied:
        named["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        at = f"{top}.layers.{i}."
        if isinstance(block, MixtureOfDepths):
            named.update((at + name, w) for name, w in block.state_dict(keep_vars=True).items()
                         if not name.startswith("block."))
        named.update((at + name, w) for name, w in block_tensors(*parts(block)))
    return {name: tensor.detach() for name, tensor in named.items()}


def block_tensors(block, mixer):
    """The weights of one block as (name, tensor): fused matrices in parts, as Hugging Face has them."""
    def rows(names, linear, sizes):
        for kind, tensor in linear.named_parameters():
            yield from ((f"{name}.{kind}", part) for name, part in zip(names, tensor.split(sizes)))
    if isinstance(mixer, Attention):
        H, G = mixer.H * mixer.D, mixer.G * mixer.D
        if mixer.q_norm is not None:
            yield from (("self_attn.q_norm.weight", mixer.q_norm), ("self_attn.k_norm.weight", mixer.k_norm))
        yield from rows(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), mixer.qkv, (H, G, G))
        yield from rows(("self_attn.o_proj",), mixer.out, len(mixer.out.weight))
    else:
        at = "linear_attn." if isinstance(block, Block) else "mixer."
        names = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "norm": "norm.weight"}
        for name, w in mixer.named_parameters():
            yield at + names.get(name, name), w[:, None] if name == "conv_weight" else w
    if isinstance(block, Block):
        yield from (("input_layernorm.weight", block.attention_norm.weight),
                    ("post_attention_layernorm.weight", block.mlp_norm.weight))
        half = block.mlp.down.weight.shape[1]
        yield from rows(("mlp.gate_proj", "mlp.up_proj"), block.mlp.gate_up, half)
        yield from rows(("mlp.down_proj",), block.mlp.down, len(block.mlp.down.weight))
    else:
        yield "norm.weight", block.norm.weight


def read_json(path):
    """A JSON file → dict; {"__float__": "Infinity"} is that number. UserError names the file."""
    def hook(d):
        return float(d["__float__"].replace("Infinity", "inf")) if set(d) == {"__float__"} else d
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=hook)
        if not isinstance(read, dict):
            raise ValueError("no object")
        return read
    except FileNotFoundError:
        raise UserError(f"{path}: not there; a model folder has config.json, model.safetensors and tokenizer.json "
                        "(python train.py makes one)") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def shards(folder):
    """{tensor name: file} of a folder. The files that an index names win; if one is missing, a whole file stands in."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        listed = read_json(index).get("weight_map") or {}
        if not isinstance(listed, dict) or any(not isinstance(f, str) or Path(f).name != f for f in listed.values()):
            raise UserError(f"{index}: names a file outside its folder")
        missing = sorted({f for f in listed.values() if not (folder / f).is_file()})
        if not missing:
            return {name: folder / file for name, file in listed.items()}
        if not single.exists():
            raise UserError(f"{folder / missing[0]}: not there, though {index.name} names it; "
                            "the download is incomplete")
    if not single.exists():
        raise UserError(f"{single}: not there; a model folder has config.json, model.safetensors and tokenizer.json "
                        "(python train.py makes one)")
    with open_shard(single) as f:
        return dict.fromkeys(f.keys(), single)


def open_shard(path):
    """A safetensors file, opened. UserError names one that is cut short or is none."""
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: incomplete or not a safetensors file ({error}); copy or download it again") from None


def load_weights(model, folder):
    """Fill the model from a folder's safetensors. UserError names a tensor that is missing, left over or misshapen."""
    wanted, files = folder_tensors(model), shards(folder)
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")
               or model.config.tied and name == "lm_head.weight"}
    for problem, names in (("is not in the files", wanted.keys() - files.keys()),
                           ("has no place in this architecture", files.keys() - wanted.keys() - ignored)):
        if names:
            raise UserError(f"{folder}: the tensor {min(names)} {problem}"
                            + (f" (and {len(names) - 1} more)" if len(names) > 1 else ""))
    for path in sorted(set(files.values())):
        with open_shard(path) as f:
            for name in sorted(n for n, p in files.items() if p == path and n in wanted):
                if name not in f.keys():
                    raise UserError(f"{path}: the tensor {name} is not in it, though the index says so")
                shape = f.get_slice(name).get_shape()
                if list(shape) != list(wanted[name].shape):
                    raise UserError(f"{path}: the tensor {name} is {shape}, "
                                    f"config.json says {list(wanted[name].shape)}")
                wanted[name].copy_(f.get_tensor(name))


def empty_model(config, dtype=torch.float32, device="cpu"):
    """A model whose weights are yet to be filled: torch's own random start, which would be overwritten, is left out."""
    resets = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    try:
        for kind in resets:
            kind.reset_parameters = lambda module: None
        return Model(config).to(device=device, dtype=dtype)
    finally:
        for kind, reset in resets.items():
            kind.reset_parameters = reset


def dtype_for(dtype, raw, device):
    """The torch.dtype, or its name, that weights are wanted in; None: float32 on a CPU, else what config.json says."""
    dtype = dtype or ("float32" if device == "cpu" else raw.get("dtype") or raw.get("torch_dtype") or "float32")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise UserError(f"dtype is {dtype!r}: it must be float32, bfloat16 or float16")
    return found


def load(folder, device=None, dtype=None):
    """A folder of weights (ours, or Hugging Face's Qwen3, Qwen2, Llama, Mistral) → (model, tokenizer), ready to run.

    dtype: a torch.dtype or its name; None: float32 on a CPU, else the folder's own. UserError says what is wrong.
    """
    folder, device = Path(folder), pick_device(device)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder (python train.py makes out/)")
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    config = parse_config(raw, read_json(generation) if generation.exists() else None)
    if raw.get("quantization_config"):
        raise UserError(f"{folder}: its weights are in fewer bits: infer.py runs it, what it was made from trains")
    model = empty_model(config, dtype_for(dtype, raw, device), device)
    load_weights(model, folder)
    return model.eval(), load_tokenizer(folder, config.eos_ids)


def load_tokenizer(folder, eos_ids=None):
    """A folder's tokenizer.json → Tokenizer."""
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer(path.read_text(encoding="utf-8"), eos_ids)
        beside = [path.with_name(name) for name in ("tokenizer_config.json", "generation_config.json",
                                                    "chat_template.jinja")]
        tokenizer.beside = {p.name: p.read_text(encoding="utf-8") for p in beside if p.exists()}
        return tokenizer
    except FileNotFoundError:
        raise UserError(f"{path}: not there; no other tokenizer files are read (transformers can save one)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.parent}: its tokenizer's files cannot be read ({error})") from None


@contextlib.contextmanager
def replacing(path):
    """Write a file beside `path` and rename it at the end: whoever reads finds the old one or the new one, whole."""
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode                                         # safetensors' files are for one user alone
        yield beside
        beside.chmod(mode)
        with open(beside, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def strict(value):
    """A value of config.json with what JSON lacks, infinity, written as transformers does: `read_json` in reverse."""
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return {"__float__": "Infinity" if value > 0 else "-Infinity"} if value in (math.inf, -math.inf) else value


def save(model, tokenizer, folder, tensors=None):
    """Write config.json, tokenizer.json (with its _config, without which transformers takes another class for it) and
    model.safetensors: a Hugging Face folder. tensors: other ones than `folder_tensors` in float32.
    """
    folder = Path(folder)
    about = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    about.update({"eos_token": END_OF_TEXT} if END_OF_TEXT in tokenizer.special else {})
    files = {"config.json": json.dumps(strict(model.config.raw), indent=2), "tokenizer.json": tokenizer.source,
             "tokenizer_config.json": json.dumps(about, indent=2)} | tokenizer.beside
    for name, text in files.items():
        with replacing(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    with replacing(folder / "model.safetensors") as path:
        if tensors is None:
            tensors = {name: tensor.float().cpu().contiguous() for name, tensor in folder_tensors(model).items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


# --- 4. Optimizer and schedule ----------------------------------------------------------------------------------------

LR = 0.025                                                                   # Muon's; the others keep their ratio to it
ADAM_LR = {"embed": 0.15, "head": 0.006, "gain": 0.003}
WEIGHT_DECAY = 0.1
NEWTON_SCHULZ = ((7.5954, -22.0924, 16.3015), (3.2996, -2.7534, 0.6109), (2.9207, -2.7817, 0.8404))


def orthogonalize(x, dtype=None):
    """x [n, rows ≤ cols] stacked matrices → nearly U Vᵀ of each. dtype: of the products; a few digits are enough.

    Three Newton–Schulz steps, each with coefficients of its own (as Polar Express has them), fitted together: a
    singular value from 0.01 to 1 ends between 0.68 and 1.24; smaller ones grow 70-fold.
    """
    kind = x.dtype
    # Divided so that no singular value is beyond 1.
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.01 + 1e-7)).to(dtype or kind)
    for a, b, c in NEWTON_SCHULZ:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.to(kind)


class Optimizer:
    """Muon for the hidden matrices, equal shapes stacked and worked on together; AdamW for the rest. `lr`: Muon's;
    `dtype`: of its products (None: as the weights).

    Of several processes each orthogonalizes every size-th matrix of a stack, and all get the sum. Where weights are cut
    over the processes (`shard`), that one alone also keeps the matrix's momentum.
    """

    def __init__(self, model, lr=LR, processes=None, dtype=None):
        self.lr, self.stacks, self.processes, self.dtype = lr, {}, processes or Processes(), dtype
        self.cut, self.latest = is_cut(model.embed.weight), (None, None)     # a weight and its gradient: see `gathered`
        hidden = set()
        for weight, i, j in model.matrices():
            hidden.add(weight)
            tall = j - i > weight.shape[1]                                   # worked on lying, rows ≤ cols
            shape = (weight.shape[1], j - i) if tall else (j - i, weight.shape[1])
            self.stacks.setdefault(shape, []).append((weight, i, j, tall))
        self.device = device = next(model.parameters()).device
        p = self.processes
        mine = lambda parts: parts[p.rank::p.size] if self.cut else parts
        self.momentum = {shape: torch.zeros(len(mine(parts)), *shape, device=device)
                         for shape, parts in self.stacks.items()}
        groups = {"embed": [], "head": [], "gain": []}
        for name, weight in model.named_parameters():
            if weight not in hidden:
                kind = name.split(".")[0]
                groups[kind if kind in groups else "gain"].append(weight)
        # Embeddings of ours start at size 1, those of other folders at 0.02: the steps are in proportion.
        scale = {"embed": whole(model.embed.weight.detach().square().mean()).sqrt().item(), "head": 1.0, "gain": 1.0}
        groups = [dict(params=weights, lr=0.0, rate=ADAM_LR[kind] * lr / LR * scale[kind])
                  for kind, weights in groups.items() if weights]
        self.adam = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0,
                                      fused=device.type in ("cpu", "cuda"), capturable=device.type == "cuda")

    @torch.no_grad()
    def step(self, scale, momentum=0.95):
        """One update; `scale` is the schedule's share of the full learning rate. Numbers, or tensors on the device."""
        scale, momentum = (torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in (scale, momentum))
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * scale
        self.adam.step()
        for shape, parts in self.stacks.items():
            many = self.processes.size if self.cut else len(parts)           # at once
            for first in range(0, len(parts), many):
                some = parts[first:first + many]
                lying = lambda w, i, j, tall: w[i:j].mT if tall else w[i:j]
                if self.cut:                                                 # each process gets one matrix whole
                    g = [lying(self.gathered(w), i, j, tall) for w, i, j, tall in some][self.processes.rank:][:1]
                    m, at = self.momentum[shape], slice(first // many, first // many + len(g))
                    g = torch.stack(g) if g else m[at]
                else:
                    g = torch.stack([lying(w.grad, i, j, tall) for w, i, j, tall in some])
                    m, at = self.momentum[shape], slice(None)
                m = m[at].lerp_(g, 1 - momentum)
                update = self.orthogonalized(g.lerp_(m, momentum), len(some))  # Nesterov: a step ahead of the mean
                for u, (w, i, j, tall) in zip(update, some):
                    rate = self.lr * scale * (max(1, shape[1] / shape[0]) ** 0.5 if tall else 1)
                    view, u = self.piece(w, i, j, u.mT if tall else u)
                    decay = (u * view > 0) * (rate * WEIGHT_DECAY * scale)   # cautious: where both pull the same way
                    view.sub_(view * decay).addcmul_(u, rate, value=-1)
        self.latest = None, None

    def gathered(self, w):
        """The whole gradient of a weight that is cut. q, k and v are rows of one: it is kept for the next of them."""
        if self.latest[0] is not w:
            self.latest = w, whole(w.grad)
        return self.latest[1]

    def orthogonalized(self, x, count):
        """`orthogonalize`, divided among the processes by matrix. x: all `count`, or this process's own alone."""
        if self.processes.size == 1:
            return orthogonalize(x, self.dtype)
        mine = slice(self.processes.rank, None, self.processes.size)
        update = x.new_zeros(count, *x.shape[1:])
        x = x if self.cut else x[mine]
        if len(x):
            update[mine] = orthogonalize(x, self.dtype)
        self.processes.sum([update])
        return update

    def piece(self, w, i, j, u):
        """Rows i … j of a weight and their update u: all, or those that lie in this process."""
        if not self.cut:
            return w[i:j], u
        local, each = w.to_local(), -(-len(w) // self.processes.size)
        begin = self.processes.rank * each
        lo, hi = max(i, begin), max(i, begin, min(j, begin + len(local)))
        return local[lo - begin:hi - begin], u[lo - i:hi - i]

    def state_dict(self):
        """Whole, whoever holds what; all processes must ask at once."""
        momentum = []
        for (shape, parts), mine in zip(self.stacks.items(), self.momentum.values()):
            if self.cut:
                every = mine.new_zeros(len(parts), *shape)
                every[self.processes.rank::self.processes.size] = mine
                self.processes.sum([every])
                mine = every
            momentum.append(mine)
        return {"adam": gathered(self.adam.state_dict(), self.processes.rank == 0), "momentum": momentum}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave, of any number of processes."""
        adam = state["adam"]
        if self.cut:
            from torch.distributed.tensor import distribute_tensor
            weights = [w for group in self.adam.param_groups for w in group["params"]]
            adam = dict(adam, state={i: {k: distribute_tensor(v, weights[i].device_mesh, weights[i].placements)
                                         if v.shape == weights[i].shape else v for k, v in one.items()}
                                     for i, one in adam["state"].items()})
        self.adam.load_state_dict(adam)
        for group in self.adam.param_groups:
            group["capturable"] = self.device.type == "cuda"                 # wherever the run was before
        for mine, saved in zip(self.momentum.values(), state["momentum"], strict=True):
            mine.copy_(saved[self.processes.rank::self.processes.size] if self.cut else saved)


def schedule(done):
    """Share of the run that is over (0 … 1) → share of the full learning rate: flat, then a line down to 5%."""
    return min(1.0, 0.05 + 0.95 * (1 - done) / 0.7)


_EPOCHS = {}


def _epoch(n, context, seed, epoch):
    key = (n, context, seed, epoch)
    if key not in _EPOCHS:
        _EPOCHS.clear()
        rng = np.random.default_rng([seed, epoch])
        per_epoch = max(1, (n - 1) // context - 1)
        _EPOCHS[key] = int(rng.integers(min(context, n - 1 - per_epoch * context) + 1)), rng.permutation(per_epoch)
    return _EPOCHS[key]


def window_starts(tokens, context, seed, first, count):
    """Where windows number first … first + count − 1 of a run begin: each epoch a new shuffle of the windows, laid at a
    new offset. A function of its arguments alone, so that a resumed run goes on as if it had never stopped.
    """
    per_epoch, starts = max(1, (len(tokens) - 1) // context - 1), []
    while len(starts) < count:
        epoch, i = divmod(first + len(starts), per_epoch)
        offset, order = _epoch(len(tokens), context, seed, epoch)
        starts += (order[i:i + count - len(starts)] * context + offset).tolist()
    return starts


def batch_at(tokens, starts, context, device="cpu"):
    """→ inputs and targets [B, context] int64, the targets one token ahead."""
    rows = torch.from_numpy(np.stack([tokens[s:s + context + 1] for s in starts]).astype(np.int64))
    rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]


# --- 5. The loop ------------------------------------------------------------------------------------------------------

def token_lengths(tokenizer):
    """Bytes of text that each id stands for → [vocabulary] (special tokens are no text: 0)."""
    special = set(tokenizer.special.values())
    return np.array([0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


@torch.no_grad()
def evaluate(model, tokens, context, lengths, limit=None, dtype="float32"):
    """Mean loss over windows of `context` without overlap → (nats per token, bits per byte). dtype: of the products.

    All of `tokens`, or, with `limit`, about that many in evenly spaced windows: the same ones each time.
    """
    windows = max(1, -(-(len(tokens) - 1) // context))
    chosen = (range(windows) if not limit or limit >= len(tokens)
              else np.linspace(0, windows - 2, max(1, limit // context)).astype(int))
    training = model.training
    model.eval()
    device = model.embed.weight.device
    nats, count, text = 0.0, 0, 0
    chosen, rows = [int(i) for i in chosen], max(1, (4096 if device.type == "cpu" else 2 ** 16) // context)
    for group in [chosen[i:i + rows] for i in range(0, len(chosen), rows)]:
        full = [i for i in group if (i + 1) * context < len(tokens)]
        for part in (full, *([i] for i in group if i not in full)):          # the last window may be shorter
            if not part:
                continue
            width = min(context, len(tokens) - 1 - part[0] * context)
            x, y = batch_at(tokens, [i * context for i in part], width, device)
            with autocast(str(device), dtype):
                loss = linear_cross_entropy(model.hidden(x).flatten(0, 1), model.head.weight, y.flatten())
            nats, count = nats + loss.item() * y.numel(), count + y.numel()
            text += int(lengths[y.cpu().numpy()].sum())
    model.train(training)
    return nats / max(count, 1), nats / math.log(2) / max(text, 1)


TEMPERATURE, MIN_P, PROMPT = 1.0, 0.05, "def fibonacci(n):"                  # what infer.py takes unless told: sharper
SHARP = dict(temperature=0.8, min_p=0.1)                                     # makes fewer slips and walks in circles


@torch.no_grad()
def write_samples(model, tokenizer, prompt, count=1, length=150, seed=0, temperature=TEMPERATURE, min_p=MIN_P):
    """Continue a prompt (token ids) `count` times by up to `length` tokens → list of str. infer.py does this better."""
    generator = torch.Generator().manual_seed(seed)
    device = model.embed.weight.device
    tokens = torch.tensor([prompt] * count, device=device)
    states, position, rows = model.new_states(count, len(prompt) + length), 0, tokens.tolist()
    model.eval()
    for _ in range(length):
        hidden = model.hidden(tokens, torch.arange(position, position + tokens.shape[1], device=device), states)
        position += tokens.shape[1]
        logits = model.head(hidden[:, -1]).float().cpu()[:, :tokenizer.vocab_size]           # a padded tail has no text
        p = torch.softmax(logits / temperature, dim=-1)
        p[p < min_p * p.amax(-1, keepdim=True)] = 0
        tokens = torch.multinomial(p, 1, generator=generator).to(device)
        for row, (token,) in zip(rows, tokens.tolist()):
            row.append(token)
    ends = set(tokenizer.eos_ids)
    stop = [next((i for i, t in enumerate(row) if t in ends and i >= len(prompt)), len(row)) for row in rows]
    return [tokenizer.decode([t for t in row[:i] if t not in ends]) for row, i in zip(rows, stop)]


def is_python_prefix(text):
    """Whether text, without its unfinished last line, is Python so far: complete, or complete if it went on."""
    lines = text.rpartition("\n")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            codeop.compile_command(lines + "\n", symbol="exec")
            return True
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
            return False


def plot(log, path, title):
    """loss.png: training and validation loss and the learning rate, over time."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    steps = [r for r in log if r.get("val_loss") is not None]
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    longest = max((r["seconds"] for r in steps), default=0)
    unit, name = (60, "minutes") if longest > 120 else (1, "seconds")
    time_ = [r["seconds"] / unit for r in steps]
    axis.plot(time_, [r["train_loss"] for r in steps], color="#6baed6", linewidth=1.5, label="training")
    axis.plot(time_, [r["val_loss"] for r in steps], color="#08519c", linewidth=2, marker="o", markersize=3.5,
              label="validation")
    axis.set(xlabel=f"{name} since the start", ylabel="loss, nats per token", title=title)
    axis.grid(alpha=0.25)
    axis.margins(y=0.12)                                                     # room for the last figure below its point
    axis.spines[["top", "right"]].set_visible(False)
    if steps:
        axis.annotate(f"{steps[-1]['val_bpb']:.3f} bits per byte", (time_[-1], steps[-1]["val_loss"]), xytext=(-4, -18),
                      textcoords="offset points", ha="right", color="#08519c", fontweight="bold")
    right = axis.twinx()
    right.plot(time_, [r["lr"] for r in steps], color="#fd8d3c", linewidth=1, linestyle="--", label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, None))
    right.spines[["top"]].set_visible(False)
    lines = axis.get_lines() + right.get_lines()
    axis.legend(lines, [line.get_label() for line in lines], frameon=False, loc="upper right", bbox_to_anchor=(1, 0.94))
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    plt.close(figure)


class Graph:
    """Work on a GPU, recorded once as a CUDA graph: its hundreds of kernels then start at one call, in the same memory
    each time. What can't be recorded, as compiling and setting up libraries, must have been done before.

    work(*inputs) takes tensors on the device and returns one or none; `pool`: where several graphs keep their numbers,
    if one runs at a time.
    """

    def __init__(self, work, *inputs, pool=None):
        self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = work(*self.inputs)

    def __call__(self, *inputs):
        for mine, x in zip(self.inputs, inputs):
            mine.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.output


class Run:
    """A training run: the model, its optimizer, its place in the data and in time; saved and resumed as one."""

    def __init__(self, settings, corpus, model, machine, teacher=None, processes=None):
        self.settings, self.corpus, self.model, self.machine = settings, corpus, model, machine
        self.teacher, self.processes = teacher, processes or Processes()
        self.out = Path(settings["out"])
        quick = (torch.cuda.is_bf16_supported(including_emulation=False) if model.embed.weight.is_cuda else
                 machine and machine.flops[torch.bfloat16] > 1.5 * machine.flops[torch.float32])
        self.optimizer = Optimizer(model, settings["lr"], self.processes, torch.bfloat16 if quick else None)
        self.step = self.tokens = self.windows = 0
        self.rows = max(1, MICRO_TOKENS // settings["context"])              # windows in a pass, until memory ends
        self.loss_scale = 2.0 ** 15 if settings["dtype"] == "float16" else 1.0
        self.spent_before = 0.0                                              # seconds of the processes before this one
        self.done, self.finished = 0.0, False                                # the share of the run that is over
        self.log, self.recent = [], [0.0, 0.0, 0]                            # evaluations; loss, distilled, steps since
        self.routed = [block for block in model.blocks if isinstance(block, MixtureOfDepths)]
        self.graphs = {} if model.embed.weight.is_cuda and not self.optimizer.cut else None          # see `recorded`

    def spent(self):
        return self.spent_before + time.monotonic() - START

    def read(self):
        """The share of the text's `passes` that is read: a run by the clock ends with them. Of a short text, more."""
        s = self.settings
        if not s["passes"]:
            return 0.0
        return self.tokens / max(s["passes"] * len(self.corpus.train), LEAST_STEPS * s["batch"] * s["context"])

    def save(self):
        """The folder a reader wants, then state.pt, which alone resumes, renamed last; by the first process. All call.

        UserError where that fails (a full disk): what was saved before is whole.
        """
        model, optimizer = self.model, self.optimizer.state_dict()
        weights = gathered(model.state_dict(), self.processes.rank == 0)
        if self.processes.rank:
            return
        if not all(bool(w.isfinite().all()) for w in weights.values() if w.ndim):                # a threshold may be
            raise UserError("the weights are not finite and are not saved; what was saved before is kept: start again, "
                            "into another --out, with a lower --lr")         # none yet
        if self.optimizer.cut:
            model = empty_model(model.config)
            model.load_state_dict(weights)
        t = self.corpus.tokenizer
        state = dict(settings=self.settings, step=self.step, tokens=self.tokens, windows=self.windows,
                     seconds=self.spent(), done=self.done, recent=self.recent, finished=self.finished,
                     loss_scale=self.loss_scale, model=weights, optimizer=optimizer,
                     config=model.config.raw, train_tokens=len(self.corpus.train), digest=self.corpus.digest,
                     tokenizer=dict(source=t.source, eos_ids=t.eos_ids, beside=t.beside))
        try:
            save(model, t, self.out)
            with replacing(self.out / "log.jsonl") as path:
                path.write_text("".join(json.dumps(r) + "\n" for r in self.log), encoding="utf-8")
            with replacing(self.out / "state.pt") as path:
                torch.save(state, path)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(f"--out {self.out}: cannot be written ({error}); what was saved before is kept") from None

    def restore(self, state):
        """Go on from what `save` wrote; with more minutes, steps or passes than then, less of the run is over."""
        if len(self.corpus.train) != state["train_tokens"] or self.corpus.digest != state.get("digest",
                                                                                              self.corpus.digest):
            raise UserError("the data is not what this run was trained on; put it back, "
                            "or start a new run in another --out")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.out / 'state.pt'}: its optimizer is not this model's ({error})") from None
        for name in ("step", "tokens", "windows", "recent", "loss_scale"):
            setattr(self, name, state[name])
        self.spent_before = state["seconds"]
        length = lambda settings: settings["minutes"] or settings["steps"]
        share = length(state["settings"]) / length(self.settings)
        if self.settings["passes"]:
            share = min(share, (state["settings"].get("passes") or math.inf) / self.settings["passes"])
        self.done = state["done"] * share
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):                   # the picture's: no
            for line in (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines():       # run ends for it
                record = json.loads(line)
                if record["step"] <= self.step:
                    self.log.append(dict(record, done=round(record["done"] * share, 4)))

    def record(self, val_loss, val_bpb, speed):
        """Note an evaluation; the training loss beside it is the mean since the one before."""
        loss, distilled, steps = self.recent
        self.recent = [0.0, 0.0, 0]
        self.log.append(dict(step=self.step, seconds=round(self.spent(), 2), tokens=self.tokens,
                             done=round(self.done, 4), train_loss=loss / steps if steps else val_loss,
                             val_loss=val_loss, val_bpb=val_bpb, tokens_per_second=speed and round(speed),
                             lr=self.settings["lr"] * schedule(self.done)))
        if self.teacher:
            self.log[-1]["distill_loss"] = distilled / steps if steps else None
        if self.routed and steps:
            self.log[-1].update(agreement([block.counts for block in self.routed]))
            for block in self.routed:
                block.counts.zero_()

    def gradients(self, hidden):
        """Forward and backward over one batch → (mean loss, mean distillation loss, norm of the gradients in .grad).

        Each process does its share, in pieces that fit: where memory ends the pieces are halved, then blocks keep only
        their inputs for the backward pass, and this batch begins anew.
        """
        s, p = self.settings, self.processes
        count = s["batch"]
        starts = window_starts(self.corpus.train, s["context"], s["seed"], self.windows, count)
        mine = starts[p.rank * count // p.size:(p.rank + 1) * count // p.size]
        while True:
            try:
                losses = self.passes(hidden, mine, count)
                break
            except (RuntimeError, MemoryError) as error:
                if not memory_ended(error):
                    raise
                self.forget_gradients()
                if self.optimizer.cut or self.rows == 1 and self.model.recompute:                # cut: others wait in
                    held = min(self.rows, len(mine))                         # the middle of this pass
                    raise UserError(f"the memory does not hold {held} window{'s' * (held > 1)} of {s['context']} "
                                    "tokens; give a smaller --context, --dim or --layers, or more processes with "
                                    f"--shard ({error})") from None
                self.model.recompute, self.rows = self.rows == 1, max(1, min(self.rows, len(mine)) // 2)
                tqdm.write("out of memory: going on with " + ("activations made anew in the backward pass"
                           if self.model.recompute else f"{self.rows} windows at a time"), file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()                                     # outside: the exception holds the tensors
        weights = [w for w in self.model.parameters() if w.grad is not None]
        p.sum([losses] if self.optimizer.cut else [*(w.grad for w in weights), losses])
        if self.loss_scale != 1:
            torch._foreach_div_([w.grad for w in weights], self.loss_scale)
        self.windows += count
        self.tokens += count * s["context"]
        return *losses.tolist(), whole(nn.utils.clip_grad_norm_(weights, 1.0)).item()

    def passes(self, hidden, starts, count):
        """Forward and backward over windows of a batch of `count` → their part of its losses [2]."""
        s, losses = self.settings, torch.zeros(2, device=self.settings["device"])
        for i in range(0, len(starts), self.rows):
            x, y = batch_at(self.corpus.train, starts[i:i + self.rows], s["context"], s["device"])
            share = len(x) / count
            losses += self.recorded(("pass", self.model.compiled, self.model.recompute, len(x)),
                                    lambda *inputs: self.one_pass(hidden, *inputs), x, y,
                                    torch.tensor([share, share * self.loss_scale], device=x.device))
        return losses

    def one_pass(self, hidden, x, y, weight):
        """Forward and backward of some windows, added to .grad: the loss times weight[1] → times weight[0], [2]."""
        with autocast(self.settings["device"], self.settings["dtype"]):
            h = hidden(x).flatten(0, 1)
            loss = linear_cross_entropy(h, self.model.head.weight, y.flatten())
            parts = [loss.detach(), torch.zeros_like(loss)]
            beside = sum(block.auxiliary for block in self.routed)           # the predictors learn beside
            if self.teacher:
                with torch.no_grad():
                    told = self.teacher.hidden(x).flatten(0, 1)
                parts[1] = distillation(h, self.model.head.weight, told, self.teacher.head.weight)
                loss = (1 - DISTILLED) * loss + DISTILLED * parts[1]
        ((loss + beside) * weight[1]).backward()
        return torch.stack(parts).detach() * weight[0]

    def update(self, scale, momentum):
        """The optimizer's step; of several processes, whose sums wait for each other, not recorded."""
        for block in self.routed:
            block.settle(self.processes)
        if self.processes.size > 1:
            return self.optimizer.step(scale, momentum)
        numbers = torch.tensor([scale, momentum], device=self.model.embed.weight.device)
        self.recorded("update", lambda numbers: self.optimizer.step(*numbers), numbers)

    def recorded(self, key, work, *inputs):
        """work(*inputs), on a GPU from the fourth time on as a CUDA graph: a small model's kernels are done before
        Python has started them. Gradients then stay where they are, and are set to zero.
        """
        if self.graphs is None:
            return work(*inputs)
        seen = self.graphs.get(key, 0)
        if seen == 3:
            try:
                seen = Graph(work, *inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:                                       # a driver, a kernel that can't
                tqdm.write(f"CUDA graphs do not work here ({type(error).__name__}: {error}); going on without",
                           file=sys.stderr)
                self.graphs = None
                return work(*inputs)
        self.graphs[key] = seen if isinstance(seen, Graph) else seen + 1
        return (seen if isinstance(seen, Graph) else work)(*inputs)

    def clear_gradients(self):
        self.model.zero_grad(set_to_none=self.graphs is None)

    def forget_gradients(self):
        """And with them what was recorded with them."""
        self.model.zero_grad(set_to_none=True)
        self.graphs = self.graphs if self.graphs is None else {}


ROUTING = "topk"
PASSES, LEAST_STEPS = 4.0, 400                                               # over the text, by the clock; else steps
DISTILLED, TEACHER_TEMPERATURE = 0.5, 2.0                                    # the teacher's share of the loss


def distillation(x, w, teacher_x, teacher_w, temperature=TEACHER_TEMPERATURE):
    """KL(teacher ‖ student), both softened by a temperature τ, times τ² → mean nats a row (Hinton et al. 2015,
    arXiv 1503.02531). x [N, C], w [V, C], the teacher's as wide as it is; a chunk of logits at a time.
    """
    def part(x, t):
        student = ((x @ w[:shared].T).float() / temperature).log_softmax(-1)
        teacher = ((t @ teacher_w[:shared].T).float() / temperature).log_softmax(-1)
        return nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
    rows, shared = max(256, 2 ** 22 // len(w)), min(len(w), len(teacher_w))  # one may be padded
    parts = [checkpoint(part, a, b, use_reentrant=False) for a, b in zip(x.split(rows), teacher_x.split(rows))]
    return sum(parts) * temperature ** 2 / len(x)


MICRO_TOKENS = 16384                                                         # a forward and backward pass at once


def autocast(device, dtype):
    """The context in which matrix products run in `dtype` (a name); float32 needs none."""
    kind = device.split(":")[0]
    return torch.autocast(kind, getattr(torch, dtype)) if dtype != "float32" else contextlib.nullcontext()


def flops_per_token(model, context):
    """Training FLOPs a token: 6 for a weight that multiplies, and attention's products (causal half not deducted)."""
    c = model.config
    total = 6 * model.head.weight.numel()
    for block in model.blocks:
        share = c.capacity if isinstance(block, MixtureOfDepths) else 1.0    # of the tokens, and so of what they see
        inner, mixer = parts(block)
        weights = sum(layer.weight.numel() for layer in inner.modules() if isinstance(layer, nn.Linear))
        mixing = (12 * context * share * mixer.H * mixer.D if isinstance(mixer, Attention) else
                  12 * math.prod(mixer.state_shape))                         # write the state, read it
        total += share * (6 * weights + mixing)
    return round(total)


class Stop:
    """Ctrl-C or a termination signal asks the loop to save and leave; a second one leaves at once."""

    def __init__(self):
        self.code, self.old = None, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):                                # signals belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        if self.code:
            raise KeyboardInterrupt
        self.code = 128 + number

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


class Forward:
    """`model.hidden` for training. Its blocks run compiled, as one function for all of them, if asked for (True) or,
    left open (None), where that pays. What it gained is noted beside the compiler's cache: the next run of such a shape
    need not try, and finds the code made.
    """

    def __init__(self, model, compile, shape):
        self.model, self.open, self.times = model, compile is None, []
        self.shape, self.known, self.made = f"{shape}, torch {torch.__version__}", {}, None
        self.notes = compiled_folder() / "seconds.json"
        if self.open:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):                # none yet, or a
                noted = json.loads(self.notes.read_text(encoding="utf-8")).items()                   # broken one
                self.known = {shape: [float(plain), float(compiled)] for shape, (plain, compiled) in noted}
        self.use(compile)

    def use(self, compiled):
        if compiled and not self.made:
            self.made = torch.compile(run_block, dynamic=False)
        self.model.compiled = self.made if compiled else None

    def consider(self, left):
        """Called before a step of a run with `left` seconds to go. Where nothing is known, twenty steps go both ways in
        turn, since a machine's speed drifts.
        """
        n = len(self.times)
        if self.open and not n and self.shape in self.known:
            plain, compiled = self.known[self.shape]
            self.use(left * (plain - compiled) > WARM_COMPILE * plain)
            self.open = False
        elif self.open and n == 3 and left > COMPILE_PAYS:
            tqdm.write("compiling, half a minute or so …", file=sys.stderr)
            self.use(True)
        elif self.open and self.made and n < 24:
            self.use(n % 2)
        elif self.open and self.made:
            plain, compiled = (statistics.median(self.times[first::2]) for first in (4, 5))
            self.use(compiled < plain)
            self.open = False
            with contextlib.suppress(OSError):
                self.notes.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.notes) as path:
                    path.write_text(json.dumps(self.known | {self.shape: [plain, compiled]}), encoding="utf-8")

    def __call__(self, tokens):
        try:
            return self.model.hidden(tokens)
        except Exception as error:                                           # a broken compiler has many ways to say so
            if not self.model.compiled or memory_ended(error):
                raise
            tqdm.write(f"torch.compile does not work here ({type(error).__name__}); going on without it",
                       file=sys.stderr)
            self.open = False
            self.use(False)
            return self.model.hidden(tokens)


EVALUATE_AT = (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)    # shares of a run
SAMPLED_TOKENS, SAVE_EVERY = 2 ** 15, 60                                     # tokens of an evaluation midway; seconds


def train_loop(run, stop):
    """Steps until the clock, the step count or a signal ends them → whether the run came to its end."""
    s, corpus, model = run.settings, run.corpus, run.model
    lengths, per_token = token_lengths(corpus.tokenizer), flops_per_token(model, s["context"])
    peak = run.machine and run.machine.flops.get(getattr(torch, s["dtype"]))  # a CPU was not asked for float16
    total, reserve = s["minutes"] and 60 * s["minutes"], 0.0
    c = model.config
    forward = Forward(model, s["compile"], f"{c.heads} heads over {c.kv_heads} of {c.head_dim}, MLP {c.hidden}, "
                      f"width {c.dim}, {min(s['batch'], run.rows)} × {s['context']} tokens of {s['dtype']}, "
                      f"{torch.get_num_threads()} threads")
    begun, began = run.done, run.spent()
    sampled = int(SAMPLED_TOKENS * min(1, max(total, 30) / 300)) if total else SAMPLED_TOKENS
    saved, bad, speed = time.monotonic(), 0, None
    ready = [t for t in EVALUATE_AT if not any(r["done"] >= t for r in run.log)]
    bar = tqdm(total=total or s["steps"], desc="train", initial=0 if total else run.step,
               bar_format="{desc} {percentage:3.0f}%|{bar:20}| {postfix}", **quiet_bar())
    model.train()
    if total and began >= total:
        tqdm.write(f"preparing took {clock(began)}, all of --minutes {s['minutes']:g}: one step is made",
                   file=sys.stderr)
    with bar:
        while True:
            done = (begun + (1 - begun) * (run.spent() - began) / max(1e-9, total - reserve - began) if total
                    else run.step / s["steps"])
            done = min(1.0, max(done, run.read()))
            run.done, code, due = run.processes.agree(done, stop.code, time.monotonic() - saved > SAVE_EVERY)
            if code:
                stop.code = code
                return False
            if run.done >= 1 and run.step:
                return True
            if ready and run.done >= ready[0] or total and not reserve:
                ready = [t for t in ready if t > run.done]
                t = time.monotonic()
                val_loss, val_bpb = evaluate(model, corpus.val, s["context"], lengths, sampled, s["dtype"])
                if total:                                                    # for a whole evaluation, samples, files
                    reserve = min(0.2 * total, END_SECONDS + (time.monotonic() - t) / sampled
                                  * min(len(corpus.val), whole_tokens(total)))
                run.record(val_loss, val_bpb, speed)
            t = time.monotonic()
            if total:
                forward.consider(total - run.spent())
            loss, distilled, norm = run.gradients(forward)
            if math.isfinite(loss) and math.isfinite(norm):
                run.update(schedule(run.done) * min(1, (run.step + 1) / WARMUP), 0.85 + 0.1 * min(1, run.step / 300))
                bad, run.recent = 0, [a + b for a, b in zip(run.recent, (loss, distilled, 1))]
                if s["dtype"] == "float16" and run.step % 1000 == 999:
                    run.loss_scale *= 2                                      # gradients in float16 stay clear of 0
            elif math.isfinite(loss) and run.loss_scale > 1:
                run.loss_scale /= 2                                          # the scaled gradients passed 65,504
            else:
                bad += 1
                tqdm.write(f"step {run.step}: the loss is not finite, the step is skipped", file=sys.stderr)
                if bad == 5:
                    raise UserError("five steps in a row without a finite loss; what was saved before is kept: start "
                                    "again, into another --out, with a lower --lr")
            run.clear_gradients()
            run.step += 1
            forward.times.append(time.monotonic() - t)
            now = s["batch"] * s["context"] / forward.times[-1]
            speed = now if speed is None or run.step < 5 else 0.95 * speed + 0.05 * now
            left = total - run.spent() if total else (s["steps"] - run.step) * s["batch"] * s["context"] / speed
            if 0 < run.read() == run.done:                                   # the text will end before the time
                left = (run.spent() - began) * (1 - run.done) / max(1e-9, run.done - begun)
            best = f"{run.log[-1]['val_bpb']:.3f}" if run.log else "–"
            bar.set_postfix_str(f"step {run.step} · loss {loss:.3f} · val {best} bits/byte · {speed:,.0f} tokens/s"
                                + (f" · {speed * per_token / peak:.0%} of peak" if peak else "")
                                + f" · {clock(left)} left", refresh=False)
            bar.update(min(max(run.spent(), run.done * total), total) - bar.n if total else 1)
            if due:
                try:
                    run.save()
                except UserError as error:                                   # there may be room again by the next time
                    tqdm.write(str(error), file=sys.stderr)
                saved = time.monotonic()


WARMUP, END_SECONDS = 5, 3.0                                                 # steps; seconds
WARM_COMPILE, COMPILE_PAYS = 5.0, 200.0                                      # seconds: to compile from the cache; left
                                                                             # in a run that repay compiling without


def counted(n, noun):
    """1 layer, 2 layers."""
    return f"{n:,.10g} {noun}{'' if n == 1 else 's'}"


def whole_tokens(total):
    """Tokens of validation at the end of a run of `total` seconds (None: by steps): all, unless that takes long."""
    return 2 ** 20 if total is None or total > 120 else 2 ** 16


def clock(seconds):
    """Seconds → "m:ss", or "h:mm:ss" from an hour on."""
    return (f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}" if seconds >= 3600
            else f"{max(0, int(seconds)) // 60}:{max(0, int(seconds)) % 60:02}")


def finish(run):
    """The end of a run: the whole validation part, samples, the plot, the next command."""
    s, corpus, model = run.settings, run.corpus, run.model
    lengths = token_lengths(corpus.tokenizer)
    limit = whole_tokens(s["minutes"] and 60 * s["minutes"])
    val_loss, val_bpb = evaluate(model, corpus.val, s["context"], lengths, limit, s["dtype"])
    if not math.isfinite(val_loss):
        raise UserError("the loss is not finite at the end: start again, into another --out, with a lower --lr")
    run.finished, run.done = True, 1.0
    run.record(val_loss, val_bpb, run.log[-1]["tokens_per_second"] if run.log else None)
    run.save()
    print(f"\nvalidation   {val_bpb:.3f} bits per byte ({val_loss:.3f} nats per token) "
          f"after {counted(run.step, 'step')}, {run.tokens / 1e6:.2f} M tokens"
          + (f",\n             on {limit:,} of its {len(corpus.val):,} tokens" if limit < len(corpus.val) else ""))
    if run.read() >= 1:
        times = counted(round(run.tokens / len(corpus.train)), "time")
        print(f"             the text was read {times}, and reading on would be learning by heart:\n"
              "             give more (--data), or --passes")
    print("             " + "   ".join(f"{name} {bits:.3f}" for name, bits in compressors(corpus.val_text).items())
          + ("   on the same text" if corpus.val_bytes <= VAL_TEXT else f"   on its first {VAL_TEXT >> 20} MB"))
    start = corpus.tokenizer.eos_ids[:1] or corpus.tokenizer.encode("\n")
    room = max(1, min(150, s["context"] - 1))
    if s["data"] is None:
        texts = write_samples(model, corpus.tokenizer, start, 64, min(100, room), s["seed"], **SHARP)
        share = sum(map(is_python_prefix, texts)) / len(texts)
        print(f"samples      {share:.0%} of {len(texts)} (100 tokens, temperature {SHARP['temperature']}, "
              f"min-p {SHARP['min_p']}) are Python as far as they go")
        start = start + corpus.tokenizer.encode(PROMPT)
    sample = write_samples(model, corpus.tokenizer, start, length=room, seed=s["seed"])[0]
    print(f"\n{sample}\n")
    title = (f"{counted(corpus.files, 'file')} · {counted(len(model.blocks), 'layer')} × {model.config.dim} · "
             f"{run.tokens / 1e6:.1f} M tokens")
    if not run.processes.rank:
        try:
            plot(run.log, run.out / "loss.png", title)
        except OSError as error:
            print(f"{run.out / 'loss.png'}: cannot be written ({error.strerror})", file=sys.stderr)
    where = "" if s["out"] == "out" else f"--model {shlex.quote(s['out'])} "
    print(f"saved        {run.out}/ (loss.png shows the run)\n"
          f"next         python infer.py {where}" + ('"def fibonacci(n):"' if s["data"] is None else '"…"'))


# --- 6. The command line ----------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(message)


def positive(kind):
    """An argparse type: an int or a float above 0, up to 10¹⁵."""
    def parse(text):
        value = kind(text)
        if not 0 < value <= 1e15:
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"
    return parse


def arguments():
    """The command line, as a parser; what is not given is chosen in `plan`."""
    p = Parser(prog="train.py", description="Train a language model on text; the one dial is --minutes. "
               "In brackets: what is taken where a flag is not given.")
    p.add_argument("--data", help="a file, a folder or a glob of UTF-8 text (Python's standard library)")
    p.add_argument("--tokenizer", choices=["bpe", "chars", "bytes", "gpt2", "o200k_base"],
                   help="pairs merged as the text teaches, characters, bytes, or OpenAI's (bpe)")
    p.add_argument("--vocab", type=positive(int), help="entries of a bpe tokenizer (by the budget)")
    p.add_argument("--minutes", type=positive(float), help="wall clock from start to trained model (5)")
    p.add_argument("--steps", type=positive(int), help="train that many steps instead: the same bits each time")
    p.add_argument("--passes", type=positive(float),
                   help=f"with --minutes: end after reading the text that many times ({PASSES:g})")
    p.add_argument("--layers", help="how many blocks, or a letter for each: a = attention + MLP, s = Mamba-2, m = "
                   "Mamba, d = gated delta rule + MLP; a capital routes its block by Mixture of Depths (by the budget)")
    p.add_argument("--capacity", type=positive(float), help="share of the tokens that a routed block takes (0.125)")
    p.add_argument("--routing", choices=["topk", "threshold"],
                   help=f"what a routed block trains with: the best of each window, or all above a bar ({ROUTING})")
    p.add_argument("--dim", type=positive(int), help="width (by the budget)")
    p.add_argument("--heads", type=positive(int), help="query heads (dim / 64)")
    p.add_argument("--kv-heads", type=positive(int), help="key and value heads (heads, from 8 on half of them)")
    p.add_argument("--context", type=positive(int), help="tokens in a window (by the budget)")
    p.add_argument("--batch", type=positive(int), help="windows in a step (by the budget)")
    p.add_argument("--lr", type=positive(float), help=f"Muon's learning rate, the others keep their ratio to it ({LR}; "
                   f"with --init {LR / 10})")
    p.add_argument("--seed", type=int, help="of weights, the data's order and samples (0)")
    p.add_argument("--out", default="out", help="folder for the model (%(default)s)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--init", help="start from the model in this folder: fine-tuning")
    p.add_argument("--teacher", help="learn from the model in this folder too: distillation")
    p.add_argument("--device", help="cpu, cuda, mps (the best there is)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="of the matrix products (the faster one)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (where it pays)")
    p.add_argument("--shard", action="store_true", help="under torchrun: cut the weights over the processes (FSDP2)")
    return p


def check(args):
    """Flags that contradict each other, before anything is done."""
    if args.minutes and args.steps:
        raise UserError("--minutes and --steps: give one of them")
    if args.passes and args.steps:
        raise UserError("--passes belongs to --minutes; --steps says itself when to end")
    if args.seed is not None and not 0 <= args.seed < 2 ** 63:
        raise UserError(f"--seed {args.seed}: it must be 0 or more, and below 2⁶³")
    for flag in ("data", "out", "init", "teacher", "layers"):
        if getattr(args, flag) == "":
            raise UserError(f"--{flag} is empty")
    if args.vocab and args.tokenizer not in (None, "bpe"):
        raise UserError(f"--vocab belongs to --tokenizer bpe, not to {args.tokenizer}")
    if args.capacity and args.capacity > 1:
        raise UserError(f"--capacity {args.capacity:g}: it must be above 0 and at most 1")
    for flag, settled in (("init", ("tokenizer", "vocab", "layers", "dim", "heads", "kv_heads", "capacity", "routing")),
                          ("teacher", ("tokenizer", "vocab"))):
        given = [f for f in settled if getattr(args, flag) and getattr(args, f) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} contradicts --{flag}: "
                            f"the folder {getattr(args, flag)} has that settled")


def plan(args, machine, processes, width=None):
    """The flags, and for those not given a choice by machine and budget → settings, complete. width: of a model that is
    there already.
    """
    s = {k: v for k, v in vars(args).items() if k != "resume"}
    if not args.steps:
        s["minutes"], s["passes"] = args.minutes or 5.0, args.passes or PASSES
    s["device"] = pick_device(args.device)
    flops = machine.flops[torch.float32] * 60 * s["minutes"] * 0.5 * processes.size if machine else 3e9 * args.steps
    shape = shape_for(flops)
    for name, value in shape.items():
        s[name] = value if s[name] is None else s[name]
    if args.dtype is None:                                                   # on a CPU worth the casts where wide
        wide = s["device"] != "cpu" or (width or s["dim"]) >= 192
        faster = wide and machine and max((t for t in machine.flops if t != torch.float32), key=machine.flops.get)
        s["dtype"] = "float32"
        if faster and machine.flops[faster] > 1.5 * machine.flops[torch.float32]:
            near = machine.flops[torch.bfloat16] > 0.7 * machine.flops[faster]   # float16 only where bfloat16 is none
            s["dtype"] = "bfloat16" if near else "float16"
    if args.batch is None:
        s["batch"] = -(-s["batch"] // processes.size) * processes.size
    if s["batch"] % processes.size:
        raise UserError(f"--batch {s['batch']}: the {processes.size} processes must get the same number of windows")
    s["layers"] = spelled(s["layers"])
    if not s["layers"] or set(s["layers"].lower()) - set(KNOWN):
        raise UserError(f"--layers {args.layers}: a number of blocks, or one letter for each; known are "
                        + ", ".join(f"{letter} ({what})" for letter, what in KNOWN.items())
                        + "; a capital routes its block")
    routed = s["layers"] != s["layers"].lower()
    for flag, value in (("capacity", 0.125), ("routing", ROUTING)):
        if s[flag] is not None and not routed and not args.init:
            raise UserError(f"--{flag} {s[flag]}: it belongs to routed blocks, capital letters in --layers")
        s[flag] = s[flag] or value
    headed = set(s["layers"].lower()) & {"a", "d"}
    if (args.heads or args.kv_heads) and not headed:
        raise UserError(f"--{'heads' if args.heads else 'kv-heads'}: no block of {s['layers']} has heads to choose")
    # Heads of 64, but at least four: two find later in a run how to look back for what followed last time. Of the delta
    # rule the state would shrink with its heads.
    few = 4 if headed == {"a"} and s["dim"] % 8 == 0 else 1
    heads = s["heads"] = args.heads or max(few, s["dim"] // 64)
    if headed and (s["dim"] % heads or s["dim"] // heads % 2):
        raise UserError(f"--dim {s['dim']} and --heads {heads}: the head size must come out whole and even")
    s["kv_heads"] = args.kv_heads or (heads // 2 if heads >= 8 and heads % 2 == 0 else heads)
    if heads % s["kv_heads"]:
        raise UserError(f"--heads {heads} and --kv-heads {s['kv_heads']}: "
                        "each kv head must serve the same number of heads")
    s["tokenizer"], s["seed"] = args.tokenizer or "bpe", args.seed or 0
    s["lr"] = args.lr or (LR if not args.init else LR / 10)
    if args.compile is None and (args.steps or args.shard or s["device"] != "cpu" or not compiler_there()):
        s["compile"] = False                                                 # else None: the loop measures if it pays
    return s


def spelled(layers):
    """--layers → a letter a block: a number of blocks is so many a."""
    return "a" * int(layers) if layers.isdecimal() and len(layers) < 5 else layers


def compiler_there():
    """Whether torch.compile can work here: on a GPU it needs Triton, which torch brings; on a CPU a C++ compiler."""
    return (torch.cuda.is_available()
            or shutil.which(os.environ.get("CXX") or ("cl" if os.name == "nt" else "g++")) is not None)


def writable(out, flag="--out"):
    """Make a folder that is to be written; UserError where it cannot be."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"{flag} {out}: cannot be written ({error.strerror})") from None


def read_state(out):
    """state.pt of a folder, or None where there is none. UserError if it is broken."""
    path = Path(out) / "state.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("settings", "step", "tokens", "windows", "seconds", "done", "recent", "finished", "loss_scale",
                    "model", "optimizer", "config", "train_tokens", "tokenizer"):
            state[key]
        return state
    except Exception as error:                                               # a broken zip, pickle or file: many kinds
        raise UserError(f"{path}: incomplete or not a checkpoint of train.py ({type(error).__name__})") from None


def resumed_settings(args, saved, finished=False):
    """Settings of a run that goes on: those it had; minutes, steps and passes may differ, any other is refused by name.
    Over how many processes it runs, and whether they share the weights, is no setting.
    """
    for flag, value in vars(args).items():
        if flag in ("resume", "out", "minutes", "steps", "passes", "shard") or value is None:
            continue
        value = spelled(value) if flag == "layers" else value
        same = (lambda p: p and Path(p).resolve()) if flag in ("data", "init", "teacher") else lambda p: p
        if same(value) != same(saved.get(flag)):
            raise UserError(f"--{flag.replace('_', '-')} {value}: the run in {args.out} has {saved.get(flag)}; "
                            "a resumed run keeps its settings")
    counted = "steps" if saved["steps"] else "minutes"
    if counted == "steps" and (args.minutes or args.passes) or args.steps and counted == "minutes":
        raise UserError(f"the run in {args.out} counts {counted}; give more of those")
    if (given := getattr(args, counted)) and given < saved[counted] and not finished:
        raise UserError(f"--{counted} {given:g}: the run in {args.out} has {saved[counted]:g}; it may be given more")
    compile = bool(saved["compile"]) if args.shard else saved["compile"]     # cut weights are not tried both ways
    passes = args.passes or (None if finished else saved.get("passes"))      # who asks for more gets more
    return dict(saved, out=args.out, shard=args.shard, compile=compile, passes=passes,
                minutes=max(args.minutes or 0, saved["minutes"] or 0) or None,
                steps=max(args.steps or 0, saved["steps"] or 0) or None)


def prepare(args, processes):
    """Everything before the first step → Run (or None: a finished run with nothing left to do)."""
    if args.shard and processes.size == 1:
        raise UserError("--shard: there is one process; start N with torchrun --nproc_per_node=N train.py --shard")
    state = read_state(args.out) if args.resume else None
    if state:
        settings = resumed_settings(args, state["settings"], state["finished"])
        over = (settings["minutes"] == state["settings"]["minutes"] and not args.passes if settings["minutes"]
                else settings["steps"] <= state["step"])
        if state["finished"] and over:
            print(f"the run in {args.out} is finished, after {counted(state['step'], 'step')}; "
                  "more --minutes or --steps go on with it")
            return None
    device = pick_device(settings["device"] if state else args.device)
    timed = not (args.steps or state and settings["steps"])
    (machine,) = processes.agree(measure(device) if timed and not processes.rank else None)
    start = load(args.init, device, torch.float32) if args.init and not state else None
    if not state:
        settings = plan(args, machine, processes, start and start[0].config.dim)
    teacher = load(settings["teacher"], device, torch.float32) if settings["teacher"] else None
    given = [model for model, _ in filter(None, (start, teacher))]
    if given and args.context is None and not state:
        settings["context"] = min(settings["context"], *(model.config.context for model in given))
    tokenizer = (start or teacher or (None, None))[1]
    if state:
        tokenizer = Tokenizer(state["tokenizer"]["source"], state["tokenizer"]["eos_ids"])
        tokenizer.beside = state["tokenizer"]["beside"]
    if teacher and teacher[1].library.get_vocab() != tokenizer.library.get_vocab():
        raise UserError(f"--teacher {settings['teacher']}: its tokens are not those of the model that learns")
    made_here = state and not settings["init"] and not teacher               # then the cache has it under its kind
    read = lambda tokenizer: processes.first_here(lambda: load_corpus(settings["data"], settings["tokenizer"],
                                                                      settings["vocab"], tokenizer))
    corpus = read(None if made_here else tokenizer)
    if made_here and corpus.tokenizer.source != tokenizer.source:
        corpus = read(tokenizer)
    context = settings["context"]
    for part, tokens, least in (("training", corpus.train, context + 2), ("validation", corpus.val, 2)):
        if len(tokens) < least:
            raise UserError(f"the {part} part of the data has {len(tokens)} tokens and needs {least}: give more text"
                            + (" or a smaller --context" if part == "training" else ""))
    known = min((model.config.vocab for model in given), default=math.inf)
    if corpus.tokenizer.vocab_size > known and max(corpus.train.max(), corpus.val.max()) >= known:
        raise UserError(f"the tokenizer says tokens that the model does not know: it has {known:,}")
    if start:
        model, raw = start[0].train(), start[0].config.raw
        raw.update(dtype="float32", torch_dtype="float32")
        if context > model.config.context:                                   # where it is more than a length, it counts
            if rope_of(raw)[1] != "default":
                raise UserError(f"--context {context}: the positions of {args.init} are scaled for up to "
                                f"{model.config.context} tokens")
            raw["max_position_embeddings"] = model.config.context = context
    else:
        raw = state["config"] if state else our_config(
            settings["layers"], settings["dim"], settings["heads"], settings["kv_heads"],
            corpus.tokenizer.vocab_size, context, corpus.tokenizer.eos_ids, settings["capacity"], settings["routing"])
        model = empty_model(parse_config(raw), device="cpu" if settings["shard"] else device)
        if not state:
            model.initialize(settings["seed"])
        else:
            try:
                model.load_state_dict(state["model"])
            except (RuntimeError, TypeError, AttributeError) as error:
                raise UserError(f"{args.out}/state.pt: its weights are not its own config's "
                                f"({str(error).splitlines()[-1].strip()})") from None
    if settings["shard"]:
        shard(model, processes, device)                                      # which brings each piece to its device
    run = Run(settings, corpus, model, machine, teacher and teacher[0].eval().requires_grad_(False), processes)
    if state:
        run.restore(state)
    c = model.config
    size = sum(w.numel() for w in model.parameters())
    token_bytes = (corpus.train_bytes + corpus.val_bytes) / max(1, len(corpus.train) + len(corpus.val))
    print(f"data         {counted(corpus.files, 'file')}, {corpus.train_bytes / 1e6:.1f} MB to train on, "
          f"{corpus.val_bytes / 1e6:.2f} MB to validate\n"
          f"tokens       {corpus.tokenizer.vocab_size:,}, of {token_bytes:.2f} bytes on average")
    if not 0.01 < corpus.val_bytes / (corpus.train_bytes + corpus.val_bytes) < 0.3:
        print("             (a hash of names divides so few files unevenly: more files, or one, divide better)")
    print(f"model        {counted(len(c.layers), 'layer')} × {c.dim}, "
          + ("" if set(c.layers) == {"a"} else f"{c.layers}, ")
          + (f"{counted(c.heads, 'head')} ({c.kv_heads} kv) of {c.head_dim}, " if "a" in c.layers.lower() else "")
          + f"{size / 1e6:.2f} M parameters")
    if machine:
        print(f"machine      {device}, {counted(torch.get_num_threads(), 'thread')}: "
              + ", ".join(f"{str(k).split('.')[1]} {v / 1e9:,.0f}" for k, v in machine.flops.items())
              + f" GFLOP/s; memory {machine.bandwidth / 1e9:.0f} GB/s")
    length = counted(settings["minutes"], "minute") if settings["minutes"] else counted(settings["steps"], "step")
    print(f"run          {length} of {settings['batch']} × {context} tokens, {settings['dtype']}"
          + (f", {processes.size} processes" if processes.size > 1 else "")
          + (f", from step {run.step:,}" if state else ""), flush=True)
    return run


@contextlib.contextmanager
def held(out):
    """Keep the folder --out for this run: a second run into it is refused while this one lives, however it ends."""
    if not fcntl:                                                            # Windows locks no folders: files are
        yield                                                                # replaced whole, and the later run wins
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing there; wait for it, or give another folder") from None
        except OSError:                                                      # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


def keep_memory():
    """With glibc: what tensors leave stays with the process for the next ones. Handed back to the system and asked for
    anew, every page is zeroed again: a twentieth of a step's time where tensors are large.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                                                  # M_MMAP_MAX: no block is a map of its own
        libc.mallopt(-1, -1)                                                 # M_TRIM_THRESHOLD: the heap never shrinks
    except (OSError, AttributeError):                                        # another system
        pass


def main(argv=None):
    """Train by command-line flags → exit code."""
    global START
    try:
        if argv is None:
            keep_memory()
        else:
            START = time.monotonic()                                         # called by a program, not from a shell
        args = arguments().parse_args(argv)
        check(args)
        writable(args.out)
        compiled_folder()                                                    # set before torch does
        processes = Processes()
        with contextlib.ExitStack() as stack:
            if processes.rank:                                               # one voice for all
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            else:
                stack.enter_context(held(args.out))
            return train(args, processes)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        lost = dist.is_initialized() and (isinstance(error, dist.DistError) or "peer" in str(error))
        if not lost and not memory_ended(error):
            raise
        what = ("another process has ended; what was saved before is kept: go on with --resume" if lost else
                f"the memory ended; give a smaller --context, --dim or --layers ({error})")
        print(f"train.py: {what}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args, processes):
    """A run from its flags to its end or a signal → exit code."""
    run = prepare(args, processes)
    if run is None:
        return 0
    with Stop() as stop:
        if not train_loop(run, stop):
            run.save()
            print(f"stopped at step {run.step:,} and saved; go on with --resume", file=sys.stderr)
            return stop.code
        run.save()                                                           # before the long look back in `finish`
    if not processes.rank or run.optimizer.cut:                              # a cut model computes in all at once
        finish(run)
    return 0


if __name__ == "__main__":
    leave(main)
