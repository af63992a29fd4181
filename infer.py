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

    drafts    tokens guessed ahead, checked several in one pass: the weights are read once for all of them. The noise is
              keyed, so a guess holds where it is the token that is drawn, and the text is the one without guesses.

`python infer.py "def fibonacci(n):"` streams from out/; `--model DIR` takes any folder of ours or a Hugging Face Qwen3,
Qwen2, Llama, Mistral or Mamba-2; `--serve` speaks OpenAI's interface; `--score FILE`, `--bench`, `--bench-serving`,
`--compare`; without a prompt, on a terminal, it asks for one.
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
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")                           # on Linux: large tensors in large pages
import torch
import torch.nn.functional as F

import train
from attention import jit, leave, on_kernel, tl, triton
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
    weight, pays = model.head.weight, {}
    room = 4 * sum(w.numel() for w in model.parameters()) < memory_of(weight.device)
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    if plain and room and torch.backends.mkldnn.is_available():
        for layer in layers:
            if (shape := layer.weight.shape) not in pays:                    # measured once for each
                pays[shape] = packing_pays(layer)
            if pays[shape]:
                layer.pack()
    return model


def packing_pays(layer):
    """Whether one row goes through a `FewRows` sooner where it is packed; small ones end before oneDNN has begun."""
    layer.pack()
    x, packed, times = torch.ones(1, layer.in_features), layer.packed, {True: [], False: []}
    for which in (True, False) * 5:
        layer.packed = packed if which else None
        t = time.perf_counter()
        layer(x)
        times[which].append(time.perf_counter() - t)
    layer.packed = None
    return min(times[True]) < min(times[False])


# Fewer bits a weight. Of w [O, I], the weights of a linear layer y = x Wᵀ:
#
#     int8       w_oi ≈ s_o q_oi               q in −127 … 127: the largest of a row becomes ±127
#     int4       w_oi ≈ s_og (q_oi − 8) + z_og q in 0 … 15; g = i div group: a scale and a middle for each group
#     fp8        w_oi ≈ s_o q_oi               q in e4m3, 4 bits of exponent and 3 of fraction: the largest becomes ±448
#
# What rounding costs the layer is not ‖E‖² of the weights, E = Q(W) − W, but ‖E Xᵀ‖² = tr(E H Eᵀ), H = Xᵀ X, of inputs
# X [N, I] of calibration text. int4 rounds to nearest; two ways to round that know H:
#
#     gptq       column by column, what rounding costs is made good by the columns to come:  Uᵀ U = (H + λ diag H)⁻¹,
#                e = (w_i − ŵ_i) / U_ii,  w_j ← w_j − e U_ij for j > i          (Frantar et al., arXiv 2210.17323)
#     awq        W diag(c) is rounded, and x / c read: c_i = ‖x_i‖^α gives channels that say much finer steps; α by the
#                least tr(E H Eᵀ)                                               (Lin et al., arXiv 2306.00978)
#
# Pruning sets weights to zero: those of least |w_oi| (magnitude) or of least |w_oi| ‖x_i‖ (Wanda, arXiv 2306.11695),
# half of each row or two of each four. One text serves NumPy and torch: `xp` is the one of the two.

def _xp(x):
    return np if isinstance(x, np.ndarray) else torch


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


def bf16(x):
    """x, rounded to what bfloat16 can say."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().double().numpy().astype(x.dtype)
    return x.bfloat16().to(x.dtype)


def grouped(w, group):
    """w [O, I] → [O, G, group]; where I does not divide, the last group is filled with the last column."""
    w = _xp(w).concatenate([w, w[:, [w.shape[1] - 1] * (-w.shape[1] % group)]], 1)
    return w.reshape(len(w), -1, group)


def int4_round(w, scale, zero):
    """w [...], scale, zero (broadcast) → q in 0 … 15, still floats."""
    xp = _xp(w)
    return xp.clip(xp.round((w - zero) / xp.where(scale > 0, scale, xp.ones_like(scale))) + 8, 0, 15)


def int4_value(q, scale, zero):
    return (q - 8) * scale + zero


SHRINK = 1.0, 0.95, 0.9, 0.85, 0.8, 0.75                                      # shares of a group's range


def int4_grid(w):
    """w [..., g] → scale, zero [...]: of ranges from the whole to three quarters the one of least squared error.

    Both are numbers of bfloat16: so they are stored, and so torch's product on a CPU takes them.
    """
    xp, best = _xp(w), None
    low, high = xp.amin(w, -1), xp.amax(w, -1)
    for share in SHRINK:
        scale = bf16((high - low) * (share / 15))
        zero = bf16((high + low) / 2 + scale / 2)
        error = ((int4_value(int4_round(w, scale[..., None], zero[..., None]), scale[..., None], zero[..., None]) - w)
                 ** 2).sum(-1)
        if best is None:
            best = error, scale, zero
        else:
            best = [xp.where(error < best[0], new, old) for new, old in zip((error, scale, zero), best)]
    return best[1], best[2]


def int4_numpy(w, group=64):
    """w [O, I] → q [O, G, group] in 0 … 15, scale, zero [O, G]: each group to the nearest. Takes tensors too."""
    w = grouped(w, group)
    scale, zero = int4_grid(w)
    return int4_round(w, scale[..., None], zero[..., None]), scale, zero


def int4_weights(q, scale, zero, I):
    """What q, scale and zero of `int4_numpy` stand for → w [O, I]."""
    return int4_value(q, scale[..., None], zero[..., None]).reshape(len(q), -1)[:, :I]


def int4_linear_numpy(x, q, scale, zero):
    """x [N, I] → x Wᵀ [N, O], group by group as the kernels have it."""
    x, y = np.pad(x, ((0, 0), (0, q.shape[1] * q.shape[2] - x.shape[1]))), 0
    for g, part in enumerate(np.split(x, q.shape[1], 1)):
        y = y + part @ int4_value(q[:, g], scale[:, g, None], zero[:, g, None]).T
    return y


def inverse_factor(H, damping):
    """H [I, I] → U upper triangular, Uᵀ U = (H + damping · diag H)⁻¹; None where it cannot be computed.

    In units of each channel's own size: one thousands of times larger than the rest spoils nothing, one that is
    always 0 has no neighbours.
    """
    xp, one = _xp(H), _xp(H).zeros_like(H)
    if not xp.isfinite(H).all():
        return None
    one[range(len(H)), range(len(H))] = 1
    size = xp.sqrt(xp.diagonal(H))
    size = xp.where(size > 0, size, xp.ones_like(size))
    with contextlib.suppress(xp.linalg.LinAlgError):
        L = xp.linalg.cholesky(H / size / size[:, None] + damping * one)     # an inverse alone would not notice
        L = xp.linalg.inv(L)
        U = xp.linalg.cholesky(L.T @ L).T / size
        if xp.isfinite(U).all():
            return U
    return None


def gptq_numpy(w, H, group=64):
    """w [O, I], H [I, I] → q, scale, zero as of `int4_numpy`. Takes torch tensors as well.

    Columns go from the largest input to the least, in the grids of the untouched weights. Of rising dampings it takes
    the first that costs less than rounding to nearest; None where none does.
    """
    xp, (O, I) = _xp(w), w.shape
    q, scale, zero = int4_numpy(w, group)
    loss = lambda q: float((((E := int4_weights(q, scale, zero, I) - w) @ H) * E).sum())
    order = xp.argsort(-xp.diagonal(H))
    for damping in (0.01, 0.1, 1.0):
        U = inverse_factor(H[order][:, order], damping)
        if U is None:
            continue
        rest, new = w[:, order], xp.zeros_like(q).reshape(O, -1) + 8
        for start in range(0, I, GPTQ_BLOCK):                                # other blocks' columns hear of its
            stop = min(start + GPTQ_BLOCK, I)                                # errors together, in one product
            block, errors = rest[:, start:stop] + 0, xp.zeros_like(rest[:, start:stop])
            for i, column in enumerate(order[start:stop].tolist()):
                s, z = scale[:, column // group], zero[:, column // group]
                new[:, column] = int4_round(block[:, i], s, z)
                errors[:, i] = (block[:, i] - int4_value(new[:, column], s, z)) / U[start + i, start + i]
                block -= errors[:, i, None] * U[start + i, start:stop]
            rest[:, stop:] -= errors @ U[start:stop, stop:]
        new = new.reshape(q.shape)
        if loss(new) < loss(q):
            return new, scale, zero
    return None


GPTQ_BLOCK = 64                                                              # columns


def awq_numpy(w, H, group=64):
    """w [O, I], H [I, I] → c [I] of AWQ: what each channel of x is divided by, and W's multiplied. Takes torch tensors.

    ‖x_i‖ is the root of H's diagonal. α = 0 is among the ten tried: never worse than rounding to nearest.
    """
    xp = _xp(w)
    if not xp.isfinite(H).all():
        return xp.ones_like(w[0])
    size = xp.sqrt(xp.diagonal(H))
    size = xp.clip(size / xp.amax(size), 1e-4, 1) if xp.amax(size) > 0 else xp.ones_like(size)
    best, least = xp.ones_like(size), math.inf
    for alpha in range(10):
        c = size ** (alpha / 10)
        c = c / xp.sqrt(xp.amax(c) * xp.amin(c))
        E = int4_weights(*int4_numpy(w * c, group), w.shape[1]) / c - w
        loss = float(((E @ H) * E).sum())
        if loss < least:
            best, least = c, loss
    return best


def wanda_numpy(w, norms, sparsity=0.5):
    """w [O, I], norms [I] of the inputs → the weights to keep, [O, I] of bool. Ones for norms: by magnitude alone.

    sparsity: the share of each row that goes, or "2:4", two of each four in a row; ValueError where 4 does not divide
    I. Takes torch tensors as well.
    """
    xp, score = _xp(w), abs(w) * norms
    if sparsity == "2:4":
        if w.shape[1] % 4:
            raise ValueError(f"2:4: w {tuple(w.shape)} must have columns in fours")
        return (xp.argsort(xp.argsort(score.reshape(-1, 4), -1), -1) >= 2).reshape(w.shape)
    return xp.argsort(xp.argsort(score, -1), -1) >= round(w.shape[1] * sparsity)


# The kernels: weights are read once, in their bits, and become numbers in registers. One row is a sum, as memory is the
# bound; more are a matrix product, of 16 rows or many a program. x [N, I], y [N, O], in int4 two weights a byte: the
# low halves are the first half of a group.

@jit
def _int8_row(X, Q, S, Y, O, I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    n, i, y = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_I), tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        x = tl.load(X + n * I + start + i, mask=start + i < I, other=0.).to(tl.float32)
        q = tl.load(Q + o[:, None] * I + (start + i)[None], mask=(o < O)[:, None] & (start + i < I)[None], other=0)
        y += q.to(tl.float32) * x[None]
    s = tl.load(S + o, mask=o < O, other=0.).to(tl.float32)
    tl.store(Y + n * O + o, tl.sum(y, 1) * s, mask=o < O)


@jit
def _int8_rows(X, Q, S, Y, N, O, I, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, y = tl.arange(0, BLOCK_I), tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for start in range(0, I, BLOCK_I):
        x = tl.load(X + n[:, None] * I + (start + i)[None], mask=(n < N)[:, None] & (start + i < I)[None], other=0.)
        q = tl.load(Q + o[None] * I + (start + i)[:, None], mask=(o < O)[None] & (start + i < I)[:, None], other=0)
        y = tl.dot(x, q.to(x.dtype), y, input_precision="ieee")
    s = tl.load(S + o, mask=o < O, other=0.).to(tl.float32)
    tl.store(Y + n[:, None] * O + o[None], y * s[None], mask=(n < N)[:, None] & (o < O)[None])


@jit
def _int4_row(X, P, SZ, Y, O, I, G, GROUP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    n, h, y = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_H), tl.zeros([BLOCK_O, BLOCK_H], tl.float32)
    half: tl.constexpr = GROUP // 2
    for g in range(G):
        low, high = g * GROUP + h, g * GROUP + half + h
        a = tl.load(X + n * I + low, mask=(h < half) & (low < I), other=0.).to(tl.float32)
        b = tl.load(X + n * I + high, mask=(h < half) & (high < I), other=0.).to(tl.float32)
        p = tl.load(P + (o[:, None] * G + g) * half + h[None], mask=(o < O)[:, None] & (h < half)[None], other=0)
        s = tl.load(SZ + (o * G + g) * 2, mask=o < O, other=0.).to(tl.float32)[:, None]
        z = tl.load(SZ + (o * G + g) * 2 + 1, mask=o < O, other=0.).to(tl.float32)[:, None]
        y += (((p & 15).to(tl.float32) - 8) * s + z) * a[None] + (((p >> 4).to(tl.float32) - 8) * s + z) * b[None]
    tl.store(Y + n * O + o, tl.sum(y, 1), mask=o < O)


@jit
def _int4_rows(X, P, SZ, Y, N, O, I, G, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
               BLOCK_H: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h, y = tl.arange(0, BLOCK_H), tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    half: tl.constexpr = GROUP // 2
    for g in range(G):
        low, high = g * GROUP + h, g * GROUP + half + h
        a = tl.load(X + n[:, None] * I + low[None], mask=(n < N)[:, None] & ((h < half) & (low < I))[None], other=0.)
        b = tl.load(X + n[:, None] * I + high[None], mask=(n < N)[:, None] & ((h < half) & (high < I))[None], other=0.)
        p = tl.load(P + (o[None] * G + g) * half + h[:, None], mask=(o < O)[None] & (h < half)[:, None], other=0)
        s = tl.load(SZ + (o * G + g) * 2, mask=o < O, other=0.).to(tl.float32)[None]
        z = tl.load(SZ + (o * G + g) * 2 + 1, mask=o < O, other=0.).to(tl.float32)[None]
        y = tl.dot(a, (((p & 15).to(tl.float32) - 8) * s + z).to(a.dtype), y, input_precision="ieee")
        y = tl.dot(b, (((p >> 4).to(tl.float32) - 8) * s + z).to(a.dtype), y, input_precision="ieee")
    tl.store(Y + n[:, None] * O + o[None], y, mask=(n < N)[:, None] & (o < O)[None])


def int8_linear(x, q, scale):
    """x [..., I], q int8 [O, I], scale [O] → x Wᵀ [..., O] by the kernels, x as it is."""
    if q.ndim != 2 or x.shape[-1] != q.shape[1] or scale.shape != q.shape[:1]:
        raise ValueError(f"int8_linear: x {tuple(x.shape)}, q {tuple(q.shape)} and scale {tuple(scale.shape)} "
                         "do not fit")
    (O, I), rows = q.shape, x.reshape(-1, x.shape[-1]).contiguous()
    y, N = x.new_empty(*x.shape[:-1], O), len(rows)
    if 0 < N <= ONE:
        _int8_row[triton.cdiv(O, 16), N](rows, q, scale, y, O, I, BLOCK_O=16, BLOCK_I=256, num_warps=4)
    elif N:
        BLOCK_N = 16 if N <= 16 else 64
        _int8_rows[triton.cdiv(O, 64), triton.cdiv(N, BLOCK_N)](
            rows, q, scale, y, N, O, I, BLOCK_N=BLOCK_N, BLOCK_O=64, BLOCK_I=64, num_warps=4)
    return y


def int4_linear(x, packed, scale_zero, group):
    """x [..., I], packed uint8 [O, G, group / 2], scale_zero [O, G, 2] → x Wᵀ [..., O] by the kernels."""
    O, G, half = packed.shape
    if -(-x.shape[-1] // group) != G or 2 * half != group or scale_zero.shape != (O, G, 2):
        raise ValueError(f"int4_linear: x {tuple(x.shape)}, packed {tuple(packed.shape)} and scale_zero "
                         f"{tuple(scale_zero.shape)} do not fit groups of {group}")
    I, rows = x.shape[-1], x.reshape(-1, x.shape[-1]).contiguous()
    y, N, BLOCK_H = x.new_empty(*x.shape[:-1], O), len(rows), max(16, triton.next_power_of_2(half))
    if 0 < N <= ONE:
        _int4_row[triton.cdiv(O, 16), N](rows, packed, scale_zero, y, O, I, G, GROUP=group, BLOCK_O=16, BLOCK_H=BLOCK_H,
                                         num_warps=4)
    elif N:
        BLOCK_N = 16 if N <= 16 else 64
        _int4_rows[triton.cdiv(O, 64), triton.cdiv(N, BLOCK_N)](
            rows, packed, scale_zero, y, N, O, I, G, GROUP=group, BLOCK_N=BLOCK_N, BLOCK_O=64, BLOCK_H=BLOCK_H,
            num_warps=4)
    return y


ONE = 2                                                                      # rows that are quicker one by one


# The layers. Each holds its tensors as a folder stores them, until `ready` lays them out for the device it is on.

class Compressed(torch.nn.Module):
    """A linear layer of fewer bits. smooth [I], where there is one, divides x: AWQ's c."""
    packed = None

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def scaled(self, x):
        return x if self.smooth is None else x / self.smooth.to(x.dtype)

    def biased(self, y, dtype):
        return y.to(dtype) if self.bias is None else y.to(dtype) + self.bias.to(dtype)

    def read(self):
        """Bytes that one pass over the layer reads."""
        return self.in_features * self.out_features + 4 * self.out_features

    def held(self):
        """Bytes that the layer takes in memory."""
        return sum(b.numel() * b.element_size() for b in self.buffers()) + (0 if self.packed is None else self.read())


