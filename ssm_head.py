"""State space models: a state of fixed size instead of a cache that grows.

    Attention keeps all it has seen and looks at it again for each token: T² work, T memory. A state space model keeps a
    summary h, brings it up to date with each token and reads from it: T work, constant memory, and what the summary has
    lost is lost.

    h_t = Ā_t h_{t−1} + B̄_t x_t                y_t = C_t h_t + D x_t

    member             state a layer   Ā_t                            what of it depends on the input
    S4D                [C, N]          exp(Δ A), complex, diagonal    nothing: so it is a convolution, too
    Mamba              [C, N]          exp(Δ_t A), real, diagonal     Δ, B, C: it can choose what to keep
    Mamba-2            [H, P, N]       exp(Δ_t A), one number a head  the same; it becomes products of matrices
    gated delta rule   [H, K, V]       α_t (I − β_t k_t k_tᵀ)         α, β, k: it can also replace what stands at a key

    A continuous system h' = A h + B x becomes steps of Δ: by ZOH (x held constant within a step) Ā = exp(Δ A) and
    B̄ = A⁻¹ (exp(Δ A) − 1) B; S4D does so. Mamba and Mamba-2 take the simpler B̄ = Δ B.

    name       shape            in the papers
    x, y       [B, T, C]        x, y (u, y): C channels, each with a state of its own
    dt         [B, T, C]        Δ > 0: how long a step is; large: forget and take in, near 0: stay
    A          [C, N]           A < 0: how fast each number of the state fades
    B, C       [B, T, N]        B, C: how a token is written into the state, how it is read
    D          [C]              D: a way past the state
    state      [B, C, N]        h
    w          [C, K]           the short convolution before it, K = 4: a token and the three before it

S4: Gu et al. 2021, arXiv 2111.00396; S4D: 2206.11893; HiPPO: 2008.07669. Mamba: Gu & Dao 2023, 2312.00752. Mamba-2: Dao
& Gu 2024, 2405.21060. The gated delta rule: Yang et al. 2024, 2412.06464.

`python ssm.py` shows that all forms agree, where the state overtakes attention, and what a token costs after 1,000 and
after 64,000 others; `python ssm.py --probe` what a state of fixed size can't remember.
"""
import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from attention import (MLP, Attention, Block, RMSNorm, Rotary, _floats, jit, on_kernel, rms_norm, rotary_inv_freq,
                       swiglu, tl, triton)


# --- 1. S4D: one model, three views -----------------------------------------------------------------------------------

def hippo_legs(N):
    """HiPPO-LegS (arXiv 2008.07669, theorem 2) → A [N, N], B [N]: a state that is the past in Legendre polynomials."""
    n = np.arange(N)
    root = np.sqrt(2 * n + 1)
    A = -np.where(n[:, None] > n, root[:, None] * root, np.diag(n + 1.0))
    return A, root


def discretize(A, B, dt, method="zoh"):
    """h' = A h + B x in steps of dt → Ā, B̄. A [N, N] and B [N], or diagonal: A [..., N], B [..., N], dt [...].

    zoh: the input is held for a step; bilinear: the trapezoidal rule. ValueError for another method.
    """
    if method not in ("zoh", "bilinear"):
        raise ValueError(f"method is {method!r}: it must be 'zoh' or 'bilinear'")
    if A.ndim == 2 and A.shape[0] == A.shape[1] and np.ndim(dt) == 0:        # whole matrices
        I = np.eye(len(A))
        if method == "bilinear":
            left = np.linalg.inv(I - dt / 2 * A)
            return left @ (I + dt / 2 * A), left @ (dt * B)
        both = np.zeros((len(A) + 1,) * 2)                                   # exp of (A B; 0 0) holds Ā and B̄
        both[:-1, :-1], both[:-1, -1] = A * dt, B * dt
        both = _exp(both)
        return both[:-1, :-1], both[:-1, -1]
    dt = np.asarray(dt)[..., None]
    if method == "bilinear":
        return (1 + dt / 2 * A) / (1 - dt / 2 * A), dt * B / (1 - dt / 2 * A)
    return np.exp(dt * A), np.expm1(dt * A) / A * B


def _exp(M):
    """exp of a matrix: its Taylor series at M / 2^s, squared s times."""
    s = max(0, math.ceil(math.log2(max(np.abs(M).sum(1).max(), 1e-300))) + 3)
    M, term = M / 2 ** s, np.eye(len(M))
    total = term
    for i in range(1, 16):
        term = term @ M / i
        total = total + term
    for _ in range(s):
        total = total @ total
    return total


def s4d_init(C, N):
    """S4D-Lin's A [C, N], complex: the same decay, frequencies in a row; only one of each conjugate pair is kept."""
    return np.broadcast_to(-0.5 + 1j * np.pi * np.arange(N), (C, N)).copy()


def s4d_recurrence_numpy(x, A, B, C, dt, state=None):
    """First view, a step at a time: x [T, C] real; A, B, C [C, N] complex, dt [C] → y [T, C], state [C, N]."""
    A_bar, B_bar = discretize(A, B, dt)
    h, y = np.zeros(A.shape, complex) if state is None else state, np.empty(x.shape)
    for t in range(len(x)):
        h = A_bar * h + B_bar * x[t, :, None]
        y[t] = 2 * (C * h).sum(1).real                                       # the other halves are its conjugates
    return y, h


