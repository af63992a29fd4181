"""FlashAttention: the same attention, and no T × S matrix is ever stored.

    softmax needs the largest score and the sum of a whole row; both can be kept up to date as keys come, tile by tile:

    m' = max(m, max_j s_j)      α = 2^(m − m')      p_j = 2^(s_j − m')
    l' = α l + Σ_j p_j          acc' = α acc + Σ_j p_j v_j           in the end  o = acc / l,  lse = m + log₂ l

    The backward pass makes p anew, p_ij = 2^(s_ij − lse_i), which is cheaper than to have read it:

    δ_i = do_i · o_i            dp_ij = do_i · v_j                   ds_ij = p_ij (dp_ij − δ_i)
    dv_j = Σ_i p_ij do_i        dk_j = c Σ_i ds_ij q_i               dq_i = c Σ_j ds_ij k_j

    name        shape           meaning
    q           [B, H, T, D]    queries of H heads; o, do, dq alike
    k, v        [B, G, S, D]    keys and values; H / G query heads share one
    s           tile            scores in units of log 2, for a GPU has 2^x and not e^x: s = c log₂e (q · k)
    c           scalar          `scale`, 1/√D unless given
    at          i + S − T       the query's place among the keys: the last query stands at the last key
    m, l, acc   a query tile's  largest score so far, Σ 2^(s − m), Σ 2^(s − m) v
    lse         [B, H, T]       log₂ Σ_j 2^s_ij, kept beside o for the backward pass; −∞ where no key is seen
    δ           [B, H, T]       delta: what a row's dp have in common, which softmax takes out
    sink        [H]             the logit of a key that has no value: a head may look at nothing

Why it pays: a chip multiplies far faster than it reads. The naive form writes and reads T × S scores several times in
slow memory; this one reads each key once for every tile of BLOCK_M queries and keeps the rest on the chip: see
`bytes_moved`. Decoding has one query against a long cache, so there the keys are split over programs, and what each
found is merged by its lse; the cache lies in pages that a table names (PagedAttention).

FlashAttention: Dao et al. 2022, arXiv 2205.14135; FlashAttention-2: 2307.08691. Flash-Decoding: Dao et al. 2023,
crfm.stanford.edu/2023/10/12/flashdecoding.html. PagedAttention: 2309.06180. Sinks: 2309.17453, as logits 2508.10925.
ALiBi: 2108.12409.

`python flash.py` shows which tiles are visited, the difference, the bytes and the memory of both forms; on a GPU also
TFLOP/s beside torch's backends, and decoding beside the speed of a copy.
"""
import argparse
import math
import time
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F

from attention import (_exact, _floats, _peak_megabytes, _tanh, _under_autocast, attention, attention_backward_numpy,
                       attention_numpy, has_kernel, jit, leave, on_kernel, tl, triton)

if triton:
    from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)                                                    # e^x = 2^(x log₂e)


# --- 1. Which tiles are visited, and what that costs ------------------------------------------------------------------
#
# These two are plain Python, called by the NumPy loops below and, compiled, by the kernels.