PACKED = weakref.WeakValueDictionary()                                       # number → layer: a graph can hold one,
PRODUCT = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
OPS = torch.library.Library("twin", "DEF")                                   # but not what packed weights are
OPS.define("int8_linear(Tensor x, int number, int outputs) -> Tensor")
OPS.impl("int8_linear", lambda x, number, outputs: PRODUCT(x, 1 / 63, 64, PACKED[number].packed), "CPU")
torch.library.register_fake("twin::int8_linear", lambda x, number, outputs: x.new_empty(*x.shape[:-1], outputs),
                            lib=OPS)


class Int8(Compressed):
    """Weights in int8, a scale for each output: a quarter of the memory to read, and on a CPU products of integers,
    which it does twice as many of. As in `int8_linear_numpy`; elsewhere x stays as it is.
    """

    def __init__(self, linear, group=None):
        super().__init__(linear)
        w = linear.weight.detach()
        scale = (w.abs().amax(1).float() / 127).clamp(min=1e-30)
        self.register_buffer("q", (w.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def ready(self, single=False):
        """Pack for torch's product of integers; `single`: and keep the weights, for compiled steps of one row."""
        if self.q.device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
            zeros = torch.zeros(len(self.q), dtype=torch.int64)
            before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
            with warnings.catch_warnings():                                  # this form of tensor is to go, one day
                warnings.simplefilter("ignore")
                self.packed = torch.ops.quantized.linear_prepack(
                    torch._make_per_channel_quantized_tensor(self.q, self.scale, zeros, 0), None)
            torch.backends.quantized.engine = before
            if not single:
                self.q = self.scale = None
            self.number = next(NUMBERS)
            PACKED[self.number] = self
        return self

    def product(self, x):
        """x [..., I] within ±1 → [..., O]."""
        return PRODUCT(x, 1 / 63, 64, self.packed)

    def forward(self, x):
        if self.packed is None:
            if on_kernel(x):
                return self.biased(int8_linear(x, self.q, self.scale), x.dtype)
            return self.biased(F.linear(x, self.q.to(x.dtype)) * self.scale.to(x.dtype), x.dtype)
        row = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        a = (x / row).float()
        if self.q is not None and torch.compiler.is_compiling() and x.numel() == self.in_features:
            a = (a * 63).round().as_strided(self.q.shape[1:], (1,))
            y = (a * self.q).sum(-1)                                         # whole numbers, summed exactly
            return self.biased(y.view(*x.shape[:-1], -1) * (row / 63) * self.scale, x.dtype)
        y = (torch.ops.twin.int8_linear(a, self.number, self.out_features) if torch.compiler.is_compiling() else
             self.product(a))
        return self.biased(y * row, x.dtype)


NUMBERS = itertools.count()


class Int4(Compressed):
    """Weights in groups of 4 bits, two a byte. On a CPU few rows go to torch's packed product, which wants bfloat16;
    for many the weights are unpacked, as then arithmetic is the bound.
    """
    FEW = 24

    def __init__(self, linear, group=64, values=None, smooth=None):
        super().__init__(linear)
        w = linear.weight.detach().float()
        self.group = group
        q, scale, zero = values or int4_numpy(w if smooth is None else w * smooth, group)
        q = q.to(torch.uint8)
        self.register_buffer("q", q[..., :group // 2] | q[..., group // 2:] << 4)            # [O, G, group / 2]
        self.register_buffer("scale_zero", torch.stack([scale, zero], -1).bfloat16())        # [O, G, 2]
        self.register_buffer("smooth", smooth)

    def read(self):
        return self.q.numel() + 2 * self.scale_zero.numel()

    def ready(self):
        """Pack for torch's product where it takes this shape: groups of 32, 64, 128 or 256, outputs in sixteens."""
        if self.q.device.type == "cpu" and self.group in (32, 64, 128, 256):
            q = torch.stack([self.q & 15, self.q >> 4], 2).flatten(1).int()  # [O, G · group]
            more = -len(q) % 64
            self.packed = torch._convert_weight_to_int4pack_for_cpu(F.pad(q, (0, 0, 0, more)), 1)
            self.steps = F.pad(self.scale_zero, (0, 0, 0, 0, 0, more)).transpose(0, 1).contiguous()
        return self

    def weights(self, dtype):
        """→ w [O, I], unpacked."""
        w = torch.stack([self.q & 15, self.q >> 4], 2).to(dtype).flatten(2)
        scale, zero = self.scale_zero.to(dtype)[..., None].unbind(2)
        return w.sub_(8).mul_(scale).add_(zero).flatten(1)[:, :self.in_features]

    def forward(self, x):
        x, dtype = self.scaled(x), x.dtype
        rows = x.numel() // max(1, x.shape[-1])
        if on_kernel(x):
            return self.biased(int4_linear(x, self.q, self.scale_zero, self.group), dtype)
        if self.packed is None or rows > self.FEW:
            return self.biased(F.linear(x, self.weights(dtype)), dtype)
        a = F.pad(x.bfloat16(), (0, self.q.shape[1] * self.group - self.in_features)).reshape(rows, -1)
        y = torch._weight_int4pack_mm_for_cpu(a, self.packed, self.group, self.steps)
        return self.biased(y[:, :self.out_features].reshape(*x.shape[:-1], -1), dtype)


class Fp8(Compressed):
    """Weights and, row by row, inputs in e4m3: products that GPUs of capability 8.9 do twice as many of."""

    def __init__(self, linear, group=None):
        super().__init__(linear)
        w = linear.weight.detach().float()
        scale = (w.abs().amax(1) / 448).clamp(min=1e-30)
        self.register_buffer("q", (w / scale[:, None]).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)

    def ready(self):
        return self

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1]).float()
        size = (rows.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
        y = torch._scaled_mm((rows / size).to(torch.float8_e4m3fn), self.q.t(), scale_a=size, scale_b=self.scale[None],
                             out_dtype=torch.bfloat16)
        return self.biased(y.view(*x.shape[:-1], -1), x.dtype)


class Table(torch.nn.Module):
    """An embedding in int8, a scale a row: a lookup reads one row, so this is for the memory alone. It stays apart from
    a tied head, which has bits of its own.
    """

    def __init__(self, embed):
        super().__init__()
        w = embed.weight.detach()
        scale = (w.abs().amax(1).float() / 127).clamp(min=1e-30)
        self.register_buffer("q", (w.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.like = w.new_zeros(()).expand(w.shape)                          # asked for device, dtype and shape

    @property
    def weight(self):
        return self.like

    def forward(self, tokens):
        return (self.q[tokens].float() * self.scale[tokens, None]).to(self.like.dtype)


def linears(model):
    """(path, parent, name, layer) of a model's linear layers, but for those that steer, and are small."""
    for path, module in list(model.named_modules()):
        for name, linear in list(module.named_children()):
            steers = {"dt_proj", "router", "predictor"} & {*path.split("."), name}
            if isinstance(linear, torch.nn.Linear) and not steers:
                yield f"{path}.{name}" if path else name, module, name, linear


QUANTIZED = dict(int8=Int8, int4=Int4, gptq=Int4, awq=Int4, fp8=Fp8)         # --quantize → the layer
PRUNED = "magnitude", "wanda"


def check_quantize(quantize, group_size, prune, sparsity, device):
    """ValueError or UserError where a compression is none, or not this device's."""
    if quantize not in (None, *QUANTIZED):
        raise ValueError(f"quantize is {quantize!r}: it must be {', '.join(map(repr, QUANTIZED))} or None")
    if prune not in (None, *PRUNED):
        raise ValueError(f"prune is {prune!r}: it must be {', '.join(map(repr, PRUNED))} or None")
    if not (isinstance(group_size, int) and 2 <= group_size <= 1024 and group_size % 2 == 0):
        raise ValueError(f"group_size is {group_size!r}: it must be an even whole number from 2 to 1024")
    if sparsity != "2:4" and not (isinstance(sparsity, float) and 0 <= sparsity < 1):
        raise ValueError(f"sparsity is {sparsity!r}: it must be a share below 1, or '2:4'")
    if quantize == "fp8" and (device != "cuda" or torch.cuda.get_device_capability() < (8, 9)):
        raise UserError("fp8 needs a GPU of compute capability 8.9 or more; int8 takes as many bits anywhere")


def folds(model):
    """Layers whose input is divided by c for free: {layer: what to divide, a parameter and its first row or None}.

    A norm's gain reaches one product alone; the rows of W_up reach W_down through nothing but products.
    """
    found = {model.head: [(model.norm.weight, 0)]}
    for block in model.blocks:
        block, mixer = train.parts(block)
        first = getattr(mixer, "qkv", None) or mixer.in_proj
        if hasattr(block, "mlp"):
            found[first] = [(block.attention_norm.weight, 0)]
            found[block.mlp.gate_up] = [(block.mlp_norm.weight, 0)]
            up = block.mlp.gate_up
            found[block.mlp.down] = [(w, block.mlp.down.in_features) for w in (up.weight, up.bias) if w is not None]
        else:
            found[first] = [(block.norm.weight, 0)]
    return found


def calibrate(model, ids, length=512, most=64):
    """Token ids → (part of the model, {path: H}) for each block and the head, in turn: what is done to a part is done
    before the next one is read, which so sees the inputs it will have. H = Xᵀ X [I, I], summed in float64.
    """
    length = min(length, model.config.context, len(ids))
    if length < 2:
        raise UserError("the calibration text has fewer than two tokens")
    device = model.embed.weight.device
    starts = np.linspace(0, len(ids) - length, min(most, len(ids) // length)).astype(int)
    xs = [model.embed(torch.tensor(np.array(ids[i:i + length], dtype=np.int64), device=device)[None]) for i in starts]
    positions, wide = torch.arange(length, device=device), torch.float32 if device.type == "mps" else torch.float64

    def add(H, path, x):
        x = x.reshape(-1, x.shape[-1]).float()
        H[path] = H.get(path, 0) + (x.T @ x).to(wide)
    for i, block in enumerate(model.blocks):
        H = {}
        hooks = [linear.register_forward_pre_hook(lambda _, inputs, path=path: add(H, path, *inputs))
                 for path, _, _, linear in linears(model) if path.startswith(f"blocks.{i}.")]
        for x in xs:
            block(x, positions)
        for hook in hooks:
            hook.remove()
        yield f"blocks.{i}.", H
        xs = [block(x, positions) for x in xs]
    H = {}
    for x in xs:
        add(H, "head", model.norm(x))
    yield "head", H


def smaller(linear, quantize, group, H, sources):
    """A linear layer in fewer bits → (the layer, whether H was of use). sources: see `folds`."""
    w = linear.weight.detach()
    if quantize == "gptq":
        values = gptq_numpy(w.to(H.dtype), H, group)
        return Int4(linear, group, values), values is not None
    if quantize == "awq":
        c = awq_numpy(w.float(), (H / H.diagonal().mean().clamp(min=1e-30)).float(), group)
        for source, start in sources:
            part = source[start:start + len(c)]
            part.div_(c if part.ndim == 1 else c[:, None])
        return Int4(linear, group, int4_numpy(w.float() * c, group), None if sources else c), bool(H.isfinite().all())
    return QUANTIZED[quantize](linear, group), True


@torch.no_grad()
def compress(model, quantize=None, group_size=64, ids=None, prune=None, sparsity=0.5):
    """Prune and quantize a model in place, layer by layer; ids: calibration text → dict(layers, nearest).

    nearest: the layers for which calibration was of no use, so that they are rounded to nearest. Pruning leaves the
    head alone. UserError where no layer is left to compress.
    """
    model.requires_grad_(False)
    known, told = quantize in ("gptq", "awq") or prune == "wanda", dict(layers=0, nearest=[])
    parts = (calibrate(model, ids) if known else
             iter([(f"blocks.{i}.", {}) for i in range(len(model.blocks))] + [("head", {})]))
    sources = folds(model) if quantize == "awq" else {}
    bar = train.tqdm(parts, total=len(model.blocks) + 1, desc=quantize or prune, leave=False, **train.quiet_bar())
    for part, H in bar:
        places = [place for place in linears(model) if place[0].startswith(part)]
        for path, parent, name, linear in reversed(places):                  # down before up, which it may divide
            I = linear.weight.shape[1]
            h = H.get(path, torch.zeros(I, I, device=linear.weight.device, dtype=torch.float64)) if known else None
            if prune and path != "head":
                norms = h.diagonal().sqrt() if prune == "wanda" else torch.ones(I, device=linear.weight.device)
                try:
                    keep = wanda_numpy(linear.weight.detach().float(), norms.float(), sparsity)
                except ValueError as error:
                    raise UserError(f"{path}: {error}") from None
                linear.weight.mul_(keep)
            if quantize:
                layer, used = smaller(linear, quantize, group_size, h, sources.get(linear, ()))
                setattr(parent, name, layer)
                told["nearest"] += [] if used else [path]
            told["layers"] += bool(quantize or path != "head")
    if not told["layers"]:
        raise UserError("the model has no layer to compress")
    if quantize:
        model.embed = Table(model.embed)
        kind = {Int8: "int8", Int4: "int4", Fp8: "fp8"}[QUANTIZED[quantize]]
        model.config.raw = model.config.raw | dict(quantization_config=dict(
            quant_method="twin", format=kind, method=quantize, group_size=group_size, layers=told["layers"]))
    return told


def ready(model, single=False):
    """Lay all layers of fewer bits out for the device they are on. single: steps are compiled, and of one row."""
    for module in model.modules():
        if isinstance(module, Compressed):
            module.ready(single) if isinstance(module, Int8) else module.ready()
    return model


def save_compressed(model, tokenizer, folder):
    """Write a compressed model, before `ready`, as a folder for `open_folder`: tensors by their place in Model."""
    try:
        quantized = model.config.raw.get("quantization_config")
        tensors = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
        train.save(model, tokenizer, folder, tensors if quantized else None)
    except OSError as error:
        raise UserError(f"--save {folder}: cannot be written ({error.strerror or error})") from None


def open_folder(folder, device=None, dtype=None):
    """`train.load`, and folders of `save_compressed` → (model, tokenizer)."""
    path = Path(folder) / "config.json"
    about = train.read_json(path).get("quantization_config") if path.exists() else None
    if not isinstance(about, dict) or about.get("quant_method") != "twin":
        return load(folder, device, dtype)
    kind, group = about.get("format"), about.get("group_size", 64)
    if kind not in ("int8", "int4", "fp8"):
        raise UserError(f"{path}: quantization_config.format is {kind!r}: it must be int8, int4 or fp8")
    device = train.pick_device(device)
    check_quantize(kind, group, None, 0.5, device)
    generation = path.with_name("generation_config.json")
    config = train.parse_config(train.read_json(path), train.read_json(generation) if generation.exists() else None)
    dtype = train.dtype_for(dtype, config.raw, device)
    model = train.empty_model(config, dtype, device).requires_grad_(False)
    tensors = {}
    for file in sorted(set((files := train.shards(folder)).values())):
        with train.open_shard(file) as f:
            tensors.update({name: f.get_tensor(name).to(device) for name in f.keys() if files.get(name) == file})
    for place, parent, name, linear in list(linears(model)):
        shell = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        smooth = torch.ones(linear.in_features, device="meta") if f"{place}.smooth" in tensors else None
        setattr(parent, name, QUANTIZED[kind](shell, group, **(dict(smooth=smooth) if smooth is not None else {})))
    like = model.embed.weight.new_zeros(()).expand(model.embed.weight.shape)
    model.embed = Table(torch.nn.Embedding(*like.shape, device="meta"))
    model.embed.like = like
    own, kinds = dict(model.named_parameters()), {
        f"{place}.{name}": b.dtype for place, module in model.named_modules() if isinstance(module, (Compressed, Table))
        for name, b in module.named_buffers() if name in ("q", "scale", "scale_zero")}
    for name, kind in kinds.items():
        if name in tensors and tensors[name].dtype != kind:
            raise UserError(f"{folder}: the tensor {name} is {tensors[name].dtype}: it must be {kind}")
    try:
        model.load_state_dict({k: t.to(dtype) if k in own else t for k, t in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: its tensors are not those of its config.json ({str(error).splitlines()[1].strip()})"
                        ) from None
    return model.requires_grad_(False).eval(), train.load_tokenizer(folder, config.eos_ids)


class Summed(torch.nn.Module):
    """A linear layer whose inputs are divided among processes: the outputs of all are added."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        y = self.linear(x)
        torch.distributed.all_reduce(y)
        return y


@torch.no_grad()
def divide(model, processes):
    """Tensor parallelism: each process keeps its heads and its share of the MLP's width, so that a layer's weights are
    read by all at once, each its part; two sums a layer over the processes put them together. UserError where they do
    not come out even.
    """
    c, n, rank = model.config, processes.size, processes.rank
    if set(c.layers) != {"a"}:
        raise UserError(f"several processes divide the heads of attention layers; this model's layers are {c.layers}")
    for name, count in (("attention heads", c.heads), ("key and value heads", c.kv_heads), ("MLP channels", c.hidden)):
        if count % n:
            raise UserError(f"{n} processes can't divide {count} {name} evenly")
    mine = lambda w, dim=0: w.detach().chunk(n, dim)[rank].clone()

    def rows(linear, sizes):                                                 # this process's outputs of each fused part
        for name, w in list(linear.named_parameters()):
            setattr(linear, name, torch.nn.Parameter(torch.cat([mine(part) for part in w.split(sizes)])))
        linear.out_features = len(linear.weight)

    def columns(linear):                                                     # its inputs; one adds the bias
        linear.weight = torch.nn.Parameter(mine(linear.weight, 1))
        linear.in_features = linear.weight.shape[1]
        linear.bias = None if rank else linear.bias
        return Summed(linear)
    for block in model.blocks:
        a, mlp = block.attention, block.mlp
        rows(a.qkv, [a.H * a.D, a.G * a.D, a.G * a.D])
        rows(mlp.gate_up, [c.hidden, c.hidden])
        a.H, a.G, a.out, mlp.down = a.H // n, a.G // n, columns(a.out), columns(mlp.down)
    model.config = replace(c, heads=c.heads // n, kv_heads=c.kv_heads // n, hidden=c.hidden // n)


# --- 2. Cache: blocks, who holds them, and where their numbers lie ----------------------------------------------------

class Block:
    """`size` places for tokens. key: the hash of its tokens and of all before them, once they are computed; memory: the
    states of recurrent layers after them, where they were kept.
    """
    __slots__ = ("id", "refs", "key", "parent", "tokens", "home", "memory")

    def __init__(self, id):
        self.id, self.refs = id, 0
        self.forget()

    def forget(self):
        self.key = self.parent = self.tokens = self.home = self.memory = None


class Blocks:
    """The pool of blocks: who holds each, and the full ones by the hash of (parent, tokens). Accounting, no numbers.

    A block that no sequence holds keeps its tokens until its place is needed: those let go longest ago are taken first.
    Of `memories` the `most` used last are kept.
    """
    IDLE = 2 ** 16                                                           # known blocks kept where places never end

    def __init__(self, total, size, caching=True, most=0):
        self.total, self.size, self.caching, self.hits = total, size, caching, 0
        self.made, self.idle = 0, OrderedDict()                              # held by no one; the first is taken next
        self.known = {}                                                      # key → block
        self.memories, self.most = OrderedDict(), most                       # key → block with a memory, latest last

    def __len__(self):
        return self.total - self.made + len(self.idle)

    def take(self, count):
        """→ a list of that many blocks, for one holder."""
        taken = [self.next() for _ in range(count)]
        for block in taken:
            if block.key:
                del self.known[block.key]
                self.memories.pop(block.key, None)
                block.forget()
            block.refs = 1
        return taken

    def next(self):
        """A block that holds nothing, if there is one; else the one that was let go longest ago."""
        first = next(iter(self.idle.values()), None)
        if self.made < self.total and (first is None or first.key and len(self.idle) < self.IDLE):
            self.made += 1
            return Block(self.made - 1)
        return self.idle.popitem(last=False)[1]

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

    def remember(self, key, memory):
        """Keep the states after the block of that key."""
        if block := self.known.get(key):
            block.memory = memory
            self.used(block)
            while len(self.memories) > self.most:
                self.memories.popitem(last=False)[1].memory = None

    def used(self, block):
        self.memories[block.key] = block
        self.memories.move_to_end(block.key)


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
    recurrent = False

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

    def cut(self, r, count):
        """Go back to a request's first `count` tokens: what lies behind them is written over."""

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
        wide = q.reshape(B, G, H // G, 1, D).float() * D ** -0.5             # as sums, which a compiler fuses: for one
        scores = (wide * self.keys[:, :, None]).sum(-1)                      # row less than half of a kernel's time
        p = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        return (p[..., None] * self.values[:, :, None]).sum(-2).to(q.dtype).reshape(B, H, 1, D)


class Pages:
    """Caches on a GPU: a block is a page, a table says which pages are a sequence's; what is shared lies there once.

    data: [pages, size, G, D] for the keys and the values of each layer. One page more than there are blocks takes what
    the padding of a compiled step writes.
    """
    recurrent = False

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
    cut = Slabs.cut

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


class Mixed(Slabs):
    """Caches of stacks that are not attention alone. Each attention layer has its part of a sequence's slab; a routed
    one keeps there only the tokens it took, and the slab says which (`kept`, positions in order). Each recurrent layer
    has a row of states for each sequence, in tensors that grow with the rows in use.

    A state is of all tokens so far and can't be cut back: it is kept (`memory`) where the scheduler asks for it.
    """

    def __init__(self, model, blocks, int8):
        c, weight = model.config, model.embed.weight
        self.size, self.kinds, self.stores, self.free, routed, layers = blocks.size, [], [], [], 0, 0
        for letter, block in zip(c.layers, model.blocks):
            if letter in "aA":
                self.kinds.append((2 * layers, routed if letter == "A" else None))           # in the slab, in `kept`
                layers, routed = layers + 1, routed + (letter == "A")
            else:
                self.kinds.append((len(self.stores), letter.isupper()))
                state = train.parts(block)[1].new_state(0)
                self.stores.append([state.conv.to(weight.dtype), state.state])
        self.layers, self.recurrent, self.routed = c.layers, bool(self.stores), routed
        self.attends = layers > 0
        self.new = lambda capacity: Slab((2 * layers, 1, c.kv_heads, capacity, c.head_dim), weight.dtype, weight.device,
                                         int8)

    def state_bytes(self):
        """Of one sequence."""
        return sum(math.prod(part.shape[1:]) * part.element_size() for store in self.stores for part in store)

    def open(self, r):
        r.slab = None
        if self.attends:
            r.slab = self.new(r.capacity)
            r.slab.kept = [[] for _ in range(self.routed)]
            found = r.table[:r.computed // self.size]
            for source, run in itertools.groupby(range(len(found)), lambda i: found[i].home):
                run = list(run)
                self.copy(r.slab, source, run[0] * self.size, (run[-1] + 1) * self.size)
        if self.recurrent:
            if not self.free:
                self.grow()
            r.row = self.free.pop(0)
            self.restore(r, r.table[r.computed // self.size - 1].memory if r.computed else None)

    def grow(self):
        rows = len(self.stores[0][0])
        self.free = list(range(rows, max(1, 2 * rows)))
        self.stores = [[torch.cat([part, part.new_zeros(len(self.free), *part.shape[1:])]) for part in store]
                       for store in self.stores]

    def close(self, r):
        r.slab = None
        if self.recurrent:
            bisect.insort(self.free, r.row)

    def copy(self, slab, source, start, stop):
        """Tokens start … stop, from where they were computed; of a routed layer those that it took."""
        for part, routed in (kind for letter, kind in zip(self.layers, self.kinds) if letter in "aA"):
            i, j, at = start, stop, start
            if routed is not None:
                theirs, at = source.kept[routed], len(slab.kept[routed])
                i, j = bisect.bisect_left(theirs, start), bisect.bisect_left(theirs, stop)
                slab.kept[routed] += theirs[i:j]
            for mine, other in ((slab.data, source.data), (slab.scale, source.scale)):
                if mine is not None:
                    mine[part:part + 2, :, :, at:at + j - i] = other[part:part + 2, :, :, i:j]

    def memory(self, r):
        """A copy of a sequence's states."""
        return [[part[r.row].clone() for part in store] for store in self.stores]

    def restore(self, r, memory):
        """Its states as they were; None: as before the first token."""
        for i, store in enumerate(self.stores):
            for j, part in enumerate(store):
                part[r.row] = memory[i][j] if memory else 0

    def cut(self, r, count):
        for kept in r.slab.kept if self.routed else ():
            del kept[bisect.bisect_left(kept, count):]

    def states(self, segments):
        views = SlabViews(segments) if self.attends else None
        counts = [stop - start for _, start, stop in segments]
        rows = [r.row for r, _, _ in segments] if self.recurrent else None

        def state(letter, at, routed):
            if letter == "a":
                return SlabState(views, at)
            if letter == "A":
                return RoutedSlabState(segments, at, routed)
            return (RoutedRows if routed else RowsState)(self.stores[at], rows, counts)
        return [state(letter, *kind) for letter, kind in zip(self.layers, self.kinds)]


class RowsState:
    """The state of one recurrent layer in a pass over many sequences: their rows of its tensors; see
    `ssm.RecurrentState`.
    """

    def __init__(self, store, rows, counts):
        first, device = rows[0], store[0].device
        together = rows == list(range(first, first + len(rows)))
        self.store = store
        self.rows = slice(first, first + len(rows)) if together else torch.tensor(rows, device=device)
        self.ones = all(count == 1 for count in counts)
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)

    @property
    def conv(self):
        return self.store[0][self.rows]

    @property
    def state(self):
        return self.store[1][self.rows]

    def update(self, conv, state):
        self.store[0][self.rows], self.store[1][self.rows] = conv, state


def chosen_counts(keep, counts):
    """keep [1, N] bool, tokens of each segment → which segments have chosen ones, how many, and where in each."""
    keep = keep[0].numpy(force=True)
    each = [np.flatnonzero(keep[end - n:end]) for n, end in zip(counts, itertools.accumulate(counts))]
    return [(i, places) for i, places in enumerate(each) if len(places)]


class RoutedRows:
    """The state of a routed recurrent layer: `chosen` gives that of the sequences with tokens it takes (None: none)."""

    def __init__(self, store, rows, counts):
        self.store, self.rows, self.counts = store, rows, counts

    def chosen(self, keep):
        some = chosen_counts(keep, self.counts)
        return RowsState(self.store, [self.rows[i] for i, _ in some], [len(p) for _, p in some]) if some else None


class RoutedSlabState:
    """The state of a routed attention layer: `chosen` notes the tokens that it takes and gives the state for those."""

    def __init__(self, segments, part, routed):
        self.segments, self.part, self.routed = segments, part, routed

    def chosen(self, keep):
        taken, counts = [], [stop - start for _, start, stop in self.segments]
        for i, places in chosen_counts(keep, counts):
            r, start, _ = self.segments[i]
            kept = r.slab.kept[self.routed]
            taken.append((r, len(kept), len(kept) + len(places)))
            kept += (start + places).tolist()
        return SlabState(SlabViews(taken), self.part) if taken else None


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
    json_schema: dict | str | bool | None = None                             # the text is JSON of this schema,
    regex: str | None = None                                                 # or all of it matches this

    def check(self, V):
        """ValueError names the argument that is out of range; V: how many tokens the model has."""
        def need(ok, name, what):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {what}")
        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= 1e30      # for float32
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
        need(self.max_tokens is None or whole(self.max_tokens) and self.max_tokens >= 1,
             "max_tokens", "a whole number from 1")
        need(number(self.temperature) and self.temperature >= 0, "temperature", "a number from 0 (greedy) to 1e30")
        need(whole(self.top_k) and self.top_k >= 0, "top_k", "a whole number from 0 (off) up")
        need(number(self.top_p) and 0 <= self.top_p <= 1, "top_p", "from 0 (greedy) to 1 (off)")
        need(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 (off) to 1")
        need(number(self.repetition_penalty) and self.repetition_penalty >= 1e-30,
             "repetition_penalty", "a number from 1e-30 to 1e30 (1: off)")
        for name in ("presence_penalty", "frequency_penalty"):
            need(number(getattr(self, name)), name, "a number within ±1e30 (0: off)")
        try:
            bias = {int(token): value for token, value in dict(self.logit_bias or {}).items()}
        except (TypeError, ValueError):
            bias = {-1: 0}
        need(all(0 <= token < V and number(value) for token, value in bias.items()),
             "logit_bias", f"numbers within ±1e30 by tokens from 0 to {V - 1}")
        self.logit_bias, self.top_k = bias, min(self.top_k, V)
        need(self.seed is None or whole(self.seed), "seed", "a whole number")
        need(whole(self.n) and self.n >= 1, "n", "a whole number from 1")
        for name in ("logprobs", "prompt_logprobs"):
            k = getattr(self, name)
            need(k is None or whole(k) and 0 <= k <= V, name, f"a whole number from 0 to {V}")
        need(isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")
        need(self.json_schema is None or isinstance(self.json_schema, (dict, str, bool)), "json_schema",
             "a JSON schema, as a dict or as text")
        need(self.regex is None or isinstance(self.regex, str), "regex", "a regular expression, as text")
        need(self.regex is None or self.json_schema is None, "regex", "alone: json_schema is given, too")
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
    """[R, 1]; logits divided by less than a millionth could leave float32."""
    return torch.tensor([max(r.sampling.temperature, 1e-6) for r in rows], device=like.device)[:, None]


def _signed(seed):
    """Any whole number as an int64."""
    seed &= 2 ** 64 - 1
    return seed - 2 ** 64 if seed >= 2 ** 63 else seed


def noise(rows, tokens):
    key = lambda values: torch.tensor(values, dtype=torch.int64, device=tokens.device)
    return gumbel(key([_signed(r.seed) for r in rows]), key([r.choice for r in rows]), key([len(r.ids) for r in rows]),
                  tokens)


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


PASS = 512                                                                   # tokens whose numbers a CPU's cache holds


def hidden_states(model, cache, segments):
    """One pass of a model over (request, start, stop)s in one row → what the head reads [N, C]. On a CPU in pieces."""
    device = model.embed.weight.device
    if device.type == "cpu" and sum(stop - start for _, start, stop in segments) > PASS:
        return torch.cat([hidden_states(model, cache, piece) for piece in pieces(segments, PASS)])
    rows = ((r.ids[start:stop] + r.drafts)[:stop - start] for r, start, stop in segments)
    tokens = torch.tensor([[token for row in rows for token in row]], device=device)
    with torch.inference_mode(False):                                        # it has a version: layers share its table
        positions = torch.tensor([i for _, start, stop in segments for i in range(start, stop)], device=device)
    return model.hidden(tokens, positions, cache.states(segments))[0]


# --- 5. Constraints: which tokens may come next -----------------------------------------------------------------------

class Constraints:
    """Texts that must match a regular expression or a JSON schema: llguidance says which tokens can go on.

    JSON comes with its properties in the order of the schema, at most a space or a line's indentation between its
    parts, and ends with its last bracket. Properties that the schema does not require may be left out.
    """
    JSON = dict(whitespace_pattern=r" ?|\n {0,32}", lenient=False)

    def __init__(self, tokenizer, eos_ids, V):
        import llguidance                                                    # not everybody's: loaded when used
        special = set(tokenizer.special.values())

        class Tokens:
            """What the library asks of a tokenizer. A model without an end token gets one that it can't draw."""
            tokens = [b"" if i in special else tokenizer.token_bytes(i) for i in range(V)] + ([] if eos_ids else [b""])
            special_token_ids, bos_token_id, eos_token_id = sorted(special), None, min(eos_ids, default=V)

            def __call__(self, text):
                return tokenizer.encode(text)
        self.library, self.V = llguidance, V
        self.tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()), n_vocab=len(Tokens.tokens),
                                             eos_token=sorted(eos_ids) or [V])

    def matcher(self, sampling):
        """What follows one text → a matcher. ValueError names the argument and what of it can't be."""
        name, matcher = "json_schema" if sampling.regex is None else "regex", self.library.LLMatcher
        try:
            if name == "regex":
                grammar = matcher.grammar_from_regex(sampling.regex)
            else:
                schema = sampling.json_schema
                schema = json.loads(schema) if isinstance(schema, str) else schema
                schema = schema if isinstance(schema, dict) else {"allOf": [schema]}                 # true, false
                grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides=self.JSON)
            _, problems = matcher.validate_grammar_with_warnings(grammar, self.tokens)
        except RecursionError:
            problems = ["it is nested too deeply"]
        except ValueError as error:
            problems = [str(error)]
        if problems:
            raise ValueError(f"{name}: {' '.join(problems[0].split())}")
        return matcher(self.tokens, grammar, log_level=0)

    def allow(self, logits, requests):
        """logits [R, V] → the same with −∞ for the tokens that can't go on a request's text; those given stay."""
        rows = [i for i, r in enumerate(requests) if r.matcher]
        if not rows:
            return logits
        bits = np.frombuffer(b"".join(requests[i].matcher.compute_bitmask() for i in rows), dtype=np.uint8)
        barred = np.zeros((len(requests), self.V), dtype=bool)
        barred[rows] = np.unpackbits(~bits.reshape(len(rows), -1), axis=1, count=self.V, bitorder="little")
        return logits.masked_fill(torch.from_numpy(barred).to(logits.device), -torch.inf)


# --- 6. Drafts: tokens guessed ahead, so that one pass over the weights checks several --------------------------------

def accept_or_resample_numpy(p, q, drafts, rng):
    """The classic rule of speculative decoding (arXiv 2211.17192, algorithm 1), for one text.

    q [k, V]: the distributions that the drafts [k] were drawn from; p [k + 1, V]: the target's. A draft x is accepted
    with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from the rest, max(0, p − q), and
    ends the step; after k accepted ones one more is drawn from p. → the tokens: distributed as draws from p alone.
    """
    tokens = []
    for i, x in enumerate(drafts):
        if rng.random() >= p[i, x] / q[i, x]:
            rest = np.maximum(p[i] - q[i], 0)
            return tokens + [int(rng.choice(len(rest), p=rest / rest.sum()))]
        tokens.append(int(x))
    return tokens + [int(rng.choice(p.shape[1], p=p[len(drafts)]))]


# The engine's rule needs no q. The target's own token at a position is argmax(logits + noise), and the noise depends on
# (seed, choice, position, token) alone (drafter-invariant speculation, arXiv 2408.07978): a draft is accepted where it
# is that token. A draft model that adds the same noise to its own logits guesses it as often as the classic rule
# accepts, nearly, and the text is bit for bit the one without drafts.

class NGram:
    """Drafts from the text itself: what followed the last time that its latest 3 (else 2) tokens stood there."""
    SIZES = (3, 2)

    def __init__(self):
        self.seen = {}                                                       # request → [tokens read, gram → its end]

    def propose(self, requests, k):
        """→ for each request a list of up to k tokens."""
        return [self.lookup(r.ids, self.seen.setdefault(r, [0, {}]), k) for r in requests]

    def lookup(self, ids, seen, k):
        read, ends = seen
        for end in range(max(read, 1), len(ids)):                            # what ends the text has no token after it
            for n in self.SIZES:
                ends[tuple(ids[max(0, end - n):end])] = end
        seen[0] = len(ids)
        for n in self.SIZES:
            if (end := ends.get(tuple(ids[-n:]))) and len(ids) >= n:
                period = len(ids) - end                                      # past its end the text repeats itself
                return [ids[end + i % period] for i in range(k)]
        return []

    def forget(self, r):
        self.seen.pop(r, None)


class Draft:
    """A text as the draft model has it: the request's tokens, then its own guesses."""

    def __init__(self, r):
        self.sampling, self.seed, self.choice, self.capacity = r.sampling, r.seed, r.choice, r.capacity
        self.tally = None
        self.ids, self.drafts, self.computed, self.known, self.table, self.before = [], [], 0, 0, [], None


class Drafter:
    """Drafts from a smaller model, or the first layers of the target itself, with a cache of its own. vocab: the
    target's; with the same tokens, tables may be padded differently.
    """

    def __init__(self, model, budget, vocab=None):
        self.model, self.budget, self.vocab, self.texts = model, budget, vocab or model.config.vocab, {}
        self.cache = (Slabs if set(model.config.layers) == {"a"} else Mixed)(model, Blocks(0, 1, False), int8=False)

    def propose(self, requests, k):
        """→ for each request a list of up to k tokens."""
        drafts = []
        for r in requests:
            if r not in self.texts:
                self.texts[r] = Draft(r)
                self.cache.open(self.texts[r])
            drafts.append(self.texts[r])
            self.follow(self.texts[r], r.ids)
        segments = [(d, d.computed, len(d.ids)) for d in drafts]
        for i in range(k):
            hidden = torch.cat([hidden_states(self.model, self.cache, p) for p in pieces(segments, self.budget)])
            ends = torch.tensor(np.cumsum([stop - start for _, start, stop in segments]) - 1, device=hidden.device)
            if not i and self.cache.recurrent:                               # a state can't be cut: kept before guesses
                for d in drafts:
                    d.before = self.cache.memory(d)
            for d, token in zip(drafts, sample(self.model.head(hidden[ends])[:, :self.vocab].float(), drafts)):
                d.computed = len(d.ids)
                d.ids.append(token)
            segments = [(d, d.computed, d.computed + 1) for d in drafts]
        return [d.ids[-k:] for d in drafts]

    def follow(self, d, ids):
        """Take over the request's tokens; go back to where those computed are its own."""
        most = self.model.config.vocab - 1                                   # its own table may be the shorter one
        ids = [min(i, most) for i in ids] if self.vocab > most + 1 else list(ids)
        same = d.known
        while same < min(len(d.ids), len(ids)) and d.ids[same] == ids[same]:
            same += 1
        if d.before:
            same = d.known if d.known < len(ids) else 0                      # not one token more: begin anew
            self.cache.restore(d, d.before if same else None)
        d.computed = min(d.computed, same, len(ids) - 1)
        self.cache.cut(d, d.computed)
        d.ids, d.known = ids, len(ids)

    def forget(self, r):
        if r in self.texts:
            self.cache.close(self.texts.pop(r))


# --- 7. Engine: requests, the schedule, the passes, LLM ---------------------------------------------------------------

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
        self.marks = set()                                                   # where its states are to be kept
        self.matcher = None                                                  # what its text must match
        self.drafts, self.before = [], None                                  # tokens guessed; states before them
        self.worth, self.pause, self.rest = 1.0, 0, 8                        # of drafts: see `LLM.guess`

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
        matched = self.matcher and self.matcher.consume_token(token) and self.matcher.is_stopped()
        if self.matcher and self.matcher.is_error():                         # of the library's own limits
            why = self.matcher.get_error().splitlines()[0]
            self.finish_reason, self.error = "error", f"the constraint can't be followed further: {why}"
        elif token in eos_ids and (self.matcher or not self.sampling.ignore_eos):
            self.finish_reason = "stop"
        elif self.out.push(token) or matched:
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
                self.room(r, budget - 1)
                segments.append((r, r.computed, r.computed + 1 + len(r.drafts)))
                budget -= 1 + len(r.drafts)
        prompts = []                                                         # more of those begun,
        for r in self.running:
            if r.left > 1 and budget:
                prompts.append((r, min(r.left, budget)))
                budget -= prompts[-1][1]
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
            prompts.append((r, min(r.left, budget)))
            budget -= prompts[-1][1]
        return segments + [self.piece(r, count) for r, count in prompts]

    @staticmethod
    def piece(r, count):
        """A request's next `count` tokens, or those up to where its states are to be kept."""
        return r, r.computed, min([r.computed + count] + [mark for mark in r.marks if mark > r.computed])

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

    def room(self, r, budget):
        """As many of a request's drafts as there is room for: nobody is set back for a guess."""
        del r.drafts[max(0, budget):]
        while len(self.blocks) and r.computed + 1 + len(r.drafts) > len(r.table) * self.blocks.size:
            r.table += self.blocks.take(1)
        del r.drafts[max(0, len(r.table) * self.blocks.size - r.computed - 1):]

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
        return self.remembered(r, found) if self.cache.recurrent else found

    def remembered(self, r, found):
        """Of blocks that hold a request's first tokens, those up to the last whose states were kept. Where a beginning
        that others have, too, parts from theirs, the states are kept by whoever gets there first; the others wait.
        """
        parting, r.waits_for, r.marks = len(found), None, set()
        last = (len(r.ids) - 1) // self.blocks.size
        while parting < last and self.key(r, parting)[0] in self.filling:
            parting += 1
        use = max((i + 1 for i, block in enumerate(found) if block.memory), default=0)
        if parting > use:
            key, mark = r.keys[parting - 1], parting * self.blocks.size
            owner = self.filling.get(key)
            if owner and owner.computed < mark:
                owner.marks.add(mark)
                r.waits_for = key
            r.marks.add(mark)
        r.marks.add(last * self.blocks.size)
        return found[:use]

    def admit(self, r, found):
        """Give a waiting request its blocks and its memory → False where they are not there yet."""
        size, blocks = self.blocks.size, self.blocks
        need = -(-len(r.ids) // size) - len(found)
        idle = sum(block.refs == 0 for block in found)
        if need + idle + len(self.running) > len(blocks):                    # each that runs may soon want one more
            return False
        for block in found:
            blocks.hold(block)
        if found and self.cache.recurrent:
            blocks.used(found[-1])
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
            if stop in r.marks and self.blocks.caching:
                self.blocks.remember(r.keys[stop // size - 1], self.cache.memory(r))

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
            r.computed, r.drafts = 0, []


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

    quantize            linear layers in fewer bits: "int8"; in 4 bits "int4", or "gptq", "awq", which are closer;
                        "fp8"; None: as they are
    group_size          weights that share a scale in 4 bits
    calibration         token ids, or what makes them when called, for gptq, awq and wanda: text that is not scored
    prune, sparsity     "magnitude" or "wanda": weights that count least become zero, that share of each row, or "2:4"
    save                a folder to write the model to as it now is
    kv_cache_dtype      "int8": keys and values in a quarter of the memory; None: as the weights
    block_size          tokens a block of the cache
    num_blocks          blocks in all; None: as many as a part of the memory holds, or all sequences could ever use
    max_num_seqs        sequences that run at once
    max_num_batched_tokens   tokens that one pass computes; a longer prompt is computed in chunks
    prefix_caching      prompts take over what earlier ones with the same beginning have computed
    draft               what guesses tokens ahead: "ngram" (the text itself), "self" (the model's first layers), or the
                        folder of a smaller model with the same tokens; the text stays the same
    num_draft_tokens    tokens it guesses at most
    device, dtype       as in `train.load`
    compile             decode steps of fixed shape: on GPUs CUDA graphs, the default there; on a CPU compiled, for
                        max_num_seqs in step and without an int8 cache or prefix_caching: for benchmarks

    Below `generate` stand `requests` (checks), `add`, `step` and `abort`: what a server runs on.
    """

    def __init__(self, folder, device=None, dtype=None, quantize=None, kv_cache_dtype=None, block_size=16,
                 num_blocks=None, max_num_seqs=64, max_num_batched_tokens=2048, prefix_caching=True, draft=None,
                 num_draft_tokens=4, compile=None, group_size=64, calibration=None, prune=None, sparsity=0.5,
                 save=None):
        for name, value in (("block_size", block_size), ("num_blocks", num_blocks), ("max_num_seqs", max_num_seqs),
                            ("max_num_batched_tokens", max_num_batched_tokens), ("num_draft_tokens", num_draft_tokens)):
            if (value is not None or name != "num_blocks") and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}: it must be a whole number from 1")
        check_quantize(quantize, group_size, prune, sparsity, train.pick_device(device))
        if kv_cache_dtype not in (None, "int8"):
            raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}: it must be 'int8' or None")
        self.folder = Path(folder)
        if save and Path(save).resolve() == self.folder.resolve():
            raise UserError(f"--save {save}: the model itself lies there, and would be lost; give another folder")
        self.processes = train.Processes()                                   # torchrun's: each does its part of all
        self.model, self.tokenizer = open_folder(folder, device, dtype)
        self.quantize = (self.model.config.raw.get("quantization_config") or {}).get("method")
        if self.quantize and (quantize or prune or self.processes.size > 1):
            raise UserError(f"{folder}: its weights are in fewer bits already ({self.quantize}); it runs as it is, in "
                            "one process")
        if self.processes.size > 1:
            if prune or save or quantize in ("gptq", "awq"):
                raise UserError("several processes take int8 and int4; pruning, gptq, awq and saving want one")
            divide(self.model, self.processes)
        self.told = None
        if save:
            train.writable(save, "--save")
        if quantize or prune:
            ids = calibration() if callable(calibration) else calibration
            if ids is None and (prune == "wanda" or quantize in ("gptq", "awq")):
                raise ValueError("calibration is None: gptq, awq and wanda want token ids")
            self.told = compress(self.model, quantize, group_size, ids, prune, sparsity)
            self.quantize = quantize
        if save:
            save_compressed(self.model, self.tokenizer, save)
        c, weight = self.model.config, self.model.embed.weight
        layers = [module for module in self.model.modules() if isinstance(module, Compressed)]
        plain = sum(w.numel() for w in self.model.parameters()) - (0 if c.tied or layers else weight.numel())
        self.weights = plain + sum(layer.in_features * layer.out_features for layer in layers)
        self.weight_bytes = plain * weight.element_size() + sum(layer.read() for layer in layers)
        ready(self.model, compile and max_num_seqs == 1) if self.quantize else quicken(self.model)
        self.context, self.eos_ids, int8 = c.context, set(self.tokenizer.eos_ids), kv_cache_dtype == "int8"
        self.endless = not set(c.layers) & {*"aA"}                           # states alone: texts of any length
        self.room = math.inf if self.endless else c.context
        there = set(self.tokenizer.library.get_vocab(with_added_tokens=True).values())
        self.no_text = torch.tensor([i for i in range(c.vocab) if i not in there], device=weight.device)
        attends = c.layers.count("a") + c.layers.count("A") * c.capacity
        self.token_bytes = round(2 * attends * c.kv_heads * (
            c.head_dim + 4 if int8 else c.head_dim * weight.element_size()))
        if self.endless:
            num_blocks = num_blocks or 2 ** 40 // block_size
        elif num_blocks is None:
            num_blocks = max(1, min(memory_of(weight.device) // (self.token_bytes * block_size),
                                    max_num_seqs * -(-self.context // block_size)))
        (num_blocks,) = self.processes.agree(num_blocks)
        self.blocks = Blocks(num_blocks, block_size, prefix_caching)
        gpu, mixed = weight.device.type == "cuda", set(c.layers) != {"a"}
        compile = self.processes.size == 1 and (gpu if compile is None else compile)
        self.cache = (Mixed(self.model, self.blocks, int8) if mixed else
                      Pages(self.model, self.blocks, int8) if gpu else
                      Rows(self.model, self.blocks, max_num_seqs) if compile and not int8 and not prefix_caching else
                      Slabs(self.model, self.blocks, int8))
        self.state_bytes = self.cache.state_bytes() if mixed else 0
        if self.state_bytes:                                                 # states kept for prompts that begin alike
            self.blocks.most = int(min(1024, max(4, memory_of(weight.device) // 4 // self.state_bytes)))
        self.graphs = {} if compile and hasattr(self.cache, "graph") else None  # shape → decode step
        self.pool = torch.cuda.graph_pool_handle() if gpu else None
        self.scheduler = Scheduler(self.blocks, self.cache, max_num_seqs, max_num_batched_tokens)
        self.drafter = None if draft is None else self.make_drafter(draft, max_num_batched_tokens)
        self.num_draft_tokens = num_draft_tokens
        self.draft_tokens, self.accepted_tokens, self.constraints = 0, 0, None
        self.costs = {}                                                      # (rows, drafts or not) → seconds of a step

    def make_drafter(self, draft, budget):
        if draft == "ngram":
            return NGram()
        if draft == "self":
            return Drafter(train.first_layers(self.model, max(1, len(self.model.blocks) // 4)), budget)
        device, dtype = self.model.embed.weight.device, self.model.embed.weight.dtype
        try:
            model, tokenizer = load(draft, str(device), dtype)
        except UserError as error:
            raise UserError(f"draft {draft}: {error}") from None
        if tokenizer.library.get_vocab() != self.tokenizer.library.get_vocab():
            raise ValueError(f"draft {draft}: its tokens are not those of {self.folder}")
        return Drafter(quicken(model), budget, self.model.config.vocab)

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
            for room, where in ((self.room, f"the context of {self.context}"),
                                (pool, f"the cache of {self.blocks.total} blocks of {self.blocks.size}")):
                if len(ids) + new > room:
                    raise ValueError(f"the prompt ({len(ids)} tokens) and max_tokens ({new}) exceed {where}")
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        (seed,) = (sampling.seed,) if sampling.seed is not None else self.processes.agree(secrets.randbits(63))
        limit = sampling.max_tokens or min(self.room - len(ids), pool - len(ids), 128)
        requests = [Request(ids, sampling, seed, i, limit, Text(self.tokenizer, sampling.stop))
                    for i in range(sampling.n)]
        if sampling.regex is not None or sampling.json_schema is not None:
            self.constraints = self.constraints or Constraints(self.tokenizer, self.eos_ids, V)
            try:
                matcher = self.constraints.matcher(sampling)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
            for r in requests:
                r.matcher = matcher.deep_copy()
        return requests

    def add(self, prompt, **sampling):
        """Take in a prompt → its n requests, which the next steps work on. ValueError as in `generate`."""
        requests = self.requests(prompt, Sampling(**sampling))
        for r in requests:
            self.scheduler.add(r)
        return requests

    @torch.inference_mode()
    def abort(self, request):
        """End a request now; its blocks are free at once."""
        if request.finish_reason is None:
            self.scheduler.leave(request)
            request.finish_reason = "abort"
            if self.drafter:
                self.drafter.forget(request)

    @torch.inference_mode()
    def step(self):
        """One pass over the weights → the requests that got a token or ended with it."""
        began = time.perf_counter()
        if self.drafter:
            self.guess()
        segments = self.scheduler.plan()
        if not segments:
            return []
        if self.cache.recurrent:
            for r, _, _ in segments:
                r.before = self.cache.memory(r) if r.drafts else None
        ready = [r for r, _, stop in segments if stop >= len(r.ids)]         # only a computed last token has a next one
        logits = self.forward(segments)
        computed = self.draw_checked(logits, ready) if ready else {}
        for r, start, stop in segments:
            if r.drafts and computed[r] < stop:                              # back to the last token that is the text's
                self.cache.cut(r, computed[r])
                if r.before:
                    self.cache.restore(r, r.before)
                    computed[r] = start
        self.scheduler.advance([(r, start, computed.get(r, stop)) for r, start, stop in segments])
        if self.drafter:
            self.learn(segments, *self.processes.agree(time.perf_counter() - began))
        for r in ready:
            r.drafts, r.before = [], None
            if r.finish_reason:
                self.scheduler.leave(r)
                if self.drafter:
                    self.drafter.forget(r)
        return ready

    def guess(self):
        """Drafts for the requests that decode, but for those whose drafts have not been worth their time lately."""
        some, running = [], self.scheduler.running
        for r in running:
            r.drafts = []
        if (len(running), False) not in self.costs:                          # what a step takes without
            return
        for r in running:
            if r.table and r.left == 1:
                r.pause -= r.pause > 0
                some += [r] if not r.pause and len(r.ids) < r.capacity - 1 else []
        most = lambda r: min(self.num_draft_tokens, r.capacity - len(r.ids) - 1)
        if some:
            (proposed,) = self.processes.agree(self.drafter.propose(some, self.num_draft_tokens))
            for r, drafts in zip(some, proposed):
                r.drafts = drafts[:most(r)]

    def learn(self, segments, seconds):
        """Whether drafts pay. A step that checks drafts must bring as many more tokens as it takes more time."""
        if any(stop - start > 1 + len(r.drafts) for r, start, stop in segments):
            return                                                           # prompts among them: another kind of step
        drafted = [r for r, _, _ in segments if r.drafts]
        key = len(segments), bool(drafted)
        self.costs[key] = min(seconds, self.costs.get(key, seconds) * 1.02)
        plain = self.costs.get((len(segments), False), 0.0)
        extra = self.costs[key] / plain - 1 if plain else 0.0
        for r in drafted:
            r.worth += 0.25 * (r.gained - r.worth)
            if r.worth < extra:
                r.pause, r.rest, r.worth = r.rest, min(2 * r.rest, 256), extra + 0.5
            elif r.worth > 2 * extra:
                r.rest = 8

    def draw_checked(self, logits, ready):
        """Draw the next token of each request, and go on while it is the one that was guessed → {request: tokens that
        are computed, of its text}. logits: 1 + len(r.drafts) rows for each.
        """
        first = np.cumsum([0] + [1 + len(r.drafts) for r in ready])
        length, going = {r: len(r.ids) for r in ready}, list(zip(ready, first))
        for r in ready:
            r.gained = 0
        for i in range(1 + max(len(r.drafts) for r in ready)):
            rows = [at + i for _, at in going]
            whole = i == 0 and len(rows) == len(logits)
            self.draw(logits if whole else logits[torch.tensor(rows, device=logits.device)], [r for r, _ in going])
            going = [(r, at) for r, at in going
                     if not r.finish_reason and i < len(r.drafts) and r.ids[-1] == r.drafts[i]]
            for r, _ in going:
                r.gained = i + 1
            if not going:
                break
        self.draft_tokens += sum(len(r.drafts) for r in ready)
        self.accepted_tokens += sum(r.gained for r in ready)
        return {r: length[r] + r.gained for r in ready if r.drafts}

    def forward(self, segments):
        """Compute (request, start, stop)s → float32 logits [R, V] after those that end their request's tokens, and
        after each of its drafts.
        """
        decode = all(stop == len(r.ids) and r.left == 1 and not r.drafts for r, _, stop in segments)
        if self.graphs is not None and decode and (shape := self.cache.shape(segments)):
            return self.compiled(segments, shape)
        hidden = self.hidden(segments)
        begin = 0
        for r, start, stop in segments:
            if r.prompt_logprobs is not None and start < len(r.prompt):
                self.score_prompt(r, hidden[begin:begin + stop - start], start)
            begin += stop - start
        ends = np.cumsum([stop - start for _, start, stop in segments]) - 1
        rows = [row for end, (r, _, stop) in zip(ends, segments) if stop >= len(r.ids)
                for row in range(end - len(r.drafts), end + 1)]
        return self.model.head(hidden[torch.tensor(rows, dtype=torch.int64, device=hidden.device)]).float()

    def hidden(self, segments):
        """Compute (request, start, stop)s, all in one row → what the head reads [N, C]."""
        return hidden_states(self.model, self.cache, segments)

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

    @torch.inference_mode(False)                                             # as `hidden_states` says
    @torch.no_grad()
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
        step = torch.compile(step, dynamic=False, fullgraph=True, isolate_recompiles=True, options=dict(
            cpp_wrapper=True, guard_filter_fn=torch.compiler.skip_all_guards_unsafe))        # no Python between kernels
        several = tokens.numel() > 1 and not self.quantize
        with inductor.patch(size_asserts=False, **dict(                      # weights laid out for so many rows
                freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP") if several else {}):
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
        allowed = self.constraints.allow(logits, requests) if self.constraints else logits
        (tokens,) = self.processes.agree(sample(allowed, requests))
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
        return dict(draft_tokens=self.draft_tokens, accepted_tokens=self.accepted_tokens,
                    preemptions=s.preemptions, prefix_hits=self.blocks.hits, running=len(s.running),
                    waiting=len(s.waiting), free_blocks=len(self.blocks), total_blocks=self.blocks.total)


def bound(llm, machine, batch, context):
    """Decode tokens/s that memory allows: each step reads all weights that multiply, each row's keys and values, and
    its states, which it also writes.
    """
    return batch * machine.bandwidth / (llm.weight_bytes + batch * (context * llm.token_bytes + 2 * llm.state_bytes))


# --- 8. Chat templates and scores -------------------------------------------------------------------------------------

def short(value):
    """A value as an error names it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def chat_template(folder):
    """A folder's chat template (chat_template.jinja or tokenizer_config.json) → (text, its variables), or None."""
    folder = Path(folder)
    path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    about = train.read_json(path) if path.exists() else {}
    template = about.get("chat_template")
    if isinstance(template, list):
        wanted = (t for t in template if isinstance(t, dict) and t.get("name") == "default")
        template = next(wanted, {}).get("template")
    if own.exists():
        template = train.read_text(own)
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: chat_template is {short(template)}: it must be text")
    name = lambda t: t.get("content") if isinstance(t, dict) else t
    tokens = {k: name(about.get(k)) for k in ("bos_token", "eos_token")}
    return template and (template, {k: token for k, token in tokens.items() if isinstance(token, str)})


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
    tails = tuple(m[k:] for m in markers for k in range(1, len(m)))
    heads = tuple(m[:k] for m in markers for k in range(1, len(m)))

    def disarm(text):
        text = train.mend(text).replace(BREAK, "\ufffd")
        for marker in markers:
            text = text.replace(marker, marker[0] + BREAK + marker[1:])
        body = text.strip()                                                  # templates trim: breaks go inside of that
        if body and (body.startswith(tails) or body.endswith(heads) or any(body in marker for marker in markers)):
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


# --- 9. Benchmarks ----------------------------------------------------------------------------------------------------

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
    rng, shrink = np.random.default_rng(0), min(1.0, llm.room / (prompt_tokens[1] + new_tokens[1]))
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


def corpus_of(args):
    """The text of --data with the model's own tokens: its training part calibrates, its validation part is scored."""
    return train.load_corpus(args.data, "bpe", None, train.load_tokenizer(args.model))


SCORED = 2 ** 16                                                             # bytes of validation text


def compare(args):
    """Each way to compress a model, measured → a table, compare.png and a recommendation. The text that is scored is
    not the text that calibrates. Each model is written to a folder and read back: a user's sizes and bits.
    """
    ways = ["float32", "int8", "int4", "awq", "gptq"]
    device = train.pick_device(args.device)
    with contextlib.suppress(UserError):
        check_quantize("fp8", args.group_size, None, 0.5, device)
        ways.append("fp8")
    train.writable(".", "compare.png in")
    corpus, rows = corpus_of(args), []
    text = corpus.val_text[:SCORED].decode("utf-8", errors="ignore")
    machine = measure(device, 0.3)
    bar = train.tqdm(total=len(ways), desc="compare", leave=False, **train.quiet_bar())
    with bar, tempfile.TemporaryDirectory() as folder:
        for way in ways:
            bar.set_description(way)
            rows.append(compared(args, way, corpus, text, machine, Path(folder) / way))
            bar.update()
    base, best = rows[0], recommended(rows)
    lost = {r["way"]: r["bits_per_byte"] / base["bits_per_byte"] - 1 for r in rows}
    if args.json:
        show(json.dumps(dict(rows=rows, recommended=best["way"])), end="\n")
    else:
        show("MB on disk and in memory; tokens/s at 1 and at 8 sequences, of the memory bound\n\n"
             f"{'':8} bits/byte    lost    disk  memory    at 1 bound    at 8 bound  prefill\n")
        for r in rows:
            show(f"{r['way']:8} {r['bits_per_byte']:9.4f} {lost[r['way']]:+7.2%} {r['disk'] / 1e6:7.1f} "
                 f"{r['memory'] / 1e6:7.1f} {r['decode_1']:7,.0f} {r['share_1']:5.0%} {r['decode_8']:7,.0f} "
                 f"{r['share_8']:5.0%} {r['prefill']:8,.0f}\n")
        show(f"\ntake --quantize {best['way']}: {lost[best['way']]:+.2%} bits per byte, "
             f"{base['disk'] / best['disk']:.1f} times smaller,\n"
             f"{best['decode_1'] / base['decode_1']:.1f} times as fast at batch 1", end="\n")
    plot_compared(rows, Path("compare.png"))


def recommended(rows):
    """Of the ways that lose at most 1%, or the one that loses least: the fastest at batch 1, or, where none is faster
    than float32 (`rows[0]`), the smallest. int4, awq and gptq are one format: among equals the one that loses least.
    """
    base, least = rows[0], min(r["bits_per_byte"] for r in rows[1:])
    fit = [r for r in rows[1:] if r["bits_per_byte"] <= max(1.01 * base["bits_per_byte"], least)]
    fastest = max(r["decode_1"] for r in fit)
    equals = [r for r in fit if r["decode_1"] >= 0.9 * fastest]
    if fastest <= base["decode_1"]:
        equals = [r for r in fit if r["memory"] == min(r["memory"] for r in fit)]
    return min(equals, key=lambda r: r["bits_per_byte"])


def compared(args, way, corpus, text, machine, folder):
    """One row of `compare`."""
    options = dict(device=args.device, dtype=args.dtype)
    if way == "float32":
        made, folder = None, Path(args.model)
    else:
        made = LLM(args.model, **options, quantize=way, group_size=args.group_size, calibration=corpus.train,
                   save=folder)
    llm = made or LLM(folder, **options)
    row = dict(way=way, bits_per_byte=score(llm, text)["bits_per_byte"], memory=memory_held(llm.model),
               disk=sum(p.stat().st_size for p in folder.glob("*.safetensors")))
    del made, llm
    for batch in (1, 8):
        new, prompt = 32, min(args.prompt_tokens, 64)
        llm = LLM(folder, **options, max_num_seqs=batch, num_blocks=batch * -(-(prompt + new + 1) // 16),
                  prefix_caching=False, compile=bool(args.compile))
        prompt = max(1, min(prompt, llm.room - new))
        r = bench(llm, machine, batch, prompt, new)
        row |= {f"decode_{batch}": r["decode_tokens_per_second"], f"share_{batch}": r["bound_share"]}
    llm = LLM(folder, **options, max_num_seqs=1, prefix_caching=False, compile=False)
    return row | dict(prefill=bench(llm, machine, 1, min(512, llm.room - 2), 1)["prefill_tokens_per_second"])


def memory_held(model):
    """Bytes of a model's weights as they lie in memory, copies in another order included."""
    whole = sum(w.numel() * w.element_size() for w in {w.data_ptr(): w for w in model.parameters()}.values())
    for module in model.modules():
        if isinstance(module, Compressed):
            whole += module.held()
        elif isinstance(module, Table):
            whole += module.q.numel() + 4 * module.scale.numel()
        elif getattr(module, "packed", None) is not None:
            whole += module.weight.numel() * module.weight.element_size()
    return whole


def plot_compared(rows, path):
    """compare.png: what each way costs in bits per byte, and what it gives in size and speed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), dpi=120, layout="constrained")
    for r in rows:
        left.plot(r["disk"] / 1e6, r["bits_per_byte"], "o", color="#08519c")
        left.annotate(r["way"], (r["disk"] / 1e6, r["bits_per_byte"]), xytext=(6, 4), textcoords="offset points")
    left.set(xlabel="MB on disk", ylabel="bits per byte", xlim=(0, None))
    places = np.arange(len(rows))
    for shift, batch, color in ((-0.2, 1, "#08519c"), (0.2, 8, "#6baed6")):
        right.bar(places + shift, [r[f"decode_{batch}"] for r in rows], 0.4, color=color, label=f"batch {batch}")
    right.set(ylabel="tokens/s", xticks=places, xticklabels=[r["way"] for r in rows])
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15, y=0.15)
    with train.replacing(path) as beside:
        figure.savefig(beside, format="png")
    plt.close(figure)


# --- 10. The server: OpenAI's interface on the engine -----------------------------------------------------------------
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
            times = Counter(name for name, _ in pairs)
            twice = train.mend(next(name for name in times if times[name] > 1))[:100]
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
    """What `response_format` and `regex` ask for, as settings."""
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
        if "top_k" in settings:
            settings["top_k"] = max(settings["top_k"], 0)                    # −1 is off, too
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
        self.room, self.template = min(llm.room, llm.blocks.total * llm.blocks.size), chat_template(llm.folder)
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
        if len(messages) > self.room:
            raise Refused(400, f"messages are {len(messages)}: they exceed the context of {self.room}",
                          param="messages", code="context_length_exceeded")
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
            self.llm.abort(r)
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


# --- 11. The command line ---------------------------------------------------------------------------------------------

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
    p.add_argument("--logit-bias", type=tokens_json, metavar="JSON", help='added to logits: \'{"token id": number}\'')
    p.add_argument("--seed", type=int, help="the same text again (a new one each time)")
    p.add_argument("--stop", action="append", help="end before this text; may be given several times")
    p.add_argument("--n", type=int, default=1, help="that many continuations")
    p.add_argument("--ignore-eos", action="store_true", help="go on past the end token")
    p.add_argument("--json-schema", metavar="JSON", help="the text is JSON of this schema")
    p.add_argument("--regex", help="all of the text matches this regular expression")
    p.add_argument("--logprobs", type=int, metavar="K", help="log probabilities of each token and the K likeliest")
    p.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")
    p.add_argument("--device", help="cpu, cuda, mps (the best there is)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                   help="of weights and cache (float32 on a CPU, else the folder's)")
    p.add_argument("--quantize", choices=sorted(QUANTIZED), help="keep the weights in fewer bits (as they are); int4 "
                   "rounds to nearest, gptq and awq are the same size and closer, by calibration text")
    p.add_argument("--group-size", type=positive(int), default=64,
                   help="weights that share a scale in 4 bits (%(default)s)")
    p.add_argument("--data", help="calibration text for gptq, awq and wanda: a file, a folder or a glob, of which the "
                   "training part is read (the Python standard library)")
    p.add_argument("--prune", choices=PRUNED, help="set the weights that count least to zero")
    p.add_argument("--sparsity", type=sparsity, default=0.5,
                   help="their share of each row, or 2:4, two of four (%(default)s)")
    p.add_argument("--save", metavar="DIR", help="write the compressed model, and end unless there is a prompt")
    p.add_argument("--compare", action="store_true", help="measure each way to compress the model: a table, a plot "
                   "(compare.png) and which to take")
    p.add_argument("--kv-cache-dtype", choices=["int8"], help="of keys and values (as the weights)")
    p.add_argument("--block-size", type=positive(int), default=16, help="tokens a block of the cache (%(default)s)")
    p.add_argument("--num-blocks", type=positive(int), help="blocks of the cache (what a part of the memory holds)")
    p.add_argument("--max-num-seqs", type=positive(int), default=64, help="sequences at once (%(default)s)")
    p.add_argument("--max-num-batched-tokens", type=positive(int), default=2048,
                   help="tokens a pass; longer prompts go in chunks (%(default)s)")
    p.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True,
                   help="take over what an earlier prompt with the same beginning has computed")
    p.add_argument("--draft", metavar="WHAT", help="guess tokens ahead and check several in one pass; the text stays "
                   "the same: ngram (the text itself), self (the first layers), or a smaller model's folder")
    p.add_argument("--num-draft-tokens", type=positive(int), default=4, help="guessed at most (%(default)s)")
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


def tokens_json(text):
    """--logit-bias, for the parser."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{short(text)}: it must be numbers by token ids, as in {{"42": -100}}')
    return value


def sparsity(text):
    """--sparsity, for the parser."""
    value = text if text == "2:4" else float(text)
    if value != "2:4" and not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a share from 0 to below 1, or 2:4")
    return value


def show(text, end=""):
    """Print to standard output at once; a code page that lacks a character gets a replacement, never an end."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end=end, flush=True)


def complete(llm, machine, prompt, sampling, as_json):
    """Generate for one prompt, streaming, then say how fast it was."""
    requests = llm.requests(prompt, sampling)
    t, first, last, early = time.perf_counter(), None, None, 0
    for _ in llm.run(requests):
        last = time.perf_counter()
        if first is None and all(r.tokens for r in requests):
            first, early = last, sum(len(r.tokens) for r in requests)
        if len(requests) == 1 and not as_json:
            show(requests[0].news())
    if failed := next((r.error for r in requests if r.error), None):
        raise UserError(failed)
    generated, prompt_tokens = sum(len(r.tokens) for r in requests), len(requests[0].prompt)
    steps = max(len(r.tokens) for r in requests) - 1
    decode = (generated - early) / (last - first) if last > first else 0.0
    speed = dict(prefill=prompt_tokens / (first - t), decode=decode)
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
    if decode:
        limit = bound(llm, machine(), len(requests), prompt_tokens + steps / 2)
        line += (f" · generated {generated} at {speed['decode']:,.0f}/s, "
                 f"{speed['decode'] / limit:.0%} of what the memory allows")
    if llm.draft_tokens:
        line += f" · {llm.accepted_tokens} of {llm.draft_tokens} drafts were right"
    print(line, file=sys.stderr)
    return requests


def tell(llm, r):
    """The log probabilities that a request was asked for, a token a line, on standard error."""
    for tokens, logprobs in ((r.prompt, r.prompt_logprobs), (r.tokens, r.logprobs)):
        for token, likely in zip(tokens, logprobs or []):
            print(f"{llm.tokenizer.decode([token])!r:20}", *(f"{llm.tokenizer.decode([i])!r} {p:.3f}"
                                                             for i, p in (likely or {}).items()), file=sys.stderr)


def read_prompt():
    """All of standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on standard input is not {error.encoding} at byte {error.start}; convert it "
                        "(iconv -t utf-8)") from None


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
        except KeyboardInterrupt:                                            # of a text that grows too long
            print("\n(stopped; Ctrl-C at the prompt ends)", file=sys.stderr)
            del messages[-1:]


def once(make):
    """A function that makes its value when it is first called for, and keeps it."""
    kept = []
    return lambda: kept[0] if kept else kept.append(make()) or kept[0]


def main(argv=None):
    """Generate, score or time by command-line flags → exit code. Of several processes the first one speaks for all."""
    quiet = contextlib.ExitStack()
    try:
        if os.environ.get("RANK", "0").lstrip("0").isdigit():
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        args = arguments().parse_args(argv)
        sampling = Sampling(**{k: getattr(args, k) for k in Sampling.__dataclass_fields__})
        doors = bool(args.score), args.bench, args.bench_serving, args.serve, args.compare, args.prompt is not None
        if sum(doors) > 1:
            raise UserError("a prompt, --score, --bench, --bench-serving, --compare and --serve: give one of them")
        if args.compare and (args.quantize or args.prune or args.save):
            raise UserError("--compare tries every --quantize by itself: give no --quantize, --prune or --save with it")
        if args.save and not (args.quantize or args.prune):
            raise UserError("--save writes a compressed model: give --quantize or --prune")
        text = train.read_text(args.score) if args.score else None
        options = {k: getattr(args, k) for k in ("device", "dtype", "quantize", "kv_cache_dtype", "block_size",
                                                 "num_blocks", "max_num_seqs", "max_num_batched_tokens",
                                                 "prefix_caching", "draft", "num_draft_tokens", "compile", "group_size",
                                                 "prune", "sparsity", "save")}
        options["calibration"] = once(lambda: corpus_of(args).train)
        if args.compare:
            compare(args)
            return 0
        if args.bench:                                                       # all of the batch in step
            room = -(-(args.prompt_tokens + args.new_tokens + 1) // args.block_size)
            options |= dict(num_blocks=args.batch * room, max_num_seqs=args.batch, prefix_caching=False,
                            max_num_batched_tokens=max(args.max_num_batched_tokens, args.batch * args.prompt_tokens),
                            compile=args.compile is not False and train.compiler_there())
        llm = LLM(args.model, **options)
        if llm.told:
            nearest = llm.told["nearest"]
            print(f"{args.quantize or args.prune}: {llm.told['layers']} layers" +
                  (f", {len(nearest)} of them rounded to nearest, as calibration says nothing of them: "
                   f"{', '.join(nearest[:3])}{' …' if len(nearest) > 3 else ''}" if nearest else ""), file=sys.stderr)
        if args.save and args.prompt is None and not (args.score or args.bench or args.bench_serving):
            return 0
        sampling.check(llm.model.config.vocab)
        machine = once(lambda: measure(llm.model.embed.weight.device.type, 0.3))
        if args.score:
            result = score(llm, text)
            show(json.dumps(result) if args.json else
                 f"{result['bits_per_byte']:.4f} bits per byte, {result['nats_per_token']:.4f} nats per token, "
                 f"over {result['tokens']:,} tokens ({result['bytes']:,} bytes)", end="\n")
        elif args.bench:
            if args.prompt_tokens + args.new_tokens > llm.room:
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
            if llm.processes.size > 1:
                raise UserError("--serve: one process serves; start it without torchrun")
            serve(llm, args.host, args.port, args.api_key, args.max_queue, args.timeout)
        elif args.prompt is None and sys.stdin.isatty() and llm.processes.size == 1:
            prompt_loop(llm, machine, sampling)
        else:
            prompt = args.prompt
            if prompt is None:
                (prompt,) = llm.processes.agree(None if llm.processes.rank else read_prompt())
            complete(llm, machine, prompt, sampling, args.json)
        return 0
    except (UserError, ValueError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not train.memory_ended(error):
            raise
        print("infer.py: the memory ended; give a smaller --num-blocks, --max-num-seqs or --max-num-batched-tokens, or "
              f"--quantize int8 ({error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    finally:
        quiet.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    leave(main)
