"""Every claim of the README, checked, in its order. `pytest test_all.py`; the peers (transformers) come with the test command.

Tolerances: float32 rounds at 6e-8; a sum of n products of unit size errs by about √n of that, so 1e-5 bounds what these
sizes can do, and an exact claim (the same tokens, the same bits) is tested as exact.
"""
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st

import attention as A
import infer
import train

FAST = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Tokenized corpora of the tests stay out of the user's cache."""
    os.environ["TWIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small folder of text: Python sources that every machine has."""
    folder = tmp_path_factory.mktemp("corpus")
    root, files = train.find_files(None)
    for path in [p for p in files if p.parent == root and p.stat().st_size < 40_000][:40]:
        shutil.copy(path, folder)
    return folder


def run(program, *argv):
    """A program called in-process as from the command line → (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = program.main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """A model folder made by train.py: 60 steps of a tiny Transformer."""
    out = tmp_path_factory.mktemp("trained") / "out"
    code, _, err = run(train, "--data", corpus, "--steps", 60, "--vocab", 400, "--context", 64, "--out", out)
    assert code == 0, err
    return out


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients(function, *tensors, seed=9):
    """Outputs and gradients of a function for a fixed random gradient of its output."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [randn(*o.shape, seed=seed + i).to(o.dtype) for i, o in enumerate(outputs)])
    return [o.detach() for o in outputs], [t.grad for t in tensors]


def close(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(np.asarray(x)).double() for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    scale = max(1.0, b.abs().max().item() if b.numel() else 1.0)
    error = (a - b).abs().max().item() if b.numel() else 0.0
    assert error <= tolerance * scale, f"off by {error:.1e} at a scale of {scale:.1e}"


# --- 1. attention.py: each op is its NumPy definition, and its gradient is autograd's of that definition ---------------

SHAPES = [(1, 1, 1, 1, 1, 2), (2, 4, 2, 7, 7, 8), (1, 6, 3, 5, 9, 10), (2, 3, 1, 1, 13, 6), (1, 4, 4, 9, 4, 16), (2, 2, 2, 33, 33, 64)]
OPTIONS = [{}, dict(causal=False), dict(window=3), dict(softcap=2.0), dict(alibi=True), dict(scale=0.3), dict(mask=True),
           dict(causal=False, window=1), dict(window=2, softcap=1.0, alibi=True, mask=True, scale=1.5)]


@pytest.mark.parametrize("B,H,G,T,S,D", SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_is_its_definition(B, H, G, T, S, D, options):
    q, k, v = randn(B, H, T, D), randn(B, G, S, D, seed=1), randn(B, G, S, D, seed=2)
    options = dict(options)
    if options.get("alibi"):
        options["alibi"] = 2.0 ** -torch.arange(1, H + 1).double()
    if options.get("mask"):
        options["mask"] = randn(B, S, seed=3) > 0
        options["mask"][0] = False                                           # a row that sees no key at all
    wanted = A.attention_numpy(*(t.numpy() for t in (q, k, v)), **{n: x.numpy() if torch.is_tensor(x) else x for n, x in options.items()})
    plain = lambda q, k, v: attention_in_torch(q, k, v, **options)
    (y,), grads = gradients(lambda *t: A.attention(*t, **options), q, k, v)
    (y_plain,), grads_plain = gradients(plain, q, k, v)
    close(y, wanted, 1e-12)
    close(y_plain, wanted, 1e-12)
    for a, b in zip(grads, grads_plain):
        assert torch.isfinite(a).all()
        close(a, b, 1e-12)
    close(A.attention(q.float(), k.float(), v.float(), **{n: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in options.items()}), wanted)


def attention_in_torch(q, k, v, causal=True, window=None, softcap=None, alibi=None, scale=None, mask=None):
    """The definition again, in operations that autograd follows; empty rows by a sum over nothing."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    s = q @ k.mT * (D ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
    s = s if alibi is None else s - alibi[:, None, None] * distance.abs()
    seen = (distance >= 0 if causal else distance > -10 ** 9) & (distance < (window or 10 ** 9))
    seen = seen.expand(B, 1, T, S) & (True if mask is None else mask[:, None, None, :])
    e = torch.where(seen, (s - s.detach().amax(-1, keepdim=True)).exp(), 0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-300) @ v


def test_attention_is_anchored_bottom_right_and_a_window_counts_its_own_token():
    v = torch.eye(5)[None, None]                                             # the output shows which keys were seen
    one = A.attention(torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 5, 5), v)
    close(one[0, 0, 0], torch.full((5,), 0.2))                               # the last query sees all five keys
    more = A.attention(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 2, 5), v[:, :, :2])
    assert (more[0, 0, :3] == 0).all() and more[0, 0, 3, 0] == 1             # queries before the first key: zeros
    window = A.attention(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5), v, window=2)
    close(window[0, 0, 4], torch.tensor([0, 0, 0, 0.5, 0.5]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 4, 1, 64), (0, 8), (5, 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_is_its_definition(shape, dtype):
    x, w, residual = randn(*shape), randn(shape[-1], seed=1), randn(*shape, seed=2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    (y,), grads = gradients(lambda x, w: A.rms_norm(x, w), x.to(dtype), w.to(dtype))
    close(y, A.rms_norm_numpy(x.numpy(), w.numpy()), tolerance)
    _, wanted = gradients(lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w, x, w)
    for a, b in zip(grads, wanted):
        close(a, b, tolerance)
    y, total = A.rms_norm(x.to(dtype), w.to(dtype), residual=residual.to(dtype))
    y_numpy, total_numpy = A.rms_norm_numpy(x.numpy(), w.numpy(), residual=residual.numpy())
    close(y, y_numpy, tolerance)
    close(total, total_numpy, tolerance)
    strided = randn(8, 3, 6).transpose(0, 2).to(dtype)                       # not contiguous
    close(A.rms_norm(strided.requires_grad_(), torch.ones(8, dtype=dtype)).detach(), A.rms_norm_numpy(strided.detach().numpy(), np.ones(8)), tolerance)


@pytest.mark.parametrize("B,H,G,T,D", [(1, 1, 1, 1, 2), (2, 4, 2, 5, 8), (3, 6, 1, 17, 10)])
@pytest.mark.parametrize("ragged", [False, True])
def test_rotary_is_its_definition_and_sees_distance_alone(B, H, G, T, D, ragged):
    q, k = randn(B, H, T, D), randn(B, G, T, D, seed=1)
    positions = torch.randint(0, 500, (B, T)) if ragged else torch.arange(3, 3 + T)
    inv_freq = torch.linspace(1, 0.01, D // 2)
    for options in ({}, dict(base=500.0), dict(inv_freq=inv_freq, factor=1.5)):
        numpy_options = {n: x.numpy() if torch.is_tensor(x) else x for n, x in options.items()}
        wanted = A.rotary_numpy(q.numpy(), k.numpy(), positions.numpy(), **numpy_options)
        outputs, grads = gradients(lambda q, k: A.rotary(q, k, positions, **options), q, k)
        for a, b in zip(outputs, wanted):
            close(a, b, 1e-12)
        factor = options.get("factor", 1.0)
        for grad, i in zip(grads, range(2)):                                 # a rotation keeps lengths; so does its gradient
            close(grad.norm(dim=-1), randn(*grad.shape, seed=9 + i).norm(dim=-1) * factor, 1e-12)
    dot = lambda at: (lambda q, k: (q * k).sum())(*A.rotary(q[:1, :1, :1], k[:1, :1, :1], torch.tensor([at])))
    a, _ = A.rotary(q[:1, :1, :1], k[:1, :1, :1], torch.tensor([10]))
    _, b = A.rotary(q[:1, :1, :1], k[:1, :1, :1], torch.tensor([7]))
    c, _ = A.rotary(q[:1, :1, :1], k[:1, :1, :1], torch.tensor([1010]))
    _, d = A.rotary(q[:1, :1, :1], k[:1, :1, :1], torch.tensor([1007]))
    close((a * b).sum(), (c * d).sum(), 1e-12)
    close(dot(0), dot(77), 1e-12)


def test_swiglu_is_its_definition():
    gate, up = randn(3, 5, seed=1) * 20, randn(3, 5, seed=2)
    close(A.swiglu(gate, up), A.swiglu_numpy(gate.numpy(), up.numpy()), 1e-12)


@pytest.mark.parametrize("N,C,V", [(1, 1, 1), (7, 5, 3), (50, 8, 300), (3000, 4, 1000)])
def test_linear_cross_entropy_is_its_definition(N, C, V):
    x, w = randn(N, C), randn(V, C, seed=1)
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    targets[::3] = -100
    targets[0] = V - 1
    (loss,), grads = gradients(lambda x, w: A.linear_cross_entropy(x, w, targets), x.float(), w.float())
    close(loss, A.linear_cross_entropy_numpy(x.numpy(), w.numpy(), targets.numpy()))
    _, wanted = gradients(lambda x, w: F.cross_entropy(x @ w.T, targets), x, w)
    for a, b in zip(grads, wanted):
        close(a, b)
    targets[:] = -100
    (loss,), grads = gradients(lambda x, w: A.linear_cross_entropy(x, w, targets), x.float(), w.float())
    assert loss == 0 and all((g == 0).all() for g in grads)


def test_linear_cross_entropy_never_holds_all_logits():
    N, C, V = 2048, 16, 32768                                                # all logits: 256 MB
    x, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        A.linear_cross_entropy(x, w, torch.randint(0, V, (N,))).backward()
    largest = max((e.cpu_memory_usage for e in p.events()), default=0)
    assert 0 < largest < N * V * 4 / 8


@pytest.mark.parametrize("call,name", [
    (lambda t: A.rms_norm(t(2, 3), t(4)), "w"),
    (lambda t: A.rms_norm(t(2, 3), t(3), residual=t(1, 3)), "residual"),
    (lambda t: A.swiglu(t(2, 3), t(2, 4)), "up"),
    (lambda t: A.rotary(t(1, 1, 2, 3), t(1, 1, 2, 3), torch.arange(2)), "head size"),
    (lambda t: A.rotary(t(1, 1, 2, 4), t(1, 1, 2, 4), torch.arange(3)), "positions"),
    (lambda t: A.attention(t(1, 3, 2, 4), t(1, 2, 2, 4), t(1, 2, 2, 4)), "k "),
    (lambda t: A.attention(t(1, 2, 2, 4), t(1, 2, 2, 4), t(1, 2, 2, 4), window=0), "window"),
    (lambda t: A.attention(t(1, 2, 2, 4), t(1, 2, 2, 4), t(1, 2, 2, 4), softcap=0.0), "softcap"),
    (lambda t: A.attention(t(1, 2, 2, 4), t(1, 2, 2, 4), t(1, 2, 2, 4), mask=t(1, 2)), "mask"),
    (lambda t: A.attention(t(1, 2, 2, 4), t(1, 2, 2, 4), t(1, 2, 2, 4), alibi=t(3)), "alibi"),
    (lambda t: A.linear_cross_entropy(t(2, 3), t(4, 3), torch.tensor([0, 4])), "targets"),
    (lambda t: A.linear_cross_entropy(t(2, 3), t(4, 3), torch.tensor([0, -1])), "targets"),
    (lambda t: A.linear_cross_entropy(t(2, 3), t(4, 5), torch.tensor([0, 1])), "w"),
])
def test_wrong_shapes_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call(lambda *shape: torch.randn(*shape))


def tiny(seed=0, **changes):
    """A small random model, every option of a Qwen3, weights far from zero."""
    raw = train.qwen3_config("aaa", 32, 4, 2, 61, 64, [60]) | changes
    model = train.Model(train.parse_config(raw))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(torch.randn(w.shape, generator=generator) * (0.2 if w.ndim > 1 else 0.3) + (w.ndim == 1))
    return model.eval()


def test_block_is_x_plus_delta():
    block, x = tiny().blocks[0], randn(2, 9, 32, dtype=torch.float32)
    close(block(x, torch.arange(9)).detach(), (x + block.delta(x, torch.arange(9))).detach(), 1e-6)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [1, 3, 1, 7], [11, 1]])
def test_prefill_and_decode_are_the_whole(cuts, windows):
    model = tiny(use_sliding_window=windows, sliding_window=4, max_window_layers=1)
    tokens = torch.randint(0, 61, (2, 12))
    whole = model(tokens)
    states, at, parts = model.new_states(2, 12), 0, []
    for n in cuts:
        parts.append(model(tokens[:, at:at + n], torch.arange(at, at + n), states))
        at += n
    close(torch.cat(parts, 1).detach(), whole.detach())
    with pytest.raises(ValueError, match="capacity"):
        model(tokens[:, :1], torch.arange(12, 13), states)


def test_rows_of_a_batch_do_not_touch_each_other():
    model, tokens = tiny(), torch.randint(0, 61, (5, 9))
    together = model(tokens)
    for i in range(5):
        close(model(tokens[i:i + 1])[0].detach(), together[i].detach())
    changed = tokens.clone()
    changed[:, 6:] = 0                                                       # causal: what comes later changes nothing before
    close(model(changed)[:, :6].detach(), together[:, :6].detach(), 1e-6)


# --- 2. train.load: Hugging Face folders in, ours out, with transformers as the judge -----------------------------------

SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=97, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
FOLDERS = [
    ("Qwen3", dict(head_dim=16)),
    ("Qwen3", dict(head_dim=24, tie_word_embeddings=True, attention_bias=True, rope_theta=1e6)),
    ("Qwen3", dict(head_dim=16, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    ("Qwen3", dict(head_dim=16, sliding_window=6, use_sliding_window=True,
                   layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    ("Qwen3", dict(head_dim=16, rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=5e5))),
    ("Qwen3", dict(head_dim=16, rope_parameters=dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0))),
    ("Qwen3", dict(head_dim=16, rope_parameters=dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3, truncate=False))),
    ("Qwen3", dict(head_dim=16, rope_parameters=dict(rope_type="yarn", factor=128.0, original_max_position_embeddings=16, attention_factor=1.4852))),
    ("Qwen2", dict()),
    ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=2, tie_word_embeddings=True)),
    ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=3)),
    ("Llama", dict(rope_theta=5e5, rms_norm_eps=1e-5)),
    ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=20)),
    ("Llama", dict(rope_parameters=dict(LLAMA3, rope_theta=1e4))),
    ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4), num_key_value_heads=4)),
    ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    ("Mistral", dict(sliding_window=5)),
    ("Mistral", dict(sliding_window=None, head_dim=32)),
]


def hugging_face(kind, options, folder, **saving):
    """A random model of transformers, saved → the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**SIZES | options)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            w.normal_(0, 0.3 if w.ndim > 1 else 0.5).add_(float("norm" in name))   # biases and gains must matter
    model.save_pretrained(folder, **saving)
    train.make_tokenizer("bytes", None, []).library.save(str(Path(folder) / "tokenizer.json"))
    return model


@pytest.mark.parametrize("kind,options", FOLDERS, ids=lambda x: str(x)[:60])
def test_logits_are_those_of_transformers(kind, options, tmp_path):
    theirs = hugging_face(kind, options, tmp_path, **({"max_shard_size": "40KB"} if "head_dim" in options else {}))
    ours, _ = train.load(tmp_path)
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(ours(tokens), theirs(tokens).logits, 2e-5)                     # scores of up to ~50: 1e-4 is asked for


def rewrite(folder, **changes):
    """Change a folder's config.json; a value of ... removes the key."""
    path = Path(folder) / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


@pytest.mark.parametrize("old,new", [
    (dict(rope_theta=500000.0, rope_scaling=dict(LLAMA3), rope_parameters=...), dict(LLAMA3, rope_theta=5e5)),
    (dict(rope_theta=500000.0, rope_scaling=dict({k: v for k, v in LLAMA3.items() if k != "rope_type"}, type="llama3"), rope_parameters=...), dict(LLAMA3, rope_theta=5e5)),
    (dict(rope_theta=..., rope_scaling=dict(type="linear", factor=4.0), rope_parameters=...), dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    (dict(rope_theta=..., rope_scaling=..., rope_parameters=dict(rope_type="default", rope_theta=500000.0)), dict(rope_type="default", rope_theta=5e5)),
    (dict(rope_theta=600000.0, rope_parameters=dict(rope_type="linear", factor=2.0)), dict(rope_type="linear", factor=2.0, rope_theta=6e5)),
    (dict(rope_theta=..., rope_parameters=..., rope_scaling=None), dict(rope_type="default", rope_theta=1e4)),
])
def test_every_dialect_of_the_rotary_settings_means_the_same(old, new, tmp_path):
    theirs = hugging_face("Llama", dict(rope_parameters=new), tmp_path)
    rewrite(tmp_path, **old)
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(train.load(tmp_path)[0](tokens), theirs(tokens).logits, 2e-5)


def test_head_sizes_are_the_configs_or_the_architectures_default():
    raw = train.qwen3_config("a", 64, 2, 2, 50, 64, [])
    qwen3 = lambda **changes: train.parse_config({k: v for k, v in (raw | changes).items() if v is not ...})
    assert qwen3(hidden_size=2560, num_attention_heads=32, num_key_value_heads=8, head_dim=128).head_dim == 128
    assert qwen3(head_dim=...).head_dim == 128                               # a Qwen3 without the key: not the quotient
    assert qwen3(model_type="llama", head_dim=...).head_dim == 32
    assert qwen3(model_type="llama", num_key_value_heads=...).kv_heads == 2


def test_windows_by_layer():
    raw = train.qwen3_config("aaaa", 64, 2, 2, 50, 64, [])
    windows = lambda **changes: train.parse_config(raw | changes).windows
    assert windows(use_sliding_window=True, sliding_window=8, max_window_layers=4) == [None] * 4
    assert windows(use_sliding_window=True, sliding_window=8, max_window_layers=2) == [None, None, 8, 8]
    assert windows(use_sliding_window=False, sliding_window=8, max_window_layers=0) == [None] * 4
    assert windows(use_sliding_window=True, sliding_window=8, max_window_layers=4,
                   layer_types=["sliding_attention"] + ["full_attention"] * 3) == [8, None, None, None]
    assert windows(model_type="mistral", sliding_window=8) == [8] * 4


def test_end_tokens_of_both_files_count(tmp_path):
    hugging_face("Llama", dict(eos_token_id=2), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 17])))
    assert train.load(tmp_path)[1].eos_ids == [2, 17]


