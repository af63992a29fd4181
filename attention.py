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
    s, p        [B, H, T, S]    scores q·k, and what softmax makes of them: how much of each value a query takes
    positions   [T] or [B, T]   where each query stands in its text
    state       KVCache         keys and values of the tokens so far, owned by the caller; None in training
    dx          as x            the gradient of the loss with respect to x; so for every name

The file goes from the definition to the layer of today: each part in NumPy with its gradient derived by hand; from
these the encoder–decoder of 2017, which `python attention.py` trains before your eyes; what replaced what since; the
same parts as GPU kernels, line for line; as torch ops; and the layer of Qwen3 (by its options also of Llama, Mistral
and Qwen2), which train.py stacks.

Attention: Vaswani et al. 2017, arXiv 1706.03762. Grouped heads: 2305.13245. RMSNorm: 1910.07467. Rotary: 2104.09864.
SwiGLU: 2002.05202. QK-norm: 2302.05442. ALiBi: 2108.12409. Latent attention: DeepSeek-V2, 2405.04434.

`python attention.py` trains, shows the attention map that solves the task, and holds each op against its definition
and plain torch; `--bench` does the last at the sizes of a real model.
"""
import argparse
import functools
import math
import os
import sys
import time
from types import SimpleNamespace

if __name__ == "__main__":                                                   # the matrices of 2017 are small: threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")                       # would wait for each other, not work
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:                                                          # macOS, Windows: torch's path serves, the
    triton, tl = None, SimpleNamespace(constexpr=int)                        # kernels are there to be read

jit = triton.jit if triton else lambda kernel: kernel


# --- 1. The parts, in NumPy: each as the equation says, and its gradient derived by hand ------------------------------
#
# `foo_backward_numpy` takes what `foo_numpy` took and, as `grad`, the gradient of its output; it returns one gradient
# for each array that can have one, and makes anew what it needs of the forward pass, so nothing has to be kept.

def rms_norm_numpy(x, w, eps=1e-6, residual=None):
    """x, residual [..., C], w [C] → y [..., C]; with a residual, their sum is normed and returned too: (y, sum)."""
    x = x if residual is None else x + residual
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)                   # [..., 1]
    y = x * r * w
    return y if residual is None else (y, x)


def rms_norm_backward_numpy(x, w, eps=1e-6, residual=None, *, grad):
    """→ dx [..., C], dw [C]; with a residual `grad` is that of (y, sum), and dresidual, equal to dx, comes third."""
    dy, dsum = (grad, 0) if residual is None else grad
    x = x if residual is None else x + residual
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)                   # [..., 1]
    x_hat = x * r
    dw = (dy * x_hat).reshape(-1, x.shape[-1]).sum(0)
    dx_hat = dy * w
    dx = r * (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdims=True)) + dsum
    return (dx, dw) if residual is None else (dx, dw, dx.copy())


def layer_norm_numpy(x, w, b, eps=1e-5):
    """x [..., C], w, b [C] → [..., C]: mean 0 and deviation 1 along C, then a gain and a shift (arXiv 1607.06450)."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w + b


def layer_norm_backward_numpy(x, w, b, eps=1e-5, *, grad):
    """→ dx [..., C], dw, db [C]: RMSNorm's, and the mean that went out of x goes out of its gradient."""
    C = x.shape[-1]
    x = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)                   # [..., 1]
    x_hat, dx_hat = x * r, grad * w
    dx = r * (dx_hat - dx_hat.mean(-1, keepdims=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdims=True))
    return dx, (grad * x_hat).reshape(-1, C).sum(0), grad.reshape(-1, C).sum(0)


def sinusoidal_numpy(positions, C, base=10000.0):
    """positions [T] → [T, C], added to the embeddings: sin and cos of the position at wavelengths 2π … 2π · base."""
    angles = positions[:, None] * base ** (-np.arange(0, C, 2) / C)          # [T, C/2]
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), -1)[:, :C]


def alibi_slopes_numpy(H):
    """H heads → [H] slopes, a geometric row from 2^(−8/H) to 2⁻⁸ (arXiv 2108.12409)."""
    n = 2 ** int(math.log2(H))                                               # between powers of two: as its authors do
    slopes = lambda n: 2.0 ** (-8 / n * np.arange(1, n + 1))
    return np.concatenate([slopes(n), slopes(2 * n)[::2][:H - n]])


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


def rotary_backward_numpy(q, k, positions, base=10000.0, inv_freq=None, factor=1.0, *, grad):
    """grad = (dq', dk') of the rotated → dq, dk: rotated back. Neither needs q or k."""
    if inv_freq is None:
        inv_freq = base ** (-np.arange(0, q.shape[-1], 2) / q.shape[-1])
    return rotary_numpy(*grad, positions, inv_freq=-inv_freq, factor=factor)


def relu_numpy(x):
    """max(x, 0): the MLP of 2017."""
    return np.maximum(x, 0)


def relu_backward_numpy(x, *, grad):
    """→ dx."""
    return grad * (x > 0)


_erf = np.vectorize(math.erf, otypes=[float])


def gelu_numpy(x):
    """x · Φ(x), Φ the normal distribution's: ReLU with a soft knee (arXiv 1606.08415)."""
    return x * (1 + _erf(x / math.sqrt(2))) / 2


def gelu_backward_numpy(x, *, grad):
    """→ dx = grad · (Φ(x) + x · φ(x))."""
    return grad * ((1 + _erf(x / math.sqrt(2))) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi))


def sigmoid_numpy(x):
    """1 / (1 + e^−x), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def swiglu_numpy(gate, up):
    """gate, up [..., F] → silu(gate) · up [..., F]."""
    return gate * sigmoid_numpy(gate) * up


def swiglu_backward_numpy(gate, up, *, grad):
    """→ dgate, dup [..., F]; silu' = σ + silu · (1 − σ)."""
    sigma = sigmoid_numpy(gate)
    silu = gate * sigma
    return grad * up * (sigma + silu * (1 - sigma)), grad * silu