def s4d_convolution_numpy(x, A, B, C, dt):
    """Second view: y = K ∗ x with K_t = 2 Re(C Āᵗ B̄), by FFT: as Ā is the same at all times. → y [T, C]."""
    T = len(x)
    A_bar, B_bar = discretize(A, B, dt)
    kernel = 2 * np.einsum("cn,cnt->tc", C * B_bar, A_bar[..., None] ** np.arange(T)).real
    spectrum = np.fft.rfft(kernel, 2 * T, axis=0) * np.fft.rfft(x, 2 * T, axis=0)    # twice as long: nothing wraps
    return np.fft.irfft(spectrum, 2 * T, axis=0)[:T]


def s4d_scan_numpy(x, A, B, C, dt):
    """Third view: a scan over pairs (a, b), (a₁, b₁) ∘ (a₂, b₂) = (a₂ a₁, a₂ b₁ + b₂), in log₂ T rounds. → y [T, C]."""
    A_bar, B_bar = discretize(A, B, dt)
    a, b = np.broadcast_to(A_bar, (len(x), *A.shape)).copy(), B_bar * x[..., None]
    shift = 1
    while shift < len(x):                                                    # after round r each holds 2^r steps
        a[shift:], b[shift:] = a[shift:] * a[:-shift], a[shift:] * b[:-shift] + b[shift:]
        shift *= 2
    return 2 * (C * b).sum(-1).real


# --- 2. The short convolution -----------------------------------------------------------------------------------------
#
# y_t = silu(bias + Σ_j w_j x_{t − K + 1 + j}): what stands before a sequence are the inputs of its state, or zeros.

def silu_numpy(z):
    """→ silu(z) and its slope."""
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