def key_tiles(i0, T, S, window, CAUSAL, BLOCK_M, BLOCK_N):
    """The keys that queries i0 … i0 + BLOCK_M − 1 see → four edges. Tiles of BLOCK_N keys from the first edge to the
    last are visited; those from the second to the third are seen whole, by every query, and need no mask.
    """
    first, last = i0 + S - T, min(i0 + BLOCK_M, T) - 1 + S - T               # where these queries stand among the keys
    lo, full_lo, full_hi, hi = 0, 0, S, S
    if CAUSAL:
        full_hi, hi = max(0, min(S, first + 1)), max(0, min(S, last + 1))
    if window is not None:
        lo = max(0, first - window + 1) // BLOCK_N * BLOCK_N
        full_lo = (max(0, last - window + 1) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return lo, full_lo, max(full_hi // BLOCK_N * BLOCK_N, full_lo), hi


def query_tiles(j0, T, S, window, CAUSAL, BLOCK_M, BLOCK_N):
    """The queries that see keys j0 … j0 + BLOCK_N − 1 → four edges, as above: the same picture, read down a column."""
    first, last = j0 + T - S, min(j0 + BLOCK_N, S) - 1 + T - S               # the queries that stand at these keys
    lo, full_lo, full_hi, hi = 0, 0, T, T
    if CAUSAL:
        lo = max(0, first) // BLOCK_M * BLOCK_M
        full_lo = (max(0, last) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if window is not None:
        full_hi, hi = max(0, min(T, first + window)), max(0, min(T, last + window))
    return lo, full_lo, max(full_hi // BLOCK_M * BLOCK_M, full_lo), hi


def bytes_moved(B, H, G, T, S, D, causal=True, window=None, size=2, BLOCK_M=128, BLOCK_N=128):
    """Bytes between slow and fast memory in a forward pass, numbers of `size` bytes → (naive, tiled).

    Naive: q, k, v in and o out once; scores written, read by softmax, written, read by the product with v. Tiled: q in,
    o and lse (4 bytes) out once, and k and v for each tile of queries as far as these see. arXiv 2205.14135, theorem 2.
    """
    ends = B * H * 2 * T * D * size
    naive = ends + B * G * 2 * S * D * size + 4 * B * H * T * S * size
    keys = 0
    for i0 in range(0, T, BLOCK_M):
        lo, _, _, hi = key_tiles(i0, T, S, window, causal, BLOCK_M, BLOCK_N)
        keys += max(min(-(-hi // BLOCK_N) * BLOCK_N, S) - lo, 0)
    return naive, ends + B * H * (2 * keys * D * size + 4 * T)


# --- 2. The algorithm in NumPy, tile for tile as the kernels ----------------------------------------------------------

def units(scale, softcap):
    """What makes scores of products → (unit, cap): s = unit · q·k, or with a cap s = unit · tanh(cap · q·k)."""
    return (LOG2E * scale, None) if softcap is None else (LOG2E * softcap, scale / softcap)


def scores_numpy(s, at, j, end, unit, cap, slope, window, causal):
    """Products q·k [M, N] of queries at `at` [M, 1] and keys j [1, N] → (s, the cap's own slope).

    The order of the options: cap, ALiBi, mask. Keys from `end` on do not exist.
    """
    slope_of_cap = 1
    if cap is not None:
        s = np.tanh(s * cap)
        slope_of_cap = 1 - s * s
    s = s * unit
    if slope is not None:
        s = s - slope * np.abs(at - j)
    seen = j < end
    if causal:
        seen = seen & (j <= at)
    if window is not None:
        seen = seen & (at - j < window)
    return np.where(seen, s, -np.inf), slope_of_cap


def softmax_step_numpy(s, m_i, l_i, acc):
    """A tile of scores [M, N] joins what was seen before → p [M, N], m_i [M], l_i [M], acc [M, D]."""
    m_new = np.maximum(m_i, s.max(1))
    m_safe = np.where(m_new > -np.inf, m_new, 0)                             # nothing seen yet: −∞ − −∞ is no number
    p = np.exp2(s - m_safe[:, None])
    alpha = np.exp2(m_i - m_safe)
    return p, m_new, alpha * l_i + p.sum(1), alpha[:, None] * acc


def finish_numpy(m_i, l_i, acc):
    """→ o [M, D], lse [M]: zeros and −∞ where no key was seen."""
    some = l_i > 0
    l_safe = np.where(some, l_i, 1)
    return acc / l_safe[:, None], np.where(some, m_i + np.log2(l_safe), -np.inf)


def _forward_numpy(q, k, v, causal, window, softcap, sinks, alibi, scale, BLOCK_M, BLOCK_N):
    """→ o [B, H, T, D], lse [B, H, T]."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    unit, cap = units(D ** -0.5 if scale is None else scale, softcap)
    o, lse = np.zeros_like(q), np.zeros((B, H, T), q.dtype)
    for b, h, i0 in np.ndindex(B, H, -(-T // BLOCK_M)):                      # a program each
        i0 *= BLOCK_M
        i, g = slice(i0, i0 + BLOCK_M), h // (H // G)
        at = np.arange(i0, min(i0 + BLOCK_M, T))[:, None] + S - T
        slope = None if alibi is None else alibi[h] * LOG2E
        q_i = q[b, h, i]                                                     # [M, D]: read once, kept
        # A sink is a key seen first: it has a score, and no value.
        m_i = np.full(len(q_i), -np.inf if sinks is None else sinks[h] * LOG2E)
        l_i = np.full(len(q_i), 0.0 if sinks is None else 1.0)
        acc = np.zeros(q_i.shape)
        lo, _, _, hi = key_tiles(i0, T, S, window, causal, BLOCK_M, BLOCK_N)
        for j0 in range(lo, hi, BLOCK_N):
            k_j, v_j = k[b, g, j0:j0 + BLOCK_N], v[b, g, j0:j0 + BLOCK_N]    # [N, D]
            j = np.arange(j0, j0 + len(k_j))[None, :]
            s, _ = scores_numpy(q_i @ k_j.T, at, j, S, unit, cap, slope, window, causal)
            p, m_i, l_i, acc = softmax_step_numpy(s, m_i, l_i, acc)
            acc = acc + p @ v_j
        o[b, h, i], lse[b, h, i] = finish_numpy(m_i, l_i, acc)               # written once
    return o, lse


def flash_attention_numpy(q, k, v, causal=True, window=None, softcap=None, sinks=None, alibi=None, scale=None,
                          BLOCK_M=64, BLOCK_N=64):
    """q [B, H, T, D], k, v [B, G, S, D] → [B, H, T, D]; arguments as `flash_attention`."""
    return _forward_numpy(q, k, v, causal, window, softcap, sinks, alibi, scale, BLOCK_M, BLOCK_N)[0]


def flash_attention_backward_numpy(q, k, v, causal=True, window=None, softcap=None, sinks=None, alibi=None, scale=None,
                                   BLOCK_M=64, BLOCK_N=64, *, grad):
    """grad [B, H, T, D] → dq [B, H, T, D], dk, dv [B, G, S, D], and dsinks [H] if there are sinks."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    unit, cap = units(scale, softcap)
    o, lse = _forward_numpy(q, k, v, causal, window, softcap, sinks, alibi, scale, BLOCK_M, BLOCK_N)
    delta = (grad * o).sum(-1)                                               # [B, H, T]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)

    def tile(b, h, i0, j0):                                                  # what both kernels make anew
        i, j, g = slice(i0, min(i0 + BLOCK_M, T)), slice(j0, min(j0 + BLOCK_N, S)), h // (H // G)
        at, keys = np.arange(i.start, i.stop)[:, None] + S - T, np.arange(j.start, j.stop)[None, :]
        slope = None if alibi is None else alibi[h] * LOG2E
        s, slope_of_cap = scores_numpy(q[b, h, i] @ k[b, g, j].T, at, keys, S, unit, cap, slope, window, causal)
        row = lse[b, h, i, None]
        p = np.exp2(s - np.where(row > -np.inf, row, 0))                     # a row that sees no key: all p are 0
        ds = p * (grad[b, h, i] @ v[b, g, j].T - delta[b, h, i, None]) * slope_of_cap
        return p, ds, i, j                                                   # [M, N], [M, N]
    for b, h, i0 in np.ndindex(B, H, -(-T // BLOCK_M)):                      # dq: a program for each tile of queries
        lo, _, _, hi = key_tiles(i0 * BLOCK_M, T, S, window, causal, BLOCK_M, BLOCK_N)
        for j0 in range(lo, hi, BLOCK_N):
            _, ds, i, j = tile(b, h, i0 * BLOCK_M, j0)
            dq[b, h, i] += scale * ds @ k[b, h // (H // G), j]
    for b, g, j0 in np.ndindex(B, G, -(-S // BLOCK_N)):                      # dk, dv: one for each tile of keys, which
        lo, _, _, hi = query_tiles(j0 * BLOCK_N, T, S, window, causal, BLOCK_M, BLOCK_N)
        for h in range(g * (H // G), (g + 1) * (H // G)):                    # sums over the heads that share them, so
            for i0 in range(lo, hi, BLOCK_M):                                # no two programs add to one number
                p, ds, i, j = tile(b, h, i0, j0 * BLOCK_N)
                dv[b, g, j] += p.T @ grad[b, h, i]
                dk[b, g, j] += scale * ds.T @ q[b, h, i]
    if sinks is None:
        return dq, dk, dv
    return dq, dk, dv, -(np.exp2(sinks[:, None] * LOG2E - lse) * delta).sum((0, 2))                  # its dp is 0


def _sequences(cu_seqlens_q, cu_seqlens_k):
    """The slices of each sequence's queries and keys."""
    q, k = (np.asarray(cu).tolist() for cu in (cu_seqlens_q, cu_seqlens_k))
    return list(zip(map(slice, q, q[1:]), map(slice, k, k[1:])))


def flash_attention_varlen_numpy(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """q [total_q, H, D], k, v [total_k, G, D] → [total_q, H, D]: a loop over the sequences of the pack."""
    o, heads = np.zeros_like(q), lambda x: x.swapaxes(0, 1)[None]            # [tokens, ·, D] → [1, ·, tokens, D]
    for i, j in _sequences(cu_seqlens_q, cu_seqlens_k):
        o[i] = flash_attention_numpy(heads(q[i]), heads(k[j]), heads(v[j]), **options)[0].swapaxes(0, 1)
    return o


def flash_attention_varlen_backward_numpy(q, k, v, cu_seqlens_q, cu_seqlens_k, *, grad, **options):
    """grad [total_q, H, D] → dq, dk, dv as q, k, v, and dsinks [H] if there are sinks."""
    sinks, heads = options.get("sinks"), lambda x: x.swapaxes(0, 1)[None]
    grads = [np.zeros_like(x) for x in (q, k, v, sinks) if x is not None]
    for i, j in _sequences(cu_seqlens_q, cu_seqlens_k):
        parts = flash_attention_backward_numpy(heads(q[i]), heads(k[j]), heads(v[j]), **options, grad=heads(grad[i]))
        for whole, part, where in zip(grads, parts, (i, j, j)):
            whole[where] = part[0].swapaxes(0, 1)
        if sinks is not None:
            grads[3] += parts[3]
    return tuple(grads)


def merge_numpy(parts, lse, sink=None):
    """What several programs found of one query: parts [n, D], lse [n] → [D]. Each weighs as much as it saw: 2^lse."""
    m = max(lse.max(), -np.inf if sink is None else sink * LOG2E)
    w = np.exp2(lse - (m if m > -np.inf else 0))
    l = w.sum() + (0 if sink is None else np.exp2(sink * LOG2E - m))
    return w @ parts / (l if l > 0 else 1)


def flash_decode_numpy(q, k_pages, v_pages, block_table, lengths, k_scale=None, v_scale=None, window=None, softcap=None,
                       sinks=None, alibi=None, scale=None, splits=2, BLOCK_N=16):
    """q [B, (T,) H, D], pages [P, page, G, D], block_table [B, n], lengths [B] → as q; arguments as `flash_decode`."""
    if q.ndim == 3:
        return flash_decode_numpy(q[:, None], k_pages, v_pages, block_table, lengths, k_scale, v_scale, window, softcap,
                                  sinks, alibi, scale, splits, BLOCK_N)[:, 0]
    (B, T, _, D), (_, page, G, _), R = q.shape, k_pages.shape, q.shape[2] // k_pages.shape[2]
    unit, cap = units(D ** -0.5 if scale is None else scale, softcap)
    o = np.zeros_like(q)
    for b, g in np.ndindex(B, G):
        rows = q[b, :, g * R:(g + 1) * R].reshape(T * R, D)                  # queries and heads of a group: one tile
        h = g * R + np.arange(T * R) % R
        at = (lengths[b] - T + np.arange(T * R) // R)[:, None]
        slope = None if alibi is None else alibi[h, None] * LOG2E
        lo = 0 if window is None else max(0, int(lengths[b]) - T - window + 1)
        share = -(-(int(lengths[b]) - lo) // (splits * BLOCK_N)) * BLOCK_N   # keys for each program
        parts, lses = np.zeros((splits, T * R, D), o.dtype), np.zeros((splits, T * R), o.dtype)
        for split in range(splits):                                          # a program each
            begin = lo + split * share
            end = min(begin + share, int(lengths[b]))
            m_i, l_i, acc = np.full(T * R, -np.inf), np.zeros(T * R), np.zeros((T * R, D))
            for j0 in range(begin, end, BLOCK_N):
                j = np.arange(j0, min(j0 + BLOCK_N, end))
                where = block_table[b, j // page], j % page, g               # a page and a slot for each key
                k_j, v_j = k_pages[where], v_pages[where]                    # [N, D]
                s = rows @ k_j.T.astype(rows.dtype)
                s = s if k_scale is None else s * k_scale[where]             # int8: k = scale · integer, moved out of
                s, _ = scores_numpy(s, at, j[None], end, unit, cap, slope, window, True)             # the product
                p, m_i, l_i, acc = softmax_step_numpy(s, m_i, l_i, acc)
                p = p if v_scale is None else p * v_scale[where]
                acc = acc + p @ v_j
            parts[split], lses[split] = finish_numpy(m_i, l_i, acc)
        for r in range(T * R):
            sink = None if sinks is None else sinks[h[r]]
            o[b, r // R, h[r]] = merge_numpy(parts[:, r], lses[:, r], sink)
    return o


# --- 3. The kernels: the same lines, a tile in one program's registers ------------------------------------------------
#
# X_at is the tuple of X's strides (batch, head, token, number), so tensors are taken as they lie; where it is None, X
# is a descriptor, and the chip's copy engine brings tiles (from Hopper on: no registers for addresses, zeros past the
# ends). A pack of sequences is one row of the batch in which each begins at its offset in Cu; a dense batch has no Cu.
# Offsets are int64. The loop over tiles runs in three parts, of which only the first and the last, at the edges of what
# is seen, need a mask.

_key_tiles, _query_tiles = jit(key_tiles), jit(query_tiles)


@jit
def _program(Cu, Owner, tiles, heads, BLOCK: tl.constexpr):
    """What this program has to do → (sequence, head, tile of the sequence). In a pack, Owner says whose a tile is."""
    program = tl.program_id(0).to(tl.int64)
    b, h, tile = program // tiles // heads, program // tiles % heads, program % tiles
    if Cu is not None:
        b = tl.load(Owner + tile).to(tl.int64)
        tile -= tl.load(Cu + b) // BLOCK + b
    return b, h, tile.to(tl.int32)


@jit
def _sequence(Cu, b, N):
    """Where sequence b lies → (row of the batch, its first token there, its length)."""
    row, start, length = b, 0, N
    if Cu is not None:
        row, start = 0, tl.load(Cu + b).to(tl.int64)
        length = (tl.load(Cu + b + 1) - start).to(tl.int32)
    return row, start, length


@jit
def _head(X, X_at, row, h, start):
    """Where a sequence's tokens begin, in one head. A descriptor knows by itself."""
    if X_at is not None:
        X += row * X_at[0] + h * X_at[1] + start * X_at[2]
    return X


@jit
def _load(X, X_at, row, h, first, N: tl.constexpr, d, end, D: tl.constexpr, EDGE: tl.constexpr):
    """Tokens first … first + N − 1 of one head, numbers d [BLOCK_D] → [N, BLOCK_D]; 0 from token `end` on, and past D.
    X is a pointer to the head, or a descriptor, which wants to be told row and h.
    """
    if X_at is None:
        x = X.load([row.to(tl.int32), h.to(tl.int32), first, 0]).reshape([N, d.shape[0]])
    else:
        token = first + tl.arange(0, N)
        here = X + token.to(tl.int64)[:, None] * X_at[2] + d.to(tl.int64)[None, :] * X_at[3]
        if EDGE:
            x = tl.load(here, mask=(token < end)[:, None] & (d < D)[None, :], other=0.)
        elif d.shape[0] == D:
            x = tl.load(here)
        else:
            x = tl.load(here, mask=(d < D)[None, :], other=0.)
    return x


@jit
def _store(X, X_at, token, d, end, x, D: tl.constexpr):
    here = X + token.to(tl.int64)[:, None] * X_at[2] + d.to(tl.int64)[None, :] * X_at[3]
    tl.store(here, x, mask=(token < end)[:, None] & (d < D)[None, :])


@jit
def _dot(a, b, c):
    return tl.dot(a, b, c, input_precision="ieee")                           # float32 is float32, not tf32


@jit
def _scores(s, at, j, end, cap, slope, window, CAUSAL: tl.constexpr, EDGE: tl.constexpr):
    """As `scores_numpy`, but still to be multiplied by `unit`, which 2^(s · unit − m) does in one instruction. at and j
    are [M, 1] and [1, N], or [1, M] and [N, 1].
    """
    slope_of_cap = 1.
    if cap is not None:
        s = _tanh(s * cap)
        slope_of_cap = 1 - s * s
    if slope is not None:
        s = s - slope * tl.abs(at - j).to(tl.float32)
    if EDGE:
        seen = j < end
        if CAUSAL:
            seen = seen & (j <= at)
        if window is not None:
            seen = seen & (at - j < window)
        s = tl.where(seen, s, -float("inf"))
    return s, slope_of_cap


@jit
def _softmax_step(s, unit, m_i, l_i, acc):
    m_new = tl.maximum(m_i, tl.max(s, 1) * unit)
    m_safe = tl.where(m_new > -float("inf"), m_new, 0.)
    p = tl.exp2(s * unit - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    return p, m_new, alpha * l_i + tl.sum(p, 1), alpha[:, None] * acc


@jit
def _finish(m_i, l_i, acc):
    some = l_i > 0
    l_safe = tl.where(some, l_i, 1.)
    return acc / l_safe[:, None], tl.where(some, m_i + tl.log2(l_safe), -float("inf"))


@jit
def _flash_fwd(Q, K, V, O, Lse, Sinks, Slopes, CuQ, CuK, Owner, Q_at, K_at, V_at, O_at, T, S, tiles, H, unit, cap,
               window, GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    b, h, tile = _program(CuQ, Owner, tiles, H, BLOCK_M)
    if CuQ is None and CAUSAL:
        tile = tiles - 1 - tile                                              # the longest rows first, the short ones
    row, q_start, T_b = _sequence(CuQ, b, T)                                 # fill what is left of the chip at the end
    _, k_start, S_b = _sequence(CuK, b, S)
    i0 = tile * BLOCK_M
    if i0 >= T_b:
        return
    g = h // GROUP
    Q, O = _head(Q, Q_at, row, h, q_start), _head(O, O_at, row, h, q_start)
    K, V = _head(K, K_at, row, g, k_start), _head(V, V_at, row, g, k_start)
    Lse += (row * H + h) * T + q_start

    i, d = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at, slope = (i + S_b - T_b)[:, None], None
    if Slopes is not None:
        slope = tl.load(Slopes + h)
    q = _load(Q, Q_at, row, h, i0, BLOCK_M, d, T_b, D, True)                 # [M, D]: read once, kept
    m_i, l_i = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if Sinks is not None:
        m_i, l_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(Sinks + h), l_i + 1
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    edges = _key_tiles(i0, T_b, S_b, window, CAUSAL, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):
        for j0 in range(edges[part], edges[part + 1], BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            k = _load(K, K_at, row, g, j0, BLOCK_N, d, S_b, D, part != 1)    # [N, D]
            s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            s = _scores(s, at, j[None, :], S_b, cap, slope, window, CAUSAL, part != 1)[0]
            p, m_i, l_i, acc = _softmax_step(s, unit, m_i, l_i, acc)
            v = _load(V, V_at, row, g, j0, BLOCK_N, d, S_b, D, part != 1)
            acc = _dot(p.to(v.dtype), v, acc)
    acc, lse = _finish(m_i, l_i, acc)
    _store(O, O_at, i, d, T_b, acc.to(O.dtype.element_ty), D)                # written once
    tl.store(Lse + i, lse, mask=i < T_b)


@jit
def _flash_bwd_dq(dO, O, Q, K, V, Lse, Delta, dQ, Slopes, CuQ, CuK, Owner, dO_at, O_at, Q_at, K_at, V_at, dQ_at, T, S,
                  tiles, H, scale, unit, cap, window, GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    b, h, tile = _program(CuQ, Owner, tiles, H, BLOCK_M)
    if CuQ is None and CAUSAL:
        tile = tiles - 1 - tile
    row, q_start, T_b = _sequence(CuQ, b, T)
    _, k_start, S_b = _sequence(CuK, b, S)
    i0 = tile * BLOCK_M
    if i0 >= T_b:
        return
    g = h // GROUP
    dO, O = _head(dO, dO_at, row, h, q_start), _head(O, O_at, row, h, q_start)
    Q, dQ = _head(Q, Q_at, row, h, q_start), _head(dQ, dQ_at, row, h, q_start)
    K, V = _head(K, K_at, row, g, k_start), _head(V, V_at, row, g, k_start)
    Lse += (row * H + h) * T + q_start
    Delta += (row * H + h) * T + q_start

    i, d = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    at, slope = (i + S_b - T_b)[:, None], None
    if Slopes is not None:
        slope = tl.load(Slopes + h)
    do = _load(dO, dO_at, row, h, i0, BLOCK_M, d, T_b, D, True)              # [M, D]
    delta = tl.sum(do.to(tl.float32) * _load(O, O_at, row, h, i0, BLOCK_M, d, T_b, D, True).to(tl.float32), 1)
    tl.store(Delta + i, delta, mask=i < T_b)                                 # for dk, dv, which come after
    q = _load(Q, Q_at, row, h, i0, BLOCK_M, d, T_b, D, True)
    lse = tl.load(Lse + i, mask=i < T_b, other=0.)
    lse = tl.where(lse > -float("inf"), lse, 0.)[:, None]                    # a row that sees no key: all p are 0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    edges = _key_tiles(i0, T_b, S_b, window, CAUSAL, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):
        for j0 in range(edges[part], edges[part + 1], BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            k = _load(K, K_at, row, g, j0, BLOCK_N, d, S_b, D, part != 1)    # [N, D]
            v = _load(V, V_at, row, g, j0, BLOCK_N, d, S_b, D, part != 1)
            s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            s, slope_of_cap = _scores(s, at, j[None, :], S_b, cap, slope, window, CAUSAL, part != 1)
            p = tl.exp2(s * unit - lse)
            dp = _dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            ds = p * (dp - delta[:, None]) * slope_of_cap
            dq = _dot(ds.to(k.dtype), k, dq)
    _store(dQ, dQ_at, i, d, T_b, (dq * scale).to(dQ.dtype.element_ty), D)


@jit
def _flash_bwd_dkdv(dO, Q, K, V, Lse, Delta, dK, dV, Slopes, CuQ, CuK, Owner, dO_at, Q_at, K_at, V_at, dK_at, dV_at,
                    T, S, tiles, G, scale, unit, cap, window, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
                    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    b, g, tile = _program(CuK, Owner, tiles, G, BLOCK_N)
    row, q_start, T_b = _sequence(CuQ, b, T)
    _, k_start, S_b = _sequence(CuK, b, S)
    j0 = tile * BLOCK_N
    if j0 >= S_b:
        return
    K, V = _head(K, K_at, row, g, k_start), _head(V, V_at, row, g, k_start)
    dK, dV = _head(dK, dK_at, row, g, k_start), _head(dV, dV_at, row, g, k_start)

    j, d = j0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = _load(K, K_at, row, g, j0, BLOCK_N, d, S_b, D, True)                 # [N, D]: read once, kept
    v = _load(V, V_at, row, g, j0, BLOCK_N, d, S_b, D, True)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    edges = _query_tiles(j0, T_b, S_b, window, CAUSAL, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):
        for r in range(GROUP):                                               # the heads that share the keys, and
            h = g * GROUP + r                                                # the tiles of each that see them
            of_row, slope = (row * G * GROUP + h) * T + q_start, None
            if Slopes is not None:
                slope = tl.load(Slopes + h)
            Q_h, dO_h = _head(Q, Q_at, row, h, q_start), _head(dO, dO_at, row, h, q_start)
            # No division in this loop: with one, Triton 3.6 made wrong dk of tiles of 64 keys.
            for i0 in range(edges[part], edges[part + 1], BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                q = _load(Q_h, Q_at, row, h, i0, BLOCK_M, d, T_b, D, part != 1)
                do = _load(dO_h, dO_at, row, h, i0, BLOCK_M, d, T_b, D, part != 1)
                lse = tl.load(Lse + of_row + i, mask=i < T_b, other=float("inf"))                    # past T: p is 0
                delta = tl.load(Delta + of_row + i, mask=i < T_b, other=0.)
                lse = tl.where(lse > -float("inf"), lse, 0.)[None, :]
                s = _dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
                at = (i + S_b - T_b)[None, :]
                s, slope_of_cap = _scores(s, at, j[:, None], S_b, cap, slope, window, CAUSAL, part != 1)
                p = tl.exp2(s * unit - lse)                                  # tiles stand on end here, [N, M], so that
                dv = _dot(p.to(do.dtype), do, dv)                            # p need not be turned to meet do
                dp = _dot(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
                ds = p * (dp - delta[None, :]) * slope_of_cap
                dk = _dot(ds.to(q.dtype), q, dk)
    _store(dK, dK_at, j, d, S_b, (dk * scale).to(dK.dtype.element_ty), D)
    _store(dV, dV_at, j, d, S_b, dv.to(dV.dtype.element_ty), D)


@jit
def _flash_decode(Q, K, V, Kscale, Vscale, Table, Lengths, Parts, Lse, Slopes, Q_at, K_at, V_at, Kscale_at, Vscale_at,
                  Table_at, Lengths_at, B, T, G, splits, tiles, unit, cap, window, GROUP: tl.constexpr,
                  PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    split, tile = (program % splits).to(tl.int32), (program // splits % tiles).to(tl.int32)
    g, b = program // splits // tiles % G, program // splits // tiles // G
    length = tl.load(Lengths + b * Lengths_at[0]).to(tl.int32)
    r, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)     # queries and heads of a group: one tile,
    t, h = r // GROUP, g * GROUP + r % GROUP                                 # enough rows for the matrix units
    at, slope = (length - T + t)[:, None], None
    if Slopes is not None:
        slope = tl.load(Slopes + h)[:, None]
    Q += b * Q_at[0]
    here = (t.to(tl.int64) * Q_at[1] + h * Q_at[2])[:, None] + d.to(tl.int64)[None, :] * Q_at[3]
    q = tl.load(Q + here, mask=(t < T)[:, None] & (d < D)[None, :], other=0.)                        # [M, D]
    lo, hi = 0, max(0, min(length, length - T + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1))
    if window is not None:
        lo = max(0, length - T + tile * BLOCK_M // GROUP - window + 1)
    share = tl.cdiv(max(hi - lo, 0), splits * BLOCK_N) * BLOCK_N             # keys for each program
    begin = lo + split * share
    end = min(begin + share, hi)

    m_i, l_i = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        page = tl.load(Table + b * Table_at[0] + (j // PAGE).to(tl.int64) * Table_at[1], mask=j < end, other=0)
        page, slot = page.to(tl.int64), (j % PAGE).to(tl.int64)              # a page and a slot for each key
        real = (j < end)[:, None] & (d < D)[None, :]
        k = tl.load(K + (page * K_at[0] + slot * K_at[1] + g * K_at[2])[:, None] + d.to(tl.int64)[None, :] * K_at[3],
                    mask=real, other=0).to(q.dtype)                          # [N, D]
        v = tl.load(V + (page * V_at[0] + slot * V_at[1] + g * V_at[2])[:, None] + d.to(tl.int64)[None, :] * V_at[3],
                    mask=real, other=0).to(q.dtype)
        s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if Kscale is not None:                                               # int8: k = scale · integer, moved out of
            of_key = page * Kscale_at[0] + slot * Kscale_at[1] + g * Kscale_at[2]                    # the product
            s *= tl.load(Kscale + of_key, mask=j < end, other=0.).to(tl.float32)[None, :]
        s = _scores(s, at, j[None, :], end, cap, slope, window, True, True)[0]
        p, m_i, l_i, acc = _softmax_step(s, unit, m_i, l_i, acc)
        if Vscale is not None:
            of_key = page * Vscale_at[0] + slot * Vscale_at[1] + g * Vscale_at[2]
            p *= tl.load(Vscale + of_key, mask=j < end, other=0.).to(tl.float32)[None, :]
        acc = _dot(p.to(q.dtype), v, acc)
    acc, lse = _finish(m_i, l_i, acc)
    row = ((split * B + b) * T + t) * (G * GROUP) + h                        # Parts [splits, B, T, H, D]
    tl.store(Parts + row[:, None] * D + d[None, :], acc, mask=(t < T)[:, None] & (d < D)[None, :])
    tl.store(Lse + row, lse, mask=t < T)


@jit
def _flash_merge(Parts, Lse, Sinks, O, O_at, B, T, H, splits, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                                      # one query of one head: its parts, each
    b, t, h = row // H // T, row // H % T, row % H                           # weighing as much as it saw: 2^lse
    n, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    of_part = n.to(tl.int64) * B * T * H + row
    lse = tl.load(Lse + of_part, mask=n < splits, other=-float("inf"))
    m = tl.max(lse)
    if Sinks is not None:
        m = tl.maximum(m, tl.load(Sinks + h))
    w = tl.exp2(lse - tl.where(m > -float("inf"), m, 0.))
    l = tl.sum(w)
    if Sinks is not None:
        l += tl.exp2(tl.load(Sinks + h) - m)
    parts = tl.load(Parts + of_part[:, None] * D + d[None, :], mask=(n < splits)[:, None] & (d < D)[None, :], other=0.)
    o = tl.sum(w[:, None] * parts, 0) / tl.where(l > 0, l, 1.)
    here = O + b * O_at[0] + t * O_at[1] + h * O_at[2] + d.to(tl.int64) * O_at[3]
    tl.store(here, o.to(O.dtype.element_ty), mask=d < D)


# --- 4. The ops: the same for torch tensors, by the path of each device -----------------------------------------------
#
# On a GPU the kernels; on a CPU torch's scaled_dot_product_attention where it has the options, else rows of queries at
# a time. Both of our paths are one op to torch.compile, which need not look inside.

# By chip and largest head size: BLOCK_M, BLOCK_N, warps and stages of the forward kernel, of dq, and of dk, dv.
# "copied": tiles come through descriptors. On Hopper timed (H200), elsewhere chosen by compiling: the largest that keep
# their numbers in registers, in half precision at D ≤ 128. (Of those timed, two spill a few and are faster for it.)
TILES = {
    "cuda 80": {64: ((128, 64, 8, 3), (64, 64, 4, 2), (32, 128, 8, 2)),
                128: ((128, 64, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
                256: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2))},
    "cuda 90": {64: ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3)),
                128: ((64, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 3)),
                256: ((128, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2))},
    "cuda 90 copied": {64: ((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
                       128: ((128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 2)),
                       256: ((128, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2))},
    "cuda 90 copied causal": {64: ((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
                              128: ((64, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 3)),
                              256: ((128, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2))},
    "cuda 100": {64: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
                 128: ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 1)),
                 256: ((128, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2))},
    "hip": {128: ((128, 64, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1)),
            256: ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1))},
    "float32": {256: ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1))},      # ieee: multiplied without matrix units
    "interpreter": {256: ((16, 16, 4, 1),) * 3},                             # small, so that a test has several
}


def _chip():
    """The row of TILES for the chip that kernels run on."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "hip"
    return f"cuda {max(n for n in (80, 90, 100) if n <= max(target.arch, 80))}" if target.arch < 120 else "cuda 80"


def _describable(x):
    """Whether the copy engine can take tiles out of x: 16-bit numbers in rows that begin at multiples of 16 bytes."""
    return (x.element_size() == 2 and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
            and all(n == 1 or step > 0 and step % 8 == 0 for n, step in zip(x.shape[:3], x.stride())))


def _tiles(cu, causal, *tensors):
    """→ launch options of forward, dq, and dk dv, and whether the kernels take tensors through descriptors. A pack goes
    without: its sequences end amid the rows.
    """
    x, chip = tensors[0], _chip()
    copied = cu is None and chip in ("cuda 90", "interpreter") and all(map(_describable, tensors))
    rows = [chip, f"{chip} copied" * copied, f"{chip} copied causal" * (copied and causal)]
    if chip != "interpreter" and x.element_size() == 4:
        rows = ["float32"]
    table = next(TILES[row] for row in reversed(rows) if row in TILES)
    sizes = next(sizes for D, sizes in table.items() if x.shape[-1] <= D)
    return *(dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), size)) for size in sizes), copied


def _sources(copied, *tensors):
    """(x, rows a tile) → what a kernel reads each from: descriptors and no strides, or tensors and their strides."""
    if not copied:
        return [x for x, _ in tensors], [x.stride() for x, _ in tensors]
    D = max(16, triton.next_power_of_2(tensors[0][0].shape[-1]))
    steps = lambda x: [8 if n == 1 else step for n, step in zip(x.shape[:3], x.stride())] + [1]
    return [TensorDescriptor(x, list(x.shape), steps(x), [1, 1, rows, D]) for x, rows in tensors], [None] * len(tensors)


def _owners(cu_seqlens, total, BLOCK):
    """Which sequence each tile of a pack belongs to → ([tiles] or None, tiles of a head). No length is looked at, which
    would be a wait: sequence b gets the tiles from cu[b] // BLOCK + b on, enough and at most one too many.
    """
    if cu_seqlens is None:
        return None, triton.cdiv(total, BLOCK)
    begins = cu_seqlens // BLOCK + torch.arange(len(cu_seqlens), device=cu_seqlens.device)
    tiles = total // BLOCK + len(cu_seqlens) - 1
    owner = torch.searchsorted(begins, torch.arange(tiles, device=begins.device), right=True) - 1
    return owner.clamp_(max=len(cu_seqlens) - 2), tiles


def _in_units(sinks, alibi, scale, softcap):
    """What kernels take → sinks and slopes [H] in float32, unit, cap."""
    unit, cap = units(scale, softcap)
    return (None if sinks is None else sinks.float() * LOG2E, None if alibi is None else alibi.float() * (LOG2E / unit),
            unit, cap)


def _forward_on_kernel(q, k, v, sinks, alibi, cu_q, cu_k, causal, window, softcap, scale):
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    sinks, slopes, unit, cap = _in_units(sinks, alibi, scale, softcap)
    o, lse = torch.empty_like(q), torch.empty(B, H, T, device=q.device)
    if cu_q is not None:                                                     # rows past the last offset: zeros that
        o.zero_(), lse.fill_(torch.inf)                                      # weigh 2^(s − ∞) = 0
    size, _, _, copied = _tiles(cu_q, causal, q, k, v)
    M, N = size["BLOCK_M"], size["BLOCK_N"]
    owner, tiles = _owners(cu_q, T, M)
    read, read_at = _sources(copied, (q, M), (k, N), (v, N))
    _flash_fwd[(tiles * H * B,)](
        *read, o, lse, sinks, slopes, cu_q, cu_k, owner, *read_at, o.stride(), T, S, tiles, H, unit, cap, window,
        GROUP=H // G, CAUSAL=causal, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), **size)
    return o, lse


def _dsinks(sinks, lse, delta):
    """A sink's dp is 0, so its ds is −p δ. → [H], or nothing where there are no sinks."""
    if sinks is None:
        return lse.new_zeros(0)
    return -(torch.exp2(sinks.to(lse.dtype)[:, None] * LOG2E - lse) * delta).sum((0, 2)).to(sinks.dtype)


def _backward_on_kernel(do, q, k, v, o, lse, sinks, alibi, cu_q, cu_k, causal, window, softcap, scale):
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    do = do if do.stride(-1) == 1 else do.contiguous()                       # that of a sum: one number, expanded
    _, slopes, unit, cap = _in_units(sinks, alibi, scale, softcap)
    make = torch.empty_like if cu_q is None else torch.zeros_like
    dq, dk, dv, delta = make(q), make(k), make(v), make(lse)
    _, size_q, size_k, copied = _tiles(cu_q, causal, q, k, v, o, do)
    shape = dict(GROUP=H // G, CAUSAL=causal, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)))
    M, N = size_q["BLOCK_M"], size_q["BLOCK_N"]
    owner, tiles = _owners(cu_q, T, M)
    read, read_at = _sources(copied, (do, M), (o, M), (q, M), (k, N), (v, N))
    _flash_bwd_dq[(tiles * H * B,)](
        *read, lse, delta, dq, slopes, cu_q, cu_k, owner, *read_at, dq.stride(), T, S, tiles, H, scale, unit, cap,
        window, **shape, **size_q)
    M, N = size_k["BLOCK_M"], size_k["BLOCK_N"]
    owner, tiles = _owners(cu_k, S, N)
    read, read_at = _sources(copied, (do, M), (q, M), (k, N), (v, N))
    _flash_bwd_dkdv[(tiles * G * B,)](
        *read, lse, delta, dk, dv, slopes, cu_q, cu_k, owner, *read_at, dk.stride(), dv.stride(), T, S, tiles, G,
        scale, unit, cap, window, **shape, **size_k)
    return dq, dk, dv, _dsinks(sinks, lse, delta)


def _blocks_in_torch(q, k, alibi, causal, window, softcap, scale):
    """Rows of queries at a time, all keys that they see: → slices i, j, q_i [B, G, R · rows, D], and s and its slope
    [B, H, rows, keys]. A block has about 2²⁰ scores, or 16 rows where these have more: memory grows with S, not T · S.
    """
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    unit, cap = units(scale, softcap)
    rows = max(16, min(128, 2 ** 20 // (B * H * (S if window is None or not causal else min(S, window + 128)))))
    for i0 in range(0, T, rows):
        lo, _, _, hi = key_tiles(i0, T, S, window, causal, rows, 1)
        if lo < hi:
            i, j = slice(i0, min(i0 + rows, T)), slice(lo, hi)
            q_i, slope = q[:, :, i].reshape(B, G, -1, D), 1
            s = (q_i @ k[:, :, j].mT).view(B, H, -1, hi - lo)
            if cap is not None:
                s = s.mul_(cap).tanh_()
                slope = 1 - s * s
            s = s.mul_(unit)
            distance = torch.arange(i.start, i.stop, device=q.device)[:, None] + S - T - torch.arange(
                lo, hi, device=q.device)
            if alibi is not None:
                s -= (alibi.to(s.dtype) * LOG2E)[:, None, None] * distance.abs()
            if causal:
                s.masked_fill_(distance < 0, -torch.inf)
            if window is not None:
                s.masked_fill_(distance >= window, -torch.inf)
            yield i, j, q_i, s, slope


def _forward_in_torch(q, k, v, sinks, alibi, _, __, *options):
    (B, H, T, D), G = q.shape, k.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v, o = q.to(exact), k.to(exact), v.to(exact), torch.zeros_like(q)
    sink = q.new_full((H, 1, 1), -torch.inf) if sinks is None else sinks.to(exact)[:, None, None] * LOG2E
    lse = sink[..., 0].repeat(B, 1, T)
    for i, j, _, s, _ in _blocks_in_torch(q, k, alibi, *options):
        m = torch.maximum(s.amax(-1, keepdim=True), sink)
        m_safe = m.where(m > -torch.inf, 0)
        p = (s - m_safe).exp2_()
        l = p.sum(-1, keepdim=True) + torch.exp2(sink - m_safe)
        some = l > 0
        l_safe = l.where(some, 1)
        o[:, :, i] = (p.view(B, G, -1, p.shape[-1]) @ v[:, :, j]).view(B, H, -1, D) / l_safe
        lse[:, :, i] = torch.where(some, m + l_safe.log2(), -torch.inf)[..., 0]
    return o, lse


def _backward_in_torch(do, q, k, v, o, lse, sinks, alibi, _, __, *options):
    (B, H, _, D), G, scale = q.shape, k.shape[1], options[-1]
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    do, q, k, v, lse = (t.to(exact) for t in (do, q, k, v, lse))
    delta = (do * o).sum(-1)                                                 # [B, H, T]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i, j, q_i, s, slope in _blocks_in_torch(q, k, alibi, *options):
        row, do_i = lse[:, :, i, None], do[:, :, i].reshape(q_i.shape)
        p = (s - row.where(row > -torch.inf, 0)).exp2_()
        dp = (do_i @ v[:, :, j].mT).view(p.shape)
        ds = (dp.sub_(delta[:, :, i, None]).mul_(p).mul_(slope)).view(B, G, -1, p.shape[-1])
        dq[:, :, i] = (ds @ k[:, :, j]).view(B, H, -1, D).mul_(scale)
        dk[:, :, j] += (ds.mT @ q_i).mul_(scale)                             # sums over the heads that share a key
        dv[:, :, j] += p.view(ds.shape).mT @ do_i
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), _dsinks(sinks, lse, delta)


@torch.library.custom_op("twin::flash", mutates_args=())
def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Optional[torch.Tensor],
           alibi: Optional[torch.Tensor], cu_q: Optional[torch.Tensor], cu_k: Optional[torch.Tensor], causal: bool,
           window: Optional[int], softcap: Optional[float], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D], k, v [B, G, S, D], or a pack as one row of a batch → o as q, lse [B, H, T]."""
    forward = _forward_on_kernel if on_kernel(q) else _forward_in_torch
    return forward(q, k, v, sinks, alibi, cu_q, cu_k, causal, window, softcap, scale)


@torch.library.custom_op("twin::flash_backward", mutates_args=())
def _flash_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
                    lse: torch.Tensor, sinks: Optional[torch.Tensor], alibi: Optional[torch.Tensor],
                    cu_q: Optional[torch.Tensor], cu_k: Optional[torch.Tensor], causal: bool, window: Optional[int],
                    softcap: Optional[float], scale: float
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    backward = _backward_on_kernel if on_kernel(q) else _backward_in_torch
    return backward(do, q, k, v, o, lse, sinks, alibi, cu_q, cu_k, causal, window, softcap, scale)


@_flash.register_fake
def _(q, k, v, *rest):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_flash_backward.register_fake
def _(do, q, k, v, o, lse, sinks, *rest):
    dsinks = lse.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _keep(ctx, inputs, output):
    q, k, v, sinks, alibi, cu_q, cu_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, alibi, cu_q, cu_k)


@_exact
def _back(ctx, do, _):
    dq, dk, dv, dsinks = _flash_backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None if ctx.saved_tensors[5] is None else dsinks, *[None] * 7


_flash.register_autograd(_back, setup_context=_keep)


def _check(op, q, k, v, H, G, window, softcap, tensors):
    """What all three ops ask of their arguments; ValueError names the one that does not fit."""
    _floats(op, q=q, k=k, v=v)
    if G == 0 or H % G:
        raise ValueError(f"{op}: q {tuple(q.shape)} has {H} heads, no multiple of the {G} of k {tuple(k.shape)}")
    if not 1 <= q.shape[-1] <= 256 and has_kernel(q):
        raise ValueError(f"{op}: the head size of q {tuple(q.shape)} must be 1 … 256")
    if window is not None and window < 1 or softcap is not None and softcap <= 0:
        raise ValueError(f"{op}: window ({window}) must be at least 1 and softcap ({softcap}) above 0")
    for name in ("sinks", "alibi"):
        x = tensors.get(name)
        if x is not None and (x.shape != (H,) or not x.is_floating_point()):
            raise ValueError(f"{op}: {name} {tuple(x.shape)} {x.dtype} must be floating, one a head: [H] = {(H,)}")
    for name, x in dict(k=k, v=v, **tensors).items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{op}: {name} {tuple(x.shape)} lies on {x.device}, q {tuple(q.shape)} on {q.device}")


def _positive(q, scale):
    """A score's sign goes into q, for a running maximum needs units above 0 → q, scale."""
    scale = float(max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    return (q, scale) if scale > 0 else (q * ((scale > 0) - (scale < 0)), -scale or 1.0)


def flash_attention(q, k, v, causal=True, window=None, softcap=None, sinks=None, alibi=None, scale=None):
    """Softmax attention in memory linear in T and S: q [B, H, T, D], k, v [B, G, S, D] → [B, H, T, D], differentiable.

    causal   query i sees key j where j ≤ i + S − T: the last query sees the last key (bottom-right alignment)
    window   a query sees itself and the `window` − 1 keys before it
    softcap  scores become softcap · tanh(score / softcap)
    sinks    [H] logits that take part in the softmax and have no value; differentiable
    alibi    [H] slopes; −slope · distance is added to the scores, after the softcap
    scale    of q · k; 1/√D if None

    A query that sees no key gives zeros, and zero gradients. Values at masked places must be finite (0 · NaN is NaN).
    The same input gives the same bits, forward and backward. ValueError names the argument that does not fit. arXiv
    2205.14135 and 2307.08691, algorithms 1 and 2.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or len(k) != len(q) or k.shape[3] != q.shape[3]:
        raise ValueError(f"flash_attention: k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, G, S, D] for q "
                         f"{tuple(q.shape)} [B, H, T, D]")
    if torch.is_autocast_enabled(q.device.type):
        return _under_autocast(flash_attention, q, k, v, causal, window, softcap, sinks, alibi, scale)
    (_, H, T, _), (G, S) = q.shape, k.shape[1:3]
    _check("flash_attention", q, k, v, H, G, window, softcap, dict(sinks=sinks, alibi=alibi))
    if window is not None and window >= S:
        window = None                                                        # wider than the text: no bound at all
    if q.numel() == 0 or S == 0:
        return 0 * q + 0 * (k.sum() + v.sum() + (0 if sinks is None else sinks.sum())).to(q.dtype)
    q, scale = _positive(q, scale)
    plain = window is None and softcap is None and sinks is None and alibi is None
    if plain and not q.is_cuda and not on_kernel(q) and (T == S or T == 1 or not causal):
        return attention(q, k, v, causal=causal, scale=scale)                # torch's aligns top left: T ≠ S is ours
    return _flash(q, k, v, sinks, alibi, None, None, bool(causal), window, None if softcap is None else float(softcap),
                  scale)[0]


def flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True, window=None, softcap=None, sinks=None,
                           alibi=None, scale=None):
    """`flash_attention` over a pack of sequences: q [total_q, H, D], k, v [total_k, G, D] → [total_q, H, D].

    Sequence b is rows cu_seqlens[b] … cu_seqlens[b + 1] − 1 of each, cu_seqlens [B + 1] int32, 0 first; either may be
    empty. Rows past the last offset are zero, in output and gradients, and may hold anything. ValueError names the
    argument that does not fit; offsets are looked at on a CPU only, on a GPU that would be a wait.
    """
    op = "flash_attention_varlen"
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: k {tuple(k.shape)} and v {tuple(v.shape)} must be [total_k, G, D] for q "
                         f"{tuple(q.shape)} [total_q, H, D]")
    if torch.is_autocast_enabled(q.device.type):
        return _under_autocast(flash_attention_varlen, q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap,
                               sinks, alibi, scale)
    (total_q, H, _), (total_k, G) = q.shape, k.shape[:2]
    offsets = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _check(op, q, k, v, H, G, window, softcap, dict(sinks=sinks, alibi=alibi, **offsets))
    for (name, cu), total in zip(offsets.items(), (total_q, total_k)):
        if cu.ndim != 1 or len(cu) == 0 or cu.shape != cu_seqlens_q.shape or cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: {name} {tuple(cu.shape)} {cu.dtype} must be [B + 1] int32, as long as "
                             f"cu_seqlens_q {tuple(cu_seqlens_q.shape)}")
        looked_at = cu.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and (cu[0] != 0 or (cu.diff() < 0).any() or cu[-1] > total):
            raise ValueError(f"{op}: {name} {cu.tolist()} must rise from 0 to at most {total}")
    heads = lambda x: x.transpose(0, 1)[None]                                # [tokens, ·, D] → [1, ·, tokens, D]
    whole = on_kernel(q) or torch.compiler.is_compiling() and has_kernel(q)  # one op to the compiler, too
    if whole and total_k and len(cu_seqlens_q) > 1:
        q, scale = _positive(q, scale)
        o, _ = _flash(heads(q), heads(k), heads(v), sinks, alibi, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(),
                      bool(causal), window, None if softcap is None else float(softcap), scale)
        return o[0].transpose(0, 1)
    lengths = [[*cu.diff().tolist(), total - int(cu[-1])] for cu, total in ((cu_seqlens_q, total_q),
                                                                           (cu_seqlens_k, total_k))]
    parts = [x.split(n) for x, n in zip((q, k, v), (lengths[0], lengths[1], lengths[1]))]
    o = [flash_attention(*map(heads, part), causal, window, softcap, sinks, alibi, scale)[0].transpose(0, 1)
         for part in list(zip(*parts))[:-1]]
    return torch.cat([q[:0], *o, torch.zeros_like(parts[0][-1])])


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def _decode_in_torch(q, k_pages, v_pages, block_table, lengths, k_scale, v_scale, window, softcap, sinks, alibi, scale):
    page, o = k_pages.shape[1], torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        def gather(pages, scales):                                           # → [1, G, length, D]
            where = block_table[b, :-(-length // page)].long()
            x = pages[where] if scales is None else pages[where].to(q.dtype) * scales[where].to(q.dtype)[..., None]
            return x.flatten(0, 1)[:length].transpose(0, 1)[None]
        o[b] = flash_attention(q[b].transpose(0, 1)[None], gather(k_pages, k_scale), gather(v_pages, v_scale), True,
                               window, softcap, sinks, alibi, scale)[0].transpose(0, 1)
    return o


def _decode_on_kernel(q, k_pages, v_pages, block_table, lengths, k_scale, v_scale, window, softcap, sinks, alibi,
                      scale):
    (B, T, H, D), (_, page, G, _), n = q.shape, k_pages.shape, block_table.shape[1]
    sinks, slopes, unit, cap = _in_units(sinks, alibi, scale, softcap)
    if triton.knobs.runtime.interpret:
        BLOCK_M, BLOCK_N, full = 16, 16, 4 * B * G
    else:
        BLOCK_M = min(64, max(16, triton.next_power_of_2(T * H // G)))
        BLOCK_N, full = 64 if D <= 128 and _chip() != "hip" else 32, 4 * _multiprocessors(q.device)
        if k_scale is not None and D <= 128 and _chip() == "cuda 90":        # int8: half the bytes, twice the keys
            BLOCK_N, full = 128, full // 2
    tiles = triton.cdiv(T * H // G, BLOCK_M)
    splits = max(1, min(full // (B * G * tiles), triton.cdiv(n * page, 4 * BLOCK_N), 128))           # enough to fill it
    parts, lse = torch.empty(splits, B, T, H, D, device=q.device), torch.empty(splits, B, T, H, device=q.device)
    o, BLOCK_D, none = torch.empty_like(q), max(16, triton.next_power_of_2(D)), (0, 0, 0)
    _flash_decode[(splits * tiles * G * B,)](
        q, k_pages, v_pages, k_scale, v_scale, block_table, lengths, parts, lse, slopes, q.stride(), k_pages.stride(),
        v_pages.stride(), none if k_scale is None else k_scale.stride(), none if v_scale is None else v_scale.stride(),
        block_table.stride(), lengths.stride(), B, T, G, splits, tiles, unit, cap, window, GROUP=H // G, PAGE=page, D=D,
        BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4, num_stages=2)
    _flash_merge[(B * T * H,)](parts, lse, sinks, o, o.stride(), B, T, H, splits, D=D, BLOCK_D=BLOCK_D,
                               SPLITS=triton.next_power_of_2(splits), num_warps=1 if splits < 16 else 4)
    return o


@torch.library.custom_op("twin::flash_decode", mutates_args=())              # the compiler takes it whole
def _flash_decode_op(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor,
                     lengths: torch.Tensor, k_scale: Optional[torch.Tensor], v_scale: Optional[torch.Tensor],
                     window: Optional[int], softcap: Optional[float], sinks: Optional[torch.Tensor],
                     alibi: Optional[torch.Tensor], scale: float) -> torch.Tensor:
    decode = _decode_on_kernel if on_kernel(q) and k_pages.numel() else _decode_in_torch
    return decode(q, k_pages, v_pages, block_table, lengths, k_scale, v_scale, window, softcap, sinks, alibi, scale)


@_flash_decode_op.register_fake
def _(q, *rest):
    return torch.empty_like(q)


def flash_decode(q, k_pages, v_pages, block_table, lengths, k_scale=None, v_scale=None, window=None, softcap=None,
                 sinks=None, alibi=None, scale=None):
    """The last queries of B sequences against their cached keys: q [B, H, D], or [B, T, H, D], the last T positions of
    each length → as q. Causal always; no gradient.

    k_pages, v_pages  [P, page, G, D], as q or int8 with k_scale, v_scale [P, page, G]: k = k_scale · integer
    block_table       [B, n] int32: key j of sequence b lies in page block_table[b, j // page], slot j % page
    lengths           [B] int32, of keys, those of q among them

    Entries past a length and unused slots may hold anything. Other arguments as `flash_attention`. ValueError names the
    argument that does not fit; lengths and table entries are looked at on a CPU only. arXiv 2309.06180; Flash-Decoding.
    """
    op, one = "flash_decode", q.ndim == 3
    q = q[:, None] if one else q
    if q.ndim != 4 or k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: k_pages {tuple(k_pages.shape)} and v_pages {tuple(v_pages.shape)} must be "
                         f"[P, page, G, D] for q {tuple(q.shape)} [B, (T,) H, D]")
    (B, _, H, _), (P, page, G, _) = q.shape, k_pages.shape
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    places = dict(block_table=block_table, lengths=lengths)
    integers = k_pages.dtype == v_pages.dtype == torch.int8
    for name, x in scales.items():
        if (x is not None) != integers or integers and (x.shape != (P, page, G) or not x.is_floating_point()):
            raise ValueError(f"{op}: pages {tuple(k_pages.shape)} {k_pages.dtype}, {v_pages.dtype} need {name}, "
                             f"floating [P, page, G], where they are int8, and none else, not "
                             f"{None if x is None else (tuple(x.shape), x.dtype)}")
    pages = (q, q) if integers else (k_pages, v_pages)
    _check(op, q, *pages, H, G, window, softcap,
           dict(k_pages=k_pages, v_pages=v_pages, sinks=sinks, alibi=alibi, **places, **scales))
    if block_table.ndim != 2 or len(block_table) != B or block_table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: block_table {tuple(block_table.shape)} {block_table.dtype} must be [B = {B}, n] int32")
    if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: lengths {tuple(lengths.shape)} {lengths.dtype} must be [B = {B}] int32")
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        n = block_table.shape[1]
        if ((lengths < 0) | (lengths > n * page)).any():
            raise ValueError(f"{op}: lengths {lengths.tolist()} must lie in 0 … {n * page}, what block_table "
                             f"{tuple(block_table.shape)} holds in pages of {page}")
        used = torch.arange(n) < (lengths[:, None] + page - 1) // max(page, 1)
        if (used & ((block_table < 0) | (block_table >= P))).any():
            raise ValueError(f"{op}: block_table {tuple(block_table.shape)} must name pages 0 … {P - 1} within lengths "
                             f"{lengths.tolist()}")
    q, scale = _positive(q, scale)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        o = _flash_decode_op(q, k_pages, v_pages, block_table, lengths, k_scale, v_scale, window,
                             None if softcap is None else float(softcap), sinks, alibi, scale)
    return o[:, 0] if one else o


# --- 5. The claims, proved on the reader's machine --------------------------------------------------------------------

def picture(T, S, causal=True, window=None, BLOCK_M=1, BLOCK_N=1):
    """Which tiles are visited → lines of text, one for each tile of queries: whole █, masked ▒, never read ·."""
    lines = []
    for i0 in range(0, T, BLOCK_M):
        lo, full_lo, full_hi, hi = key_tiles(i0, T, S, window, causal, BLOCK_M, BLOCK_N)
        lines.append("".join("█" if full_lo <= j0 < full_hi else "▒" if lo <= j0 < hi else "·"
                             for j0 in range(0, S, BLOCK_N)))
    return lines


def show_tiles():
    """Print which tiles are visited, for three kinds of attention."""
    kinds = [("causal", 64, None), ("8 queries, 64 keys", 8, None), ("window 20", 64, 20)]
    drawn = [picture(T, 64, True, window, 4, 4) for _, T, window in kinds]
    print("Tiles of 4 × 4 scores: all seen █, masked ▒, never read ·\n\n"
          + "".join(f"{name:22}" for name, _, _ in kinds))
    for n in range(len(drawn[0])):
        print("".join(f"{lines[n] if n < len(lines) else '':22}" for lines in drawn).rstrip())


def naive_attention(q, k, v):
    """Causal attention with its T × T matrix, in torch."""
    above = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT * q.shape[3] ** -0.5).masked_fill_(above, -torch.inf).softmax(-1) @ v


def show_growth(device, longest):
    """Print time and peak memory of a forward and backward pass from T = 512 on: naive, ours, ours with options."""
    H, D = 1, 64
    forms = [("naive", naive_attention), ("flash", flash_attention),
             ("window, softcap", lambda q, k, v: flash_attention(q, k, v, window=512, softcap=20.0))]
    print(f"\nForward and backward, {H} head of {D}, float32, on {device}: time and peak memory, the\n"
          "window 512. Moved in slow memory: forward, in float16, by tiles of 128\n\n"
          f"{'':6}{'moved, MB':>18}" + "".join(f"{name:>18}" for name, _ in forms)
          + f"\n{'T':>6}{'naive':>10}{'tiled':>8}" + f"{'ms':>10}{'MB':>8}" * 3)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def both(form, T):
        """→ milliseconds and megabytes of one run."""
        x, times = [torch.randn(1, H, T, D, device=device, requires_grad=True) for _ in range(3)], []

        def work():
            wait()
            times.append(-time.perf_counter())
            torch.autograd.grad(form(*x).sum(), x)
            wait()
            times[0] += time.perf_counter()
        return _peak_megabytes(work, device), 1000 * times[0]
    for _, form in forms:
        both(form, 256)                                                      # the first one warms up
    T = 512
    while T <= longest:
        line = f"{T:6,}" + "".join(f"{moved / 1e6:>{width},.1f}" for moved, width in zip(
            bytes_moved(1, H, H, T, T, D), (10, 8)))
        for _, form in forms:
            if form is naive_attention and T > 4096:                         # the scores and their gradients alone:
                line += f"{'–':>10}{f'> {8 * H * T * T / 2 ** 20:,.0f}':>8}"
            else:
                megabytes, milliseconds = both(form, T)
                line += f"{milliseconds:>10,.1f}{megabytes:>8,.1f}"
        print(line, flush=True)
        T *= 2


def show_speed(longest):
    """On a GPU: print TFLOP/s of both passes beside torch's backends, and decoding beside a copy."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    dtype, milliseconds, recorded = torch.bfloat16, triton.testing.do_bench, triton.testing.do_bench_cudagraph
    randn = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
    a, source = randn(8192, 8192).detach(), torch.zeros(2 ** 29, device="cuda", dtype=dtype)
    copied = torch.empty_like(source)
    product = 2 * 8192 ** 3 / 1e9 / milliseconds(lambda: a @ a)
    copy = 2 * source.nbytes / 1e6 / milliseconds(lambda: copied.copy_(source))
    print(f"\n{torch.cuda.get_device_name()}, {str(dtype)[6:]}: a matrix product does {product:,.0f} TFLOP/s,\n"
          f"a copy moves {copy:,.0f} GB/s. TFLOP/s forward and backward, 16,384 tokens of 2,048\n"
          f"channels; what causality leaves out is not counted\n\n{'D':>5}{'causal':>8}{'T':>8}"
          f"{'flash.py':>18}{'torch flash':>18}{'torch cuDNN':>18}")

    def backend(which):
        def attend(q, k, v, causal):
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return attend
    forms = [flash_attention, backend(SDPBackend.FLASH_ATTENTION), backend(SDPBackend.CUDNN_ATTENTION)]
    for D, causal in ((64, False), (64, True), (128, False), (128, True)):
        T = 1024
        while T <= longest:
            B, H = max(1, 16384 // T), 2048 // D
            q, k, v, do = (randn(B, H, T, D) for _ in range(4))
            work = 4 * B * H * T * T * D / (2 if causal else 1) / 1e9        # GFLOP forward; / ms: TFLOP/s
            line = f"{D:5}{'yes' if causal else 'no':>8}{T:8,}"
            for attend in forms:
                try:
                    with torch.no_grad():
                        forward = milliseconds(lambda: attend(q, k, v, causal))
                    y = attend(q, k, v, causal)
                    backward = milliseconds(lambda: torch.autograd.grad(y, (q, k, v), do, retain_graph=True))
                    line += f"{f'{work / forward:,.0f}  {2.5 * work / backward:,.0f}':>18}"
                except RuntimeError:                                         # a backend that is not there
                    line += f"{'–':>18}"
            print(line, flush=True)
            T *= 2

    S, H, G, D, page = 32768, 32, 8, 128, 16
    print(f"\nDecoding: {S:,} keys in pages of {page}, {H} heads, {G} of keys, D {D}, as a CUDA graph\n\n"
          f"{'B':>5}{'pages':>12}{'GB/s':>10}{'of a copy':>12}")
    for B in (1, 8, 64):
        table = torch.randperm(B * S // page, device="cuda").int().view(B, -1)
        lengths = torch.full((B,), S, dtype=torch.int32, device="cuda")
        for kind in (dtype, torch.int8):
            k, v = (torch.ones(B * S // page, page, G, D, dtype=kind, device="cuda") for _ in range(2))
            names = ("k_scale", "v_scale") if kind == torch.int8 else ()
            scales = {name: torch.ones(k.shape[:3], device="cuda") for name in names}
            q, moved = randn(B, H, D).detach(), 2 * k.nbytes + sum(s.nbytes for s in scales.values())
            rate = moved / 1e6 / recorded(lambda: flash_decode(q, k, v, table, lengths, **scales))
            print(f"{B:5}{str(kind)[6:]:>12}{rate:10,.0f}{rate / copy:12.0%}", flush=True)


def main(argv=None):
    """Show which tiles attention visits, that leaving out the matrix changes nothing, and what it saves."""
    p = argparse.ArgumentParser(prog="flash.py", description=main.__doc__)
    p.add_argument("--longest", type=int, default=16384, help="the most tokens (16384; for speed on a GPU twice that)")
    longest = p.parse_args(argv).longest
    show_tiles()

    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((1, heads, 200, 32)) for heads in (4, 2, 2, 4))
    options = dict(window=150, softcap=10.0)
    twins = [(flash_attention_numpy(q, k, v, **options), *flash_attention_backward_numpy(q, k, v, **options, grad=do)),
             (attention_numpy(q, k, v, **options), *attention_backward_numpy(q, k, v, **options, grad=do))]
    x = [torch.tensor(t, dtype=torch.float32, requires_grad=True) for t in (q, k, v)]
    y = flash_attention(*x, **options)
    op = [y, *torch.autograd.grad(y, x, torch.tensor(do, dtype=torch.float32))]
    off = lambda a, b: max(np.abs(s - t).max() / np.abs(t).max() for s, t in zip(a, b))
    print("\nTiled against the whole matrix, output and gradients, relative:\n"
          f"NumPy in float64 {off(*twins):.0e}, the op in float32 "
          f"{off([t.numpy(force=True) for t in op], twins[1]):.0e}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    show_growth(device, longest)
    if device == "cuda" and triton:
        show_speed(2 * longest)
    return 0


if __name__ == "__main__":
    leave(main)