def attention_weights_numpy(q, k, causal=True, window=None, softcap=None, alibi=None, scale=None, mask=None):
    """q [B, H, T, D], k [B, G, S, D] → p [B, H, T, S]: how much of each key's value a query takes. Rows sum to 1."""
    (_, H, T, D), (G, S) = q.shape, k.shape[1:3]
    k = np.repeat(k, H // G, axis=1)                                         # [B, H, S, D]
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
    return p / np.where(l > 0, l, 1)


def attention_numpy(q, k, v, causal=True, window=None, softcap=None, alibi=None, scale=None, mask=None):
    """q [B, H, T, D], k, v [B, G, S, D] → [B, H, T, D], the whole T × S matrix at once. Options: see `attention`."""
    p = attention_weights_numpy(q, k, causal, window, softcap, alibi, scale, mask)
    return p @ np.repeat(v, q.shape[1] // k.shape[1], axis=1)


def attention_backward_numpy(q, k, v, causal=True, window=None, softcap=None, alibi=None, scale=None, mask=None, *,
                             grad):
    """grad [B, H, T, D] → dq [B, H, T, D], dk, dv [B, G, S, D].

    Softmax turns dp into ds = p ∘ (dp − Σ_j p_j dp_j): a row of p sums to 1, so only what differs along it counts.
    """
    (B, H, _, D), (G, S) = q.shape, k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    p = attention_weights_numpy(q, k, causal, window, softcap, alibi, scale, mask)
    k, v = np.repeat(k, H // G, axis=1), np.repeat(v, H // G, axis=1)        # [B, H, S, D]
    dv = p.swapaxes(-1, -2) @ grad
    dp = grad @ v.swapaxes(-1, -2)                                           # [B, H, T, S]
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    if softcap is not None:
        ds = ds * (1 - np.tanh(q @ k.swapaxes(-1, -2) * scale / softcap) ** 2)
    ds = ds * scale
    dq, dk = ds @ k, ds.swapaxes(-1, -2) @ q
    over_group = lambda x: x.reshape(B, G, H // G, S, -1).sum(2)             # the heads that shared a key
    return dq, over_group(dk), over_group(dv)


def cross_entropy_numpy(z, targets, ignore_index=-100):
    """z [N, V], targets [N] → mean over the rows not ignored of −log softmax(z)[target], in nats; 0 if none is left."""
    kept = targets != ignore_index
    z, targets = z[kept], targets[kept]                                      # [rows, V]
    if ((targets < 0) | (targets >= z.shape[1])).any():
        raise ValueError(f"cross_entropy: targets must lie in 0 … {z.shape[1] - 1}")
    m = z.max(-1, keepdims=True)
    lse = m[:, 0] + np.log(np.exp(z - m).sum(-1))
    return (lse - z[np.arange(len(z)), targets]).sum() / max(len(z), 1)


def cross_entropy_backward_numpy(z, targets, ignore_index=-100, *, grad=1.0):
    """→ dz [N, V] = (softmax(z) − onehot(target)) / rows: what was foreseen minus what came."""
    kept = targets != ignore_index
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(z)), np.where(kept, targets, 0)] -= 1
    return p * np.where(kept, grad / max(kept.sum(), 1), 0).astype(z.dtype)[:, None]


def linear_cross_entropy_numpy(x, w, targets, ignore_index=-100):
    """x [N, C], w [V, C], targets [N] → `cross_entropy_numpy` of the logits x wᵀ."""
    return cross_entropy_numpy(x @ w.T, targets, ignore_index)


def linear_cross_entropy_backward_numpy(x, w, targets, ignore_index=-100, *, grad=1.0):
    """→ dx [N, C], dw [V, C]."""
    dz = cross_entropy_backward_numpy(x @ w.T, targets, ignore_index, grad=grad)
    return dz @ w, dz.T @ x


# --- 2. The Transformer of 2017, whole, in NumPy: an encoder reads, a decoder writes ----------------------------------
#
# A part returns its output and `back`: a function from the gradient of that output to those of the inputs, which adds
# the weights' own to `dw` on its way. A layer's backward pass is its forward pass read from the end.

class Parts:
    """Weights by name in `w`, their gradients in `dw`, and the parts that have weights. Each → (output, back)."""

    def __init__(self, weights):
        self.w, self.dw = weights, {name: np.zeros_like(w) for name, w in weights.items()}

    def linear(self, name, x):
        """x [..., in] → x wᵀ + b [..., out]."""
        w, b = self.w[name + ".weight"], self.w.get(name + ".bias")
        y = x @ w.T if b is None else x @ w.T + b

        def back(dy):
            rows = dy.reshape(-1, len(w))
            self.dw[name + ".weight"] += rows.T @ x.reshape(len(rows), -1)
            if b is not None:
                self.dw[name + ".bias"] += rows.sum(0)
            return dy @ w
        return y, back

    def layer_norm(self, name, x):
        w, b = self.w[name + ".weight"], self.w[name + ".bias"]

        def back(dy):
            dx, dw, db = layer_norm_backward_numpy(x, w, b, grad=dy)
            self.dw[name + ".weight"] += dw
            self.dw[name + ".bias"] += db
            return dx
        return layer_norm_numpy(x, w, b), back

    def rms_norm(self, name, x, eps):
        w = self.w[name]

        def back(dy):
            dx, dw = rms_norm_backward_numpy(x, w, eps, grad=dy)
            self.dw[name] += dw
            return dx
        return rms_norm_numpy(x, w, eps), back


def split_heads(x, D):
    """[B, T, heads · D] → [B, heads, T, D]."""
    return x.reshape(*x.shape[:2], -1, D).swapaxes(1, 2)


def merge_heads(x):
    """[B, heads, T, D] → [B, T, heads · D]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


class Transformer2017(Parts):
    """Vaswani et al., arXiv 1706.03762, figure 1: post-norm layers, sinusoidal positions, ReLU; one embedding serves
    both sides and the output. Tokens are [B, T]: PAD fills short rows, BEGIN stands before what the decoder writes.
    """
    PAD, BEGIN = 0, 1

    def __init__(self, vocabulary, C=64, H=4, F=128, layers=2, seed=0, dtype=np.float32):
        self.C, self.D, self.layers = C, C // H, layers
        rng, weights = np.random.default_rng(seed), {}

        def add_linear(name, inputs, outputs):
            edge = math.sqrt(6 / (inputs + outputs))                         # Glorot: signals keep their size both ways
            weights[name + ".weight"] = rng.uniform(-edge, edge, (outputs, inputs))
            weights[name + ".bias"] = np.zeros(outputs)
        weights["embed"] = rng.standard_normal((vocabulary, C)) * C ** -0.5
        for i in range(layers):
            for side, attentions in ((f"encoder.{i}", ["self"]), (f"decoder.{i}", ["self", "cross"])):
                for name in attentions:
                    for part in "qkvo":
                        add_linear(f"{side}.{name}.{part}", C, C)
                add_linear(f"{side}.up", C, F)
                add_linear(f"{side}.down", F, C)
                for name in (*attentions, "mlp"):
                    weights[f"{side}.{name}.norm.weight"] = np.ones(C)
                    weights[f"{side}.{name}.norm.bias"] = np.zeros(C)
        super().__init__({name: w.astype(dtype) for name, w in weights.items()})

    def embed(self, tokens):
        """tokens [B, T] → embedding · √C + position [B, T, C]."""
        w, root = self.w["embed"], math.sqrt(self.C)

        def back(dx):                                                        # a look-up is a product with one-hot rows
            onehot = (tokens.reshape(-1, 1) == np.arange(len(w))).astype(w.dtype)                    # [B · T, V]
            self.dw["embed"] += onehot.T @ dx.reshape(-1, self.C) * root
        return w[tokens] * root + sinusoidal_numpy(np.arange(tokens.shape[1]), self.C).astype(w.dtype), back

    def attend(self, name, x, source, **options):
        """x [B, T, C] asks, source [B, S, C] answers: self-attention where they are the same, else cross-attention."""
        (q, back_q), (k, back_k), (v, back_v) = (
            self.linear(f"{name}.{part}", t) for part, t in (("q", x), ("k", source), ("v", source)))
        q, k, v = (split_heads(t, self.D) for t in (q, k, v))
        y, back_o = self.linear(f"{name}.o", merge_heads(attention_numpy(q, k, v, **options)))
        self.looked_at = lambda: attention_weights_numpy(q, k, **options)    # the last attention's map, to be shown

        def back(dy):
            dq, dk, dv = attention_backward_numpy(q, k, v, **options, grad=split_heads(back_o(dy), self.D))
            return back_q(merge_heads(dq)), back_k(merge_heads(dk)) + back_v(merge_heads(dv))
        return y, back

    def mlp(self, name, x):
        a, back_up = self.linear(f"{name}.up", x)
        y, back_down = self.linear(f"{name}.down", relu_numpy(a))
        return y, lambda dy: back_up(relu_backward_numpy(a, grad=back_down(dy)))

    def encoder_layer(self, name, x, mask):
        """x [B, S, C] → [B, S, C]; every token sees every other that is no padding."""
        a, back_a = self.attend(f"{name}.self", x, x, causal=False, mask=mask)
        x, back_n = self.layer_norm(f"{name}.self.norm", x + a)
        f, back_f = self.mlp(name, x)
        y, back_m = self.layer_norm(f"{name}.mlp.norm", x + f)

        def back(dy):
            dx = back_m(dy)
            dx = back_n(dx + back_f(dx))
            return dx + sum(back_a(dx))
        return y, back

    def decoder_layer(self, name, x, memory, mask):
        """x [B, T, C], memory [B, S, C] → [B, T, C]; a token sees those before it, and all of the memory."""
        a, back_a = self.attend(f"{name}.self", x, x, causal=True)
        x, back_n = self.layer_norm(f"{name}.self.norm", x + a)
        c, back_c = self.attend(f"{name}.cross", x, memory, causal=False, mask=mask)
        x, back_k = self.layer_norm(f"{name}.cross.norm", x + c)
        f, back_f = self.mlp(name, x)
        y, back_m = self.layer_norm(f"{name}.mlp.norm", x + f)

        def back(dy):
            dx = back_m(dy)
            dx = back_k(dx + back_f(dx))
            dc, dmemory = back_c(dx)
            dx = back_n(dx + dc)
            return dx + sum(back_a(dx)), dmemory
        return y, back

    def encode(self, source):
        """source [B, S] → memory [B, S, C]."""
        x, back_embed = self.embed(source)
        backs = []
        for i in range(self.layers):
            x, back = self.encoder_layer(f"encoder.{i}", x, source != self.PAD)
            backs.append(back)

        def back(dx):
            for back_layer in reversed(backs):
                dx = back_layer(dx)
            back_embed(dx)
        return x, back

    def decode(self, memory, source, target):
        """target [B, T], read up to each place → hidden [B, T, C], from which the next token is foretold."""
        x, back_embed = self.embed(target)
        backs = []
        for i in range(self.layers):
            x, back = self.decoder_layer(f"decoder.{i}", x, memory, source != self.PAD)
            backs.append(back)

        def back(dx):
            dmemory = 0
            for back_layer in reversed(backs):
                dx, more = back_layer(dx)
                dmemory = dmemory + more
            back_embed(dx)
            return dmemory
        return x, back

    def loss(self, source, target):
        """source [B, S], target [B, T] → mean nats a token of the target; the gradients stand in `dw`."""
        for d in self.dw.values():
            d[...] = 0
        begun = np.concatenate([np.full((len(target), 1), self.BEGIN), target[:, :-1]], axis=1)
        memory, back_encode = self.encode(source)
        x, back_decode = self.decode(memory, source, begun)
        last = x.reshape(-1, self.C), self.w["embed"], target.ravel(), self.PAD
        dx, dw = linear_cross_entropy_backward_numpy(*last)
        self.dw["embed"] += dw
        back_encode(back_decode(dx.reshape(x.shape)))
        return linear_cross_entropy_numpy(*last)

    def generate(self, source, length):
        """Greedy: source [B, S] → [B, length], each token the likeliest after those before it."""
        memory, _ = self.encode(source)
        tokens = np.full((len(source), 1), self.BEGIN)
        for _ in range(length):
            x, _ = self.decode(memory, source, tokens)
            tokens = np.concatenate([tokens, (x[:, -1:] @ self.w["embed"].T).argmax(-1)], axis=1)
        return tokens[:, 1:]


class Adam:
    """Adam (arXiv 1412.6980) with the β of 2017; the rate rises over the first tenth of the steps, then falls to 0."""

    def __init__(self, model, steps, rate=0.01, betas=(0.9, 0.98), eps=1e-9):
        self.model, self.steps, self.rate, self.betas, self.eps = model, steps, rate, betas, eps
        self.m, self.v = ({n: np.zeros_like(w) for n, w in model.w.items()} for _ in range(2))
        self.step = 0

    def update(self):
        """One step along the gradients in the model's `dw`."""
        b1, b2 = self.betas
        t = self.step = self.step + 1
        rate = self.rate * min(10 * t / self.steps, (self.steps - t + 1) / (0.9 * self.steps), 1)
        rate *= math.sqrt(1 - b2 ** t) / (1 - b1 ** t)                       # both means start at 0: weigh that out
        for name, g in self.model.dw.items():
            m, v = self.m[name], self.v[name]
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (g * g - v)
            self.model.w[name] -= rate * m / (np.sqrt(v) + self.eps)


# --- 3. What replaced what since 2017 ---------------------------------------------------------------------------------
#
#     2017                       today                        because
#     norm after the sum         norm before the part         x passes all layers as a plain sum, and so does its
#                                (pre-norm)                   gradient: deep stacks train without a long warm-up
#     LayerNorm                  RMSNorm                      the mean did nothing; one reduction and one vector less
#     positions added once       rotary, in every layer       q·k depends on the distance alone, and v stays clean
#     MLP with ReLU              SwiGLU                       a gate chooses what passes: lower loss for the same FLOPs
#     a key head a query head    few key heads (grouped)      the cache of a long text shrinks by H / G
#                                or a latent (below)          and by still more, with all heads kept different
#     scores as they come        QK-norm                      q and k cannot grow until softmax is a hard choice
#     encoder and decoder        decoder alone                one stack reads and writes; every token is a lesson
#     biases, one embedding      no biases, head apart        fewer parts; the head may differ from the embedding

class BlockNumpy(Parts):
    """`Block` below, in NumPy: the same weights by the same names, and the gradients derived by hand."""

    def __init__(self, weights, H, G, D, eps=1e-6, base=10000.0, window=None):
        super().__init__(weights)
        self.H, self.G, self.D, self.eps, self.base, self.window = H, G, D, eps, base, window

    def attention(self, x, positions):
        """x [B, T, C], positions [T] → [B, T, C]."""
        H, G, options = self.H, self.G, dict(causal=True, window=self.window)
        qkv, back_qkv = self.linear("attention.qkv", x)
        q, k, v = np.split(split_heads(qkv, self.D), [H, H + G], axis=1)     # few key heads: [B, G, T, D]
        q, back_qn = self.rms_norm("attention.q_norm", q, self.eps)          # QK-norm
        k, back_kn = self.rms_norm("attention.k_norm", k, self.eps)
        q, k = rotary_numpy(q, k, positions, self.base)                      # rotary
        y, back_out = self.linear("attention.out", merge_heads(attention_numpy(q, k, v, **options)))

        def back(dy):
            dq, dk, dv = attention_backward_numpy(q, k, v, **options, grad=split_heads(back_out(dy), self.D))
            dq, dk = rotary_backward_numpy(q, k, positions, self.base, grad=(dq, dk))
            return back_qkv(merge_heads(np.concatenate([back_qn(dq), back_kn(dk), dv], axis=1)))
        return y, back

    def mlp(self, x):
        gate_up, back_up = self.linear("mlp.gate_up", x)
        gate, up = np.split(gate_up, 2, axis=-1)
        y, back_down = self.linear("mlp.down", swiglu_numpy(gate, up))       # SwiGLU
        return y, lambda dy: back_up(np.concatenate(swiglu_backward_numpy(gate, up, grad=back_down(dy)), axis=-1))

    def __call__(self, x, positions):
        """x [B, T, C] → (y [B, T, C], back)."""
        n, back_n = self.rms_norm("attention_norm.weight", x, self.eps)      # before the part: pre-norm, RMSNorm
        a, back_a = self.attention(n, positions)
        x = x + a                                                            # the sum itself is never normed
        m, back_m = self.rms_norm("mlp_norm.weight", x, self.eps)
        f, back_f = self.mlp(m)

        def back(dy):
            dx = dy + back_m(back_f(dy))
            return dx + back_n(back_a(dx))
        return x + f, back


def latent_attention_numpy(x, w_q, w_down, w_k, w_v, w_out, positions, absorbed=False):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, equations 9–19): x [B, T, C] → [B, T, C], causal.

    A token is kept as one latent c [R] for all heads, and one rotated key [Dr] that tells where it stood: R + Dr
    numbers instead of 2 · H · D. w_q [H · (D + Dr), C], w_down [R + Dr, C], w_k, w_v [H, D, R], w_out [C, H · D].

    absorbed: the form for decoding. q·(w_k c) = (w_kᵀ q)·c and Σ p (w_v c) = w_v (Σ p c): with w_k moved to the query
    and w_v to the output, attention runs among the latents themselves, as multi-query attention with one key head, and
    the keys and values of the heads are never made.
    """
    (H, D, R), Dr = w_k.shape, w_down.shape[0] - w_k.shape[2]
    scale = (D + Dr) ** -0.5
    q, q_r = np.split(split_heads(x @ w_q.T, D + Dr), [D], axis=-1)          # [B, H, T, D], [B, H, T, Dr]
    c, k_r = np.split((x @ w_down.T)[:, None], [R], axis=-1)                 # [B, 1, T, R], [B, 1, T, Dr]: the cache
    q_r, k_r = rotary_numpy(q_r, k_r, positions)
    if absorbed:
        y = attention_numpy(np.concatenate([q @ w_k, q_r], -1), np.concatenate([c, k_r], -1), c, scale=scale)
        y = y @ w_v.swapaxes(1, 2)                                           # [B, H, T, R] → [B, H, T, D]
    else:
        k, v = c @ w_k.swapaxes(1, 2), c @ w_v.swapaxes(1, 2)                # [B, H, T, D]
        y = attention_numpy(np.concatenate([q, q_r], -1), np.concatenate([k, np.repeat(k_r, H, axis=1)], -1), v,
                            scale=scale)
    return merge_heads(y) @ w_out.T


def latent_attention_backward_numpy(x, w_q, w_down, w_k, w_v, w_out, positions, *, grad):
    """→ dx, dw_q, dw_down, dw_k, dw_v, dw_out. Both forms are one function, so this is the gradient of both."""
    (H, D, R), Dr = w_k.shape, w_down.shape[0] - w_k.shape[2]
    scale, rows = (D + Dr) ** -0.5, lambda t: t.reshape(-1, t.shape[-1])     # [B, T, ·] → [B · T, ·]
    q, q_r = np.split(split_heads(x @ w_q.T, D + Dr), [D], axis=-1)
    c, k_r = np.split((x @ w_down.T)[:, None], [R], axis=-1)
    q_r, k_r = rotary_numpy(q_r, k_r, positions)
    k, v = c @ w_k.swapaxes(1, 2), c @ w_v.swapaxes(1, 2)
    q, k = np.concatenate([q, q_r], -1), np.concatenate([k, np.repeat(k_r, H, axis=1)], -1)

    dy = split_heads(grad @ w_out, D)
    dw_out = rows(grad).T @ rows(merge_heads(attention_numpy(q, k, v, scale=scale)))
    dq, dk, dv = attention_backward_numpy(q, k, v, scale=scale, grad=dy)
    (dq, dq_r), (dk, dk_r) = np.split(dq, [D], axis=-1), np.split(dk, [D], axis=-1)
    dq_r, dk_r = rotary_backward_numpy(q_r, k_r, positions, grad=(dq_r, dk_r.sum(1, keepdims=True)))
    dw_k, dw_v = (np.einsum("bhtd,btr->hdr", d, c[:, 0]) for d in (dk, dv))
    dc = (dk @ w_k + dv @ w_v).sum(1, keepdims=True)
    d_q, d_down = merge_heads(np.concatenate([dq, dq_r], -1)), merge_heads(np.concatenate([dc, dk_r], -1))
    return d_q @ w_q + d_down @ w_down, rows(d_q).T @ rows(x), rows(d_down).T @ rows(x), dw_k, dw_v, dw_out


# --- 4. The kernels: the same lines, a row or a few in one program's registers ----------------------------------------
#
# X, W, dX, Targets … are pointers, and B, H, T, S, C, N, V, F sizes; `x_row` is the distance from one row of X to the
# next; where rows are the heads of tokens, X_at is that from token to token, and from head to head. Everything is
# computed in float32, whatever is stored. Padding up to a block's power of two is masked when loaded and when stored;
# offsets are int64, since N · C may pass 2³¹.

@jit
def _row(X, X_at, row, heads):
    return X + row // heads * X_at[0] + row % heads * X_at[1]


@jit
def _rms_norm_fwd(X, Residual, W, Y, Sum, R, N, heads, C, X_at, Residual_at, eps, ROWS: tl.constexpr,
                  BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    here = (row < N) & (c < C)
    x = tl.load(_row(X, X_at, row, heads) + c, mask=here, other=0.).to(tl.float32)                   # padding: 0
    if Residual is not None:
        x += tl.load(_row(Residual, Residual_at, row, heads) + c, mask=here, other=0.).to(tl.float32)
        tl.store(Sum + row * C + c, x, mask=here)
    w = tl.load(W + c, mask=c < C, other=0.).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / C + eps)              # [ROWS, 1]
    tl.store(Y + row * C + c, x * r * w, mask=here)
    tl.store(R + row, r, mask=row < N)


@jit
def _rms_norm_bwd(dY, dSum, X, W, R, dX, dW, N, heads, C, dY_at, dSum_at, X_at, rounds, ROWS: tl.constexpr,
                  BLOCK_C: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    dw = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i in range(rounds):
        row = (program * rounds + i) * ROWS + tl.arange(0, ROWS)[:, None]
        here = (row < N) & (c < C)
        x = tl.load(_row(X, X_at, row, heads) + c, mask=here, other=0.).to(tl.float32)
        dy = tl.load(_row(dY, dY_at, row, heads) + c, mask=here, other=0.).to(tl.float32)
        r = tl.load(R + row, mask=row < N, other=0.)
        x_hat = x * r
        dw += dy * x_hat
        dx_hat = dy * tl.load(W + c, mask=c < C, other=0.).to(tl.float32)    # read anew: registers are what is short
        dx = r * (dx_hat - x_hat * (tl.sum(dx_hat * x_hat, 1, keep_dims=True) / C))
        if dSum is not None:
            dx += tl.load(_row(dSum, dSum_at, row, heads) + c, mask=here, other=0.).to(tl.float32)
        tl.store(dX + row * C + c, dx, mask=here)
    c = tl.arange(0, BLOCK_C)                                                # a row a program, to be summed afterwards:
    tl.store(dW + program * C + c, tl.sum(dw, 0), mask=c < C)                # no atomics, so the same bits each time


@jit
def _rotate_heads(X, Y, x_head, y_head, heads, cos, sin, half, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    h, d = tl.arange(0, BLOCK_H)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    here = (h < heads) & (d < half)
    a = tl.load(X + h * x_head + d, mask=here).to(tl.float32)                # pair d is (x[d], x[d + D/2])
    b = tl.load(X + h * x_head + half + d, mask=here).to(tl.float32)
    tl.store(Y + h * y_head + d, a * cos - b * sin, mask=here)
    tl.store(Y + h * y_head + half + d, b * cos + a * sin, mask=here)


@jit
def _rotary_fwd(Q, K, Cos, Sin, Q_out, K_out, T, H, G, half, cos_batch, q_batch, q_head, q_token, k_batch, k_head,
                k_token, qo_batch, qo_head, qo_token, ko_batch, ko_head, ko_token, BLOCK_H: tl.constexpr,
                BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)                                    # all heads of one token share cos and sin
    b, t = token // T, token % T
    d = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(Cos + b * cos_batch + t * half + d, mask=d < half)
    sin = tl.load(Sin + b * cos_batch + t * half + d, mask=d < half)
    _rotate_heads(Q + b * q_batch + t * q_token, Q_out + b * qo_batch + t * qo_token, q_head, qo_head, H,
                  cos, sin, half, BLOCK_H, BLOCK_D)
    _rotate_heads(K + b * k_batch + t * k_token, K_out + b * ko_batch + t * ko_token, k_head, ko_head, G,
                  cos, sin, half, BLOCK_G, BLOCK_D)


@jit
def _swiglu_fwd(Gate, Up, Y, F, gate_row, up_row, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate = tl.load(Gate + row * gate_row + f, mask=f < F).to(tl.float32)
    up = tl.load(Up + row * up_row + f, mask=f < F).to(tl.float32)
    tl.store(Y + row * F + f, gate * tl.sigmoid(gate) * up, mask=f < F)


@jit
def _swiglu_bwd(dY, Gate, Up, dGate, dUp, F, dy_row, gate_row, up_row, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    grad = tl.load(dY + row * dy_row + f, mask=f < F).to(tl.float32)
    gate = tl.load(Gate + row * gate_row + f, mask=f < F).to(tl.float32)
    up = tl.load(Up + row * up_row + f, mask=f < F).to(tl.float32)
    sigma = tl.sigmoid(gate)
    silu = gate * sigma
    tl.store(dGate + row * F + f, grad * up * (sigma + silu * (1 - sigma)), mask=f < F)
    tl.store(dUp + row * F + f, grad * silu, mask=f < F)


@jit
def _tanh(z):                                                                # Triton has none; e ≤ 1 cannot overflow
    e = tl.exp(-2 * tl.abs(z))
    near = z * (1 - z * z * (1 / 3 - z * z * (2 / 15 - z * z * (17 / 315))))
    return tl.where(tl.abs(z) < 0.1, near, tl.where(z < 0, -1, 1) * (1 - e) / (1 + e))


@jit
def _attention_fwd(Scores, P, Alibi, Mask, H, T, S, scale, softcap, window, CAUSAL: tl.constexpr,
                   BLOCK_S: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                                      # one query's whole row of scores:
    b, h, i = row // T // H, row // T % H, row % T                           # row = (b · H + h) · T + i
    j = tl.arange(0, BLOCK_S)
    s = tl.load(Scores + row * S + j, mask=j < S, other=0.) * scale
    if softcap is not None:
        s = softcap * _tanh(s / softcap)
    distance = i + S - T - j                                                 # ≥ 0: the key is not in the query's future
    if Alibi is not None:
        s = s - tl.load(Alibi + h).to(tl.float32) * tl.abs(distance).to(tl.float32)
    seen = j < S
    if CAUSAL:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    if Mask is not None:
        seen = seen & (tl.load(Mask + b * S + j, mask=j < S, other=0) != 0)
    s = tl.where(seen, s, -float("inf"))
    m = tl.max(s)
    p = tl.exp(s - tl.where(m > -float("inf"), m, 0.))                       # a row that sees no key: all p are 0
    l = tl.sum(p)
    tl.store(P + row * S + j, p / tl.where(l > 0, l, 1.), mask=j < S)


@jit
def _attention_bwd(dP, P, Scores, dS, S, scale, softcap, BLOCK_S: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_S)
    dp = tl.load(dP + row * S + j, mask=j < S, other=0.)
    p = tl.load(P + row * S + j, mask=j < S, other=0.).to(tl.float32)
    ds = p * (dp - tl.sum(p * dp))
    if softcap is not None:
        t = _tanh(tl.load(Scores + row * S + j, mask=j < S, other=0.) * scale / softcap)
        ds = ds * (1 - t * t)
    tl.store(dS + row * S + j, ds * scale, mask=j < S)


@jit
def _linear_cross_entropy_fwd(Z, Targets, Loss, dZ, V, ignore_index, GRAD: tl.constexpr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(Targets + row)
    kept = target != ignore_index
    z_target = tl.load(Z + row * V + target, mask=kept & (target >= 0) & (target < V), other=float("nan"))
    v = tl.arange(0, BLOCK_V)
    m, l = -float("inf"), 0.                                                 # the largest so far, the sum scaled to it
    for start in range(0, V, BLOCK_V):
        z = tl.load(Z + row * V + start + v, mask=start + v < V, other=-float("inf"))
        m_new = tl.maximum(m, tl.max(z))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new))
        m = m_new
    lse = m + tl.log(l)
    tl.store(Loss + row, tl.where(kept, lse - z_target, 0.))
    if GRAD:
        for start in range(0, V, BLOCK_V):                                   # dZ may be Z: each number is read before
            z = tl.load(Z + row * V + start + v, mask=start + v < V, other=-float("inf"))
            dz = tl.exp(z - lse) - tl.where(start + v == target, 1., 0.)
            tl.store(dZ + row * V + start + v, tl.where(kept, dz, 0.), mask=start + v < V)


# --- 5. The ops: the same for torch tensors, differentiable, the fastest path of each device --------------------------
#
# torch has rotary and RMSNorm only as chains of small ops, each of which reads and writes all of x and keeps a copy for
# the backward pass. Memory is what they wait for: on a GPU a kernel does each in one pass; on a CPU the backward is
# written out by hand.

def has_kernel(x):
    """Whether Triton can take x: it is on a GPU, or TRITON_INTERPRET=1 runs the kernels on the CPU for tests, where it
    multiplies the bits of bfloat16 instead of its numbers.
    """
    return triton is not None and x.numel() > 0 and x.dtype != torch.float64 and (
        x.is_cuda or triton.knobs.runtime.interpret and x.dtype != torch.bfloat16)


def on_kernel(x):
    """Whether x goes to Triton here and now: not in a compiled graph, where torch.compile fuses the plain ops with
    their neighbours: train.py times both ways.
    """
    return not torch.compiler.is_compiling() and has_kernel(x)


def _exact(op):
    """An op or a backward pass that autocast does not reach: its products are in the dtype of what it is given."""
    @functools.wraps(op)
    def exact(*args, **options):
        kind = next((a.device.type for a in (*args, *options.values()) if isinstance(a, torch.Tensor)), "cpu")
        if not torch.is_autocast_enabled(kind):
            return op(*args, **options)
        with torch.autocast(kind, enabled=False):
            return op(*args, **options)
    return exact


def _under_autocast(op, q, k, v, *rest):
    """Under autocast: the op in its dtype, but for float64, as torch's own attention does."""
    kind = q.device.type
    dtype = torch.float64 if q.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return op(q.to(dtype), k.to(dtype), v.to(dtype), *rest)


def _floats(op, **tensors):
    """ValueError that names the arguments, unless all are floating and of one dtype."""
    kinds = {t.dtype for t in tensors.values()}
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        raise ValueError(f"{op}: " + ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items())
                         + (" must be floating" if len(tensors) == 1 else " must share one floating dtype"))