def _sequences(x, cu_seqlens):
    """(row of x, its first token, the one after its last) for each sequence: rows of a batch, or pieces of a pack."""
    if cu_seqlens is None:
        return [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    return [(0, int(i), int(j)) for i, j in zip(cu_seqlens[:-1], cu_seqlens[1:])]


def causal_conv1d_numpy(x, w, bias=None, state=None, cu_seqlens=None):
    """x [B, T, C], w [C, K], bias [C], state [B, C, K − 1] → y [B, T, C], state: arguments and results as the op's."""
    K, y, after = w.shape[1], np.zeros_like(x), []
    for s, (b, i, j) in enumerate(_sequences(x, cu_seqlens)):
        before = np.zeros((K - 1, x.shape[2]), x.dtype) if state is None else state[s].T
        line = np.concatenate([before, x[b, i:j]])                           # [K − 1 + T, C]
        z = sum((line[k:k + j - i] * w[:, k] for k in range(K)), np.zeros((j - i, x.shape[2]), x.dtype))
        y[b, i:j] = silu_numpy(z if bias is None else z + bias)[0]
        after.append(line[len(line) - (K - 1):].T)
    return y, np.stack(after)


def causal_conv1d_backward_numpy(x, w, bias=None, state=None, cu_seqlens=None, *, grad):
    """grad (dy, dstate) → dx, dw, and dbias, dstate where they were given."""
    dy, dafter = grad
    K, dx, dw, dbias, dstate = w.shape[1], np.zeros_like(x), np.zeros_like(w), np.zeros_like(w[:, 0]), []
    for s, (b, i, j) in enumerate(_sequences(x, cu_seqlens)):
        before = np.zeros((K - 1, x.shape[2]), x.dtype) if state is None else state[s].T
        line = np.concatenate([before, x[b, i:j]])
        z = sum((line[k:k + j - i] * w[:, k] for k in range(K)), np.zeros((j - i, x.shape[2]), x.dtype))
        dz = dy[b, i:j] * silu_numpy(z if bias is None else z + bias)[1]
        dline = np.zeros_like(line)
        for k in range(K):
            dline[k:k + j - i] += dz * w[:, k]
            dw[:, k] += (dz * line[k:k + j - i]).sum(0)
        dbias += dz.sum(0)
        dline[len(line) - (K - 1):] += dafter[s].T
        dx[b, i:j] = dline[K - 1:]
        dstate.append(dline[:K - 1].T)
    return dx, dw, *(() if bias is None else (dbias,)), *(() if state is None else (np.stack(dstate),))


@jit
def _conv_in(X, S, t, first, seq, k, c, C, sx, K: tl.constexpr, mask):
    """What stands K − 1 − k tokens before t: an input, or before the first one a number of the state (zero without)."""
    at = t - (K - 1) + k
    x = tl.load(X + at[:, None] * sx + c, mask=mask & (at >= first)[:, None], other=0.).to(tl.float32)
    if S is not None:
        old = at - first + K - 1                                             # its place in the state [C, K − 1]
        s = tl.load(S + (seq[:, None] * C + c) * (K - 1) + old[:, None], mask=mask & (at < first)[:, None], other=0.)
        x += s.to(tl.float32)
    return x


@jit
def _conv_sum(X, W, BIAS, S, t, first, seq, c, C, sx, K: tl.constexpr, mask):
    """→ z, of which y is the silu."""
    z = tl.zeros_like(mask.to(tl.float32))
    if BIAS is not None:
        z += tl.load(BIAS + c, mask=c < C, other=0.).to(tl.float32)
    for k in tl.static_range(K):
        w = tl.load(W + c * K + k, mask=c < C, other=0.).to(tl.float32)
        z += w * _conv_in(X, S, t, first, seq, k, c, C, sx, K, mask)
    return z


@jit
def _causal_conv1d_fwd(X, W, BIAS, S, FIRST, SEQ, Y, N, C, sx, K: tl.constexpr, BLOCK_T: tl.constexpr,
                       BLOCK_C: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    first = tl.load(FIRST + t, mask=t < N, other=0)                          # where the token's own sequence begins
    seq = tl.load(SEQ + t, mask=t < N, other=0).to(tl.int64)
    mask = (t < N)[:, None] & (c < C)
    z = _conv_sum(X, W, BIAS, S, t, first, seq, c, C, sx, K, mask)
    tl.store(Y + t[:, None] * C + c, z / (1 + tl.exp(-z)), mask=mask)


@jit
def _causal_conv1d_bwd(dY, X, W, BIAS, S, FIRST, SEQ, LAST, dX, dW, dBIAS, N, C, sx, K: tl.constexpr,
                       BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    first = tl.load(FIRST + t, mask=t < N, other=0)
    last = tl.load(LAST + t, mask=t < N, other=0)                            # where it ends
    seq = tl.load(SEQ + t, mask=t < N, other=0).to(tl.int64)
    dx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.static_range(K):                                             # x_t is in z_t … z_{t + K − 1}
        u = t + K - 1 - k
        mask = ((t < N) & (u < last))[:, None] & (c < C)
        z = _conv_sum(X, W, BIAS, S, u, first, seq, c, C, sx, K, mask)
        s = 1 / (1 + tl.exp(-z))
        dz = tl.load(dY + u[:, None] * C + c, mask=mask, other=0.).to(tl.float32) * s * (1 + z * (1 - s))
        dx += dz * tl.load(W + c * K + k, mask=c < C, other=0.).to(tl.float32)
        if k == K - 1:                                                       # z_t itself
            tl.store(dBIAS + tile * C + c, tl.sum(dz, 0)[None, :], mask=c < C)
            for j in tl.static_range(K):
                x = _conv_in(X, S, t, first, seq, j, c, C, sx, K, mask)
                tl.store(dW + (tile * C + c) * K + j, tl.sum(dz * x, 0)[None, :], mask=c < C)
    tl.store(dX + t[:, None] * C + c, dx, mask=(t < N)[:, None] & (c < C))


def _places(cu_seqlens, B, T, device):
    """For each token of a batch or pack, all in one row: where its sequence begins and ends, and which it is."""
    if cu_seqlens is None:
        seq = torch.arange(B, device=device).repeat_interleave(T)
        return seq * T, (seq + 1) * T, seq
    cu = cu_seqlens.to(device=device, dtype=torch.int64)
    at = torch.arange(T, device=device)
    seq = torch.searchsorted(cu, at, right=True) - 1
    inside = seq < len(cu) - 1                                               # past the last offset: of no sequence
    seq = seq.clamp(max=max(len(cu) - 2, 0))
    return torch.where(inside, cu[seq], at), torch.where(inside, cu[(seq + 1).clamp(max=len(cu) - 1)], at), seq


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, state, cu_seqlens):
        (B, T, C), K = x.shape, w.shape[1]
        rows = x.reshape(B * T, C) if x.stride(-1) == 1 else x.contiguous().view(B * T, C)
        places, y = _places(cu_seqlens, B, T, x.device), x.new_empty(B, T, C)
        grid = triton.cdiv(B * T, 32), triton.cdiv(C, 64)
        _causal_conv1d_fwd[grid](rows, w, bias, state, places[0], places[2], y, B * T, C, rows.stride(0), K=K,
                                 BLOCK_T=32, BLOCK_C=64)
        if cu_seqlens is not None:
            y[0, int(cu_seqlens[-1]):] = 0
        ctx.save_for_backward(rows, w, bias, state, cu_seqlens, *places)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, w, bias, state, cu_seqlens, first, last, seq = ctx.saved_tensors
        (B, T, C), K = ctx.shape, w.shape[1]
        dy, tiles = dy.contiguous(), triton.cdiv(B * T, 32)
        dx, dw, dbias = dy.new_empty(B, T, C), w.new_empty(tiles, C, K, dtype=torch.float32), torch.empty(
            tiles, C, device=dy.device)
        _causal_conv1d_bwd[tiles, triton.cdiv(C, 64)](dy, rows, w, bias, state, first, seq, last, dx, dw, dbias, B * T,
                                                      C, rows.stride(0), K=K, BLOCK_T=32, BLOCK_C=64)
        return (dx, dw.sum(0).to(w.dtype), None if bias is None else dbias.sum(0).to(bias.dtype),
                None if state is None else _conv_state_gradient(dy, rows, w, bias, state, cu_seqlens, B, T), None)


def _conv_state_gradient(dy, rows, w, bias, state, cu_seqlens, B, T):
    """dstate: of the first K − 1 tokens of each sequence alone, in torch."""
    K1, x, dy = state.shape[2], rows.view(B, T, -1), dy.view(B, T, -1)
    with torch.enable_grad():
        before, parts = state.detach().requires_grad_(), []
        for s, (b, i, j) in enumerate(_sequences(x, cu_seqlens)):
            j = min(j, i + K1)
            y, _ = _conv_in_torch(x[b:b + 1, i:j].detach(), w.detach(), None if bias is None else bias.detach(),
                                  before[s:s + 1])
            parts.append((y * dy[b:b + 1, i:j]).sum())
        return torch.autograd.grad(torch.stack(parts).sum(), before)[0]


def _conv_in_torch(x, w, bias, state):
    """x [B, T, C] → y, state after: one product of torch."""
    K = w.shape[1]
    before = x.new_zeros(x.shape[0], x.shape[2], K - 1) if state is None else state.to(x.dtype)
    line = torch.cat([before, x.mT], dim=2)                                  # [B, C, K − 1 + T]
    after = line[:, :, line.shape[2] - (K - 1):]
    if not x.shape[1]:
        return x, after
    return F.silu(F.conv1d(line, w[:, None], bias, groups=x.shape[2])).mT, after


def _tails(x, state, cu_seqlens, B, T, K):
    """The last K − 1 inputs of each sequence, oldest first [sequences, C, K − 1]; a short one's begin in its state."""
    if cu_seqlens is None:
        starts, ends = torch.arange(B, device=x.device) * T, (torch.arange(B, device=x.device) + 1) * T
    else:
        starts, ends = cu_seqlens[:-1].to(x.device).long(), cu_seqlens[1:].to(x.device).long()
    at = ends[:, None] - (K - 1) + torch.arange(K - 1, device=x.device)      # [sequences, K − 1]
    here = at >= starts[:, None]
    some = x.reshape(B * T, -1)[at.clamp(0, max(B * T - 1, 0))] if B * T else x.new_zeros(*at.shape, x.shape[2])
    some = torch.where(here[..., None], some, 0).mT                          # [sequences, C, K − 1]
    if state is None:
        return some
    old = (at - starts[:, None] + K - 1).clamp(0, max(K - 2, 0))[:, None].expand(-1, x.shape[2], -1)
    return torch.where(here[:, None], some, state.to(x.dtype).gather(2, old))


def causal_conv1d(x, w, bias=None, state=None, cu_seqlens=None):
    """Each channel convolved with its last K inputs, then SiLU: x [B, T, C], w [C, K], bias [C] → (y as x, state).

    state [B, C, K − 1]: the inputs before the first, oldest first (None: zeros), and after the last. Differentiable,
    the state too. Packed: `cu_seqlens` [sequences + 1], B = 1, a state for each. ValueError for shapes that do not fit.
    """
    if x.ndim != 3 or w.ndim != 2 or len(w) != x.shape[2] or bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"causal_conv1d: x {tuple(x.shape)}, w {tuple(w.shape)}, bias "
                         f"{None if bias is None else tuple(bias.shape)} must be [B, T, C], [C, K], [C]")
    (B, T, C), K = x.shape, w.shape[1]
    sequences = B
    if cu_seqlens is not None:
        _offsets("causal_conv1d", cu_seqlens, T, B)
        sequences = len(cu_seqlens) - 1
    if state is not None and state.shape != (sequences, C, K - 1):
        raise ValueError(f"causal_conv1d: state {tuple(state.shape)} must be {(sequences, C, K - 1)}")
    if on_kernel(x):
        return _CausalConv1d.apply(x, w, bias, state, cu_seqlens), _tails(x, state, cu_seqlens, B, T, K)
    if cu_seqlens is None:
        return _conv_in_torch(x, w, bias, state)
    # Packed: one convolution over all, and the first K − 1 tokens of each sequence, which must not see the one before.
    y, ends = _conv_in_torch(x, w, bias, None)[0], cu_seqlens.tolist()
    at = [i + k for i, j in zip(ends, ends[1:]) for k in range(min(K - 1, j - i))]
    own = [(s, min(K - 1, j - i)) for s, (i, j) in enumerate(zip(ends, ends[1:])) if j > i]
    if at:
        heads = torch.zeros(len(own), C, 2 * (K - 1), dtype=x.dtype, device=x.device)
        if state is not None:
            heads = torch.cat([state.to(x.dtype)[[s for s, _ in own]], heads[:, :, K - 1:]], dim=2)
        row = torch.tensor([n for n, (_, count) in enumerate(own) for _ in range(count)], device=x.device)
        column = torch.tensor([K - 1 + k for _, count in own for k in range(count)], device=x.device)
        at = torch.tensor(at, device=x.device)
        heads = heads.index_put((row[:, None], torch.arange(C, device=x.device), column[:, None]), x[0, at])
        first = F.silu(F.conv1d(heads, w[:, None], bias, groups=C))          # [n, C, K − 1]
        y = y.index_copy(1, at, first[row, :, column - (K - 1)][None])
    if ends[-1] < T:
        y = torch.cat([y[:, :ends[-1]], torch.zeros_like(y[:, ends[-1]:])], dim=1)
    return y, _tails(x, state, cu_seqlens, B, T, K)


def causal_conv1d_step(x, w, bias=None, state=None):
    """One token of each sequence: x [B, C], state [B, C, K − 1] → (y [B, C], state)."""
    if state is None or x.ndim != 2 or state.shape != (*x.shape, w.shape[1] - 1):
        raise ValueError(f"causal_conv1d_step: x {tuple(x.shape)}, state "
                         f"{None if state is None else tuple(state.shape)} must be [B, C] and [B, C, {w.shape[1] - 1}]")
    line = torch.cat([state.to(x.dtype), x[:, :, None]], dim=2)
    z = (line * w).sum(-1)
    return F.silu(z if bias is None else z + bias), line[:, :, 1:]


# --- 3. Mamba: a scan that chooses ------------------------------------------------------------------------------------
#
#     h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t            y_t = C_t · h_t + D x_t            a state of N for each channel
#
# Backward, with g_t the gradient of h_t:  g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1},  and from it, with a_t = exp(Δ_t A):
#
#     dC_t = Σ_c dy_t h_t      dB_t = Σ_c Δ_t x_t g_t      d(Δx)_t = Σ_n B_t g_t      d(Δ_t A) = a_t g_t h_{t−1}

def selective_scan_numpy(x, dt, A, B, C, D=None, state=None, cu_seqlens=None):
    """The definition, step by step: arguments and results as `selective_scan`."""
    if cu_seqlens is not None:
        return _pack_numpy(selective_scan_numpy, (x, dt, A, B, C, D), (0, 1, 3, 4), state, cu_seqlens)
    h = np.zeros((x.shape[0], *A.shape), x.dtype) if state is None else state
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        h = np.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y[:, t] = (h * C[:, t, None]).sum(-1) + (0 if D is None else D * x[:, t])
    return y, h


def selective_scan_associative_numpy(x, dt, A, B, C, D=None, state=None):
    """The same in log₂ T rounds, as `s4d_scan_numpy`: what is scanned depends on the input now."""
    a, b = np.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]    # [B, T, C, N]
    if state is not None and x.shape[1]:
        b[:, 0] += a[:, 0] * state
    shift = 1
    while shift < x.shape[1]:
        a[:, shift:], b[:, shift:] = a[:, shift:] * a[:, :-shift], a[:, shift:] * b[:, :-shift] + b[:, shift:]
        shift *= 2
    after = b[:, -1] if x.shape[1] else np.zeros((x.shape[0], *A.shape)) if state is None else state
    return (b * C[:, :, None]).sum(-1) + (0 if D is None else D * x), after