@pytest.mark.parametrize("change,word", [
    (dict(model_type="gpt2"), "gpt2"), (dict(hidden_act="gelu"), "hidden_act"), (dict(quantization_config=dict(bits=4)), "quantization_config"),
    (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "dynamic"), (dict(rope_scaling=dict(rope_type="longrope")), "longrope"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"), (dict(layer_types=["chunked_attention"] * 3), "layer_types"),
    (dict(hidden_size=...), "hidden_size"), (dict(num_key_value_heads=3), "num_key_value_heads"), (dict(intermediate_size=81), "gate_proj|mlp"),
    (dict(vocab_size=98), "embed_tokens|lm_head"), (dict(num_hidden_layers=4), r"layers\.3"), (dict(num_hidden_layers=2), r"layers\.2"),
    (dict(layers="aasa"), "layers"), (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "low_freq_factor"),
])
def test_what_is_not_supported_is_refused_by_name(change, word, tmp_path):
    hugging_face("Llama", {}, tmp_path)
    rewrite(tmp_path, **({"rope_parameters": ...} if "rope_scaling" in change else {}), **change)
    code, _, err = run(infer, "hello", "--model", tmp_path)
    assert code == 2 and len(err.strip().splitlines()) == 1
    import re
    assert re.search(word, err), err


def test_broken_folders_name_the_file_or_the_tensor(tmp_path):
    import safetensors.torch
    hugging_face("Llama", dict(tie_word_embeddings=False), tmp_path / "good")
    weights = safetensors.torch.load_file(tmp_path / "good" / "model.safetensors")

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        code, _, err = run(infer, "hello", "--model", folder)
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        return err
    keep = lambda **kept: lambda f: safetensors.torch.save_file({**weights, **kept} if kept else weights, f / "model.safetensors")
    without = lambda name: lambda f: safetensors.torch.save_file({k: v for k, v in weights.items() if k != name}, f / "model.safetensors")
    assert "lm_head.weight" in broken("untied", without("lm_head.weight"))   # never random weights
    assert "q_proj.weight" in broken("missing", without("model.layers.1.self_attn.q_proj.weight"))
    assert "stray" in broken("left-over", keep(stray=torch.zeros(1)))
    assert "model.norm.weight" in broken("misshapen", keep(**{"model.norm.weight": torch.ones(3)}))
    cut = lambda f: (f / "model.safetensors").write_bytes((tmp_path / "good" / "model.safetensors").read_bytes()[:-50])
    assert "model.safetensors" in broken("cut", cut) and "incomplete" in broken("cut2", cut)
    assert "config.json" in broken("no config", lambda f: (f / "config.json").unlink())
    assert "config.json" in broken("bad config", lambda f: (f / "config.json").write_text("{"))
    assert "tokenizer.json" in broken("no tokenizer", lambda f: (f / "tokenizer.json").unlink())
    assert "model.safetensors" in broken("no weights", lambda f: (f / "model.safetensors").unlink())
    assert "there is no such folder" in run(infer, "x", "--model", tmp_path / "nowhere")[2]


def test_only_the_files_of_the_index_are_read(tmp_path):
    import safetensors.torch
    theirs = hugging_face("Llama", {}, tmp_path, max_shard_size="40KB")
    tokens = torch.randint(0, 97, (1, 9))
    same = lambda: close(train.load(tmp_path)[0](tokens).detach(), theirs(tokens).logits.detach(), 2e-5)
    safetensors.torch.save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "model.safetensors")
    same()                                                                   # a stray whole file beside the shards
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    whole = dict(theirs.state_dict())
    (tmp_path / shard).unlink()
    with pytest.raises(train.UserError):                                     # shards incomplete, the whole file too
        train.load(tmp_path)
    safetensors.torch.save_file({k: v.contiguous() for k, v in whole.items()}, tmp_path / "model.safetensors")
    same()                                                                   # a left-over index beside a complete file
    index["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(train.UserError, match="outside"):
        train.load(tmp_path)


def test_our_folder_loads_in_transformers(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained).eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ours, tokenizer = train.load(trained)
    tokens = torch.randint(0, tokenizer.vocab_size, (2, 60))
    with torch.no_grad():
        close(ours(tokens), theirs(tokens).logits, 2e-5)
    library = transformers.AutoTokenizer.from_pretrained(trained)
    text = "def main(argv=None):\n    return 'naïve – 字'\n"
    assert library(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert library.decode(tokenizer.encode(text)) == text
    assert [library.eos_token_id] == tokenizer.eos_ids