def _rows(x):
    """x [..., C] → [N, C] for a kernel: a view where the rows lie evenly, else a copy."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _warps(elements):
    """Warps for a program that holds so many numbers: about 16 a thread."""
    return min(max(elements // 512, 4), 16)


def _heads(x, turned):
    """x [..., C] → [tokens, heads, C] for a kernel: a view where that can be, else a copy. turned: [B, heads, T, C]."""
    x = x.transpose(1, 2) if turned else x
    x = x.reshape(-1, x.shape[-2] if x.ndim > 2 else 1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _unturn(y, shape, turned):
    """[tokens, heads, C] → `shape`."""
    if not turned:
        return y.view(shape)
    B, H, T, C = shape
    return y.view(B, T, H, C).transpose(1, 2)


class _RMSNormKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps, residual):
        turned = x.ndim == 4 and x.stride(1) < x.stride(2)                   # heads of a fused product: taken as they
        rows, added = _heads(x, turned), None if residual is None else _heads(residual, turned)      # lie
        (tokens, heads, C), BLOCK_C = rows.shape, triton.next_power_of_2(x.shape[-1])
        N, ROWS = tokens * heads, max(1, 2048 // BLOCK_C)
        y = torch.empty(rows.shape, dtype=x.dtype if added is None else torch.promote_types(x.dtype, added.dtype),
                        device=x.device)
        total = None if added is None else torch.empty_like(y)
        r = torch.empty(N, device=x.device)
        _rms_norm_fwd[(triton.cdiv(N, ROWS),)](
            rows, added, w.contiguous(), y, total, r, N, heads, C, rows.stride()[:2],
            None if added is None else added.stride()[:2], eps, ROWS=ROWS, BLOCK_C=BLOCK_C,
            num_warps=_warps(ROWS * BLOCK_C))
        ctx.save_for_backward(rows if total is None else total, w, r)
        ctx.dtypes, ctx.shape = (x.dtype, residual.dtype if residual is not None else None), x.shape
        ctx.turned = turned
        ctx.set_materialize_grads(False)                                     # a sum that nothing reads has no gradient
        return _unturn(y, x.shape, turned) if total is None else (
            _unturn(y, x.shape, turned), _unturn(total, x.shape, turned))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        rows, w, r = ctx.saved_tensors
        (tokens, heads, C), BLOCK_C = rows.shape, triton.next_power_of_2(rows.shape[2])
        dy = torch.zeros_like(rows) if dy is None else _heads(dy, ctx.turned)
        dsum = None if dsum is None else _heads(dsum, ctx.turned)
        N, ROWS = tokens * heads, max(1, 2048 // BLOCK_C)
        rounds = triton.cdiv(triton.cdiv(N, ROWS), 512)                      # ≤ 512 programs: each chip full, dw small
        dx = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        dw = torch.empty(triton.cdiv(N, ROWS * rounds), C, device=w.device)
        _rms_norm_bwd[(len(dw),)](
            dy, dsum, rows, w.contiguous(), r, dx, dw, N, heads, C, dy.stride()[:2],
            None if dsum is None else dsum.stride()[:2], rows.stride()[:2], rounds, ROWS=ROWS, BLOCK_C=BLOCK_C,
            num_warps=_warps(ROWS * BLOCK_C))
        dx, (x_type, residual_type) = _unturn(dx, ctx.shape, ctx.turned), ctx.dtypes
        return dx.to(x_type), dw.sum(0).to(w.dtype), None, None if residual_type is None else dx.to(residual_type)


def _inverse_rms(x, eps):
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """dx = r · (dy∘w) − x · r³ · mean(x∘dy∘w),  dw = Σ_rows r · (x∘dy): with x∘dy known, both sums are one product."""

    @staticmethod
    def forward(ctx, x, w, eps):
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, w, r)
        return (x * r).mul_(w)

    @staticmethod
    @once_differentiable
    @_exact
    def backward(ctx, dy):
        x, w, r = ctx.saved_tensors
        x_dy = (x * dy).reshape(-1, x.shape[-1])
        dw = x_dy.T @ r.reshape(-1)
        mean = (x_dy @ w).reshape(r.shape) / x.shape[-1]
        return (dy * w).mul_(r).addcmul_(x, r.pow(3).mul_(mean), value=-1), dw, None


def rms_norm(x, w, eps=1e-6, residual=None):
    """x [..., C] · w [C] / RMS(x) → [..., C]; with `residual` [..., C] → (normed x + residual, x + residual).

    Computed in float32 or better and returned in x's dtype (with a residual: in that of the sum). ValueError where the
    shapes or dtypes do not fit. arXiv 1910.07467, equation 4.
    """
    if x.ndim == 0 or w.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: w {tuple(w.shape)} must be the last size of x {tuple(x.shape)}")
    _floats("rms_norm", x=x)
    _floats("rms_norm", w=w)
    if residual is not None:
        _floats("rms_norm", residual=residual)
        if residual.shape != x.shape:
            raise ValueError(f"rms_norm: residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
    if on_kernel(x):
        return _RMSNormKernel.apply(x, w, eps, residual)
    x = x if residual is None else x + residual
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.dtype == w.dtype == torch.float32:
        y = _RMSNorm.apply(x, w, eps) if torch.is_grad_enabled() else (x * _inverse_rms(x, eps)).mul_(w)
    elif x.dtype == w.dtype and x.dtype in (torch.float32, torch.float64):
        y = F.rms_norm(x, w.shape, w, eps)
    else:                                                                    # half precision: normed in float32
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        y = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * w).to(x.dtype)
    return y if residual is None else (y, x)


def _rotate_on_kernel(q, k, cos, sin):
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    (B, H, T, D), G = q.shape, k.shape[1]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    strides = [n for t in (q, k, q_out, k_out) for n in t.stride()[:3]]
    BLOCK_H, BLOCK_G, BLOCK_D = (triton.next_power_of_2(n) for n in (H, G, D // 2))
    cos_batch = cos.stride(0) if cos.ndim == 4 and len(cos) > 1 else 0       # one table may serve all sequences
    _rotary_fwd[(B * T,)](q, k, cos, sin, q_out, k_out, T, H, G, D // 2, cos_batch, *strides, BLOCK_H=BLOCK_H,
                          BLOCK_G=BLOCK_G, BLOCK_D=BLOCK_D, num_warps=_warps(BLOCK_H * BLOCK_D))
    return q_out, k_out


def _rotate(x, cos, sin):
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    if torch.compiler.is_compiling():                                        # which makes one pass of it
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    y = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    y_a, y_b = y.chunk(2, dim=-1)                                            # in place: x read twice, y written twice
    torch.mul(a, cos, out=y_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=y_b).addcmul_(a, sin)
    return y.to(x.dtype)


def _rotate_both(q, k, cos, sin):
    if on_kernel(q) and k.numel() > 0:
        return _rotate_on_kernel(q, k, cos, sin)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


class _Rotary(torch.autograd.Function):
    """A rotation's gradient is the rotation back: the same lines with −sin, and nothing of q and k is kept."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate_both(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return *_rotate_both(dq, dk, cos, -sin), None, None