def selective_scan_backward_numpy(x, dt, A, B, C, D=None, state=None, cu_seqlens=None, *, grad):
    """grad (dy, dstate) → dx, ddt, dA, dB, dC, and dD, dstate where they were given."""
    if cu_seqlens is not None:
        return _pack_backward_numpy(selective_scan_backward_numpy, (x, dt, A, B, C, D), (0, 1, 3, 4), state, cu_seqlens,
                                    grad)
    dy, g = grad
    h = [np.zeros((x.shape[0], *A.shape), x.dtype) if state is None else state]
    for t in range(x.shape[1]):
        h.append(np.exp(dt[:, t, :, None] * A) * h[-1] + (dt[:, t] * x[:, t])[..., None] * B[:, t, None])
    du, ddt, dA, dB, dC = (np.zeros_like(a) for a in (x, dt, A, B, C))
    for t in reversed(range(x.shape[1])):
        g = g + C[:, t, None] * dy[:, t, :, None]
        a = np.exp(dt[:, t, :, None] * A)
        dC[:, t] = (dy[:, t, :, None] * h[t + 1]).sum(1)
        dB[:, t] = ((dt[:, t] * x[:, t])[..., None] * g).sum(1)
        du[:, t] = (g * B[:, t, None]).sum(-1)
        da = a * g * h[t]
        ddt[:, t] = (da * A).sum(-1) + du[:, t] * x[:, t]
        dA += (da * dt[:, t, :, None]).sum(0)
        g = a * g
    dx = du * dt + (0 if D is None else D * dy)
    return dx, ddt, dA, dB, dC, *(() if D is None else ((dy * x).sum((0, 1)),)), *(() if state is None else (g,))


