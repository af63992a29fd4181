"""The Transformer layer: every token looks at every token before it, then thinks alone.

    x ← x + Attention(RMSNorm(x))        tokens exchange: a weighted mean of the values of earlier tokens
    x ← x + MLP(RMSNorm(x))              each token by itself

    attention   o_i = Σ_j p_ij v_j       p_i = softmax_j(q_i · k_j / √D)       j ≤ i (causal)
    RMSNorm     y = x / √(mean(x²) + ε) · w
    rotary      (a, b) ← (a cos θ − b sin θ, b cos θ + a sin θ)      θ = position · base^(−2d/D), one angle a pair d
    SwiGLU      y = W_down (silu(W_gate x) ∘ W_up x)                 silu(z) = z / (1 + e^−z)
    loss        mean over tokens of  log Σ_v e^{z_v} − z_target      z = W x, a chunk of tokens at a time

    name        shape           meaning
    x           [B, T, C]       B sequences of T tokens, C channels each: the residual stream
    q           [B, H, T, D]    a query for each of H heads, D long: what this token looks for
    k, v        [B, G, S, D]    keys and values of S tokens; G heads of them, each shared by H / G query heads
    positions   [T] or [B, T]   where each query stands in its text
    state       KVCache         keys and values of the tokens so far, owned by the caller; None in training

This is the layer of Qwen3 (and, by its options, of Llama, Mistral and Qwen2): pre-norm, grouped heads, normalised
queries and keys, rotary positions, a gated MLP. Attention: Vaswani et al. 2017, arXiv 1706.03762. Grouped heads:
2305.13245. RMSNorm: 1910.07467. Rotary: 2104.09864. SwiGLU: 2002.05202. QK-norm: 2302.05442. ALiBi: 2108.12409.

`python attention.py` checks each part against its definition and times it.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# --- 1. The parts, in NumPy: the definitions --------------------------------------------------------------------------

def rms_norm_numpy(x, w, eps=1e-6, residual=None):
    """x, residual [..., C], w [C] → y [..., C]; with a residual, their sum is normed and returned too: (y, sum)."""
    x = x if residual is None else x + residual
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)                   # [..., 1]
    y = x * r * w
    return y if residual is None else (y, x)


def rotary_angles_numpy(positions, D, base=10000.0, inv_freq=None):
    """positions [T] or [B, T] → angles [T, D/2] or [B, 1, T, D/2] (heads broadcast)."""
    if inv_freq is None:
        inv_freq = base ** (-np.arange(0, D, 2) / D)                         # [D/2], from 1 down to ~1/base
    angles = positions[..., None] * inv_freq
    return angles if angles.ndim == 2 else angles[:, None]


def rotary_numpy(q, k, positions, base=10000.0, inv_freq=None, factor=1.0):
    """q [B, H, T, D], k [B, G, T, D], positions [T] or [B, T] → both rotated; q·k then depends on distance alone."""
    angles = rotary_angles_numpy(positions, q.shape[-1], base, inv_freq)
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)                                       # pair d is (x[d], x[d + D/2])
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotate(q), rotate(k)


def swiglu_numpy(gate, up):
    """gate, up [..., F] → silu(gate) · up [..., F]."""
    return gate / (1 + np.exp(-gate)) * up


def attention_numpy(q, k, v, causal=True, window=None, softcap=None, alibi=None, scale=None, mask=None):
    """q [B, H, T, D], k, v [B, G, S, D] → [B, H, T, D], the whole T × S matrix at once. Options: see `attention`."""
    (_, H, T, D), (G, S) = q.shape, k.shape[1:3]
    k, v = np.repeat(k, H // G, axis=1), np.repeat(v, H // G, axis=1)        # [B, H, S, D]
    s = q @ k.swapaxes(-1, -2) * (D ** -0.5 if scale is None else scale)     # [B, H, T, S]
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    distance = np.arange(T)[:, None] + S - T - np.arange(S)                  # ≥ 0: the key is not in the query's future
    if alibi is not None:
        s = s - alibi[:, None, None] * np.abs(distance)
    seen = np.ones((T, S), bool) if not causal else distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    s = np.where(seen, s, -np.inf)
    m = s.max(-1, keepdims=True, initial=-np.inf)                            # subtracted, so that exp cannot overflow
    p = np.exp(s - np.where(m > -np.inf, m, 0))                              # a row that sees no key: all p are 0
    l = p.sum(-1, keepdims=True)
    return p @ v / np.where(l > 0, l, 1)


def linear_cross_entropy_numpy(x, w, targets, ignore_index=-100):
    """x [N, C], w [V, C], targets [N] → mean over the rows not ignored of −log softmax(x wᵀ)[target]; 0 if none."""
    kept = targets != ignore_index
    z = x[kept] @ w.T                                                        # [rows, V]
    m = z.max(-1, keepdims=True)
    lse = m[:, 0] + np.log(np.exp(z - m).sum(-1))
    return (lse - z[np.arange(len(z)), targets[kept]]).sum() / max(len(z), 1)


# --- 2. The ops: the same for torch tensors, differentiable, the fastest path of each device --------------------------
#
# torch has rotary and RMSNorm only as chains of small ops, each of which reads and writes all of x and keeps a copy for
# the backward pass. On a CPU memory is what training waits for, so these two have their backward written out by hand.

class _RMSNorm(torch.autograd.Function):
    """dx = r · (dy∘w) − x · r³ · mean(x∘dy∘w),  dw = Σ_rows r · (x∘dy): with x∘dy known, both sums are one product."""

    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, r)
        return (x * r).mul_(w)

    @staticmethod
    def backward(ctx, dy):
        x, w, r = ctx.saved_tensors
        x_dy = (x * dy).reshape(-1, x.shape[-1])
        dw = x_dy.T @ r.reshape(-1)
        mean = (x_dy @ w).reshape(r.shape) / x.shape[-1]
        return (dy * w).mul_(r).addcmul_(x, r.pow(3).mul_(mean), value=-1), dw, None


def rms_norm(x, w, eps=1e-6, residual=None):
    """x [..., C] · w [C] / RMS(x) → [..., C]; with `residual` [..., C] → (normed x + residual, x + residual).

    Computed in float32 or better and returned in x's dtype. ValueError where the channels differ. arXiv 1910.07467,
    equation 4.
    """
    if w.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: w {tuple(w.shape)} must be the last size of x {tuple(x.shape)}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"rms_norm: residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
        x = x + residual
    if (x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and x.dtype == w.dtype == torch.float32):
        y = _RMSNorm.apply(x, w, eps)
    elif x.dtype == w.dtype and x.dtype in (torch.float32, torch.float64):
        y = F.rms_norm(x, w.shape, w, eps)
    else:                                                                    # half precision: normed in float32
        x32 = x.float()
        y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * w
    return y if residual is None else (y, x)


class _Rotary(torch.autograd.Function):
    """A rotation's gradient is the rotation back: the same lines with −sin, and nothing of x is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def _rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():                                        # which makes one pass of it
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_a, y_b = y.chunk(2, dim=-1)                                            # in place: x read twice, y written twice
    torch.mul(a, cos, out=y_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y_b).addcmul_(a, sin)
    return y


