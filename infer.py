"""Serve a language model: a prompt in, text out, as fast as the machine's memory can be read.

    prefill   the prompt at once: matrix × matrix, bound by arithmetic   tokens/s ≤ FLOP/s / (2 · weights)
    decode    one token a step: matrix × vector, bound by memory         steps/s ≤ bytes/s / (bytes of weights + cache)

A decode step reads every weight once, whatever the batch: B sequences in step are nearly B times the tokens per second,
until arithmetic or the cache (which each sequence has for itself) is the bound. Every figure printed here stands beside
its bound.

    cache     keys and values of the tokens so far, accounted in blocks: a sequence holds a table of them, gets one more
              when it grows into it, and gives all back when it ends. Full blocks stay findable by their tokens: a
              prompt that begins as an earlier one did takes them over instead of computing them again.
    schedule  each step takes the next token of every running sequence, then pieces of waiting prompts, oldest first, up
              to max_num_batched_tokens, in one pass over the weights. Where blocks run out the youngest sequence waits
              again and is recomputed later.
    sampling  token = argmax(logits / temperature + g),  g = −log(−log u), u uniform in (0, 1): Gumbel-max, the same
              distribution as softmax. u is a hash of (seed, choice, position, token) and of nothing else, so a seeded
              text does not depend on what else is in the batch, on the order of requests, or on the machine's load.
    serve     one thread reads and writes sockets, one takes requests apart, one owns the model: none holds up another.
              A text that no one waits for any more gives its blocks back at once.

`python infer.py "def fibonacci(n):"` streams from out/; `--model DIR` takes any folder of ours or a Hugging Face Qwen3,
Qwen2, Llama or Mistral; `--serve` speaks OpenAI's interface; `--score FILE`, `--bench`, `--bench-serving`; without a
prompt, on a terminal, it asks for one.
"""
import argparse
import asyncio
import bisect
import codecs
import contextlib
import functools
import hashlib
import hmac
import ipaddress
import itertools
import json
import math
import os
import queue
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")                           # on Linux: large tensors in large pages
import torch
import torch.nn.functional as F

import train
from flash import flash_attention_varlen, flash_decode
from train import Parser, UserError, load, measure, positive


# --- 1. Weights: laid out for few rows, or in fewer bits --------------------------------------------------------------

def memory_of(device):
    """Bytes of memory that a cache may count on: half of what a GPU has left, a quarter of what a computer has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 2 ** 33) // 4


class FewRows(torch.nn.Linear):
    """A linear layer that is quick for few rows too, where matrix libraries are made for many: decode is bound by it.

    On a CPU a second copy of the weights may be packed in oneDNN's own order (`quicken` measures whether that pays).
    One row in a compiled graph is a product and a sum, which the compiler turns into one pass over the weights.
    """
    packed = None
    ROWS = 128                                                               # packed weights are quicker up to here

    def pack(self):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 32)  # laid out for that many rows

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if torch.compiler.is_compiling():
            if rows == 1 and x.device.type == "cpu":
                y = (x.reshape(-1) * self.weight).sum(-1).view(*x.shape[:-1], -1)
                return y if self.bias is None else y + self.bias
        elif self.packed is not None and rows <= self.ROWS:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def quicken(model):
    """Turn a model's linear layers into `FewRows`, packed where one row is faster for it on this machine (and where its
    memory holds a second copy of the weights with ease).
    """
    model.requires_grad_(False)
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    for layer in layers:
        layer.__class__ = FewRows
    head = model.head
    plain = head.weight.device.type == "cpu" and head.weight.dtype == torch.float32
    room = 4 * sum(w.numel() for w in model.parameters()) < memory_of(head.weight.device)
    if not plain or not room or not torch.backends.mkldnn.is_available():
        return model
    head.pack()
    x, packed, times = torch.ones(1, head.in_features), head.packed, {True: [], False: []}
    for which in (True, False) * 3:
        head.packed = packed if which else None
        t = time.perf_counter()
        head(x)
        times[which].append(time.perf_counter() - t)
    head.packed = None
    if min(times[True]) < min(times[False]):
        for layer in layers:
            layer.pack()
    return model


def int8_numpy(w):
    """w [O, I] → q int8 [O, I] and scale [O]: w ≈ scale ∘ q. The largest of each row becomes ±127; zeros stay zeros."""
    scale = np.abs(w).max(1) / 127
    return np.rint(w / np.where(scale, scale, 1)[:, None]).astype(np.int8), scale


def int8_linear_numpy(x, q, scale):
    """x [N, I], q and scale of `int8_numpy` → x Wᵀ [N, O]. Each row of x, too, becomes whole numbers for the product.

    Of 7 bits: a CPU without VNNI adds two products at a time in 16 bits, and 2 · 127 · 127 is what fits.
    """
    row = np.abs(x).max(-1, keepdims=True)
    a = np.rint(x / np.where(row, row, 1) * 63).astype(np.int32)
    return (a @ q.T.astype(np.int32)) * (row / 63) * scale


class Int8(torch.nn.Module):
    """A linear layer with its weights in int8, a scale for each output: a quarter of the memory to read, and products
    of integers, which a CPU does twice as many of. As in `int8_linear_numpy`; elsewhere x stays as it is.
    """

    def __init__(self, linear):
        super().__init__()
        w = linear.weight.detach()
        self.in_features, self.out_features, self.bias, self.packed = (
            linear.in_features, linear.out_features, linear.bias, None)
        scale = (w.abs().amax(1).float() / 127).clamp(min=1e-30)
        if w.device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
            zeros = torch.zeros(len(w), dtype=torch.int64)
            before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
            with warnings.catch_warnings():                                  # this form of tensor is to go, one day
                warnings.simplefilter("ignore")
                self.packed = torch.ops.quantized.linear_prepack(
                    torch.quantize_per_channel(w.float(), scale, zeros, 0, torch.qint8), None)
            torch.backends.quantized.engine = before
        else:
            self.register_buffer("scale", scale.to(w.dtype))
            self.register_buffer("q", (w / scale[:, None]).round().to(torch.int8))

    def forward(self, x):
        if self.packed is None:
            return F.linear(x, self.q.to(x.dtype)).mul_(self.scale).add_(0 if self.bias is None else self.bias)
        row = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            (x / row).float(), 1 / 63, 64, self.packed).mul_(row)
        return y.to(x.dtype) if self.bias is None else y.to(x.dtype).add_(self.bias)


def layers_in(model, layer):
    """Replace a model's linear layers by `layer`s made of them."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear:
                setattr(module, name, layer(linear))


QUANTIZED = {"int8": Int8}                                                   # --quantize → the layer


# --- 2. Cache: blocks, who holds them, and where their numbers lie ----------------------------------------------------

class Block:
    """`size` places for tokens. key: the hash of its tokens and of all before them, once they are computed."""
    __slots__ = ("id", "refs", "key", "parent", "tokens", "home")

    def __init__(self, id):
        self.id, self.refs = id, 0
        self.forget()

    def forget(self):
        self.key = self.parent = self.tokens = self.home = None