@jit
def _selective_scan_fwd(X, DT, A, B, C, D, S, CU, Y, LAST, HELD, CHANNELS, N, CHUNK, BLOCK_C: tl.constexpr,
                        BLOCK_N: tl.constexpr):
    seq = tl.program_id(0).to(tl.int64)
    c, n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    mask = (c < CHANNELS)[:, None] & (n < N)[None, :]
    place = c[:, None] * N + n[None, :]
    a_log = tl.load(A + place, mask=mask, other=0.).to(tl.float32)
    h = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    if S is not None:
        h = tl.load(S + seq * CHANNELS * N + place, mask=mask, other=0.).to(tl.float32)
    first, last = tl.load(CU + seq).to(tl.int64), tl.load(CU + seq + 1).to(tl.int64)
    for t in range(first, last):
        if (t - first) % CHUNK == 0:                                         # for the backward pass: the state before
            tl.store(HELD + (t // CHUNK + seq) * CHANNELS * N + place, h, mask=mask)                 # each chunk
        x = tl.load(X + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
        dt = tl.load(DT + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
        b = tl.load(B + t * N + n, mask=n < N, other=0.).to(tl.float32)
        r = tl.load(C + t * N + n, mask=n < N, other=0.).to(tl.float32)
        h = tl.exp(dt[:, None] * a_log) * h + (dt * x)[:, None] * b[None, :]
        y = tl.sum(h * r[None, :], 1)
        if D is not None:
            y += tl.load(D + c, mask=c < CHANNELS, other=0.).to(tl.float32) * x
        tl.store(Y + t * CHANNELS + c, y, mask=c < CHANNELS)
    tl.store(LAST + seq * CHANNELS * N + place, h, mask=mask)


@jit
def _selective_scan_bwd(dY, dLAST, X, DT, A, B, C, D, CU, HELD, ROOM, dX, dDT, dA, dB, dC, dD, dS, T, CHANNELS, N,
                        CHUNK, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    seq, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c, n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    mask = (c < CHANNELS)[:, None] & (n < N)[None, :]
    place = c[:, None] * N + n[None, :]
    a_log = tl.load(A + place, mask=mask, other=0.).to(tl.float32)
    g = tl.load(dLAST + seq * CHANNELS * N + place, mask=mask, other=0.).to(tl.float32)
    da_sum = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    dd_sum = tl.zeros([BLOCK_C], tl.float32)
    first, last = tl.load(CU + seq).to(tl.int64), tl.load(CU + seq + 1).to(tl.int64)
    chunks = (last - first + CHUNK - 1) // CHUNK
    for back in range(0, chunks):
        start = first + (chunks - 1 - back) * CHUNK
        stop = tl.minimum(start + CHUNK, last)
        h = tl.load(HELD + (start // CHUNK + seq) * CHANNELS * N + place, mask=mask, other=0.)
        for t in range(start, stop):                                         # the chunk's states anew, before each t
            tl.store(ROOM + (seq * CHUNK + t - start) * CHANNELS * N + place, h, mask=mask)
            x = tl.load(X + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            dt = tl.load(DT + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            b = tl.load(B + t * N + n, mask=n < N, other=0.).to(tl.float32)
            h = tl.exp(dt[:, None] * a_log) * h + (dt * x)[:, None] * b[None, :]
        for i in range(0, stop - start):
            t = stop - 1 - i
            x = tl.load(X + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            dt = tl.load(DT + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            dy = tl.load(dY + t * CHANNELS + c, mask=c < CHANNELS, other=0.).to(tl.float32)
            b = tl.load(B + t * N + n, mask=n < N, other=0.).to(tl.float32)
            r = tl.load(C + t * N + n, mask=n < N, other=0.).to(tl.float32)
            before = tl.load(ROOM + (seq * CHUNK + t - start) * CHANNELS * N + place, mask=mask, other=0.)
            a = tl.exp(dt[:, None] * a_log)
            h = a * before + (dt * x)[:, None] * b[None, :]
            g += r[None, :] * dy[:, None]
            tl.store(dC + (group * T + t) * N + n, tl.sum(dy[:, None] * h, 0), mask=n < N)          # summed later over
            tl.store(dB + (group * T + t) * N + n, tl.sum((dt * x)[:, None] * g, 0), mask=n < N)    # groups: no atomics
            du = tl.sum(g * b[None, :], 1)
            da = a * g * before
            dx = du * dt
            if D is not None:
                dx += tl.load(D + c, mask=c < CHANNELS, other=0.).to(tl.float32) * dy
                dd_sum += dy * x
            tl.store(dX + t * CHANNELS + c, dx, mask=c < CHANNELS)
            tl.store(dDT + t * CHANNELS + c, tl.sum(da * a_log, 1) + du * x, mask=c < CHANNELS)
            da_sum += da * dt[:, None]
            g = a * g
    tl.store(dA + seq * CHANNELS * N + place, da_sum, mask=mask)
    tl.store(dD + seq * CHANNELS + c, dd_sum, mask=c < CHANNELS)
    tl.store(dS + seq * CHANNELS * N + place, g, mask=mask)


SCAN_CHUNK, SCAN_CHANNELS = 16, 32                                           # steps between kept states; of a program


class _ScanKernel(torch.autograd.Function):
    """x, dt [T, C], B, C [T, N] of all sequences, one after the other; cu [sequences + 1]."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, cu):
        (T, channels), N, sequences = x.shape, A.shape[1], len(cu) - 1
        y = torch.zeros_like(x)
        last = torch.empty(sequences, channels, N, device=x.device)
        held = torch.empty(T // SCAN_CHUNK + sequences + 1, channels, N, device=x.device)
        grid = sequences, triton.cdiv(channels, SCAN_CHANNELS)
        _selective_scan_fwd[grid](x, dt, A, B, C, D, state, cu, y, last, held, channels, N, SCAN_CHUNK,
                                  BLOCK_C=SCAN_CHANNELS, BLOCK_N=triton.next_power_of_2(N))
        ctx.save_for_backward(x, dt, A, B, C, D, state, cu, held)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, state, cu, held = ctx.saved_tensors
        (T, channels), N, sequences = x.shape, A.shape[1], len(cu) - 1
        groups, new = triton.cdiv(channels, SCAN_CHANNELS), lambda *shape: torch.zeros(*shape, device=x.device)
        room, dx, ddt = new(sequences, SCAN_CHUNK, channels, N), torch.zeros_like(x), torch.zeros_like(dt)
        dA, dS, dD = new(sequences, channels, N), new(sequences, channels, N), new(sequences, channels)
        dB, dC = new(groups, T, N), new(groups, T, N)
        _selective_scan_bwd[sequences, groups](
            dy.contiguous(), dlast.contiguous(), x, dt, A, B, C, D, cu, held, room, dx, ddt, dA, dB, dC, dD, dS, T,
            channels, N, SCAN_CHUNK, BLOCK_C=SCAN_CHANNELS, BLOCK_N=triton.next_power_of_2(N))
        return (dx, ddt, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
                None if D is None else dD.sum(0).to(D.dtype), None if state is None else dS.to(state.dtype), None)


# On a CPU the line is folded: `steps` tokens one after the other, in all pieces of so many at once; each piece as if
# nothing had been before it, and then what entered it, faded by as many steps as have passed.

STEPS, FOLDED = 32, 2 ** 18                                                  # tokens a piece; numbers at once


def _fold(x, steps):
    """x [B, T, …] → [steps, B, pieces, …], zeros behind the end: at Δ = 0 nothing fades and nothing is added."""
    B, T = x.shape[:2]
    pieces = -(-T // steps)
    x = F.pad(x, [0] * (2 * (x.ndim - 2)) + [0, pieces * steps - T])
    return x.unflatten(1, (pieces, steps)).movedim(2, 0)


def _unfold(x, T):
    return x.movedim(0, 2).flatten(1, 2)[:, :T]


def _carry_on(fade, own, entering):
    """Pieces in a row: fade, own [B, pieces, C, N], entering [B, C, N] → what enters each, and what leaves."""
    each = []
    for f, o in zip(fade.unbind(1), own.unbind(1)):
        each.append(entering)
        entering = f * entering + o
    return torch.stack(each, 1), entering


def _piecewise_forward(u, dt, A, B, C, state):
    """u = Δ x and dt [steps, B, pieces, C], B, C [steps, B, pieces, N] → y, what entered each piece, and what left."""
    h, y = u.new_zeros(*u.shape[1:], A.shape[1]), torch.empty_like(u)
    for i in range(len(u)):
        a = (dt[i, ..., None] * A).exp_()
        h = torch.addcmul(a.mul_(h), u[i, ..., None], B[i, ..., None, :])
        torch.matmul(h, C[i, ..., None], out=y[i][..., None])
    passed = dt.cumsum(0)
    entered, after = _carry_on((passed[-1, ..., None] * A).exp_(), h, state)
    for i in range(len(u)):
        y[i] += ((passed[i, ..., None] * A).exp_().mul_(entered) @ C[i, ..., None])[..., 0]
    return y, entered, after


def _piecewise_backward(u, dt, A, B, C, entered, dy, g):
    """g [B, C, N]: the gradient of what leaves → du, d(Δ) by way of the decays, dA, dB, dC, and g of what enters."""
    hs, h = [entered], entered
    for i in range(len(u)):
        a = (dt[i, ..., None] * A).exp_()
        h = torch.addcmul(a.mul_(h), u[i, ..., None], B[i, ..., None, :])
        hs.append(h)
    du, ddt, dB, dC, dA = (torch.zeros_like(x) for x in (u, dt, B, C, A))
    own = torch.zeros_like(h)
    for i in reversed(range(len(u))):                                        # each piece as if nothing came after it
        own = torch.addcmul(own, dy[i, ..., None], C[i, ..., None, :])
        own = own * (dt[i, ..., None] * A).exp_()
    left = dt.flip(0).cumsum(0).flip(0)                                      # Δ_t + … to the end of the piece
    fade = (left[0, ..., None] * A).exp_()
    leaving, before = _carry_on(fade.flip(1), own.flip(1), g)
    later = leaving.flip(1)                                                  # what comes back into each from behind
    for i in reversed(range(len(u))):
        g = torch.addcmul(later, dy[i, ..., None], C[i, ..., None, :])
        dC[i] = (dy[i, ..., None, :] @ hs[i + 1])[..., 0, :]
        dB[i] = (u[i, ..., None, :] @ g)[..., 0, :]
        du[i] = (g @ B[i, ..., None])[..., 0]
        later = g.mul_((dt[i, ..., None] * A).exp_())
        da = later * hs[i]
        ddt[i] = (da * A).sum(-1)
        dA += torch.einsum("bpc,bpcn->cn", dt[i], da)
    return du, ddt, dA, dB, dC, before


class _ScanInPieces(torch.autograd.Function):
    """A few pieces at a time, so that their numbers stay in a CPU's cache; between them only what entered is kept."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state):
        T, many = x.shape[1], max(1, FOLDED // max(1, x.shape[0] * A.numel())) * STEPS
        y, entered = torch.empty_like(x), []
        for t in range(0, T, many):
            part = slice(t, min(T, t + many))
            u, d, b, c = (_fold(a[:, part], STEPS) for a in (dt * x, dt, B, C))
            out, entering, state = _piecewise_forward(u, d, A, b, c, state)
            y[:, part] = _unfold(out, y[:, part].shape[1])
            entered.append(entering)
        ctx.save_for_backward(x, dt, A, B, C, D, *entered)
        ctx.many = many
        return y if D is None else torch.addcmul(y, D, x), state.clone() if not T else state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, g):
        x, dt, A, B, C, D, *entered = ctx.saved_tensors
        dx, ddt, dA, dB, dC = (torch.zeros_like(a) for a in (x, dt, A, B, C))
        for i, t in reversed(list(enumerate(range(0, x.shape[1], ctx.many)))):
            part = slice(t, min(x.shape[1], t + ctx.many))
            own = x[:, part], dt[:, part], B[:, part], C[:, part], dy[:, part]
            u, d, b, c, e = (_fold(a, STEPS) for a in (own[0] * own[1], *own[1:]))
            du, through, da, db, dc, g = _piecewise_backward(u, d, A, b, c, entered[i], e, g)
            n = own[0].shape[1]
            du = _unfold(du, n)
            dx[:, part], ddt[:, part] = du * own[1], _unfold(through, n) + du * own[0]
            dB[:, part], dC[:, part] = _unfold(db, n), _unfold(dc, n)
            dA += da
        dD = None if D is None else (dy * x).sum((0, 1))
        return dx if D is None else dx + D * dy, ddt, dA, dB, dC, dD, g


def _check_scan(op, x, dt, A, B, C, D, state, sequences):
    told = f"{op}: x {tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
    if (A.ndim != 2 or x.shape[-1:] != A.shape[:1] or dt.shape != x.shape or B.shape != (*x.shape[:-1], A.shape[1])
            or C.shape != B.shape or D is not None and D.shape != A.shape[:1]):
        raise ValueError(f"{told}, D {None if D is None else tuple(D.shape)} must be [B, T, C], [B, T, C], [C, N], "
                         "[B, T, N] twice and [C], without T for a step")
    if state is not None and state.shape != (sequences, *A.shape):
        raise ValueError(f"{op}: state {tuple(state.shape)} must be {(sequences, *A.shape)}")
    if x.device.type == "cpu":
        if A.numel() and not (A < 0).all():
            raise ValueError(f"{op}: A {tuple(A.shape)} holds {A.max().item():g}; all of it must be below 0")
        if dt.numel() and dt.min() < 0:
            raise ValueError(f"{op}: dt {tuple(dt.shape)} holds {dt.min().item():g}; a step can't be below 0")


def selective_scan(x, dt, A, B, C, D=None, state=None, cu_seqlens=None):
    """Mamba's scan (arXiv 2312.00752, algorithm 2): x, dt [B, T, C] (dt > 0), A [C, N] (< 0), B, C [B, T, N], D [C] →
    (y as x, state [B, C, N] float32).

    state: before the first token (None: zeros), and after the last; differentiable, too. Packed: `cu_seqlens`
    [sequences + 1], B = 1, a state for each sequence. ValueError for shapes that do not fit, and on a CPU for signs.
    """
    if x.ndim != 3:
        raise ValueError(f"selective_scan: x {tuple(x.shape)} must be [B, T, C]")
    (rows, T, _), kind = x.shape, x.dtype
    if cu_seqlens is not None:
        _offsets("selective_scan", cu_seqlens, T, rows)
    sequences = rows if cu_seqlens is None else len(cu_seqlens) - 1
    _check_scan("selective_scan", x, dt, A, B, C, D, state, sequences)
    if on_kernel(x):
        cu = torch.arange(rows + 1, device=x.device) * T if cu_seqlens is None else cu_seqlens
        flat = [a.flatten(0, 1).contiguous() for a in (x, dt, B, C)]
        before = None if state is None else state.contiguous()
        y, after = _ScanKernel.apply(*flat[:2], A.contiguous(), *flat[2:], D, before, cu)
        return y.view(x.shape), after
    wide = torch.promote_types(torch.float32, kind)
    x, dt, A, B, C, D = (a if a is None else a.to(wide) for a in (x, dt, A, B, C, D))
    state = x.new_zeros(sequences, *A.shape) if state is None else state.to(wide)
    if cu_seqlens is None:
        y, state = _ScanInPieces.apply(x, dt, A, B, C, D, state)
    else:
        y, state = _pack_in_torch(lambda x, dt, B, C, state: _ScanInPieces.apply(x, dt, A, B, C, D, state),
                                  lambda x, dt, B, C, state: selective_scan_step(x, dt, A, B, C, D, state),
                                  (x, dt, B, C), state, cu_seqlens)
        y = torch.zeros_like(x) if y is None else y
    return y.to(kind), state


def selective_scan_step(x, dt, A, B, C, D=None, state=None):
    """One token: x, dt [B, C], B, C [B, N], state [B, C, N] → (y [B, C], state)."""
    if state is None or x.ndim != 2:
        raise ValueError(f"selective_scan_step: x {tuple(x.shape)} must be [B, C], and it needs a state")
    _check_scan("selective_scan_step", x, dt, A, B, C, D, state, len(x))
    kind, wide = x.dtype, torch.promote_types(torch.float32, x.dtype)
    x, dt, A, B, C = (a.to(wide) for a in (x, dt, A, B, C))
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None]
    y = (state @ C[..., None])[..., 0]
    return (y if D is None else y + D.to(wide) * x).to(kind), state