def rotary_cos_sin(positions, inv_freq, factor=1.0):
    """positions [T] or [B, T], inv_freq [D/2] → cos, sin [T, D/2] or [B, 1, T, D/2].

    In float64 where the device has it: at position 10⁵ a float32 angle is off by a hundredth of a radian.
    """
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = positions[..., None].to(exact) * inv_freq.to(exact)
    angles = angles if angles.ndim == 2 else angles[:, None]
    return angles.cos() * factor, angles.sin() * factor


def rotary_inv_freq(D, base=10000.0, device=None):
    """The inverse wavelengths base^(−2d/D) → [D/2]. ValueError for an odd D."""
    if D % 2:
        raise ValueError(f"rotary: the head size must be even to be rotated in pairs, not {D}")
    exact = torch.float32 if str(device).startswith("mps") else torch.float64
    return base ** (-torch.arange(0, D, 2, dtype=exact, device=device) / D)


def rotary(q, k, positions, base=10000.0, inv_freq=None, factor=1.0):
    """Rotate q [B, H, T, D] and k [B, G, T, D] by their positions [T] or [B, T] → the same shapes.

    Pair d of a head is (x[d], x[d + D/2]), Hugging Face's order. `inv_freq` [D/2] (radians a position) replaces
    base^(−2d/D); `factor` scales cos and sin (YaRN). arXiv 2104.09864, equation 34.
    """
    if inv_freq is None:
        inv_freq = rotary_inv_freq(q.shape[-1], base, q.device)
    if k.shape[-1] != q.shape[-1] or 2 * len(inv_freq) != q.shape[-1]:
        raise ValueError(f"rotary: q {tuple(q.shape)}, k {tuple(k.shape)} and 2 · inv_freq ({2 * len(inv_freq)}) must "
                         "have one head size")
    if q.shape[-2] != positions.shape[-1] or k.shape[-2] != positions.shape[-1]:
        raise ValueError(f"rotary: positions {tuple(positions.shape)} must be one for each of the tokens of "
                         f"q {tuple(q.shape)} and k {tuple(k.shape)}")
    cos, sin = (a.to(q.dtype) for a in rotary_cos_sin(positions, inv_freq, factor))
    return Rotary.turn(q, cos, sin), Rotary.turn(k, cos, sin)