class Blocks:
    """The pool of blocks: who holds each, and the full ones by the hash of (parent, tokens). Accounting, no numbers.

    A block that no sequence holds keeps its tokens until its place is needed: those let go longest ago are taken first.
    """

    def __init__(self, total, size, caching=True):
        self.total, self.size, self.caching, self.hits = total, size, caching, 0
        self.idle = OrderedDict((id, Block(id)) for id in range(total))      # held by no one; the first is taken next
        self.known = {}                                                      # key → block

    def __len__(self):
        return len(self.idle)

    def take(self, count):
        """→ a list of that many blocks, for one holder."""
        taken = [self.idle.popitem(last=False)[1] for _ in range(count)]
        for block in taken:
            if block.key:
                del self.known[block.key]
                block.forget()
            block.refs = 1
        return taken

    def hold(self, block):
        """One more holder of a known block."""
        self.idle.pop(block.id, None)
        block.refs += 1

    def release(self, table):
        """A sequence lets go of its blocks; the last first, as it is worth less than those it stands on."""
        for block in reversed(table):
            block.refs -= 1
            if not block.refs:
                self.idle[block.id] = block
                if not block.key:
                    self.idle.move_to_end(block.id, last=False)              # nothing to find in it: taken next
        table.clear()

    @staticmethod
    def key(parent, tokens):
        return hashlib.blake2b(parent + np.array(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()

    def find(self, key, parent, tokens):
        """The block of these tokens after that parent, or None. The hash finds it, the tokens decide."""
        block = self.known.get(key)
        return block if block and block.parent == parent and block.tokens == tokens else None

    def register(self, block, key, parent, tokens, home):
        """Make a block findable, now that all its tokens are computed and can be copied from `home`."""
        if self.caching and key not in self.known:
            block.key, block.parent, block.tokens, block.home = key, parent, tokens, home
            self.known[key] = block


def quantized(x):
    """x [..., D] → int8 [..., D] and its scale float32 [...]: the largest of each vector becomes 127."""
    scale = x.abs().amax(-1).float().clamp(min=1e-12) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


class Slab:
    """One sequence's keys and values, each layer's in one piece. Pages of memory never written to are never there.

    data [2 · layers, 1, G, capacity, D]: keys of layer l at 2l, values at 2l + 1; in int8 with scale [… without D].
    """

    def __init__(self, shape, dtype, device, int8):
        self.data = torch.empty(shape, dtype=torch.int8 if int8 else dtype, device=device)
        self.scale = torch.empty(shape[:-1], device=device) if int8 else None

    def cut(self, start, stop):
        """Tokens start … stop → views [1, G, stop − start, D], keys and values of all layers."""
        return self.data[:, :, :, start:stop].unbind()

    def cut_scale(self, start, stop):
        return self.scale[:, :, :, start:stop].unbind()

    def copy(self, source, start, stop):
        torch._foreach_copy_(self.cut(start, stop), source.cut(start, stop))
        if self.scale is not None:
            torch._foreach_copy_(self.cut_scale(start, stop), source.cut_scale(start, stop))


class Slabs:
    """Caches on a CPU: torch's attention wants a sequence's keys in one piece, so each sequence has a `Slab`.

    A block that is found is copied once, from the slab it was computed in, which lives as long as the block is known.
    """

    def __init__(self, model, blocks, int8):
        c, weight = model.config, model.embed.weight
        self.size = blocks.size
        self.new = lambda capacity: Slab((2 * len(model.blocks), 1, c.kv_heads, capacity, c.head_dim),
                                         weight.dtype, weight.device, int8)

    def open(self, r):
        """Memory for a request that has its blocks; its first `computed` tokens are copied from where they lie."""
        r.slab = self.new(r.capacity)
        found = r.table[:r.computed // self.size]
        for source, run in itertools.groupby(range(len(found)), lambda i: found[i].home):
            run = list(run)
            r.slab.copy(source, run[0] * self.size, (run[-1] + 1) * self.size)

    def close(self, r):
        r.slab = None

    def home(self, r):
        return r.slab

    def states(self, segments):
        """segments: (request, start, stop), the tokens that a pass computes, in a row → a state for each layer."""
        views = SlabViews(segments)
        return [SlabState(views, 2 * layer) for layer in range(len(views.all[0]) // 2)]


class SlabViews:
    """What a pass writes (new) and reads (all) of its slabs: cut once, for all layers."""

    def __init__(self, segments):
        self.counts = [stop - start for _, start, stop in segments]
        self.new = [r.slab.cut(start, stop) for r, start, stop in segments]
        self.all = [r.slab.cut(0, stop) for r, _, stop in segments]
        self.int8 = segments[0][0].slab.scale is not None
        if self.int8:
            self.new_scale = [r.slab.cut_scale(start, stop) for r, start, stop in segments]
            self.all_scale = [r.slab.cut_scale(0, stop) for r, _, stop in segments]


class SlabState:
    """The state of one layer's attention in a pass over many sequences: each looks back over its own slab."""

    def __init__(self, views, part):
        self.views, self.part = views, part

    def write(self, x, part):
        """x [1, G, N, D], the tokens of all segments."""
        views = self.views
        if views.int8:
            x, scale = quantized(x)
            torch._foreach_copy_([new[part] for new in views.new_scale], scale.split(views.counts, dim=2))
        torch._foreach_copy_([new[part] for new in views.new], x.split(views.counts, dim=2))

    def read(self, i, part, dtype):
        """Keys or values of segment i from its beginning → [1, G, S, D]."""
        x = self.views.all[i][part]
        return (x * self.views.all_scale[i][part][..., None]).to(dtype) if self.views.int8 else x

    def attend(self, q, k, v, attention, window=None):
        """q [1, H, N, D], k, v [1, G, N, D] → [1, H, N, D]."""
        (_, H, N, D), G, parts, at = q.shape, k.shape[1], [], 0
        self.write(k, self.part)
        self.write(v, self.part + 1)
        ones = q[0].transpose(0, 1).reshape(N, 1, G, H // G, D).unbind()     # a group's heads stand as its queries
        for i, count in enumerate(self.views.counts):
            keys, values = self.read(i, self.part, q.dtype), self.read(i, self.part + 1, q.dtype)
            if count == 1:
                if window is not None:
                    keys, values = keys[:, :, -window:], values[:, :, -window:]
                y = F.scaled_dot_product_attention(ones[at], keys, values).view(1, H, D)
            else:
                y = attention(q[:, :, at:at + count], keys, values, window=window)[0].transpose(0, 1)
            parts.append(y)                                                  # [count, H, D]
            at += count
        return torch.cat(parts).transpose(0, 1)[None]


class Row(Slab):
    """A slab that is one row of tensors which hold many."""
    scale = None

    def __init__(self, store, row):
        self.row, self.parts = row, [part[row:row + 1] for part in store]

    def cut(self, start, stop):
        return [part[:, :, start:stop] for part in self.parts]


class Rows(Slabs):
    """Slabs of equal size, for a compiled step on a CPU: `rows` in one tensor for each layer's keys and values.

    A request that is longer than a row has a slab of its own, as in `Slabs`, and then no step is a compiled one. A row
    is used again at once, so no block can be copied from it later: not with the prefix cache.
    """

    def __init__(self, model, blocks, rows):
        super().__init__(model, blocks, int8=False)
        c, weight = model.config, model.embed.weight
        self.capacity, self.rows, self.free = blocks.total // rows * blocks.size, rows, list(range(rows))
        self.store = [torch.zeros(rows, c.kv_heads, self.capacity, c.head_dim, dtype=weight.dtype)
                      for _ in range(2 * len(model.blocks))]
        own = self.new
        self.new = lambda capacity: Row(self.store, self.free.pop(0)) if capacity <= self.capacity else own(capacity)

    def close(self, r):
        if isinstance(r.slab, Row):
            for part in r.slab.parts:
                part.zero_()                                                 # a compiled step reads all places: no NaN
            bisect.insort(self.free, r.slab.row)
        r.slab = None

    def shape(self, segments):
        """What a step for these segments is compiled for; None where it can't be."""
        fit = len(segments) == self.rows and all(isinstance(r.slab, Row) for r, _, _ in segments)
        return self.rows if fit else None

    def inputs(self, segments, shape):
        """→ the order of the rows, tokens and positions [rows, 1], and what `graph` takes."""
        order = [r.slab.row for r, _, _ in segments]
        tokens, positions = torch.zeros(2, self.rows, dtype=torch.int64)
        tokens[order] = torch.tensor([r.ids[start] for r, start, _ in segments])
        positions[order] = torch.tensor([start for _, start, _ in segments])
        return order, tokens[:, None], positions[:, None], [positions, *self.store]

    def graph(self, positions, *store):
        return [RowState(positions, *store[i:i + 2]) for i in range(0, len(store), 2)]


class RowState:
    """One layer's state in a graph of fixed shape: positions say how far each row is filled."""

    def __init__(self, positions, keys, values):
        self.positions, self.keys, self.values = positions, keys, values

    def attend(self, q, k, v, attention, window=None):
        """q [B, H, 1, D], k, v [B, G, 1, D] → [B, H, 1, D]."""
        (B, H, _, D), G = q.shape, k.shape[1]
        place = torch.arange(self.keys.shape[2])
        for store, x in ((self.keys, k), (self.values, v)):
            store.index_put_((torch.arange(B)[:, None], torch.arange(G), self.positions[:, None]), x[:, :, 0])
        seen = place <= self.positions[:, None]
        if window is not None:
            seen = seen & (place > self.positions[:, None] - window)
        y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), self.keys, self.values,
                                           attn_mask=seen[:, None, None].expand(-1, 1, H // G, -1))
        return y.reshape(B, H, 1, D)


class Pages:
    """Caches on a GPU: a block is a page, a table says which pages are a sequence's; what is shared lies there once.

    data: [pages, size, G, D] for the keys and the values of each layer. One page more than there are blocks takes what
    the padding of a compiled step writes.
    """

    def __init__(self, model, blocks, int8):
        c, weight = model.config, model.embed.weight
        self.size, self.spare = blocks.size, blocks.total
        shape, parts = (blocks.total + 1, blocks.size, c.kv_heads, c.head_dim), range(2 * len(model.blocks))
        self.data = [torch.zeros(shape, dtype=torch.int8 if int8 else weight.dtype, device=weight.device)
                     for _ in parts]
        self.scale = [torch.zeros(shape[:-1], device=weight.device) if int8 else None for _ in parts]

    def open(self, r):
        pass

    close = home = open

    def places(self, segments, rows=0, width=0):
        """→ int64 slots [N] for the tokens, tables [rows, width], lengths [rows], padded to at least these sizes."""
        rows = max(rows, len(segments))
        width = max([width] + [-(-stop // self.size) for _, _, stop in segments])
        table, lengths, slots = np.full((rows, width), self.spare), np.ones(rows, dtype=np.int64), []
        for i, (r, start, stop) in enumerate(segments):
            ids, at = np.array([block.id for block in r.table[:width]]), np.arange(start, stop)
            table[i, :len(ids)], lengths[i] = ids, stop
            slots.append(ids[at // self.size] * self.size + at % self.size)
        slots.append(np.full(rows - len(segments), self.spare * self.size))
        return [torch.from_numpy(a.astype(np.int64)).to(self.data[0].device)
                for a in (np.concatenate(slots), table, lengths)]

    def states(self, segments):
        """Three kinds of work: rows of one token are decoded together; whole prompts are one pack, their keys and
        values just computed; what goes on with a prompt reads its pages, a sequence at a time.
        """
        slots, table, lengths = self.places(segments)
        counts = np.array([stop - start for _, start, stop in segments])
        ends, stops = np.cumsum(counts), np.array([stop for _, _, stop in segments])
        there = lambda *parts: torch.from_numpy(np.concatenate(parts)).to(table.device)
        ones, whole = counts == 1, (counts > 1) & (counts == stops) & (self.scale[0] is None)
        one = pack = None
        if ones.any():
            rows = there(np.flatnonzero(ones))
            one = there(ends[ones] - 1), table[rows], lengths[rows]
        if whole.any():
            pack = (there(*(np.arange(end - n, end) for end, n in zip(ends[whole], counts[whole]))),
                    there([0], np.cumsum(counts[whole])))
        rest = [(slice(ends[i] - counts[i], ends[i]), table[i:i + 1, :-(-stops[i] // self.size)], int(stops[i]))
                for i in np.flatnonzero(~ones & ~whole)]
        return self.layers(slots, one, pack, rest)

    def shape(self, segments):
        """What a step for these segments is compiled for: rows and pages a row, in powers of two."""
        power = lambda n: 1 << (n - 1).bit_length()
        return power(len(segments)), power(max(-(-stop // self.size) for _, _, stop in segments))

    def inputs(self, segments, shape):
        """→ the order of the rows, tokens and positions [1, rows], and what `graph` takes."""
        slots, table, lengths = self.places(segments, *shape)
        tokens = torch.zeros(1, shape[0], dtype=torch.int64)
        tokens[0, :len(segments)] = torch.tensor([r.ids[start] for r, start, _ in segments])
        return slice(len(segments)), tokens.to(slots.device), lengths[None] - 1, [slots, table, lengths]

    def graph(self, slots, table, lengths):
        return self.layers(slots, (slice(None), table, lengths))

    def layers(self, slots, one=None, pack=None, rest=()):
        parts = list(zip(self.data, self.scale))
        return [PageState(parts[i:i + 2], slots, one, pack, rest) for i in range(0, len(parts), 2)]


class PageState:
    """The state of one layer's attention over pages. slots: where each token goes; what there is to do:

    one     tokens that are decoded, their tables [B, n] and lengths [B]
    pack    tokens of prompts from their beginnings, and the offsets of each
    rest    (tokens, table [1, n], length) of each prompt that goes on
    """

    def __init__(self, parts, slots, one, pack, rest):
        self.parts, self.slots, self.one, self.pack, self.rest = parts, slots, one, pack, rest

    def write(self, x, pages, scale):
        x = x[0].transpose(0, 1)                                             # [N, G, D]
        if scale is not None:
            x, s = quantized(x)
            scale.view(-1, scale.shape[-1]).index_copy_(0, self.slots, s)
        pages.view(-1, *pages.shape[2:]).index_copy_(0, self.slots, x)

    @staticmethod
    def read(table, stop, dtype, pages, scale):
        """→ the first `stop` keys or values of a sequence [1, G, stop, D]."""
        x = pages[table] if scale is None else pages[table] * scale[table][..., None]
        return x.to(dtype).flatten(1, 2)[:, :stop].transpose(1, 2)

    def attend(self, q, k, v, attention, window=None):
        """q [1, H, N, D], k, v [1, G, N, D] → [1, H, N, D]."""
        (keys, k_scale), (values, v_scale) = self.parts
        self.write(k, keys, k_scale)
        self.write(v, values, v_scale)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                  # [N, ·, D]
        y = torch.empty_like(q)
        if self.one:
            tokens, table, lengths = self.one
            y[tokens] = flash_decode(q[tokens], keys, values, table, lengths, k_scale, v_scale, window)
        if self.pack:
            tokens, cu = self.pack
            y[tokens] = flash_attention_varlen(q[tokens], k[tokens], v[tokens], cu, cu, window=window)
        for tokens, table, stop in self.rest:
            y[tokens] = attention(q[tokens].transpose(0, 1)[None], *(self.read(table, stop, q.dtype, *part)
                                  for part in self.parts), window=window)[0].transpose(0, 1)
        return y.transpose(0, 1)[None]


# --- 3. Sampler -------------------------------------------------------------------------------------------------------

@dataclass
class Sampling:
    """How to choose a request's tokens. temperature 0 or top_p 0 is greedy; top_k 0, top_p 1, min_p 0 are off."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict | None = None                                           # token → what is added to its logit
    seed: int | None = None
    stop: list = field(default_factory=list)
    n: int = 1
    logprobs: int | None = None                                              # so many of the likeliest, and the chosen
    prompt_logprobs: int | None = None
    ignore_eos: bool = False

    def check(self, V):
        """ValueError names the argument that is out of range; V: how many tokens the model has."""
        def need(ok, name, what):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {what}")
        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
        need(self.max_tokens is None or whole(self.max_tokens) and self.max_tokens >= 1,
             "max_tokens", "a whole number from 1")
        need(number(self.temperature) and self.temperature >= 0, "temperature", "a number from 0 (greedy) up")
        need(whole(self.top_k) and self.top_k >= 0, "top_k", "a whole number from 0 (off) up")
        need(number(self.top_p) and 0 <= self.top_p <= 1, "top_p", "from 0 (greedy) to 1 (off)")
        need(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        need(number(self.repetition_penalty) and self.repetition_penalty > 0,
             "repetition_penalty", "a number above 0 (1: off)")
        for name in ("presence_penalty", "frequency_penalty"):
            need(number(getattr(self, name)), name, "a number (0: off)")
        try:
            bias = {int(token): value for token, value in dict(self.logit_bias or {}).items()}
        except (TypeError, ValueError):
            bias = {-1: 0}
        need(all(0 <= token < V and number(value) for token, value in bias.items()),
             "logit_bias", f"numbers by tokens from 0 to {V - 1}")
        self.logit_bias = bias
        need(self.seed is None or whole(self.seed), "seed", "a whole number")
        need(whole(self.n) and self.n >= 1, "n", "a whole number from 1")
        for name in ("logprobs", "prompt_logprobs"):
            k = getattr(self, name)
            need(k is None or whole(k) and 0 <= k <= V, name, f"a whole number from 0 to {V}")
        need(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        need(isinstance(self.stop, (list, tuple)) and all(isinstance(s, str) and s for s in self.stop),
             "stop", "a string or a list of strings, none empty")

    @property
    def greedy(self):
        return self.temperature == 0 or self.top_p == 0

    @property
    def penalizes(self):
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


class Tally:
    """What a request's penalties ask for: which tokens were there, and how often in the output; kept as they come."""

    def __init__(self, prompt, limit, bias):
        known = list(dict.fromkeys([*prompt, *bias]))
        self.at, self.size = {token: i for i, token in enumerate(known)}, len(known)
        self.tokens = np.zeros(len(known) + limit, dtype=np.int64)
        self.seen, self.count, self.bias = np.zeros((3, len(known) + limit), dtype=np.float32)
        self.tokens[:self.size] = known
        self.seen[:self.size] = np.isin(known, prompt)
        for token, value in bias.items():
            self.bias[self.at[token]] = value

    def add(self, token):
        i = self.at.setdefault(token, self.size)
        self.size = len(self.at)
        self.tokens[i], self.seen[i] = token, 1
        self.count[i] += 1


def penalize(logits, requests):
    """Repetition, presence and frequency penalties and the logit bias, in place on logits [R, V] float32 → a function
    that takes them back. Only the tokens that a request has seen or biased are touched.
    """
    rows = [(i, r.tally, r.sampling) for i, r in enumerate(requests) if r.tally]
    if not rows:
        return lambda: None
    sizes = [tally.size for _, tally, _ in rows]
    tensor = lambda array: torch.from_numpy(array).to(logits.device)
    spread = lambda values: tensor(np.repeat(np.array(values, dtype=np.float32), sizes))
    joined = lambda name: tensor(np.concatenate([getattr(t, name)[:t.size] for _, t, _ in rows]))
    place = tensor(np.repeat([i * logits.shape[1] for i, _, _ in rows], sizes)) + joined("tokens")
    raw, seen, count = logits.view(-1)[place], joined("seen") > 0, joined("count")
    penalty = spread([s.repetition_penalty for _, _, s in rows])             # makes rarer whatever the sign
    z = torch.where(seen, torch.where(raw > 0, raw / penalty, raw * penalty), raw)
    z = z - spread([s.presence_penalty for _, _, s in rows]) * (count > 0)
    z = z - spread([s.frequency_penalty for _, _, s in rows]) * count
    logits.view(-1)[place] = z + joined("bias")
    return lambda: logits.view(-1).index_put_((place,), raw)


def _mix(x):
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): int64 [...] → int64, every bit depends on every bit."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -0x40A7_B892_E31B_1A47           # · BF58476D1CE4E5B9, in two's complement
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -0x6B2F_B644_ECCE_EE15          # · 94D049BB133111EB
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


GOLDEN = -0x61C8_8646_80B5_83EB                                              # 9E3779B97F4A7C15: 2⁶⁴ / the golden ratio


def gumbel(seeds, choices, positions, tokens):
    """Noise keyed by (seed, choice, position, token): int64 [R] three times, tokens int64 [R or 1, K] → float32 [R, K].

    A counter-based generator: each row has a key of 64 bits, each token mixes its number with both halves of it, in 32
    bits, which a CPU does eight at a time.
    """
    key = seeds
    for part in (choices, positions):
        key = _mix((key + GOLDEN) ^ _mix(part + GOLDEN))
    low, high = _mix(key).view(torch.int32).view(-1, 2).unbind(1)
    x = tokens.to(torch.int32) * -0x61C8_8647 + low[:, None]                 # · 9E3779B9; then murmur3's finaliser
    for shift, mask, factor in ((16, 0xFFFF, -0x7A14_3595), (13, 0x7_FFFF, -0x3D4D_51CB), (15, 0x1_FFFF, 0x2C1B_3C6D)):
        x.bitwise_xor_((x >> shift).bitwise_and_(mask)).mul_(factor)
        x.bitwise_xor_(high[:, None]) if shift == 16 else x
    u = ((x >> 9).bitwise_and_(0x7F_FFFF)).float().add_(0.5).mul_(2.0 ** -23)  # never 0 or 1
    return u.log_().neg_().log_().neg_()


def best(logits, k):
    """The k largest of each row of logits [R, V] → values and tokens [R, k], largest first, of equals the lower token.

    With the row written in 32 lines, the k largest lie in the k columns that have the largest maxima: one quick pass
    leaves few candidates.
    """
    R, V = logits.shape
    width = V // 32
    if k == V:
        return logits.sort(dim=-1, descending=True, stable=True)
    if k * 8 > width:
        values, tokens = logits.topk(k, dim=-1)
    else:
        body = logits[:, :32 * width].unflatten(1, (32, width))
        columns = body.amax(1).topk(k, dim=-1, sorted=False).indices         # [R, k]
        tokens = (columns[:, None] + width * torch.arange(32, device=logits.device)[:, None]).flatten(1)
        rest = torch.arange(32 * width, V, device=logits.device).expand(R, -1)
        tokens = torch.cat([tokens, rest], 1)                                # [R, 32 k and the rest]
        values, at = logits.gather(1, tokens).topk(k, dim=-1)
        tokens = tokens.gather(1, at)
    tokens, order = tokens.sort(dim=-1)
    values, again = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, again)


def floors(largest, rows):
    """The least score [R, 1] that min-p leaves: min_p times as likely as the likeliest."""
    return largest + torch.tensor([[r.sampling.min_p] for r in rows], device=largest.device).log()


def filtered(scores, rows, whole, total=None):
    """Min-p, top-k and top-p over scores [R, K], largest first → the same with −∞ for what they leave out, and [R]
    whether those K decide the matter. whole: they are all tokens. total [R, 1]: log Σ exp of the whole row's scores.
    """
    column = lambda name, dtype=torch.float64: torch.tensor([getattr(r.sampling, name) for r in rows],
                                                            dtype=dtype, device=scores.device)[:, None]
    k, p, rank = column("top_k", torch.int64), column("top_p"), torch.arange(scores.shape[1], device=scores.device)
    out = (scores < floors(scores[:, :1], rows)) | (rank >= k) & (k > 0)
    decided = out[:, -1:] | (k == scores.shape[1]) | whole                   # nothing beyond the K would be left
    kept = scores.masked_fill(out, -torch.inf).double()
    known = decided if total is None else decided | torch.isfinite(total)
    size = kept.logsumexp(-1, keepdim=True)
    likelier = (kept - (size if total is None else torch.where(decided, size, total))).exp().cumsum(-1)
    decided = decided | known & (p < 1) & (likelier[:, -1:] >= p)
    before = likelier.roll(1, -1)                                            # probability of all likelier tokens
    out |= (before >= p) & (p < 1) & (rank > 0)                              # the smallest set that reaches p
    return scores.masked_fill(out, -torch.inf), decided[:, 0]


FEW, MANY = 64, 1024                                                         # candidates looked at before all are


def sample(logits, requests):
    """logits [R, V] float32 and the R requests they belong to → token ids, a list.

    In this order: penalties, logit bias, temperature, min-p, top-k, top-p, Gumbel-max.
    """
    take_back = penalize(logits, requests)
    V, tokens = logits.shape[1], [None] * len(requests)
    rows_of = lambda want: [i for i, r in enumerate(requests) if tokens[i] is None and want(r.sampling)]
    pick = lambda rows: logits if len(rows) == len(requests) else logits[torch.tensor(rows, device=logits.device)]

    def keep(rows, ids):
        for i, token in zip(rows, ids.tolist()):
            tokens[i] = token

    if rows := rows_of(lambda s: s.greedy):
        keep(rows, pick(rows).argmax(-1))
    few = max(1, 2 ** (25 if logits.is_cuda else 17) // V)                   # rows at once that a CPU's cache holds
    top_k, top_p = (lambda s: 0 < s.top_k < V), (lambda s: s.top_p < 1)
    for draw, want, most in (
            (lambda *x: choose(*x, min(FEW, V)), lambda s: top_k(s) or top_p(s) or s.min_p > 0, len(requests)),
            (lambda *x: choose(*x, min(MANY, V)), top_k, len(requests)),
            (unsorted, lambda s: not top_k(s), few),
            (lambda *x: choose(*x, V), lambda s: True, len(requests))):
        rows = rows_of(want)
        for part in (rows[i:i + most] for i in range(0, len(rows), most)):
            ids, decided = draw(pick(part), [requests[i] for i in part])
            keep([i for i, d in zip(part, decided) if d], ids[decided])
    take_back()
    return tokens


TRIES = 16                                                                   # with p = 0.5, one row in 65,000 is sorted


def unsorted(logits, rows):
    """Draw among all tokens, but for min-p and top-p, without sorting → token ids [R], and [R] whether one was found.

    In falling order of score + noise, the first token that is in the set of top-p: whose likelier ones together have
    less than p.
    """
    every = torch.arange(logits.shape[1], device=logits.device)[None]
    scores = logits / temperatures(rows, logits)
    scores = scores.masked_fill(scores < floors(scores.amax(-1, keepdim=True), rows), -torch.inf)
    noisy, p = scores + noise(rows, every), torch.tensor([r.sampling.top_p for r in rows], device=logits.device)
    ids, found = noisy.argmax(-1), p >= 1
    if not found.all():
        share = scores.softmax(-1)
        for token in best(noisy, min(TRIES, logits.shape[1]))[1].unbind(1):
            z = scores.gather(1, token[:, None])
            likelier = (scores > z) | (scores == z) & (every < token[:, None])
            fits = ~found & ((share * likelier).sum(-1) < p)
            ids, found = torch.where(fits, token, ids), found | fits
            if found.all():
                break
    return ids, found


def choose(logits, rows, k):
    """Draw among the k largest of each row → token ids [R], and [R] whether the k were enough to decide."""
    V = logits.shape[1]
    values, tokens = best(logits, k)
    temperature, total = temperatures(rows, logits), None
    if k < V and any(r.sampling.top_p < 1 and not r.sampling.top_k and not r.sampling.min_p for r in rows):
        total = torch.tensor([[0.0 if r.sampling.top_p < 1 and not r.sampling.top_k and not r.sampling.min_p else
                               torch.nan] for r in rows], device=logits.device)
        total = total + (logits / temperature).logsumexp(-1, keepdim=True)   # NaN: not asked for
    scores, decided = filtered(values / temperature, rows, k == V, total)
    at = (scores + noise(rows, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(1, at)[:, 0], decided


def temperatures(rows, like):
    return torch.tensor([r.sampling.temperature for r in rows], device=like.device)[:, None]


def noise(rows, tokens):
    key = lambda values: torch.tensor(values, dtype=torch.int64, device=tokens.device)
    return gumbel(key([_signed(r.seed) for r in rows]), key([r.choice for r in rows]), key([len(r.ids) for r in rows]),
                  tokens)


def _signed(seed):
    """Any whole number as an int64."""
    seed &= 2 ** 64 - 1
    return seed - 2 ** 64 if seed >= 2 ** 63 else seed


def likeliest(logits, k):
    """Of logits [R, V]: log probabilities and tokens of the k likeliest [R, k], and log Σ exp [R, 1]."""
    total = torch.cat([few.logsumexp(-1, keepdim=True) for few in logits.split(4)])  # few: in a CPU's cache
    values, tokens = best(logits, max(k, 1))
    return values - total, tokens, total


def log_probabilities(logits, tokens, counts, likely):
    """A dict token → log probability for each row: as many of the likeliest as `counts` says, and the row's token."""
    values, ids, total = likely
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]) - total
    return [dict(zip(i[:k], v[:k])) | {token: mine} for i, v, k, token, (mine,)
            in zip(ids.tolist(), values.tolist(), counts, tokens, own.tolist())]


# --- 4. Text: from tokens to what may be shown ------------------------------------------------------------------------

class Text:
    """The text of a growing token list. Bytes of an unfinished character wait; a stop string cuts before it begins."""

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.shown, self.stopped = "", 0, False

    def push(self, token):
        """Add a token's bytes → whether a stop string is now in the text (it is cut off)."""
        return self._add(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def close(self):
        """No token follows: bytes that are still no character become U+FFFD."""
        return self.stopped or self._add(self.decoder.decode(b"", final=True))

    def _add(self, piece):
        start = len(self.text)
        self.text += piece
        hits = [i for s in self.stop if (i := self.text.find(s, max(0, start - len(s) + 1))) >= 0]
        if hits:
            self.text, self.stopped = self.text[:min(hits)], True
        return self.stopped

    def news(self, closed):
        """The text not yet shown, without a tail that may still become a stop string."""
        end = len(self.text)
        if not closed:
            for s in self.stop:
                for k in range(min(len(s) - 1, len(self.text)), 0, -1):
                    if self.text.endswith(s[:k]):
                        end = min(end, len(self.text) - k)
                        break
        piece, self.shown = self.text[self.shown:end], max(self.shown, end)
        return piece


# --- 5. Engine: requests, the schedule, the passes, LLM ---------------------------------------------------------------

class Request:
    """One text in the making: choice `choice` of a prompt, up to `limit` new tokens. What a caller reads of it: .text,
    .tokens, .finish_reason (None while it runs; stop, length, abort, error), .error, .logprobs, .prompt_logprobs,
    .prompt_tokens, .cached_tokens.
    """

    def __init__(self, prompt, sampling, seed, choice, limit, out):
        self.prompt, self.sampling, self.seed, self.choice, self.limit, self.out = (
            prompt, sampling, seed, choice, limit, out)
        self.ids, self.capacity = list(prompt), len(prompt) + limit          # all tokens so far, and at most
        self.finish_reason = self.error = None
        self.logprobs = None if sampling.logprobs is None else []
        self.prompt_logprobs = None if sampling.prompt_logprobs is None else [None]
        self.tally = Tally(prompt, limit, sampling.logit_bias or {}) if sampling.penalizes else None
        # Of the schedule: blocks, keys of full ones, how many tokens are computed; whose block it waits for.
        self.table, self.keys, self.computed, self.arrival = [], [], 0, 0
        self.waits_for = self.cached_tokens = None

    @property
    def tokens(self):
        return self.ids[len(self.prompt):]

    @property
    def text(self):
        return self.out.text

    @property
    def prompt_tokens(self):
        return len(self.prompt)

    @property
    def position(self):
        """Where the next token will stand."""
        return len(self.ids)

    @property
    def left(self):
        """Tokens that are yet to be computed: one when it is decoding."""
        return len(self.ids) - self.computed

    def accept(self, token, eos_ids):
        """Take the next token; sets finish_reason where it ends the text. The earliest event wins."""
        self.ids.append(token)
        if self.tally:
            self.tally.add(token)
        if token in eos_ids and not self.sampling.ignore_eos:
            self.finish_reason = "stop"
        elif self.out.push(token):
            self.finish_reason = "stop"
        elif len(self.ids) == self.capacity:
            self.finish_reason = "length"
        if self.finish_reason and self.out.close():
            self.finish_reason = "stop"

    def news(self):
        """The text that became certain since the last call."""
        return self.out.news(closed=self.finish_reason is not None)


class Scheduler:
    """Which tokens of which requests the next pass computes; first come, first served.

    Lists are in order of arrival. A running request holds blocks for all its tokens; one that finds none for its next
    token takes them from the youngest, which waits again and is computed anew later. The oldest is never set back, so
    each request ends.
    """

    def __init__(self, blocks, cache, max_num_seqs, max_num_batched_tokens):
        self.blocks, self.cache, self.most, self.budget = blocks, cache, max_num_seqs, max_num_batched_tokens
        self.waiting, self.running = [], []
        self.filling = {}                                                    # key → who computes that block now
        self.arrivals = self.preemptions = 0

    def add(self, r):
        self.arrivals += 1
        r.arrival = self.arrivals
        self.waiting.append(r)

    def plan(self):
        """→ [(request, start, stop)]: tokens start … stop of each are computed in this pass."""
        segments, budget = [], self.budget
        for r in list(self.running):                                         # the next token of those that decode,
            if r.table and r.left == 1 and budget and self.grow(r):
                segments.append((r, r.computed, r.computed + 1))
                budget -= 1
        for r in self.running:                                               # more of the prompts begun,
            if r.left > 1 and budget:
                segments.append((r, r.computed, r.computed + min(r.left, budget)))
                budget -= min(r.left, budget)
        for r in list(self.waiting):                                         # and prompts that waited
            if not budget or len(self.running) == self.most:
                break
            if r.waits_for in self.filling:
                continue
            found = self.find(r)
            if r.waits_for in self.filling:                                  # a common start is computed once: others
                continue                                                     # that have it let those behind them pass
            if not self.admit(r, found):
                break
            segments.append((r, r.computed, r.computed + min(r.left, budget)))
            budget -= min(r.left, budget)
        return segments

    def grow(self, r):
        """A block for the next token where it needs one → whether it is still running."""
        while r.computed == len(r.table) * self.blocks.size:
            if len(self.blocks):
                r.table += self.blocks.take(1)
                break
            self.preemptions += 1
            youngest = self.running[-1]
            self.leave(youngest)
            bisect.insort(self.waiting, youngest, key=lambda r: r.arrival)
            if youngest is r:
                return False
        return True

    def key(self, r, i):
        """The key of a request's full block i, and what it is made of: (key, parent, tokens)."""
        size = self.blocks.size
        tokens, parent = r.ids[i * size:(i + 1) * size], r.keys[i - 1] if i else b""
        if i == len(r.keys):
            r.keys.append(self.blocks.key(parent, tokens))
        return r.keys[i], parent, tokens

    def find(self, r):
        """→ the blocks that hold the request's first tokens already. The last token is always left to compute."""
        found, r.waits_for = [], None
        if not self.blocks.caching or r.prompt_logprobs is not None and len(r.prompt_logprobs) < len(r.prompt):
            return found
        for i in range((len(r.ids) - 1) // self.blocks.size):
            key, parent, tokens = self.key(r, i)
            block = self.blocks.find(key, parent, tokens)
            if block is None:
                r.waits_for = key if key in self.filling else None
                break
            found.append(block)
        return found

    def admit(self, r, found):
        """Give a waiting request its blocks and its memory → False where they are not there yet."""
        size, blocks = self.blocks.size, self.blocks
        need = -(-len(r.ids) // size) - len(found)
        idle = sum(block.refs == 0 for block in found)
        if need + idle + len(self.running) > len(blocks):                    # each that runs may soon want one more
            return False
        for block in found:
            blocks.hold(block)
        r.table, r.computed = found + blocks.take(need), len(found) * size
        blocks.hits += len(found)
        if r.cached_tokens is None:
            r.cached_tokens = r.computed
        self.waiting.remove(r)
        bisect.insort(self.running, r, key=lambda r: r.arrival)
        self.cache.open(r)
        if blocks.caching:
            for i in range(len(found), len(r.ids) // size):
                self.filling.setdefault(self.key(r, i)[0], r)
        return True

    def advance(self, segments):
        """The pass is done: its tokens are in the cache, and blocks that it filled can be found."""
        size = self.blocks.size
        for r, start, stop in segments:
            r.computed = stop
            for i in range(start // size, stop // size if self.blocks.caching else 0):
                key, parent, tokens = self.key(r, i)
                self.blocks.register(r.table[i], key, parent, tokens, self.cache.home(r))
                if self.filling.get(key) is r:
                    del self.filling[key]

    def leave(self, r):
        """A request stops running or waiting; its blocks and its memory are free at once."""
        if r in self.waiting:
            self.waiting.remove(r)
        if r in self.running:
            self.running.remove(r)
            self.cache.close(r)
            self.blocks.release(r.table)
            for key in r.keys:
                if self.filling.get(key) is r:
                    del self.filling[key]
            r.computed = 0


def pieces(segments, most):
    """Cut (request, start, stop)s, in their order, into lists of up to `most` tokens."""
    piece, room = [], most
    for r, start, stop in segments:
        while start < stop:
            count = min(stop - start, room)
            piece.append((r, start, start + count))
            start, room = start + count, room - count
            if not room:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


class Step(torch.nn.Module):
    """One decode step as a module of its own, so that the compiler may take the weights for constants and pack them."""

    def __init__(self, model, states):
        super().__init__()
        self.model, self.states = model, states

    def forward(self, tokens, positions, *places):
        """tokens, positions [B, T]; places: what the cache's `states` takes → logits [B · T, V]."""
        hidden = self.model.hidden(tokens, positions, self.states(*places))
        return self.model.head(hidden).flatten(0, 1)


class LLM:
    """A model folder, ready to generate. `LLM(DIR).generate("…")`; `stream` for text as it is made.

    quantize            "int8": linear layers in a quarter of the memory; None: as they are
    kv_cache_dtype      "int8": keys and values in a quarter of the memory; None: as the weights
    block_size          tokens a block of the cache
    num_blocks          blocks in all; None: as many as a part of the memory holds, or all sequences could ever use
    max_num_seqs        sequences that run at once
    max_num_batched_tokens   tokens that one pass computes; a longer prompt is computed in chunks
    prefix_caching      prompts take over what earlier ones with the same beginning have computed
    device, dtype       as in `train.load`
    compile             decode steps of fixed shape: on GPUs CUDA graphs, the default there; on a CPU compiled, for
                        max_num_seqs in step and not with int8 or prefix_caching: for benchmarks

    Below `generate` stand `requests` (checks), `add`, `step` and `abort`: what a server runs on.
    """

    def __init__(self, folder, device=None, dtype=None, quantize=None, kv_cache_dtype=None, block_size=16,
                 num_blocks=None, max_num_seqs=64, max_num_batched_tokens=2048, prefix_caching=True, compile=None):
        for name, value in (("block_size", block_size), ("num_blocks", num_blocks), ("max_num_seqs", max_num_seqs),
                            ("max_num_batched_tokens", max_num_batched_tokens)):
            if (value is not None or name != "num_blocks") and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}: it must be a whole number from 1")
        if quantize not in (None, *QUANTIZED):
            raise ValueError(f"quantize is {quantize!r}: it must be {', '.join(map(repr, QUANTIZED))} or None")
        if kv_cache_dtype not in (None, "int8"):
            raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}: it must be 'int8' or None")
        self.folder = Path(folder)
        self.model, self.tokenizer = load(folder, device, dtype)
        c, weight = self.model.config, self.model.embed.weight
        self.quantize = quantize
        self.weights = sum(w.numel() for w in self.model.parameters()) - (0 if c.tied else weight.numel())
        self.weight_bytes = self.weights * (1 if quantize else weight.element_size())
        layers_in(self.model, QUANTIZED[quantize]) if quantize else quicken(self.model)
        self.context, self.eos_ids, int8 = c.context, set(self.tokenizer.eos_ids), kv_cache_dtype == "int8"
        there = set(self.tokenizer.library.get_vocab(with_added_tokens=True).values())
        self.no_text = torch.tensor([i for i in range(c.vocab) if i not in there], device=weight.device)
        self.token_bytes = 2 * len(self.model.blocks) * c.kv_heads * (
            c.head_dim + 4 if int8 else c.head_dim * weight.element_size())
        if num_blocks is None:
            num_blocks = max(1, min(memory_of(weight.device) // (self.token_bytes * block_size),
                                    max_num_seqs * -(-self.context // block_size)))
        self.blocks = Blocks(num_blocks, block_size, prefix_caching)
        gpu = weight.device.type == "cuda"
        if compile is None:
            compile = gpu
        self.cache = (Pages(self.model, self.blocks, int8) if gpu else
                      Rows(self.model, self.blocks, max_num_seqs) if compile and not int8 and not prefix_caching else
                      Slabs(self.model, self.blocks, int8))
        self.graphs = {} if compile and hasattr(self.cache, "graph") else None  # shape → decode step
        self.pool = torch.cuda.graph_pool_handle() if gpu else None
        self.scheduler = Scheduler(self.blocks, self.cache, max_num_seqs, max_num_batched_tokens)

    def requests(self, prompt, sampling, index=0):
        """A prompt (text or token ids) and its settings, checked → n requests. ValueError names what does not fit."""
        try:
            V = self.model.config.vocab
            sampling.check(V)
            if not isinstance(prompt, str) and not all(isinstance(i, (int, np.integer)) for i in prompt):
                raise ValueError("the prompt must be text or token ids, whole numbers")
            ids = [int(i) for i in prompt] if not isinstance(prompt, str) else (
                self.tokenizer.start_ids + self.tokenizer.encode(prompt))
            if not ids:
                raise ValueError("the prompt is empty: give at least one token")
            if bad := [i for i in ids if not 0 <= i < V]:
                raise ValueError(f"token {bad[0]} of the prompt is outside 0 … {V - 1}")
            new, pool = sampling.max_tokens or 1, self.blocks.total * self.blocks.size
            for room, where in ((self.context, f"the context of {self.context}"),
                                (pool, f"the cache of {self.blocks.total} blocks of {self.blocks.size}")):
                if len(ids) + new > room:
                    raise ValueError(f"the prompt ({len(ids)} tokens) and max_tokens ({new}) exceed {where}")
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        limit = sampling.max_tokens or min(self.context - len(ids), pool - len(ids), 128)
        return [Request(ids, sampling, seed, i, limit, Text(self.tokenizer, sampling.stop)) for i in range(sampling.n)]

    def add(self, prompt, **sampling):
        """Take in a prompt → its n requests, which the next steps work on. ValueError as in `generate`."""
        requests = self.requests(prompt, Sampling(**sampling))
        for r in requests:
            self.scheduler.add(r)
        return requests

    def abort(self, request):
        """End a request now; its blocks are free at once."""
        if request.finish_reason is None:
            self.scheduler.leave(request)
            request.finish_reason = "abort"

    @torch.no_grad()
    def step(self):
        """One pass over the weights → the requests that got a token or ended with it."""
        segments = self.scheduler.plan()
        if not segments:
            return []
        ready = [r for r, _, stop in segments if stop == len(r.ids)]         # only a computed last token has a next one
        logits = self.forward(segments)
        self.scheduler.advance(segments)
        if ready:
            self.draw(logits, ready)
        for r in ready:
            if r.finish_reason:
                self.scheduler.leave(r)
        return ready

    def forward(self, segments):
        """Compute (request, start, stop)s → float32 logits [R, V] after those that end their request's tokens."""
        decode = all(stop == len(r.ids) and r.left == 1 for r, _, stop in segments)
        if self.graphs is not None and decode and (shape := self.cache.shape(segments)):
            return self.compiled(segments, shape)
        hidden = self.hidden(segments)
        begin = 0
        for r, start, stop in segments:
            if r.prompt_logprobs is not None and start < len(r.prompt):
                self.score_prompt(r, hidden[begin:begin + stop - start], start)
            begin += stop - start
        ends = np.cumsum([stop - start for _, start, stop in segments]) - 1
        rows = [end for end, (r, _, stop) in zip(ends, segments) if stop == len(r.ids)]
        return self.model.head(hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]).float()

    PASS = 512                                                               # tokens whose numbers a CPU's cache holds

    def hidden(self, segments):
        """Compute (request, start, stop)s, all in one row → what the head reads [N, C]. On a CPU in pieces."""
        device = self.model.embed.weight.device
        if device.type == "cpu" and sum(stop - start for _, start, stop in segments) > self.PASS:
            return torch.cat([self.hidden(piece) for piece in pieces(segments, self.PASS)])
        tokens = torch.tensor([[token for r, start, stop in segments for token in r.ids[start:stop]]], device=device)
        positions = torch.tensor([i for _, start, stop in segments for i in range(start, stop)], device=device)
        return self.model.hidden(tokens, positions, self.cache.states(segments))[0]

    def read(self, ids):
        """A text's tokens, computed in chunks through a cache of its own → what the head reads after each [T, C]."""
        r, chunk = Request(ids, Sampling(), 0, 0, 0, None), self.scheduler.budget
        r.table = self.blocks.take(-(-len(ids) // self.blocks.size))
        self.cache.open(r)
        try:
            return torch.cat([self.hidden([(r, i, min(i + chunk, len(ids)))]) for i in range(0, len(ids), chunk)])
        finally:
            self.cache.close(r)
            self.blocks.release(r.table)

    def compiled(self, segments, shape):
        """A decode step as a graph of fixed shape, made when that shape first comes up."""
        order, tokens, positions, places = self.cache.inputs(segments, shape)
        try:
            if shape not in self.graphs:
                self.graphs[shape] = self.graph(tokens, positions, places)
            return self.graphs[shape](tokens, positions, *places)[order].float()
        except Exception as error:                                           # a broken compiler, a shape without kernel
            print(f"decode steps of fixed shape do not work here ({type(error).__name__}: {error}); going on without",
                  file=sys.stderr)
            self.graphs = None
            return self.forward(segments)

    def graph(self, tokens, positions, places):
        """Make a decode step of this shape: on a GPU a CUDA graph; on a CPU compiled, and run at once, as the settings
        count while it is traced.
        """
        step = Step(self.model, self.cache.graph)
        if tokens.is_cuda:
            step(tokens, positions, *places)                                 # kernels are compiled, libraries set up
            # The rotary table that was made is kept for this very tensor: a graph must make its own each time.
            fresh = lambda tokens, positions, *places: step(tokens, positions.clone(), *places)
            return train.Graph(fresh, tokens, positions, *places, pool=self.pool)
        import torch._inductor.config as inductor
        step = torch.compile(step, dynamic=False, fullgraph=True)
        several = tokens.numel() > 1
        with inductor.patch(**dict(freezing=True, max_autotune=True,         # weights laid out for so many rows
                                   max_autotune_gemm_backends="CPP") if several else {}):
            step(tokens, positions, *places)
        return step

    def score_prompt(self, r, hidden, start):
        """Log probabilities of a prompt's tokens, those after start, start + 1, …, as far as they are not known yet."""
        first, last = len(r.prompt_logprobs), min(start + len(hidden), len(r.prompt) - 1)
        for i in range(max(first - 1, start), last, 64):
            targets = r.prompt[i + 1:min(i + 64, last) + 1]
            logits = self.model.head(hidden[i - start:i - start + len(targets)]).float()
            k = r.sampling.prompt_logprobs
            r.prompt_logprobs += log_probabilities(logits, targets, [k] * len(targets), likeliest(logits, k))

    def draw(self, logits, requests):
        """Sample the next token of each request from its row of logits [R, V]."""
        finite = torch.isfinite(logits.sum(-1)).tolist()
        if not all(finite):
            for r, fine in zip(requests, finite):
                if not fine:
                    r.finish_reason = "error"
                    r.error = "the model's logits are not finite: its weights are broken, or dtype float32 is needed"
            requests, logits = [r for r, fine in zip(requests, finite) if fine], logits[torch.tensor(finite)]
            if not requests:
                return
        told = [i for i, r in enumerate(requests) if r.logprobs is not None]
        rows_told = lambda: logits if len(told) == len(requests) else logits[torch.tensor(told, device=logits.device)]
        if told:                                                             # of the raw logits
            counts = [requests[i].sampling.logprobs for i in told]
            likely = likeliest(rows_told(), max(counts))
        if len(self.no_text):
            logits.index_fill_(1, self.no_text, -torch.inf)
        tokens = sample(logits, requests)
        for r, token in zip(requests, tokens):
            r.accept(token, self.eos_ids)
        if told:
            for i, known in zip(told, log_probabilities(rows_told(), [tokens[i] for i in told], counts, likely)):
                requests[i].logprobs.append(known)

    def run(self, requests):
        """Generate for checked requests, yielding after each step: what is new is in them. Ends them if it is left."""
        for r in requests:
            self.scheduler.add(r)
        try:
            while any(r.finish_reason is None for r in requests):
                self.step()
                yield
        finally:
            for r in requests:
                self.abort(r)

    def stream(self, prompt, **sampling):
        """Yield pieces of text as they are certain; joined they are what `generate` returns."""
        requests = self.requests(prompt, Sampling(**sampling))
        if len(requests) > 1:
            raise ValueError(f"n is {len(requests)}: a stream is of one text")
        for _ in self.run(requests):
            if piece := requests[0].news():
                yield piece

    def generate(self, prompts, **sampling):
        """prompts: a str, a list of token ids, or a list of those → a list of finished requests, one a prompt
        (a list of n inside where n > 1); see `Request`.

        Settings: see `Sampling`; each one value or a list of one a prompt (a list of strings is one `stop`). All are
        checked before any runs: ValueError names the prompt and the argument. Where a model's logits are not finite its
        request ends with finish_reason "error" and the reason in .error.
        """
        if isinstance(prompts, str) or len(prompts) and all(isinstance(i, (int, np.integer)) for i in prompts):
            prompts = [prompts]
        every, errors = [], {}
        for i, prompt in enumerate(prompts):
            own = {}
            for name, value in sampling.items():
                several = (isinstance(value, (list, tuple))
                           and (name != "stop" or any(not isinstance(v, str) for v in value)))
                if several and len(value) != len(prompts):
                    raise ValueError(f"{name} has {len(value)} values for {len(prompts)} prompts")
                own[name] = value[i] if several else value
            try:
                every.append(self.requests(prompt, Sampling(**own), i))
            except ValueError as error:
                errors[i] = error
        if errors:
            first, *others = errors
            raise ValueError(f"{errors[first]}" + (f" (refused too: prompt {', '.join(map(str, others))})"
                                                   if others else ""))
        for _ in self.run([r for requests in every for r in requests]):
            pass
        return [requests if len(requests) > 1 else requests[0] for requests in every]

    def stats(self):
        """Counts since the start, and what runs and is free now → dict. Known blocks that no request holds are free."""
        s = self.scheduler
        return dict(draft_tokens=0, accepted_tokens=0, preemptions=s.preemptions, prefix_hits=self.blocks.hits,
                    running=len(s.running), waiting=len(s.waiting),
                    free_blocks=len(self.blocks), total_blocks=self.blocks.total)


def bound(llm, machine, batch, context):
    """Decode tokens/s that memory allows: each step reads all weights that multiply, and each row's keys and values."""
    return batch * machine.bandwidth / (llm.weight_bytes + batch * context * llm.token_bytes)


# --- 6. Chat templates and scores -------------------------------------------------------------------------------------

def chat_template(folder):
    """A folder's chat template (chat_template.jinja or tokenizer_config.json) → (text, its variables), or None."""
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    about = train.read_json(path) if path.exists() else {}
    template = about.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    name = lambda t: t["content"] if isinstance(t, dict) else t
    return template and (template, {k: name(about[k]) for k in ("bos_token", "eos_token") if about.get(k)})


BREAK = "\ufdd0"                                                             # a noncharacter, put into forged markers


@functools.lru_cache(4)
def template_of(source):
    """A chat template's text → the template, in a sandbox."""
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=["jinja2.ext.loopcontrols"])
    environment.globals.update(raise_exception=refuse, strftime_now=time.strftime)
    return environment.from_string(source)


def chat_ids(tokenizer, template, messages):
    """messages [{"role", "content"}] through a template of `chat_template` → token ids, ready for the reply.

    Only the template's own text gives control tokens: one that a message spells out is broken before rendering and
    mended after the cut, so it reaches the model as plain text; the same where it only begins or ends one. UserError
    where the template does not render.
    """
    source, variables = template
    markers = sorted(tokenizer.special, key=len, reverse=True)

    def disarm(text):
        text = train.mend(text).replace(BREAK, "\ufffd")
        for marker in markers:
            text = text.replace(marker, marker[0] + BREAK + marker[1:])
        body = text.strip()                                                  # templates trim: breaks go inside of that
        if body and any(body.startswith(m[k:]) or body.endswith(m[:k]) for m in markers for k in range(1, len(m))):
            text = text.replace(body, BREAK + body + BREAK)
        return text
    messages = [dict(m, content=disarm(m["content"])) for m in messages]
    try:
        text = template_of(source).render(messages=messages, add_generation_prompt=True, **variables)
    except Exception as error:                                               # a template may raise anything
        raise UserError(f"the chat template does not render: {type(error).__name__}: {error}") from None
    parts = re.split("(" + "|".join(map(re.escape, markers)) + ")", text) if markers else [text]
    return [i for part in parts if part for i in (
        [tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part.replace(BREAK, "")))]


@torch.no_grad()
def score(llm, text, overlap=0.5):
    """How well a model predicts a text → dict(tokens, bytes, nats_per_token, bits_per_byte).

    A text longer than the context is read in windows that overlap by half: each token is scored once, with at least
    half a context before it. The folder's own start token is context, not counted; without one the first token is not.
    """
    start = llm.tokenizer.start_ids
    ids = start + llm.tokenizer.encode(text)
    first = max(1, len(start))
    if len(ids) <= first:
        raise UserError("the text to score has fewer than two tokens")
    lengths = [len(llm.tokenizer.token_bytes(i)) for i in ids]
    context = min(llm.context, llm.blocks.total * llm.blocks.size)
    stride = max(1, int(context * (1 - overlap)))
    device, done, nats = llm.model.embed.weight.device, first, 0.0
    while done < len(ids):
        begin = max(0, min(done - 1, done - context + stride) if done > first else 0)
        window = ids[begin:begin + context + 1]
        fresh = begin + len(window) - done                                   # tokens not scored before
        y = torch.tensor(window[1:], device=device)
        for x, targets in zip(llm.read(window[:-1])[-fresh:].split(64), y[-fresh:].split(64)):
            nats += F.cross_entropy(llm.model.head(x).float(), targets, reduction="sum").item()
        done += fresh
    count, size = len(ids) - first, sum(lengths[first:])
    return dict(tokens=count, bytes=size, nats_per_token=nats / count, bits_per_byte=nats / math.log(2) / max(size, 1))


# --- 7. Benchmarks ----------------------------------------------------------------------------------------------------

def random_request(llm, rng, prompt_tokens, new_tokens):
    """A greedy request of random tokens that runs to its length."""
    prompt = rng.integers(0, llm.tokenizer.vocab_size, prompt_tokens).tolist()
    return Request(prompt, Sampling(temperature=0.0, ignore_eos=True), 0, 0, new_tokens, Text(llm.tokenizer))


def bench(llm, machine, batch, prompt_tokens, new_tokens):
    """Time prefill and decode of random tokens through the engine, the median of three → the --bench record."""
    rng, prefill, decode = np.random.default_rng(0), [], []
    for _ in range(4):                                                       # the first compiles and warms up
        requests = [random_request(llm, rng, prompt_tokens, new_tokens + 1) for _ in range(batch)]
        start, first = time.perf_counter(), None
        for _ in llm.run(requests):
            if first is None and all(len(r.ids) > prompt_tokens for r in requests):
                first = time.perf_counter()
        prefill.append(first - start)
        decode.append(time.perf_counter() - first)
    limit = bound(llm, machine, batch, prompt_tokens + new_tokens / 2)
    median = lambda times: sorted(times[1:])[1]
    speed = batch * new_tokens / median(decode)
    return dict(batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens, quantize=llm.quantize,
                prefill_tokens_per_second=batch * prompt_tokens / median(prefill), decode_tokens_per_second=speed,
                bound_tokens_per_second=limit, bound_share=speed / limit)


def product_rate(llm, machine):
    """FLOP/s of large matrix products: as the machine was measured, or in a format of its own, as its head's are."""
    if not llm.quantize:
        return machine.flops[llm.model.embed.weight.dtype]
    head, times = llm.model.head, []
    x = torch.ones(512, head.in_features, dtype=llm.model.embed.weight.dtype, device=llm.model.embed.weight.device)
    for _ in range(5):
        t = time.perf_counter()
        head(x)[-1, -1].item()
        times.append(time.perf_counter() - t)
    return 2 * len(x) * head.in_features * head.out_features / min(times)


def bench_serving(llm, machine, count, prompt_tokens=(100, 500), new_tokens=(50, 300)):
    """Time `count` requests of mixed lengths, all sent at once → the --bench-serving record. Lengths are drawn with
    seed 0 and shrink in proportion where the context is short.

    bound: the larger of two times, that of all products at the machine's matmul peak (`product_rate`), and that of
    reading the weights once for each token of the longest text and the cache once for each new token.
    """
    rng, shrink = np.random.default_rng(0), min(1.0, llm.context / (prompt_tokens[1] + new_tokens[1]))
    draw = lambda low, high: int(rng.integers(max(1, int(low * shrink)), max(1, int(high * shrink)) + 1))
    for _ in llm.run([random_request(llm, rng, 8, 2)]):                      # warms up
        pass
    requests = [random_request(llm, rng, draw(*prompt_tokens), draw(*new_tokens)) for _ in range(count)]
    times, use, preemptions = {r: [] for r in requests}, 0.0, llm.scheduler.preemptions
    start = time.perf_counter()
    for _ in llm.run(requests):
        now = time.perf_counter()
        use = max(use, 1 - len(llm.blocks) / llm.blocks.total)
        for r, seen in times.items():
            seen += [now] * (len(r.ids) - len(r.prompt) - len(seen))
    seconds = now - start
    first, between = [t[0] - start for t in times.values()], [b - a for t in times.values() for a, b in zip(t, t[1:])]
    read, made = sum(len(r.prompt) for r in requests), sum(len(t) for t in times.values())
    head = llm.model.head.in_features * llm.model.head.out_features
    products = 2 * ((llm.weights - head) * (read + made) + head * made) / product_rate(llm, machine)
    reads = (max(r.limit for r in requests) * llm.weight_bytes
             + sum(r.limit * (len(r.prompt) + r.limit / 2) for r in requests) * llm.token_bytes) / machine.bandwidth
    percent = lambda values, q: float(np.percentile(values, q)) if values else 0.0
    return dict(requests=count, prompt_tokens=read, new_tokens=made, seconds=seconds, tokens_per_second=made / seconds,
                first_token_seconds_median=percent(first, 50), first_token_seconds_p99=percent(first, 99),
                between_tokens_seconds_median=percent(between, 50), between_tokens_seconds_p99=percent(between, 99),
                cache_use=use, preemptions=llm.scheduler.preemptions - preemptions,
                bound_tokens_per_second=made / max(products, reads),
                bound_share=max(products, reads) / seconds)


# --- 8. The server: OpenAI's interface on the engine ------------------------------------------------------------------
#
# Three places of work, so that none holds up another. The event loop reads and writes sockets and computes nothing. One
# worker thread takes requests apart: JSON, chat template, tokens, checks. The engine's thread owns the LLM: it takes
# orders from a queue, steps, and hands to the loop what is new.

BODY, HEAD_SECONDS, BODY_SECONDS = 4 * 2 ** 20, 30, 30                       # bytes; seconds for a head, a body
LIKELY, STOPS, STOP_LENGTH = 20, 16, 256                                     # logprobs, stop strings, their length
EVENTS = 250                                                                 # a second over all streams, about
NUMBER = (int, float)
SETTINGS = {"temperature": (NUMBER, 0, 2), "top_p": (NUMBER, 0, 1), "min_p": (NUMBER, 0, 1),
            "top_k": (int, -1, 2 ** 63), "repetition_penalty": (NUMBER, 0.01, 100), "presence_penalty": (NUMBER, -2, 2),
            "frequency_penalty": (NUMBER, -2, 2), "seed": (int, -2 ** 63, 2 ** 64), "n": (int, 1, 2 ** 63)}
NOT_HERE = ("tools", "tool_choice", "functions", "function_call", "audio", "modalities", "prediction",
            "web_search_options", "suffix")                                  # fields that ask for what is not done here
NOTHING = (None, "", "none", [], ["text"])                                   # values of theirs that ask for nothing
KINDS = {bool: "true or false", int: "a whole number", NUMBER: "a number", str: "a string", dict: "an object",
         list: "a list", (str, list): "a string or a list"}


class Refused(Exception):
    """An answer that is an error, in OpenAI's form. param: the field that is to blame."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        message = train.mend(message if len(message) <= 500 else message[:500] + "…")
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        self.status, self.headers = status, {"content-type": "application/json"} | (headers or {})
        self.error = {"error": dict(message=message, type=kind, param=param, code=code)}

    async def __call__(self, scope, receive, send):
        await reply(send, self.status, self.error, self.headers)


class Gone(Exception):
    """The client has left: nobody reads an answer."""


async def reply(send, status, body, headers=None):
    """A whole answer: bytes, or an object as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(data))} | (headers or {})
    await send({"type": "http.response.start", "status": status,
                "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": data})


async def read_body(scope, receive, keep=True):
    """A request's body; None unless `keep`. What is not wanted is read all the same, within reason: only then does the
    answer get through.
    """
    declared, parts, size = int(dict(scope["headers"]).get(b"content-length", 0)), [], 0

    async def read():
        nonlocal size
        more = declared <= 16 * BODY
        while more and size <= 16 * BODY:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if keep and size <= BODY:
                parts.append(message.get("body", b""))
    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS} s", None, None,
                      {"connection": "close"}) from None
    if keep and max(size, declared) > BODY:
        raise Refused(413, f"the body is longer than {BODY} bytes", headers={"connection": "close"})
    return b"".join(parts) if keep else None


def parse_body(data, kind=b"application/json"):
    """Bytes → dict. Strict: a name once, numbers finite and within 64 bits, an object. Refused says what is not so."""
    if kind.split(b";")[0].strip().lower() not in (b"application/json", b""):
        raise Refused(415, "the content-type must be application/json")

    def once_each(pairs):
        body = dict(pairs)
        if len(body) < len(pairs):
            names = [name for name, _ in pairs]
            twice = train.mend(next(name for name in names if names.count(name) > 1))[:100]
            raise Refused(400, f"the field {twice!r} is there twice", param=twice)
        return body

    def finite(text):
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:40]} is not a finite number")
        return value

    def whole(text):
        if len(text) > 20:
            raise ValueError(f"{text[:20]}… is too large a number")
        return int(text)
    try:
        body = json.loads(data, object_pairs_hook=once_each, parse_float=finite, parse_constant=finite, parse_int=whole)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise Refused(400, f"the body is not JSON as it should be: {reason}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


def short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


class Fields:
    """A JSON object, taken apart by name. What nobody took stays in `left`."""

    def __init__(self, body, where=""):
        self.left, self.where = dict(body), where

    def take(self, name, kind, default=None, low=None, high=None):
        """The field's value, or the default where it is absent or null. Refused names it where it does not fit."""
        value, name = self.left.pop(name, None), self.where + name
        if value is None:
            return default
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or low is not None and not low <= value <= high:
            span = "" if low is None else f" from {low}" + (f" to {high}" if high < 2 ** 62 else "")
            raise Refused(400, f"{name} is {short(value)}: it must be {KINDS[kind]}{span}", param=name)
        return value


def constraint(fields):
    """What `response_format` and `regex` ask for, as settings. Refused where `Sampling` has no such setting."""
    asked, form = {}, Fields(fields.take("response_format", dict, {}), "response_format.")
    kind = form.take("type", str, "text")
    if kind == "json_object":
        asked["json_schema"] = {"type": "object"}
    elif kind == "json_schema":
        inner = Fields(form.take("json_schema", dict, {}), "response_format.json_schema.")
        asked["json_schema"] = inner.take("schema", dict, {"type": "object"})
    elif kind != "text":
        raise Refused(400, f"response_format.type is {short(kind)}: it must be text, json_object or json_schema",
                      param="response_format.type")
    if (regex := fields.take("regex", str)) is not None:
        asked["regex"] = regex
    for name in asked:
        if name not in Sampling.__dataclass_fields__:
            field = {"json_schema": "response_format"}.get(name, name)
            raise Refused(400, f"{field} is not supported: this engine does not constrain what it writes", param=field)
    return asked


class Choice:
    """One text of a job, and how much of it is told: tokens, and what their bytes spell so far."""

    def __init__(self, job, index, request):
        self.job, self.index, self.request = job, index, request
        self.told, self.counted, self.due, self.began = 0, 0, 0.0, None
        self.decoder, self.offset = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0

    @property
    def made(self):
        """How many tokens there are."""
        return len(self.request.ids) - len(self.request.prompt)

    def spell(self, token, last=False):
        """The text that this token's bytes complete, and where it begins. Joined they are the text."""
        text, begin = self.decoder.decode(self.job.llm.tokenizer.token_bytes(token), final=last), self.offset
        self.offset += len(text)
        return text, begin


class Job:
    """What one HTTP request waits for: its texts, which the engine's thread posts and the event loop tells.

    The worker thread makes it of the request's body; how it is read and told is its dialect's, a subclass.
    """

    def __init__(self, service, body):
        fields, self.service, self.llm = Fields(body), service, service.llm
        model = fields.take("model", str, service.name)
        if model not in service.names:
            raise Refused(404, f"the model {short(model)} does not exist; there is {service.name!r}",
                          param="model", code="model_not_found")
        for name in NOT_HERE:
            if fields.left.pop(name, None) not in NOTHING:
                raise Refused(400, f"{name} is not supported", param=name)
        self.stream = fields.take("stream", bool, False)
        options = fields.take("stream_options", dict)
        if options is not None and not self.stream:
            raise Refused(400, "stream_options is only for stream: true", param="stream_options")
        options = Fields(options or {}, "stream_options.")
        self.include_usage = options.take("include_usage", bool, False)
        settings = self.settings(fields)
        prompts = self.read(fields, settings)
        if (count := settings["n"] * len(prompts)) > service.most:
            raise Refused(400, f"{count} texts are asked for: at most {service.most} are made at once", param="n")
        requests = [r for i, prompt in enumerate(prompts)
                    for r in self.requests(prompt, settings, f"prompt {i}: " if len(prompts) > 1 else "")]
        self.choices = [Choice(self, index, r) for index, r in enumerate(requests)]
        self.ignored = [*fields.left, *(options.where + name for name in options.left)]
        self.head = dict(id=self.PREFIX + secrets.token_hex(12), object=self.OBJECT, created=int(time.time()),
                         model=service.name)
        self.news, self.late, self.arrived = deque(), False, time.perf_counter()

    def settings(self, fields):
        """The fields that both dialects share → settings of `Sampling`."""
        settings = dict(n=1) | {name: value for name, (kind, low, high) in SETTINGS.items()
                                if (value := fields.take(name, kind, None, low, high)) is not None}
        if 0 < settings.get("temperature", 1) < 0.01:
            settings["temperature"] = 0.01                                   # logits divided by less leave float32
        if "top_k" in settings:
            settings["top_k"] = min(max(settings["top_k"], 0), self.llm.model.config.vocab)
        stop = fields.take("stop", (str, list), [])
        stop = [stop] if isinstance(stop, str) else stop
        if len(stop) > STOPS or not all(isinstance(s, str) and 0 < len(s) <= STOP_LENGTH for s in stop):
            raise Refused(400, f"stop is {short(stop)}: it must be up to {STOPS} strings, none empty, none longer than "
                          f"{STOP_LENGTH} characters", param="stop")
        bias = fields.take("logit_bias", dict, {})
        if not all(isinstance(v, NUMBER) and not isinstance(v, bool) and -100 <= v <= 100 for v in bias.values()):
            raise Refused(400, "logit_bias must be numbers from -100 to 100 by token ids", param="logit_bias")
        ignore_eos = fields.take("ignore_eos", bool, False)
        return settings | dict(stop=stop, logit_bias=bias, ignore_eos=ignore_eos) | constraint(fields)

    def requests(self, prompt, settings, where):
        """A prompt's requests, as the engine checks them. What it refuses is a 400 that names the field."""
        try:
            return self.llm.requests(prompt, Sampling(**settings))
        except ValueError as error:
            message = str(error).removeprefix("prompt 0: ")
            name = message.split(" ", 1)[0]
            raise Refused(400, where + message, param=name if name in settings else self.PROMPT,
                          code="context_length_exceeded" if "exceed" in message else None) from None

    def post(self, choice, now):
        """In the engine's thread: a text has grown or ended → whether the loop is to be woken for it."""
        end = choice.request.finish_reason
        choice.due = math.inf                                                # a whole reply is told at its end; of many
        if self.stream:                                                      # streams each takes more tokens an event
            choice.due = now + min(self.service.streams, self.llm.scheduler.most) / EVENTS
        if end or self.stream:
            self.news.append((choice, choice.request.news() if self.stream else "", choice.made, end))
        return bool(end or self.stream)

    async def answer(self, send):
        """In the event loop: tell the texts, as they grow or when all have ended."""
        left = len(self.choices)
        if self.stream:
            await send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"), *self.headers()]})
            await self.write(send, [self.opening(c) for c in self.choices] if self.OPENS else [])
        while left:
            await self.woken.wait()
            self.woken.clear()
            fresh = {}                                                       # choice → its text, tokens, end
            while self.news:
                choice, text, made, end = self.news.popleft()
                fresh[choice] = fresh.get(choice, ("",))[0] + text, made, end
                left -= end is not None
            if failed := self.failure():
                if not self.stream:
                    raise failed
                return await self.write(send, [failed.error], more=False)
            if self.stream:
                await self.write(send, [told for c, (text, made, end) in fresh.items()
                                        if (told := self.piece(c, text, made, end))])
        if self.stream:
            usage = [self.chunk([], self.usage())] if self.include_usage else []
            await self.write(send, usage, b"data: [DONE]\n\n", more=False)
        else:
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in self.headers()}
            await reply(send, 200, self.head | dict(choices=[self.whole(c) for c in self.choices], usage=self.usage()),
                        headers)

    def failure(self):
        """Where a text ended by no doing of its own: what to answer."""
        for r in (c.request for c in self.choices):
            if r.finish_reason == "error":
                return Refused(500, r.error)
            if r.finish_reason == "abort":
                return Refused(504, f"not done within {self.service.timeout:g} s", code="timeout")

    def chunk(self, choices, usage=None):
        """One event of a stream."""
        body = self.head | dict(object=self.CHUNK, choices=choices)
        return body | dict(usage=usage) if self.include_usage else body

    async def write(self, send, chunks, end=b"", more=True):
        data = b"".join(b"data: " + json.dumps(c, allow_nan=False).encode() + b"\n\n" for c in chunks) + end
        if data:
            await send({"type": "http.response.body", "body": data, "more_body": more})

    def headers(self):
        """Names the fields that nothing has read."""
        names = [re.sub(r"[^\w.\[\]-]", "?", name, flags=re.ASCII)[:64] for name in self.ignored[:20]]
        return [(b"x-ignored-fields", ", ".join(names).encode())] if names else []

    def length(self, choice):
        return choice.made

    def usage(self):
        first = self.choices[::self.choices[0].request.sampling.n]           # a prompt counts once for all its texts
        read, made = sum(len(c.request.prompt) for c in first), sum(map(self.length, self.choices))
        return dict(prompt_tokens=read, completion_tokens=made, total_tokens=read + made,
                    prompt_tokens_details=dict(cached_tokens=sum(c.request.cached_tokens or 0 for c in first)))


def floor(logprob):
    """JSON has no −∞."""
    return max(logprob, -9999.0)


class Completion(Job):
    """/v1/completions: a prompt or several, as text or tokens."""
    PREFIX, OBJECT, CHUNK, OPENS, PROMPT = "cmpl-", "text_completion", "text_completion", False, "prompt"

    def read(self, fields, settings):
        """→ prompts; settings get what is this dialect's."""
        prompts = fields.take("prompt", (str, list), [])
        many = isinstance(prompts, list) and prompts and isinstance(prompts[0], (str, list))
        self.prompts = prompts = prompts if many else [prompts]
        ids = lambda x: isinstance(x, list) and x and all(type(i) is int for i in x)
        if not all(isinstance(p, str) for p in prompts) and not all(map(ids, prompts)):
            raise Refused(400, "prompt must be a string, a list of token ids, or a list of either, none empty",
                          param="prompt")
        self.echo = fields.take("echo", bool, False)
        best = fields.take("best_of", int, settings["n"], 1, 2 ** 63)
        if best != settings["n"]:
            raise Refused(400, f"best_of is {best}: only texts that are returned are made, so it must be n",
                          param="best_of")
        settings["logprobs"] = fields.take("logprobs", int, None, 0, LIKELY)
        if self.echo and settings["logprobs"] is not None:
            settings["prompt_logprobs"] = settings["logprobs"]
        most = fields.take("max_tokens", int, 16, 0, 2 ** 63)                # OpenAI's default
        self.silent = most == 0                                              # only the prompt is wanted
        settings["max_tokens"] = max(most, 1)
        return prompts

    def length(self, choice):
        return 0 if self.silent else choice.made

    def piece(self, choice, text, made, end):
        """The event for a text that has grown to `made` tokens; None where there is nothing to tell yet."""
        start, choice.told, r = choice.told, made, choice.request
        prompt = self.prompts[choice.index // r.sampling.n]
        tokens = list(zip(r.ids[len(r.prompt) + start:len(r.prompt) + made], (r.logprobs or [])[start:made]))
        if self.silent:
            text, tokens, end = "", [], end and "length"
        if self.echo and not start:
            text = (train.mend(prompt) if isinstance(prompt, str) else self.llm.tokenizer.decode(prompt)) + text
            skip = len(self.llm.tokenizer.start_ids) if isinstance(prompt, str) else 0
            tokens = list(zip(r.prompt, r.prompt_logprobs or []))[skip:] + tokens
        if not text and not end and not tokens:
            return None
        logprobs = None if r.logprobs is None else self.logprobs(choice, tokens, end)
        return self.chunk([dict(index=choice.index, text=text, logprobs=logprobs, finish_reason=end)])

    def whole(self, choice):
        (told,) = self.piece(choice, choice.request.text, choice.made, choice.request.finish_reason)["choices"]
        return told

    def logprobs(self, choice, tokens, end):
        told = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for i, (token, likely) in enumerate(tokens):
            text, begin = choice.spell(token, last=bool(end) and i == len(tokens) - 1)
            top = likely and {text if t == token else self.service.spelled(t): floor(p) for t, p in likely.items()}
            for name, value in zip(told, (text, likely and floor(likely[token]), top, begin)):
                told[name].append(value)
        return told


class Chat(Job):
    """/v1/chat/completions: messages, through the folder's chat template."""
    PREFIX, OBJECT, CHUNK, OPENS, PROMPT = "chatcmpl-", "chat.completion", "chat.completion.chunk", True, "messages"

    def read(self, fields, settings):
        ids = self.service.chat_ids(fields)
        likely = fields.take("top_logprobs", int, None, 0, LIKELY)
        if fields.take("logprobs", bool, False):
            settings["logprobs"] = likely or 0
        elif likely is not None:
            raise Refused(400, "top_logprobs is only for logprobs: true", param="top_logprobs")
        most = fields.take("max_tokens", int, None, 1, 2 ** 63)
        settings["max_tokens"] = fields.take("max_completion_tokens", int, most, 1, 2 ** 63) or max(
            1, self.service.room - len(ids))                                 # as long as the context is
        return [ids]

    def opening(self, choice):
        return self.chunk([dict(index=choice.index, delta=dict(role="assistant", content=""), logprobs=None,
                                finish_reason=None)])

    def piece(self, choice, text, made, end):
        start, choice.told = choice.told, made
        logprobs = self.logprobs(choice, start, made)
        if not text and not end and not logprobs:
            return None
        return self.chunk([dict(index=choice.index, delta=dict(content=text) if text else {}, logprobs=logprobs,
                                finish_reason=end)])

    def whole(self, choice):
        r = choice.request
        return dict(index=choice.index, message=dict(role="assistant", content=r.text, refusal=None),
                    logprobs=self.logprobs(choice, 0, choice.made), finish_reason=r.finish_reason)

    def logprobs(self, choice, start, stop):
        r = choice.request
        entry = lambda token, p: dict(token=self.service.spelled(token), logprob=floor(p),
                                      bytes=list(self.llm.tokenizer.token_bytes(token)))
        return None if r.logprobs is None else dict(refusal=None, content=[
            entry(token, likely[token]) | dict(top_logprobs=[
                entry(t, p) for t, p in itertools.islice(likely.items(), r.sampling.logprobs)])
            for token, likely in zip(r.tokens[start:stop], r.logprobs[start:stop])])


class Service:
    """The engine's thread, which owns the LLM, and the worker's.

    max_queue   texts that may wait beside the max_num_seqs that run; more are refused with 429
    timeout     seconds that a request may take
    """

    def __init__(self, llm, max_queue=256, timeout=600.0):
        self.llm, self.timeout, self.most = llm, timeout, llm.scheduler.most + max_queue
        self.name = llm.folder.resolve().name or "model"
        self.names = {self.name, str(llm.folder), str(llm.folder.resolve())}
        self.room, self.template = min(llm.context, llm.blocks.total * llm.blocks.size), chat_template(llm.folder)
        self.arriving = self.texts = self.streams = 0                        # the event loop's
        self.orders, self.active = queue.SimpleQueue(), {}                   # active: request → choice, the engine's
        self.metrics = Metrics(self)
        self.worker = ThreadPoolExecutor(1, "worker")                        # one: a tokenizer is no place for two
        self.engine = threading.Thread(target=self.run, name="engine", daemon=True)
        self.engine.start()

    def close(self):
        self.orders.put(None)
        self.worker.shutdown(wait=False)
        self.engine.join()

    def spelled(self, token):
        """A token by itself, as a string: its text, or the bytes of what is part of a character."""
        data = self.llm.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_ids(self, fields):
        """Takes `messages` → the ids of the prompt that the folder's template makes of them."""
        messages = fields.take("messages", list)
        if not messages:
            raise Refused(400, "messages must be a list of at least one message", param="messages")
        if not self.template:
            raise Refused(400, f"the model {self.name!r} has no chat template: use /v1/completions", param="messages")
        messages = [self.message(m, f"messages[{i}]", fields) for i, m in enumerate(messages)]
        try:
            return chat_ids(self.llm.tokenizer, self.template, messages)
        except ValueError as error:
            raise Refused(400, str(error), param="messages") from None

    def message(self, message, where, fields):
        """One message, checked → {"role", "content"}, its text parts as lines of one text."""
        if not isinstance(message, dict):
            raise Refused(400, f"{where} is {short(message)}: it must be an object", param=where)
        own = Fields(message, where + ".")
        role, content = own.take("role", str), own.take("content", (str, list))
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused(400, f"{where}.role is {short(role)}: it must be system, developer, user or assistant",
                          param=where + ".role")
        for name in ("tool_calls", "function_call", "audio"):
            if own.left.pop(name, None) not in NOTHING:
                raise Refused(400, f"{where}.{name} is not supported", param=f"{where}.{name}")
        if content is None:
            raise Refused(400, f"{where}.content must be a string or a list of text parts", param=where + ".content")
        for i, part in enumerate(content if isinstance(content, list) else []):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise Refused(400, f'{where}.content[{i}] must be {{"type": "text", "text": a string}}',
                              param=f"{where}.content[{i}]")
        for name, value in own.left.items():
            if value is not None:
                fields.left[own.where + name] = value                        # told as ignored
        if role == "developer" and "developer" not in self.template[0]:
            role = "system"                                                  # its name before 2025
        return dict(role=role, content=content if isinstance(content, str) else "\n".join(p["text"] for p in content))

    # In the event loop

    async def take(self, scope, receive, make):
        """A request's body, read, and `make(body)` by the worker thread."""
        if self.arriving + self.texts >= self.most:
            await read_body(scope, receive, keep=False)
            raise self.busy()
        self.arriving += 1
        try:
            data, kind = await read_body(scope, receive), dict(scope["headers"]).get(b"content-type", b"")
            return await asyncio.get_running_loop().run_in_executor(
                self.worker, lambda: make(parse_body(data, kind)))
        finally:
            self.arriving -= 1

    def busy(self):
        return Refused(429, f"{self.texts} texts are in the making or wait, of {self.most} at most: try again later",
                       code="rate_limit_exceeded", headers={"retry-after": "1"})

    def submit(self, job):
        if self.texts + len(job.choices) > self.most:
            raise self.busy()
        self.texts += len(job.choices)
        self.streams += job.stream
        job.loop, job.woken = asyncio.get_running_loop(), asyncio.Event()
        self.orders.put((self.begin, job))

    def leave(self, job):
        """The job is over, however it ended: what of it still runs ends now, and its blocks are free."""
        self.texts -= len(job.choices)
        self.streams -= job.stream
        if any(c.request.finish_reason is None for c in job.choices):
            self.orders.put((self.abort, job))

    # In the engine's thread

    def begin(self, job):
        for choice in job.choices:
            self.active[choice.request] = choice
            self.llm.scheduler.add(choice.request)

    def abort(self, job):
        ended = [c.request for c in job.choices if c.request.finish_reason is None]
        for r in ended:
            self.llm.abort(r)
        self.deliver(ended)

    def run(self):
        """Orders first; then, while there are texts to make, one step after the other."""
        while True:
            while not self.active or not self.orders.empty():
                if (order := self.orders.get()) is None:
                    return
                order[0](order[1])
            try:
                self.deliver(self.llm.step())
            except Exception as error:                                       # out of memory, a kernel's failure
                self.fail(error)

    def fail(self, error):
        """A step failed: the texts it worked on end with an error, and those that waited go on."""
        traceback.print_exception(error)
        s = self.llm.scheduler
        ended = list(s.running or s.waiting)
        for r in ended:
            s.leave(r)
            r.finish_reason, r.error = "error", f"the engine failed at this text ({type(error).__name__})"
        self.deliver(ended)

    def deliver(self, requests):
        """Post what is new, and wake the loops that wait for it: once a step, not once a text."""
        woken, now = {}, time.perf_counter()                                 # woken: loop → jobs
        for r in requests:
            choice = self.active[r]
            if not r.finish_reason and now < choice.due:
                continue
            if r.finish_reason:
                del self.active[r]
            self.metrics.note(choice, now)
            if choice.job.post(choice, now):
                woken.setdefault(choice.job.loop, {})[choice.job] = None
        for loop, jobs in woken.items():
            with contextlib.suppress(RuntimeError):                          # a loop that is closed waits for nothing
                loop.call_soon_threadsafe(lambda jobs=jobs: [job.woken.set() for job in jobs])


class Metrics:
    """What /metrics tells, by vLLM's names, so that its dashboards fit."""
    SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
    TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

    def __init__(self, service):
        import prometheus_client as prometheus
        self.prometheus, self.service, self.registry = prometheus, service, prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        make = lambda name, what, buckets: prometheus.Histogram(
            "vllm:" + name, what, ["model_name"], registry=self.registry, buckets=buckets).labels(service.name)
        self.first = make("time_to_first_token_seconds", "From a request to its first token.", self.SECONDS)
        self.between = make("inter_token_latency_seconds", "From one token of a text to its next, the mean of a text.",
                            self.SECONDS)
        self.whole = make("e2e_request_latency_seconds", "From a request to its last token.", self.SECONDS)
        self.read = make("request_prompt_tokens", "Tokens of a prompt.", self.TOKENS)
        self.made = make("request_generation_tokens", "Tokens of a text.", self.TOKENS)
        self.counts = Counter()
        self.registry.register(self)

    def note(self, choice, now):
        """A text has grown or ended."""
        r, since = choice.request, choice.job.arrived
        self.counts["generation_tokens"] += choice.made - choice.counted
        choice.counted = choice.made
        if choice.began is None and choice.made:
            choice.began = now
            self.first.observe(now - since)
            self.read.observe(len(r.prompt))
            self.counts.update(prompt_tokens=len(r.prompt), prefix_cache_queries=len(r.prompt),
                               prefix_cache_hits=r.cached_tokens or 0)
        if r.finish_reason:
            self.counts["finished", r.finish_reason] += 1
            self.whole.observe(now - since)
            self.made.observe(choice.made)
            if choice.made > 1:
                self.between.observe((now - choice.began) / (choice.made - 1))

    def collect(self):
        stats, family = self.service.llm.stats(), self.prometheus.metrics_core
        for name, what, value in (
                ("num_requests_running", "Texts in the making.", stats["running"]),
                ("num_requests_waiting", "Texts that wait.", stats["waiting"]),
                ("kv_cache_usage_perc", "Share of the cache's blocks that are held; 1: all.",
                 1 - stats["free_blocks"] / stats["total_blocks"])):
            gauge = family.GaugeMetricFamily("vllm:" + name, what, labels=["model_name"])
            gauge.add_metric([self.service.name], value)
            yield gauge
        counts = dict(self.counts)
        for name, what, value in (
                ("num_preemptions", "Texts that were set back as blocks ran out.", stats["preemptions"]),
                ("prompt_tokens", "Tokens of prompts.", counts.get("prompt_tokens", 0)),
                ("generation_tokens", "Tokens made.", counts.get("generation_tokens", 0)),
                ("prefix_cache_queries", "Tokens of prompts that the prefix cache was asked for.",
                 counts.get("prefix_cache_queries", 0)),
                ("prefix_cache_hits", "Those that it had.", counts.get("prefix_cache_hits", 0))):
            counter = family.CounterMetricFamily("vllm:" + name, what, labels=["model_name"])
            counter.add_metric([self.service.name], value)
            yield counter
        success = family.CounterMetricFamily("vllm:request_success", "Texts that have ended, by how.",
                                             labels=["model_name", "finished_reason"])
        for reason in ("stop", "length", "abort", "error"):
            success.add_metric([self.service.name, reason], counts.get(("finished", reason), 0))
        yield success

    def text(self):
        return self.prometheus.generate_latest(self.registry)


class Generate:
    """An endpoint that makes texts: accept, answer, and stop when the client leaves or time is up."""

    def __init__(self, service, dialect):
        self.service, self.dialect = service, dialect

    async def __call__(self, scope, receive, send):
        service = self.service
        job = await service.take(scope, receive, lambda body: self.dialect(service, body))
        service.submit(job)
        scope["job"] = job                                                   # for the access log
        work, gone = asyncio.ensure_future(job.answer(send)), asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((work, gone), timeout=service.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not gone.done():
                job.late = True
                service.orders.put((service.abort, job))
                await asyncio.wait((work, gone), timeout=5, return_when=asyncio.FIRST_COMPLETED)
        finally:
            service.leave(job)
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()


async def left(receive):
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def tokenize(service, body):
    """/tokenize, as vLLM has it: `prompt`, or `messages` through the chat template."""
    fields, tokenizer = Fields(body), service.llm.tokenizer
    if "messages" in body:
        ids = service.chat_ids(fields)
    else:
        if (text := fields.take("prompt", str)) is None:
            raise Refused(400, "prompt must be a string", param="prompt")
        try:
            ids = tokenizer.encode(text)
            ids = tokenizer.start_ids + ids if fields.take("add_special_tokens", bool, True) else ids
        except ValueError as error:
            raise Refused(400, str(error), param="prompt") from None
    strings = [service.spelled(i) for i in ids] if fields.take("return_token_strs", bool, False) else None
    return dict(count=len(ids), max_model_len=service.llm.context, tokens=ids, token_strs=strings)


def detokenize(service, body):
    """/detokenize, as vLLM has it: `tokens` → `prompt`."""
    V, ids = service.llm.model.config.vocab, Fields(body).take("tokens", list)
    if ids is None or not all(type(i) is int and 0 <= i < V for i in ids):
        raise Refused(400, f"tokens must be a list of token ids from 0 to {V - 1}", param="tokens")
    return dict(prompt=train.mend(service.llm.tokenizer.decode(ids)))


class Log:
    """Lines to standard error by a thread of its own: where nobody reads them they are dropped, and no one waits."""

    def __init__(self):
        self.lines = queue.Queue(1000)
        self.thread = threading.Thread(target=self.run, args=(sys.stderr,), name="log", daemon=True)
        self.thread.start()

    def run(self, stream):
        while (line := self.lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):                   # a closed pipe
                print(line, file=stream, flush=True)

    def __call__(self, line):
        with contextlib.suppress(queue.Full):
            self.lines.put_nowait(line)

    def close(self):
        self(None)
        self.thread.join(1)


class Gate:
    """Around all routes: who may enter, what browsers may do, a log line a request, and an end for what went wrong."""
    OPEN = ("/", "/health", "/metrics")                                      # without a key
    EVERYWHERE = [(b"access-control-allow-origin", b"*"), (b"x-content-type-options", b"nosniff"),
                  (b"access-control-expose-headers", b"x-ignored-fields, x-request-id, retry-after")]

    def __init__(self, app, key, log):
        digest = lambda text: hashlib.sha256(text).digest()                  # of one length, so that a comparison tells
        self.app, self.log, self.key = app, log, key and digest(key.encode())  # nothing of it by its time
        self.fits = lambda given: hmac.compare_digest(digest(given), self.key)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status, number = time.perf_counter(), 0, secrets.token_hex(8)

        async def noted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.EVERYWHERE, (b"x-request-id", number.encode())]
            await send(message)
        try:
            await self.enter(scope, receive, noted)
        except Gone:
            pass
        except Exception as error:                                           # ours to mend: told here, not there
            self.log("".join(traceback.format_exception(error)).rstrip())
        finally:
            job = scope.get("job")
            told = f"{job.usage()['prompt_tokens']}+{job.usage()['completion_tokens']} tokens " if job else ""
            self.log(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {scope['method'][:10]} {ascii(scope['path'][:80])[1:-1]} "
                     f"{status or 'client left'} {1000 * (time.perf_counter() - start):.0f} ms {told}{number}")

    async def enter(self, scope, receive, send):
        headers = dict(scope["headers"])
        if scope["method"] == "OPTIONS":                                     # a browser's question, asked without a key
            wanted = headers.get(b"access-control-request-headers", b"authorization, content-type")
            return await reply(send, 200, b"", {"access-control-allow-methods": "GET, POST, OPTIONS",
                                                "access-control-allow-headers": wanted.decode("latin-1"),
                                                "access-control-max-age": "86400"})
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        fits = not self.key or scheme.lower() == b"bearer" and self.fits(given.strip())
        if not fits and scope["path"] not in self.OPEN:
            await read_body(scope, receive, keep=False)
            return await Refused(401, "the API key is missing or wrong: Authorization: Bearer KEY",
                                 code="invalid_api_key", headers={"www-authenticate": "Bearer"})(scope, receive, send)
        await self.app(scope, receive, send)


def application(service, key=None, log=print):
    """The whole interface as an ASGI application, `log` for its lines."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    page = (Path(__file__).parent / "assets" / "page.html").read_bytes()
    card = dict(id=service.name, object="model", created=int(time.time()), owned_by="twin",
                max_model_len=service.llm.context, chat=bool(service.template))

    async def show_page(request):
        return Response(page, media_type="text/html", headers={
            "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "referrer-policy": "no-referrer"})

    async def models(request):
        if (wanted := request.path_params.get("model")) is None:
            return JSONResponse(dict(object="list", data=[card]))
        if wanted not in service.names:
            raise Refused(404, f"the model {short(wanted)} does not exist", param="model", code="model_not_found")
        return JSONResponse(card)

    async def health(request):
        alive = service.engine.is_alive()
        return JSONResponse(dict(status="ok" if alive else "the engine has ended"), 200 if alive else 503)

    async def metrics(request):
        return Response(service.metrics.text(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    def asked(make):
        async def endpoint(request):
            return JSONResponse(await service.take(request.scope, request.receive, lambda body: make(service, body)))
        return endpoint

    async def no_such(request, error):
        what = {404: "there is no such path", 405: f"{request.method[:10]} is not for this path"}
        return Refused(error.status_code, what.get(error.status_code, error.detail), headers=error.headers)

    async def refused(request, error):
        return error

    async def unheard(request, error):
        return lambda scope, receive, send: asyncio.sleep(0)

    async def broken(request, error):
        return Refused(500, "something went wrong here")
    handlers = {400: no_such, 404: no_such, 405: no_such, Refused: refused, Gone: unheard, Exception: broken}
    post = dict(methods=["POST"])
    return Gate(Starlette(exception_handlers=handlers, routes=[
        Route("/", show_page), Route("/health", health), Route("/metrics", metrics),
        Route("/v1/models", models), Route("/v1/models/{model:path}", models),
        Route("/v1/completions", Generate(service, Completion), **post),
        Route("/v1/chat/completions", Generate(service, Chat), **post),
        Route("/tokenize", asked(tokenize), **post), Route("/detokenize", asked(detokenize), **post)]), key, log)


def listener(app, timeout):
    """A uvicorn server for the application: the first signal drains it, a second one ends it."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Guarded(H11Protocol):
        """Ends connections that bring no whole head of a request in time, and those that take no answer."""
        seen = None

        def connection_made(self, transport):
            super().connection_made(transport)
            sock = transport.get_extra_info("socket")                        # small writes wait for no other
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.timer = self.loop.call_later(HEAD_SECONDS, self.look)

        def connection_lost(self, error):
            self.timer.cancel()
            super().connection_lost(error)

        def look(self):
            idle = self.cycle is None or self.cycle.response_complete
            if self.transport.is_closing() or idle and self.cycle is self.seen:
                return self.transport.abort()                                # twice idle with nothing between
            self.seen = self.cycle if idle else self
            self.timer = self.loop.call_later(HEAD_SECONDS, self.look)

        def send_400_response(self, message):
            body = json.dumps(Refused(400, message).error).encode()
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
                                 b"content-length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()

    class Listener(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            here = threading.current_thread() is threading.main_thread()
            old = {n: signal.signal(n, self.handle_exit) for n in (signal.SIGINT, signal.SIGTERM)} if here else {}
            try:
                yield
            finally:
                for number, handler in old.items():
                    signal.signal(number, handler)

        def handle_exit(self, number, frame):
            if self.should_exit:
                os._exit(128 + number)
            self.should_exit = True
    return Listener(uvicorn.Config(app, http=Guarded, ws="none", lifespan="off", log_config=None, access_log=False,
                                   server_header=False, timeout_keep_alive=HEAD_SECONDS, backlog=2048,
                                   timeout_graceful_shutdown=math.ceil(timeout)))


def serve(llm, host, port, key=None, max_queue=256, timeout=600.0):
    """Serve until a signal says to end: no new connections then, what runs is finished. UserError: port not free."""
    try:
        if not 0 <= port < 2 ** 16:
            raise OverflowError("a port is from 0 to 65535")
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.create_server(address[4], family=address[0], backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    llm.generate([[0]], max_tokens=2, temperature=0.0)                       # kernels are compiled, libraries set up
    sys.setswitchinterval(0.001)                                             # the engine waits less for the loop
    log, service = Log(), Service(llm, max_queue, timeout)
    server = listener(application(service, key, log), timeout)
    at = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    log(f"{service.name} at {at} (a page), {at}/v1 (OpenAI's interface)")
    if not key and not ipaddress.ip_address(address[4][0].partition("%")[0]).is_loopback:
        log("no --api-key: whoever reaches this address may use it")
    try:
        server.run([sock])
    finally:
        service.close()
        log.close()


# --- 9. The command line ----------------------------------------------------------------------------------------------

def arguments():
    """The command line, as a parser."""
    p = Parser(prog="infer.py", description="Generate text with a model folder of train.py or of Hugging Face.")
    p.add_argument("prompt", nargs="?",
                   help="the text to continue (standard input if it is piped; on a terminal: a prompt loop)")
    p.add_argument("--model", default="out", help="the model's folder (%(default)s)")
    p.add_argument("--max-tokens", type=int, help="new tokens at most (128, or what the context leaves)")
    p.add_argument("--temperature", type=float, default=train.TEMPERATURE, help="0 is greedy (%(default)s)")
    p.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="the smallest set of likeliest tokens that reaches p; 1: all")
    p.add_argument("--min-p", type=float, default=train.MIN_P,
                   help="only tokens at least this share as likely as the likeliest (%(default)s)")
    p.add_argument("--repetition-penalty", type=float, default=1.0,
                   help="above 1, tokens that are there already get rarer")
    p.add_argument("--presence-penalty", type=float, default=0.0, help="taken from tokens that the text already has")
    p.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, as often as the text has them")
    p.add_argument("--logit-bias", type=json.loads, metavar="JSON", help='added to logits: \'{"token id": number}\'')
    p.add_argument("--seed", type=int, help="the same text again (a new one each time)")
    p.add_argument("--stop", action="append", help="end before this text; may be given several times")
    p.add_argument("--n", type=int, default=1, help="that many continuations")
    p.add_argument("--ignore-eos", action="store_true", help="go on past the end token")
    p.add_argument("--logprobs", type=int, metavar="K", help="log probabilities of each token and the K likeliest")
    p.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")
    p.add_argument("--device", help="cpu, cuda, mps (the best there is)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="of weights and cache (float32 on a CPU, else the folder's)")
    p.add_argument("--quantize", choices=sorted(QUANTIZED), help="keep the weights in fewer bits (as they are)")
    p.add_argument("--kv-cache-dtype", choices=["int8"], help="of keys and values (as the weights)")
    p.add_argument("--block-size", type=positive(int), default=16, help="tokens a block of the cache (%(default)s)")
    p.add_argument("--num-blocks", type=positive(int), help="blocks of the cache (what a part of the memory holds)")
    p.add_argument("--max-num-seqs", type=positive(int), default=64, help="sequences at once (%(default)s)")
    p.add_argument("--max-num-batched-tokens", type=positive(int), default=2048,
                   help="tokens a pass; longer prompts go in chunks (%(default)s)")
    p.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True,
                   help="take over what an earlier prompt with the same beginning has computed")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output, all else on standard error")
    p.add_argument("--score", metavar="FILE", help="how well the model predicts this text: bits per byte")
    p.add_argument("--bench", action="store_true", help="time prefill and decode")
    p.add_argument("--bench-serving", action="store_true", help="time requests of mixed lengths, sent all at once")
    p.add_argument("--serve", action="store_true", help="serve OpenAI's interface over HTTP, and a page to try it")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at, for --serve (%(default)s)")
    p.add_argument("--port", type=int, default=8000, help="0: a free one (%(default)s)")
    p.add_argument("--api-key", default=os.environ.get("TWIN_API_KEY"), metavar="KEY",
                   help="what clients must send; better by the environment variable TWIN_API_KEY (none: all may)")
    p.add_argument("--max-queue", type=positive(int), default=256,
                   help="texts that may wait beside those that run, more are refused with 429 (%(default)s)")
    p.add_argument("--timeout", type=positive(float), default=600.0, help="seconds a request may take (%(default)s)")
    p.add_argument("--requests", type=positive(int), default=32, help="for --bench-serving (%(default)s)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="compile decode steps (--bench does where a compiler is there, GPUs always)")
    p.add_argument("--batch", type=positive(int), default=1, help="sequences at once, for --bench")
    p.add_argument("--prompt-tokens", type=positive(int), default=32, help="for --bench")
    p.add_argument("--new-tokens", type=positive(int), default=64, help="for --bench")
    return p


def show(text, end=""):
    """Print to standard output at once; a code page that lacks a character gets a replacement, never an end."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end=end, flush=True)


def complete(llm, machine, prompt, sampling, as_json):
    """Generate for one prompt, streaming, then say how fast it was."""
    requests = llm.requests(prompt, sampling)
    t, first, last = time.perf_counter(), None, None
    for _ in llm.run(requests):
        last = time.perf_counter()
        first = first or (last if all(r.tokens for r in requests) else None)
        if len(requests) == 1 and not as_json:
            show(requests[0].news())
    if failed := next((r.error for r in requests if r.error), None):
        raise UserError(failed)
    generated, prompt_tokens = sum(len(r.tokens) for r in requests), len(requests[0].prompt)
    steps = max(len(r.tokens) for r in requests) - 1
    speed = dict(prefill=prompt_tokens / (first - t), decode=len(requests) * steps / (last - first) if steps else 0.0)
    if as_json:
        for r in requests:
            told = {name: getattr(r, name) for name in ("logprobs", "prompt_logprobs") if getattr(r, name) is not None}
            show(json.dumps(dict(prompt=prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt),
                                 text=r.text, tokens=r.tokens, finish_reason=r.finish_reason,
                                 prompt_tokens=prompt_tokens, generated_tokens=len(r.tokens),
                                 prefill_tokens_per_second=speed["prefill"],
                                 decode_tokens_per_second=speed["decode"], **told)), end="\n")
    elif len(requests) > 1:
        for i, r in enumerate(requests):
            print(f"--- {i + 1} of {len(requests)}", file=sys.stderr, flush=True)
            show(r.text, end="\n")
            tell(llm, r)
    else:
        show("", end="\n")
        tell(llm, requests[0])
    line = f"prompt {prompt_tokens} tokens at {speed['prefill']:,.0f}/s"
    if steps:
        limit = bound(llm, machine(), len(requests), prompt_tokens + steps / 2)
        line += (f" · generated {generated} at {speed['decode']:,.0f}/s, "
                 f"{speed['decode'] / limit:.0%} of what the memory allows")
    print(line, file=sys.stderr)
    return requests


def tell(llm, r):
    """The log probabilities that a request was asked for, a token a line, on standard error."""
    for tokens, logprobs in ((r.prompt, r.prompt_logprobs), (r.tokens, r.logprobs)):
        for token, likely in zip(tokens, logprobs or []):
            print(f"{llm.tokenizer.decode([token])!r:20}", *(f"{llm.tokenizer.decode([i])!r} {p:.3f}"
                                                             for i, p in (likely or {}).items()), file=sys.stderr)


def prompt_loop(llm, machine, sampling):
    """Ask for prompts until the input ends; through the folder's chat template where it has one."""
    template, messages = chat_template(llm.folder), []
    print("a prompt and Enter; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if not text.strip():
            continue
        try:
            if template:
                messages.append(dict(role="user", content=text))
                (request, *_) = complete(llm, machine, chat_ids(llm.tokenizer, template, messages), sampling, False)
                messages.append(dict(role="assistant", content=request.text))
            else:
                complete(llm, machine, text, sampling, False)
        except ValueError as error:
            print(error, file=sys.stderr)
            messages.clear()                                                 # a chat beyond the context begins anew


def once(make):
    """A function that makes its value when it is first called for, and keeps it."""
    kept = []
    return lambda: kept[0] if kept else kept.append(make()) or kept[0]


def main(argv=None):
    """Generate, score or time by command-line flags → exit code."""
    try:
        args = arguments().parse_args(argv)
        sampling = Sampling(**{k: getattr(args, k) for k in Sampling.__dataclass_fields__})
        if sum([bool(args.score), args.bench, args.bench_serving, args.serve, args.prompt is not None]) > 1:
            raise UserError("a prompt, --score, --bench, --bench-serving and --serve: give one of them")
        text = train.read_text(args.score) if args.score else None
        options = {k: getattr(args, k) for k in ("device", "dtype", "quantize", "kv_cache_dtype", "block_size",
                                                 "num_blocks", "max_num_seqs", "max_num_batched_tokens",
                                                 "prefix_caching", "compile")}
        if args.bench:                                                       # all of the batch in step
            room = -(-(args.prompt_tokens + args.new_tokens + 1) // args.block_size)
            options |= dict(num_blocks=args.batch * room, max_num_seqs=args.batch, prefix_caching=False,
                            max_num_batched_tokens=max(args.max_num_batched_tokens, args.batch * args.prompt_tokens),
                            compile=args.compile is not False and not args.quantize and train.compiler_there())
        llm = LLM(args.model, **options)
        sampling.check(llm.model.config.vocab)
        machine = once(lambda: measure(llm.model.embed.weight.device.type, 0.3))
        if args.score:
            result = score(llm, text)
            show(json.dumps(result) if args.json else
                 f"{result['bits_per_byte']:.4f} bits per byte, {result['nats_per_token']:.4f} nats per token, "
                 f"over {result['tokens']:,} tokens ({result['bytes']:,} bytes)", end="\n")
        elif args.bench:
            if args.prompt_tokens + args.new_tokens > llm.context:
                raise UserError(f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} "
                                f"exceed the context of {llm.context}")
            r = bench(llm, machine(), args.batch, args.prompt_tokens, args.new_tokens)
            show(json.dumps(r) if args.json else
                 f"batch {r['batch']}: prefill {r['prefill_tokens_per_second']:,.0f} tokens/s, "
                 f"decode {r['decode_tokens_per_second']:,.1f} tokens/s, "
                 f"{r['bound_share']:.0%} of the memory bound ({r['bound_tokens_per_second']:,.1f})", end="\n")
        elif args.bench_serving:
            r = bench_serving(llm, machine(), args.requests)
            show(json.dumps(r) if args.json else
                 f"{r['requests']} requests, {r['prompt_tokens']:,} tokens in, {r['new_tokens']:,} out: "
                 f"{r['tokens_per_second']:,.1f} tokens/s, {r['bound_share']:.0%} of the bound "
                 f"({r['bound_tokens_per_second']:,.0f})\n"
                 f"first token {r['first_token_seconds_median']:.2f} s (99th {r['first_token_seconds_p99']:.2f}), "
                 f"between tokens {1000 * r['between_tokens_seconds_median']:.0f} ms "
                 f"(99th {1000 * r['between_tokens_seconds_p99']:.0f}); "
                 f"{r['cache_use']:.0%} of the cache, {r['preemptions']} preemptions", end="\n")
        elif args.serve:
            serve(llm, args.host, args.port, args.api_key, args.max_queue, args.timeout)
        elif args.prompt is None and sys.stdin.isatty():
            prompt_loop(llm, machine, sampling)
        else:
            prompt = args.prompt if args.prompt is not None else sys.stdin.read()
            complete(llm, machine, prompt, sampling, args.json)
        return 0
    except (UserError, ValueError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