def rotary_inv_freq(D, base=10000.0, device=None):
    """The inverse wavelengths base^(−2d/D) → [D/2]. ValueError for an odd D."""
    if D % 2:
        raise ValueError(f"rotary: the head size must be even to be rotated in pairs, not {D}")
    exact = torch.float32 if str(device).startswith("mps") else torch.float64
    return base ** (-torch.arange(0, D, 2, dtype=exact, device=device) / D)


def rotary_cos_sin(positions, inv_freq, factor=1.0, dtype=torch.float32):
    """positions [T] or [B, T], inv_freq [D/2] → cos, sin [T, D/2] or [B, 1, T, D/2], for tensors of `dtype`.

    Computed in float64 where the device has it: at position 10⁵ a float32 angle is off by a hundredth of a radian. For
    half precision they stay float32, in which the rotation is done.
    """
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = positions.contiguous()[..., None].to(exact) * inv_freq.detach().to(exact)           # as kernels read them
    angles = angles if angles.ndim == 2 else angles[:, None]
    dtype = torch.promote_types(dtype, torch.float32)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _rotate_q_k(q, k, cos, sin):
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return _Rotary.apply(q, k, cos, sin) if grad else _rotate_both(q, k, cos, sin)


def rotary(q, k, positions, base=10000.0, inv_freq=None, factor=1.0):
    """Rotate q [B, H, T, D] and k [B, G, T, D] by their positions [T] or [B, T] → the same shapes.

    Pair d of a head is (x[d], x[d + D/2]), Hugging Face's order. `inv_freq` [D/2] (radians a position) replaces
    base^(−2d/D); `factor` scales cos and sin (YaRN). ValueError where sizes or dtypes do not fit. arXiv 2104.09864,
    equation 34.
    """
    if q.ndim != 4 or k.ndim != 4 or len(q) != len(k):
        raise ValueError(f"rotary: q {tuple(q.shape)} and k {tuple(k.shape)} must be [B, H, T, D] and [B, G, T, D]")
    _floats("rotary", q=q, k=k)
    if inv_freq is None:
        inv_freq = rotary_inv_freq(q.shape[-1], base, q.device)
    if k.shape[-1] != q.shape[-1] or inv_freq.ndim != 1 or 2 * len(inv_freq) != q.shape[-1]:
        raise ValueError(f"rotary: q {tuple(q.shape)} and k {tuple(k.shape)} must have one head size, and inv_freq "
                         f"{tuple(inv_freq.shape)} half as many numbers")
    if (positions.ndim not in (1, 2) or q.shape[2] != positions.shape[-1] or k.shape[2] != positions.shape[-1]
            or positions.ndim == 2 and len(positions) not in (1, len(q))):
        raise ValueError(f"rotary: positions {tuple(positions.shape)} must be [T] or [B, T], one for each token of "
                         f"q {tuple(q.shape)} and k {tuple(k.shape)}")
    return _rotate_q_k(q, k, *rotary_cos_sin(positions, inv_freq, factor, q.dtype))