def swiglu(gate, up):
    """silu(gate) · up, both [..., F] → [..., F]. arXiv 2002.05202, equation 6 (without the linear maps)."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape")
    return F.silu(gate) * up


def attention(q, k, v, causal=True, window=None, softcap=None, alibi=None, scale=None, mask=None):
    """Softmax attention: q [B, H, T, D], k, v [B, G, S, D] → [B, H, T, D], differentiable.

    causal   query i sees key j where j ≤ i + S − T: the last query sees the last key (bottom-right alignment)
    window   a query sees itself and the `window` − 1 keys before it
    softcap  scores become softcap · tanh(score / softcap)
    alibi    [H] slopes; −slope · distance is added to the scores, after the softcap
    scale    of q · k; 1/√D if None
    mask     [B, S], True where a key takes part

    A query that sees no key gives zeros, and zero gradients. Values at masked places must be finite (0 · NaN is NaN).
    ValueError names the argument that does not fit. arXiv 1706.03762, equation 1; grouped heads 2305.13245.
    """
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or H % G:
        raise ValueError(f"attention: k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, G, S, D] for q "
                         f"{tuple(q.shape)} [B, H, T, D], with G a divisor of H")
    if window is not None and window < 1 or softcap is not None and softcap <= 0:
        raise ValueError(f"attention: window ({window}) must be at least 1 and softcap ({softcap}) above 0")
    if mask is not None and (mask.shape != (B, S) or mask.dtype != torch.bool):
        raise ValueError(f"attention: mask {tuple(mask.shape)} {mask.dtype} must be bool [B, S] = {(B, S)}")
    if alibi is not None and alibi.shape != (H,):
        raise ValueError(f"attention: alibi {tuple(alibi.shape)} must be a slope a head, [H] = {(H,)}")
    if window is not None and window >= S:
        window = None                                                        # wider than the text: no bound at all
    scale = D ** -0.5 if scale is None else scale
    if B * H * T == 0 or S == 0:
        return 0 * q + 0 * (k.sum() + v.sum())                               # nothing to see, and gradients that say so
    plain = softcap is None and alibi is None and mask is None and window is None
    if plain and T == 1:
        # One query sees all keys: the H / G heads of a group stand in as its queries.
        y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), k, v, scale=scale)
        return y.reshape(B, H, 1, D)
    if plain and (not causal or T == S):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=H != G)

    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)          # [T, S]
    seen = torch.ones_like(distance, dtype=torch.bool) if not causal else distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[None, None] if mask is None else seen & mask[:, None, None, :]                       # [B|1, 1, T, S]
    some = seen.any(-1, keepdim=True)                                        # rows that see a key
    seen = seen | ~some                                                      # others see all, so that no NaN arises,
    if softcap is None and alibi is None:                                    # and are zeroed with their gradients below
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(B, 1, T, S), scale=scale, enable_gqa=H != G)
    else:
        s = q.unflatten(1, (G, H // G)) @ k.unsqueeze(2).transpose(-1, -2) * scale                   # [B, G, H/G, T, S]
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if alibi is not None:
            s = s - alibi.view(G, H // G, 1, 1) * distance.abs()
        s = s.masked_fill(~seen.unsqueeze(1), -torch.inf)
        p = s.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        y = (p @ v.unsqueeze(2)).flatten(1, 2)
    return torch.where(some, y, 0)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients together, a chunk of rows at a time: dz = (softmax(z) − onehot(target)) / rows kept."""

    CHUNK = 2 ** 20                                                          # logits at once: 4 MB stay in the cache

    @staticmethod
    def forward(ctx, x, w, targets, ignore_index):
        (N, C), V = x.shape, len(w)
        exact = torch.promote_types(x.dtype, torch.float32)                  # of the softmax and the sums
        kept = targets != ignore_index
        count = kept.sum().clamp(min=1)
        index = targets.where(kept, 0)[:, None]
        loss = torch.zeros((), dtype=exact, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros(V, C, dtype=exact, device=x.device) if ctx.needs_input_grad[1] else None
        rows = max(1, _LinearCrossEntropy.CHUNK // V)
        for i in range(0, N, rows):
            chunk, weight = x[i:i + rows], kept[i:i + rows, None].to(exact)
            p = F.log_softmax((chunk @ w.T).to(exact), dim=-1)                # [rows, V]
            loss -= (p.gather(1, index[i:i + rows]) * weight).sum()
            if dx is None and dw is None:
                continue
            p.exp_().scatter_add_(1, index[i:i + rows], -torch.ones_like(weight)).mul_(weight)
            p = p.to(x.dtype)
            if dx is not None:
                torch.matmul(p, w, out=dx[i:i + rows])
            if dw is not None:
                dw.addmm_(p.T, chunk) if dw.dtype == x.dtype else dw.add_(p.T @ chunk)
        ctx.save_for_backward(dx, dw, count)
        ctx.w_dtype = w.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return dx if dx is None else dx.mul_(scale), dw if dw is None else dw.mul_(scale).to(ctx.w_dtype), None, None


def linear_cross_entropy(x, w, targets, ignore_index=-100):
    """Mean cross-entropy of the logits x wᵀ: x [N, C], w [V, C], targets [N] integers → a scalar, nats a row.

    The [N, V] logits never exist at once, nor does their gradient. Rows whose target is `ignore_index` do not count; if
    none is left the loss and its gradients are 0. ValueError for a target outside 0 … V − 1. Backward once.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy: x {tuple(x.shape)}, w {tuple(w.shape)}, "
                         f"targets {tuple(targets.shape)} must be [N, C], [V, C] and [N]")
    if x.device.type == "cpu":                                               # elsewhere a look at the values is a wait
        bad = ((targets < 0) | (targets >= len(w))) & (targets != ignore_index)
        if bad.any():
            raise ValueError(f"linear_cross_entropy: targets holds {targets[bad][0]}, outside 0 … {len(w) - 1}")
    return _LinearCrossEntropy.apply(x, w, targets.long(), ignore_index)


# --- 3. The modules: parts with weights, stacked into a block ---------------------------------------------------------

class KVCache:
    """The state of an attention layer: keys and values of up to `capacity` tokens for each of B sequences in step."""

    def __init__(self, B, G, capacity, D, dtype=torch.float32, device=None):
        self.k = torch.empty(B, G, capacity, D, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def attend(self, q, k, v, attention, **options):
        """Append k, v [B, G, T, D] and let q [B, H, T, D] look at all of the cache → [B, H, T, D]."""
        start, self.length = self.length, self.length + k.shape[2]
        if self.length > self.k.shape[2]:
            raise ValueError(f"KVCache: {self.length} tokens do not fit a capacity of {self.k.shape[2]}")
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return attention(q, self.k[:, :, :self.length], self.v[:, :, :self.length], **options)

    def repeat(self, n):
        """Turn one sequence into n alike: continuations that share what came before."""
        self.k, self.v = self.k.repeat(n, 1, 1, 1), self.v.repeat(n, 1, 1, 1)


class Rotary:
    """The positions' cos and sin, made once and shared by all layers. `inv_freq` and `factor`: see `rotary`."""

    def __init__(self, inv_freq, factor=1.0):
        self.inv_freq, self.factor = inv_freq, factor
        self.seen, self.table = None, None

    def __call__(self, x, positions):
        """x [B, heads, T, D], rotated: q and k side by side in one pass."""
        if torch.compiler.is_compiling():                                    # a graph shares what is alike by itself
            table = rotary_cos_sin(positions, self.inv_freq.to(x.device), self.factor)
            return self.turn(x, *(a.to(x.dtype) for a in table))
        version = None if positions.is_inference() else positions._version
        seen = (positions, version, x.dtype)                                 # all layers of a pass share one tensor
        if self.seen is None or self.seen[0] is not positions or self.seen[1:] != seen[1:]:
            table = rotary_cos_sin(positions, self.inv_freq.to(x.device), self.factor)
            self.seen, self.table = seen, tuple(a.to(x.dtype) for a in table)
        return self.turn(x, *self.table)

    @staticmethod
    def turn(x, cos, sin):
        return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() and x.requires_grad else _rotate(x, cos, sin)


class Attention(nn.Module):
    """x [B, T, C] → [B, T, C]: q, k, v from one product, normed, rotated, attended, mixed back.

    The rows of `qkv` are those of q (H · D), k (G · D), v (G · D). `attend` is the attention function (flash on GPUs).
    """

    def __init__(self, C, H, G, D, rotary, qk_norm=True, bias=False, out_bias=False, window=None, eps=1e-6,
                 attend=attention):
        super().__init__()
        self.H, self.G, self.D, self.window, self.eps = H, G, D, window, eps
        self.rotary, self.attend = rotary, attend
        self.qkv = nn.Linear(C, (H + 2 * G) * D, bias=bias)
        self.out = nn.Linear(H * D, C, bias=out_bias)
        self.q_norm = nn.Parameter(torch.ones(D)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(D)) if qk_norm else None

    def forward(self, x, positions, state=None):
        B, T, _ = x.shape
        H, G, D = self.H, self.G, self.D
        q, k, v = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2).split([H, G, G], dim=1)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        options = dict(window=self.window)
        y = self.attend(q, k, v, **options) if state is None else state.attend(q, k, v, self.attend, **options)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


class MLP(nn.Module):
    """x [..., C] → W_down (silu(W_gate x) ∘ W_up x) [..., C]; the rows of `gate_up` are W_gate's, then W_up's."""

    def __init__(self, C, hidden, bias=False):
        super().__init__()
        self.gate_up = nn.Linear(C, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, C, bias=bias)

    def forward(self, x):
        return self.down(swiglu(*self.gate_up(x).chunk(2, dim=-1)))


class RMSNorm(nn.Module):
    """`rms_norm` with its gain as a parameter."""

    def __init__(self, C, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x, residual=None):
        return rms_norm(x, self.weight, self.eps, residual)


class Block(nn.Module):
    """The pre-norm layer: `block(x, positions, state)` = x + `block.delta(x, positions, state)`, all [B, T, C]."""

    def __init__(self, attention, mlp, C, eps=1e-6):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(C, eps), attention
        self.mlp_norm, self.mlp = RMSNorm(C, eps), mlp

    def forward(self, x, positions, state=None):
        x = x + self.attention(self.attention_norm(x), positions, state)
        return x + self.mlp(self.mlp_norm(x))

    def delta(self, x, positions, state=None):
        """What the block adds to x, without x: Mixture of Depths scales it."""
        a = self.attention(self.attention_norm(x), positions, state)
        normed, _ = self.mlp_norm(a, residual=x)
        return a + self.mlp(normed)


# --- 4. The claims, proved on the reader's machine --------------------------------------------------------------------

def _milliseconds(work, tries=7):
    times = []
    for _ in range(tries):
        t = time.perf_counter()
        work()
        times.append(time.perf_counter() - t)
    return 1000 * min(times)


def main():
    """Print each op beside its definition and its plain writing, and a block with a cache beside one without."""
    B, H, G, T, D, C, V = 4, 8, 4, 256, 32, 256, 4096
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    q, k, v = randn(B, H, T, D), randn(B, G, T, D), randn(B, G, T, D)
    x, w, head = randn(B * T, C), randn(C), randn(V, C) / 16
    positions, targets = torch.arange(T), torch.randint(0, V, (B * T,), generator=generator)

    def naive_attention(q, k, v):
        s = q @ k.repeat_interleave(H // G, 1).mT / D ** 0.5
        return s.masked_fill(positions[:, None] < positions, -torch.inf).softmax(-1) @ v.repeat_interleave(H // G, 1)

    def naive_rotary(q, k):
        cos, sin = (torch.cat([a, a], -1) for a in rotary_cos_sin(positions, rotary_inv_freq(D)))
        turn = lambda x: x * cos.float() + torch.cat([-x[..., D // 2:], x[..., :D // 2]], -1) * sin.float()
        return turn(q), turn(k)
    rows = [
        ("rms_norm", rms_norm, rms_norm_numpy,
         lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w, (x, w)),
        ("rotary", lambda q, k: rotary(q, k, positions), lambda q, k: rotary_numpy(q, k, positions.numpy()),
         naive_rotary, (q, k)),
        ("swiglu", swiglu, swiglu_numpy, lambda g, u: g * torch.sigmoid(g) * u, (x, x.flip(0))),
        ("attention", attention, attention_numpy, naive_attention, (q, k, v)),
        ("linear_cross_entropy", lambda x, w: linear_cross_entropy(x, w, targets),
         lambda x, w: linear_cross_entropy_numpy(x, w, targets.numpy()),
         lambda x, w: F.cross_entropy(x @ w.T, targets), (x, head)),
    ]
    print(f"{'the op':22}{'off its definition':>20}{'forward + backward':>22}{'written plainly':>18}")
    for name, op, definition, plain, tensors in rows:
        result, wanted = op(*tensors), definition(*(t.double().numpy() for t in tensors))
        pairs = zip(result, wanted) if isinstance(result, tuple) else [(result, wanted)]
        error = max(np.abs(a.numpy() - b).max() for a, b in pairs)

        def both(f):
            inputs = [t.clone().requires_grad_() for t in tensors]
            out = f(*inputs)
            sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
        print(f"{name:22}{error:>20.0e}{_milliseconds(lambda: both(op)):>19.2f} ms"
              f"{_milliseconds(lambda: both(plain)):>15.2f} ms")

    block = Block(Attention(C, H, G, D, Rotary(rotary_inv_freq(D))), MLP(C, 2 * C), C)
    x, state = randn(1, T, C), KVCache(1, G, T, D)
    with torch.no_grad():
        whole = block(x, positions)
        cuts = [(0, T - 50), *((i, i + 1) for i in range(T - 50, T))]
        parts = [block(x[:, i:j], positions[i:j], state) for i, j in cuts]
        error = (torch.cat(parts, 1) - whole).abs().max()
    print(f"\na block over {T} tokens at once, or {T - 50} and then one by one from its cache: {error:.0e} apart")


if __name__ == "__main__":
    main()