class _SwiGLUKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        shape, gate, up = gate.shape, _rows(gate), _rows(up)
        (N, F), y = gate.shape, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        BLOCK_F = min(triton.next_power_of_2(F), 2048)
        _swiglu_fwd[(N, triton.cdiv(F, BLOCK_F))](gate, up, y, F, gate.stride(0), up.stride(0), BLOCK_F=BLOCK_F)
        ctx.save_for_backward(gate, up)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        (N, F), rows = gate.shape, _rows(dy)
        dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        BLOCK_F = min(triton.next_power_of_2(F), 2048)
        _swiglu_bwd[(N, triton.cdiv(F, BLOCK_F))](rows, gate, up, dgate, dup, F, rows.stride(0), gate.stride(0),
                                                  up.stride(0), BLOCK_F=BLOCK_F)
        return dgate.view(dy.shape), dup.view(dy.shape)


def swiglu(gate, up):
    """silu(gate) · up, both [..., F] → [..., F]. ValueError where shapes or dtypes differ. arXiv 2002.05202, equation 6
    (without the linear maps).
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape")
    _floats("swiglu", gate=gate, up=up)
    return _SwiGLUKernel.apply(gate, up) if on_kernel(gate) and gate.ndim else F.silu(gate) * up


def _product32(a, b):
    """a [(B,) M, K] · b [(B,) K, N] in float32 or better, of half-precision inputs too: what exp sees must be exact."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and not torch.version.hip:                                  # tensor cores sum in float32 anyway
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _AttentionKernel(torch.autograd.Function):
    """`attention_numpy` and its backward, step for step: the products are matrix products, the rows of scores between
    them one pass of a kernel. It writes the T × S matrix out; flash.py is about never doing so.
    """

    @staticmethod
    def forward(ctx, q, k, v, causal, window, softcap, alibi, scale, mask):
        (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
        q, k, v = q.reshape(B * G, H // G * T, D), k.reshape(B * G, S, D), v.reshape(B * G, S, D)
        s = _product32(q, k.mT)                                              # [B · G, H/G · T, S] = [B · H · T, S]
        p = torch.empty(s.shape, dtype=q.dtype, device=q.device)
        BLOCK_S = triton.next_power_of_2(S)
        alibi, mask = (t if t is None else t.contiguous() for t in (alibi, mask))
        _attention_fwd[(B * H * T,)](s, p, alibi, mask, H, T, S, scale, softcap, window, CAUSAL=causal, BLOCK_S=BLOCK_S,
                                     num_warps=_warps(BLOCK_S))
        ctx.save_for_backward(q, k, v, p, None if softcap is None else s)
        ctx.scale, ctx.softcap, ctx.shape = scale, softcap, (B, H, G, T, S, D)
        return (p @ v).view(B, H, T, D)

    @staticmethod
    @once_differentiable
    @_exact
    def backward(ctx, do):
        q, k, v, p, s = ctx.saved_tensors
        B, H, G, T, S, D = ctx.shape
        do = do.reshape(q.shape)
        dv = p.mT @ do                                                       # sums over the heads that shared a key
        dp = _product32(do, v.mT)
        ds = torch.empty_like(p)
        BLOCK_S = triton.next_power_of_2(S)
        _attention_bwd[(B * H * T,)](dp, p, s, ds, S, ctx.scale, ctx.softcap, BLOCK_S=BLOCK_S,
                                     num_warps=_warps(BLOCK_S))
        dq, dk = ds @ k, ds.mT @ q
        return dq.view(B, H, T, D), dk.view(B, G, S, D), dv.view(B, G, S, D), None, None, None, None, None, None


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
    if torch.is_autocast_enabled(q.device.type):
        return _under_autocast(attention, q, k, v, causal, window, softcap, alibi, scale, mask)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or len(k) != len(q) or k.shape[3] != q.shape[3] or (
            k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"attention: k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, G, S, D] for q "
                         f"{tuple(q.shape)} [B, H, T, D], with G a divisor of H")
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    _floats("attention", q=q, k=k, v=v)
    if window is not None and window < 1 or softcap is not None and softcap <= 0:
        raise ValueError(f"attention: window ({window}) must be at least 1 and softcap ({softcap}) above 0")
    if mask is not None and (mask.shape != (B, S) or mask.dtype != torch.bool):
        raise ValueError(f"attention: mask {tuple(mask.shape)} {mask.dtype} must be bool [B, S] = {(B, S)}")
    if alibi is not None and (alibi.shape != (H,) or not alibi.is_floating_point()):
        raise ValueError(f"attention: alibi {tuple(alibi.shape)} {alibi.dtype} must be a floating slope a head, "
                         f"[H] = {(H,)}")
    if window is not None and window >= S:
        window = None                                                        # wider than the text: no bound at all
    scale = max(D, 1) ** -0.5 if scale is None else scale
    if scale <= 0:                                                           # torch's CPU kernel takes it for positive
        q, scale = (-q, -scale) if scale < 0 else (0 * q, 1.0)
    if B * H * T == 0 or S == 0:
        return 0 * q + 0 * (k.sum() + v.sum())                               # nothing to see, and gradients that say so
    plain = softcap is None and alibi is None and mask is None and window is None
    if on_kernel(q) and S <= 2 ** 14 and not (plain and q.is_cuda):          # longer rows would not fit the registers;
        return _AttentionKernel.apply(q, k, v, causal, window, softcap, alibi, scale, mask)          # plain ones: SDPA
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
        exact = torch.promote_types(q.dtype, torch.float32)
        s = q.unflatten(1, (G, H // G)).to(exact) @ k.unsqueeze(2).mT.to(exact) * scale              # [B, G, H/G, T, S]
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if alibi is not None:
            s = s - alibi.to(exact).view(G, H // G, 1, 1) * distance.abs()
        p = s.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1).to(q.dtype)
        y = (p @ v.unsqueeze(2)).flatten(1, 2)
    return torch.where(some, y, 0)


def _loss_and_dz(z, targets, ignore_index, dtype):
    """z [rows, V] → the loss of each row and, in `dtype` unless None, softmax(z) − onehot(target); 0 where ignored."""
    kept = targets != ignore_index
    index = targets.where(kept, 0)[:, None]
    p = F.log_softmax(z, dim=-1)
    loss = -p.gather(1, index)[:, 0] * kept
    if dtype is None:
        return loss, None
    return loss, p.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=p.dtype)).mul_(kept[:, None]).to(dtype)


def _loss_on_kernel(z, targets, ignore_index, dtype):
    loss, V = torch.empty(len(z), device=z.device), z.shape[1]
    dz = z if dtype in (None, z.dtype) else torch.empty_like(z, dtype=dtype)
    BLOCK_V = min(triton.next_power_of_2(V), 8192)
    _linear_cross_entropy_fwd[(len(z),)](z, targets, loss, dz, V, ignore_index, GRAD=dtype is not None, BLOCK_V=BLOCK_V,
                                         num_warps=_warps(BLOCK_V))
    return loss, dz


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients together, a chunk of rows at a time: dz = (softmax(z) − onehot(target)) / rows kept."""

    @staticmethod
    def forward(ctx, x, w, targets, ignore_index, needs_dx, needs_dw):
        (N, C), V = x.shape, len(w)
        exact = torch.promote_types(x.dtype, torch.float32)                  # of the softmax and the sums
        kernel = on_kernel(x) and w.numel() > 0
        count = (targets != ignore_index).sum().clamp(min=1)
        loss = torch.zeros((), dtype=exact, device=x.device)
        dx = torch.empty_like(x) if needs_dx else None
        dw = torch.zeros(V, C, dtype=exact, device=x.device) if needs_dw else None
        rows = max(256, 2 ** (25 if x.is_cuda else 20) // max(V, 1))         # a chunk's logits: few MB on a CPU, where
        for i in range(0, N, rows):                                          # the cache counts, but rows enough to make
            chunk, goal = x[i:i + rows], targets[i:i + rows]                 # the product with w worth its reading
            z = _product32(chunk, w.T)                                       # [rows, V]
            step = _loss_on_kernel if kernel else _loss_and_dz
            part, dz = step(z, goal, ignore_index, x.dtype if needs_dx or needs_dw else None)
            loss += part.sum(dtype=exact)
            if needs_dx:
                torch.matmul(dz, w, out=dx[i:i + rows])
            if needs_dw:
                product = _product32 if x.dtype == torch.float16 else torch.mm               # float16 ends at 65,504
                dw.addmm_(dz.T, chunk) if exact == x.dtype else dw.add_(product(dz.T, chunk))
        ctx.save_for_backward(dx, dw, count)
        ctx.w_dtype = w.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        return (None if dx is None else (dx * scale).to(dx.dtype), None if dw is None else (dw * scale).to(ctx.w_dtype),
                None, None, None, None)


def linear_cross_entropy(x, w, targets, ignore_index=-100):
    """Mean cross-entropy of the logits x wᵀ: x [N, C], w [V, C], targets [N] integers → a scalar, nats a row.

    The [N, V] logits never exist at once, nor does their gradient. Rows whose target is `ignore_index` do not count; if
    none is left the loss and its gradients are 0. Under autocast the products run in its dtype. ValueError for shapes
    and dtypes that do not fit, and for a target outside 0 … V − 1 (on a GPU, where a look at the values would be a
    wait, the loss is NaN instead).
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy: x {tuple(x.shape)}, w {tuple(w.shape)}, "
                         f"targets {tuple(targets.shape)} must be [N, C], [V, C] and [N]")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"linear_cross_entropy: targets {tuple(targets.shape)} {targets.dtype} must be integers")
    targets = targets.long().contiguous()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ((targets < 0) | (targets >= len(w))) & (targets != ignore_index)
        if bad.any():
            raise ValueError(f"linear_cross_entropy: targets holds {targets[bad][0]}, outside 0 … {len(w) - 1}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):                                      # w is converted once, not for each chunk
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return linear_cross_entropy(x.to(dtype), w.to(dtype), targets, ignore_index)
    _floats("linear_cross_entropy", x=x, w=w)
    needs = (torch.is_grad_enabled() and t.requires_grad for t in (x, w))
    return _LinearCrossEntropy.apply(x, w, targets, ignore_index, *needs)


# --- 6. The modules: parts with weights, stacked into a block ---------------------------------------------------------

class KVCache:
    """The state of an attention layer: keys and values of up to `capacity` tokens for each of B sequences in step."""

    def __init__(self, B, G, capacity, D, dtype=torch.float32, device=None):
        self.k = torch.empty(B, G, capacity, D, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def attend(self, q, k, v, attention, **options):
        """Append k, v [B, G, T, D] and let q [B, H, T, D] look at all of the cache → [B, H, T, D]."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"KVCache: {end} tokens do not fit a capacity of {self.k.shape[2]}")
        if k.shape != (*self.k.shape[:2], end - start, self.k.shape[3]) or v.shape != k.shape:
            raise ValueError(f"KVCache: k {tuple(k.shape)} and v {tuple(v.shape)} do not go into {tuple(self.k.shape)}")
        self.k[:, :, start:end], self.v[:, :, start:end], self.length = k, v, end
        return attention(q, self.k[:, :, :self.length], self.v[:, :, :self.length], **options)


class Rotary:
    """The positions' cos and sin, made once and shared by all layers. `inv_freq` and `factor`: see `rotary`."""

    def __init__(self, inv_freq, factor=1.0):
        self.inv_freq, self.factor = inv_freq, factor
        self.seen, self.table = None, None

    def __call__(self, q, k, positions):
        """q [B, H, T, D] and k [B, G, T, D], rotated."""
        if self.inv_freq.device != q.device:
            self.inv_freq = self.inv_freq.to(q.device)
        make = lambda: rotary_cos_sin(positions, self.inv_freq, self.factor, q.dtype)
        if torch.compiler.is_compiling():                                    # a graph shares what is alike by itself
            return _rotate_q_k(q, k, *make())
        if positions.is_inference():                                         # which does not say when it is changed
            return _rotate_q_k(q, k, *make())
        seen = (positions, positions._version, q.dtype)                      # all layers of a pass share one tensor
        if self.seen is None or self.seen[0] is not positions or self.seen[1:] != seen[1:]:
            with torch.inference_mode(False):                                # the table may serve training next
                self.seen, self.table = seen, make()
        return _rotate_q_k(q, k, *self.table)


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
        q, k = self.rotary(q, k, positions)
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
        normed, x = self.mlp_norm(self.attention(self.attention_norm(x), positions, state), residual=x)
        return x + self.mlp(normed)

    def delta(self, x, positions, state=None):
        """What the block adds to x, without x: Mixture of Depths scales it."""
        a = self.attention(self.attention_norm(x), positions, state)
        normed, _ = self.mlp_norm(a, residual=x)
        return a + self.mlp(normed)


# --- 7. The claims, proved on the reader's machine --------------------------------------------------------------------

def digits(rng, B, longest, task="reverse"):
    """B rows of up to `longest` random digits, and the same reversed (or sorted) → source, target [B, longest].

    A digit d is token d + 2; short rows end in PAD.
    """
    length, at = rng.integers(1, longest + 1, (B, 1)), np.arange(longest)
    source = np.where(at < length, rng.integers(2, 12, (B, longest)), Transformer2017.PAD)
    if task == "sort":
        target = np.sort(np.where(source, source, 12), axis=1) % 12          # padding goes last, and is 0 again
    else:
        target = np.where(at < length, np.take_along_axis(source, (length - 1 - at) % longest, axis=1), source)
    return source, target


def train_2017(steps=500, longest=8, task="reverse", seed=0, say=lambda text: None):
    """Train a `Transformer2017` on `digits` → (the model, the share of 1,000 fresh rows that it gets wholly right)."""
    rng = np.random.default_rng(seed)
    model = Transformer2017(12, C=32, H=2, F=64, layers=2, seed=seed)
    adam = Adam(model, steps)
    for step in range(1, steps + 1):
        loss = model.loss(*digits(rng, 48, longest, task))
        adam.update()
        if step % 20 == 0:
            say(f"step {step} of {steps}, loss {loss:.3f}")
    source, target = digits(rng, 1000, longest, task)
    right = (model.generate(source, longest) == target) | (target == model.PAD)
    return model, right.all(1).mean()


def attention_map(model, source, length):
    """The cross-attention of the last layer, averaged over its heads, as lines of text: a row a token written."""
    written = model.generate(source, length)
    begun = np.concatenate([[[model.BEGIN]], written[:, :-1]], axis=1)
    model.decode(model.encode(source)[0], source, begun)
    shades = " ·░▒▓█"
    try:
        shades.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        shades = " .-+*#"
    shade = lambda p: 3 * shades[min(int(p * len(shades)), len(shades) - 1)]
    lines = ["reads    " + "   ".join(str(t - 2) for t in source[0, :length]), "writes"]
    for token, row in zip(written[0], model.looked_at()[0].mean(0)[:, :length]):
        lines.append(f"   {token - 2}    " + " ".join(shade(p) for p in row))
    return lines


def _milliseconds(work, device, tries=5):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(tries + 1):                                               # the first one warms up
        wait()
        t = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - t)
    return 1000 * sorted(times[1:])[tries // 2]


def _peak_megabytes(work, device):
    """The most memory that tensors made by `work` hold at one time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                          # the profiler's own chatter
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        work()
    steps = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum(steps), default=0) / 2 ** 20


def compare_ops(device, dtype, B, T, H, G, D, C, width, loss, tries):
    """Print each op beside its definition and beside plain torch, forward and backward: time, rate, memory.

    loss = (N, C, V) of linear_cross_entropy; the others as at the top of the file, `width` that of the MLP.
    """
    N, channels, V = loss
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)
    q, k, v = randn(B, H, T, D), randn(B, G, T, D), randn(B, G, T, D)
    x, w, gate, up = randn(B * T, C), randn(C), randn(B * T, width), randn(B * T, width)
    rows, head, positions = randn(N, channels), randn(V, channels) / 16, torch.arange(T, device=device)
    targets = torch.randint(0, V, (N,), generator=generator).to(device)
    numbers = lambda t: t.double().numpy(force=True)

    def plain_attention(q, k, v):
        s = q @ k.repeat_interleave(H // G, 1).mT / D ** 0.5
        return s.masked_fill(positions[:, None] < positions, -torch.inf).softmax(-1) @ v.repeat_interleave(H // G, 1)

    def plain_rotary(q, k):
        cos, sin = (torch.cat([a, a], -1).to(dtype) for a in rotary_cos_sin(positions, rotary_inv_freq(D, 1e4, device)))
        turn = lambda x: x * cos + torch.cat([-x[..., D // 2:], x[..., :D // 2]], -1) * sin
        return turn(q), turn(k)
    table = [                                                                # op, definition, plain torch, inputs, work
        ("rms_norm", rms_norm, rms_norm_numpy,
         lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w, (x, w), 5 * x.nbytes),
        ("rotary", lambda q, k: rotary(q, k, positions), lambda q, k: rotary_numpy(q, k, numbers(positions)),
         plain_rotary, (q, k), 4 * (q.nbytes + k.nbytes)),
        ("swiglu", swiglu, swiglu_numpy, lambda g, u: g * torch.sigmoid(g) * u, (gate, up), 8 * gate.nbytes),
        ("attention", attention, attention_numpy, plain_attention, (q, k, v), 6 * B * H * T * (T + 1) * D),
        ("linear_cross_entropy", lambda x, w: linear_cross_entropy(x, w, targets),
         lambda x, w: linear_cross_entropy_numpy(x, w, numbers(targets).astype(int)),
         lambda x, w: F.cross_entropy((x @ w.T).float(), targets), (rows, head), 6 * N * channels * V),
    ]
    a, source = randn(1024, 1024), torch.zeros(2 ** (28 if device == "cuda" else 25), device=device)
    copied = torch.zeros_like(source)
    copy = 2 * source.nbytes / 1e6 / _milliseconds(lambda: copied.copy_(source), device)
    product = 2 * 1024 ** 3 / 1e6 / _milliseconds(lambda: a @ a, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{name}, {str(dtype)[6:]}: a copy moves {copy:,.0f} GB/s, "
          f"a matrix product does {product:,.0f} GFLOP/s\n"
          f"B {B}, T {T}, H {H}, G {G}, D {D}, C {C}, MLP {width}; loss: N {N}, C {channels}, V {V}\n\n"
          "forward and backward; off: from its definition, relative; torch: written plainly\n"
          f"{'':20}{'off':>7}{'ms':>11}{'torch':>11}{'rate':>13}{'MB':>8}{'torch':>9}")
    for name, op, definition, plain, tensors, work in table:
        error = "–"
        if sum(t.numel() for t in tensors) < 2 ** 22:                        # a large definition takes minutes
            got, wanted = op(*tensors), definition(*(numbers(t) for t in tensors))
            pairs = zip(got, wanted) if isinstance(got, tuple) else [(got, wanted)]
            error = f"{max(np.abs(numbers(a) - b).max() / np.abs(b).max() for a, b in pairs):.0e}"

        def both(f):
            inputs = [t.detach().requires_grad_() for t in tensors]
            out = f(*inputs)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])
        t, t_plain = (_milliseconds(lambda: both(f), device, tries) for f in (op, plain))
        memory, memory_plain = (_peak_megabytes(lambda: both(f), device) for f in (op, plain))
        unit = "GFLOP/s" if name in ("attention", "linear_cross_entropy") else "GB/s"
        print(f"{name:20}{error:>7}{t:>11,.2f}{t_plain:>11,.2f}{f'{work / 1e6 / t:,.0f} {unit}':>13}"
              f"{memory:>8,.1f}{memory_plain:>9,.1f}", flush=True)


def leave(main):
    """Run a program and end the process with its exit code, on Ctrl-C and for a reader that has gone (`| head`), too.

    One of several processes ends on the spot: gloo's threads let go of the last tensors some time after their message,
    and abort a Python that is taking itself apart by then.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                                       # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):                       # a notebook's has none
            getattr(sys, name).reconfigure(errors="replace")                 # a code page without × ends no run
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # Python will flush it once more
        code = 141
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv=None):
    """Train the Transformer of 2017 in NumPy, show what it looks at, and hold the ops against plain torch."""
    p = argparse.ArgumentParser(prog="attention.py", description=main.__doc__)
    p.add_argument("--bench", action="store_true", help="only the ops, at the sizes of a real model (minutes on a CPU)")
    args = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.bench:
        compare_ops(device, torch.bfloat16 if device == "cuda" else torch.float32,
                    B=4, T=1024, H=32, G=8, D=128, C=4096, width=11008, loss=(4096, 512, 65536), tries=3)
        return 0
    print("A Transformer in NumPy, its gradients by hand, learns to write digits backwards:", flush=True)
    begin, shown = time.perf_counter(), sys.stdout.isatty()
    model, right = train_2017(say=lambda text: shown and print(f"\r{text}   ", end="", flush=True))
    print("\r" * shown + f"{right:.1%} of 1,000 fresh rows right after {time.perf_counter() - begin:.1f} s. "
          "Where it looks as it writes\n(cross-attention, last layer):\n")
    print("\n".join(attention_map(model, np.array([[9, 3, 5, 2, 7, 11, 4, 0]]), 7)), "\n", flush=True)

    compare_ops(device, torch.float32, B=4, T=256, H=8, G=4, D=32, C=256, width=704, loss=(1024, 256, 4096), tries=3)
    T, H, G, D, C = 256, 8, 4, 32, 256
    torch.manual_seed(0)
    block = Block(Attention(C, H, G, D, Rotary(rotary_inv_freq(D))), MLP(C, 2 * C), C)
    x, positions, state = torch.randn(1, T, C), torch.arange(T), KVCache(1, G, T, D)
    with torch.no_grad():
        whole = block(x, positions)
        cuts = [(0, T - 50), *((i, i + 1) for i in range(T - 50, T))]
        parts = [block(x[:, i:j], positions[i:j], state) for i, j in cuts]
        error = (torch.cat(parts, 1) - whole).abs().max()
    print(f"\na block over {T} tokens at once, or {T - 50} and then one by one from its cache:\n{error:.0e} apart")
    return 0


if __name__ == "__main__":
    leave(main)
