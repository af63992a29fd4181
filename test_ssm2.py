from test_all import *

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
import ssm as Sm
os.environ.pop("TRITON_INTERPRET", None)


# --- 3. ssm.py: SSD and the gated delta rule, each in its forms, forward and backward ---------------------------------

OPS += [(Sm, "ssd"), (Sm, "ssd_step"), (Sm, "gated_delta"), (Sm, "gated_delta_step")]
SSD = dict(op="ssd", twin=Sm.ssd_numpy, backward=Sm.ssd_backward_numpy)
DELTA = dict(op="gated_delta", twin=Sm.gated_delta_numpy, backward=Sm.gated_delta_backward_numpy)


def decays_from(seed, *shape):
    """Logarithms of decays between 1 − 1e-6 and 1e-8, as many of one size as of another."""
    return -torch.exp(torch.empty(shape, dtype=torch.float64).uniform_(math.log(1e-6), math.log(math.log(1e8)),
                                                                       generator=torch.Generator().manual_seed(seed)))


def ssd_inputs(B, T, H, P, G, N, n=None, extreme=False):
    """x, dt, A, B, C, D, state; extreme: decays over all that a float knows."""
    dt, A = randn(B, T, H, seed=1).abs() + 0.01, -randn(H, seed=2).abs() - 0.01
    if extreme:
        A = -torch.logspace(-6, math.log10(math.log(1e8)), H, dtype=torch.float64)
        dt = torch.exp(randn(B, T, H, seed=1) / 2)
    return [randn(B, T, H, P), dt, A, randn(B, T, G, N, seed=3), randn(B, T, G, N, seed=4), randn(H, seed=5),
            randn(B if n is None else n, H, P, N, seed=6)]


def delta_inputs(B, T, H, K, V, n=None, extreme=False, repeated=False):
    """q, k, v, decay, beta, state; repeated: the same key at each step."""
    k = F.normalize(randn(B, T, H, K, seed=1), dim=-1)
    if repeated:
        k = k[:, :1].expand_as(k)
    decay = decays_from(3, B, T, H) if extreme else -randn(B, T, H, seed=3).abs()
    return [randn(B, T, H, K), k, randn(B, T, H, V, seed=2), decay, torch.sigmoid(3 * randn(B, T, H, seed=4)),
            randn(B if n is None else n, H, K, V, seed=5)]


def is_its_definition(case, tensors, dtype=torch.float32, tolerance=None, cu=None, **options):
    """y, the last state and all gradients of an op against its twin in float64 on the same numbers; each off by a part
    of the largest value of its own. The state is never less than float32.
    """
    cu = {} if cu is None else dict(cu_seqlens=cu)
    exact = torch.promote_types(dtype, torch.float32)
    tensors = [t.to(dtype) for t in tensors[:-1]] + [tensors[-1].to(exact)]
    arrays = [t.double().numpy() for t in tensors]
    outputs, grads = gradients(lambda *t: getattr(Sm, case["op"])(*t[:-1], state=t[-1], **cu, **options), *tensors)
    assert outputs[0].dtype == dtype and outputs[1].dtype == exact
    numpy_cu = {name: c.tolist() for name, c in cu.items()}
    wanted = case["twin"](*arrays[:-1], state=arrays[-1], **numpy_cu)
    given = tuple(randn(*o.shape, seed=9 + i).to(o.dtype).double().numpy() for i, o in enumerate(outputs))
    wanted += case["backward"](*arrays[:-1], state=arrays[-1], **numpy_cu, grad=given)
    tolerance = tolerance or {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 4e-3}[dtype]
    for i, (got, want) in enumerate(zip((*outputs, *grads), wanted, strict=True)):
        want = torch.as_tensor(want)
        got = torch.zeros_like(want, dtype=exact) if got is None else got    # there was nothing to learn from
        assert got.shape == want.shape and bool(torch.isfinite(got).all())
        if got.numel():
            error = (got.double() - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
            assert error <= tolerance, f"number {i} is off by {error:.1e}"


# The forms agree.

@pytest.mark.parametrize("B,T,H,P,G,N", [(1, 1, 1, 1, 1, 1), (2, 7, 4, 3, 2, 5), (1, 33, 6, 4, 3, 2)])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_all_forms_of_ssd_agree(B, T, H, P, G, N, chunk):
    *tensors, state = (t.numpy() for t in ssd_inputs(B, T, H, P, G, N))
    for D in (None, tensors[5]):
        y, h = Sm.ssd_numpy(*tensors[:5], D, state=state)
        for a, b in zip(Sm.ssd_chunked_numpy(*tensors[:5], D, chunk=chunk, state=state), (y, h)):
            close(a, b, 1e-12)
        close(Sm.ssd_mask_numpy(*tensors[:5], D), Sm.ssd_numpy(*tensors[:5], D)[0], 1e-12)
        has_slope(lambda *t: Sm.ssd_numpy(*t[:5], D if D is None else t[5], state=t[-1]),
                  lambda *t, grad: Sm.ssd_backward_numpy(*t[:5], D if D is None else t[5], state=t[-1], chunk=chunk,
                                                         grad=grad), *tensors[:5], *([] if D is None else [D]), state)


@pytest.mark.parametrize("B,T,H,K,V", [(1, 1, 1, 1, 1), (2, 7, 2, 3, 5), (1, 33, 2, 4, 2), (1, 16, 1, 2, 3)])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_both_forms_of_the_delta_rule_agree(B, T, H, K, V, chunk):
    arrays = [t.numpy() for t in delta_inputs(B, T, H, K, V)]
    for a, b in zip(Sm.gated_delta_chunked_numpy(*arrays, chunk=chunk), Sm.gated_delta_numpy(*arrays)):
        close(a, b, 1e-12)
    has_slope(Sm.gated_delta_numpy, lambda *t, grad: Sm.gated_delta_backward_numpy(*t, chunk=chunk, grad=grad), *arrays)


def test_without_erase_the_delta_rule_is_ssd():
    """β k (v − what stands there) with keys that never stood there before: plain addition."""
    T = 6
    q, _, v, decay, _, _ = delta_inputs(1, T, 1, T, 3)
    k = torch.eye(T, dtype=torch.float64)[None, :, None]
    y, state = Sm.gated_delta(q, k, v, decay, torch.ones(1, T, 1).double())
    z, h = Sm.ssd(v, torch.ones(1, T, 1).double(), torch.zeros(1).double(), k, q)
    y0, state0 = Sm.gated_delta(q, k, v, decay * 0, torch.ones(1, T, 1).double())
    close(y0, z, 1e-12), close(state0, h.mT, 1e-12)


def test_the_delta_rule_overwrites():
    """α = β = 1: at a key stands what was written there last."""
    keys = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 1]][None, :, None]
    v = randn(1, 5, 1, 4)
    one = torch.ones(1, 5, 1).double()
    _, state = Sm.gated_delta(keys, keys, v, one * 0, one)
    close(state[0, 0], v[0, [2, 4, 3], 0], 1e-12)


@pytest.mark.parametrize("l", [1, 2, 3, 7, 16, 33, 64])
def test_unit_lower_inverse(l):
    """Keys that all are alike, too: there the Neumann series has terms of 10¹⁸."""
    for lower in (np.tril(array(2, l, l), -1) / 4, np.tril(np.ones((2, l, l)), -1)):
        for inverse in (Sm.unit_lower_inverse(lower), Sm.unit_lower_inverse(torch.tensor(lower)).numpy()):
            close(inverse @ (np.eye(l) + lower), np.stack([np.eye(l)] * 2), 1e-10)


# The ops are their definitions.

@pytest.fixture
def small_chunks(path, monkeypatch):
    """Several chunks in few tokens."""
    monkeypatch.setattr(Sm, "CHUNK", 16)
    return path


SIZES = [(2, 37, 4, 9, 2, 6), (1, 1, 2, 16, 1, 20), (1, 70, 2, 5, 1, 3), (1, 32, 3, 33, 3, 17)]
PACK = [[5, 0, 1, 18, 16, 1, 1], [1, 1, 1], [0, 0], [33]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ssd_is_its_definition(sizes, dtype, small_chunks):
    is_its_definition(SSD, ssd_inputs(*sizes), dtype, chunk=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 37, 2, 9, 7), (1, 1, 1, 16, 20), (1, 70, 1, 3, 5), (1, 32, 2, 17, 33)], ids=str)
def test_gated_delta_is_its_definition(sizes, dtype, small_chunks):
    is_its_definition(DELTA, delta_inputs(*sizes), dtype)


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("lengths", PACK, ids=str)
def test_packs_of_state_spaces_are_their_sequences(lengths, spare, small_chunks):
    """Empty ones, whose state passes through, and single tokens among others; rows past the last offset."""
    T, n, cu = sum(lengths) + spare, len(lengths), packed(lengths)
    if T:
        is_its_definition(SSD, ssd_inputs(1, T, 2, 5, 1, 3, n=n), cu=cu, chunk=16)
        is_its_definition(DELTA, delta_inputs(1, T, 2, 5, 3, n=n), cu=cu)
    state = randn(n, 2, 5, 3)
    for op, inputs, sizes in (Sm.ssd, ssd_inputs, (5, 1, 3)), (Sm.gated_delta, delta_inputs, (5, 3)):
        tensors = inputs(1, T, 2, *sizes, n=n)
        _, end = op(*[t.float() for t in tensors[:-1]], state=state.float(), cu_seqlens=cu)
        for i, length in enumerate(lengths):
            assert length or torch.equal(end[i], state[i].float())


def test_rows_past_the_last_offset_of_a_state_space_may_hold_anything(small_chunks):
    cu = packed([4, 3])
    for op, inputs, sizes in (Sm.ssd, ssd_inputs, (5, 1, 3)), (Sm.gated_delta, delta_inputs, (5, 3)):
        tensors = [t.float() for t in inputs(1, 9, 2, *sizes, n=2)]
        for t in tensors:
            if t.shape[:2] == (1, 9):
                t[:, 7:] = torch.nan if t.ndim == 4 else 0
        (y, state), grads = gradients(lambda *t: op(*t[:-1], state=t[-1], cu_seqlens=cu), *tensors)
        assert bool((y[:, 7:] == 0).all()) and bool(torch.isfinite(state).all())
        for t, g in zip(tensors, grads):
            assert bool(torch.isfinite(g).all()) and (t.shape[:2] != (1, 9) or bool((g[:, 7:] == 0).all()))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 257])
def test_decays_from_nearly_one_to_nearly_zero(T):
    """Each gradient to 1e-5 of float64's, step by step, where some heads remember everything and some nothing."""
    is_its_definition(SSD, ssd_inputs(2, T, 6, 8, 2, 16, extreme=True), tolerance=1e-5)
    is_its_definition(DELTA, delta_inputs(2, T, 3, 16, 8, extreme=True), tolerance=1e-5)
    is_its_definition(DELTA, delta_inputs(2, T, 3, 16, 8, extreme=True, repeated=True), tolerance=1e-5)


def test_decays_from_nearly_one_to_nearly_zero_in_the_kernels(monkeypatch):
    monkeypatch.setattr(Sm, "CHUNK", 16)
    with kernels():
        is_its_definition(SSD, ssd_inputs(1, 40, 3, 5, 1, 6, extreme=True), tolerance=1e-5, chunk=16)
        is_its_definition(DELTA, delta_inputs(1, 40, 2, 6, 5, extreme=True), tolerance=1e-5)
        is_its_definition(DELTA, delta_inputs(1, 40, 2, 6, 5, extreme=True, repeated=True), tolerance=1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e8, 1e30])
def test_a_very_large_A_forgets_and_stays_finite(scale, small_chunks):
    """Running sums far below −1e7 in float32, beside heads that forget little: no difference of them, no NaN."""
    tensors = ssd_inputs(1, 40, 4, 3, 2, 5)
    tensors[2] = torch.tensor([-scale, -1e-6, -scale, -0.1], dtype=torch.float64)
    tensors[1][:, ::3] *= 1e-4
    is_its_definition(SSD, tensors, tolerance=1e-5, chunk=16)


@pytest.mark.parametrize("pieces", [[1] * 6, [3, 0, 2, 1], [5, 1]])
def test_pieces_of_a_text_are_the_whole(pieces, small_chunks):
    """With the state handed on; and steps of one token are pieces of one token."""
    for op, step, fixed, tensors in ((Sm.ssd, Sm.ssd_step, (2, 5), ssd_inputs(2, 6, 4, 3, 2, 5)),
                                     (Sm.gated_delta, Sm.gated_delta_step, (), delta_inputs(2, 6, 2, 3, 5))):
        *tensors, state = (t.float() for t in tensors)
        cut = lambda t0, t1: [t if i in fixed else t[:, t0:t1] for i, t in enumerate(tensors)]
        y, end = op(*tensors, state=state)
        at, ys, other, ones = 0, [], state, []
        for piece in pieces:
            part, other = op(*cut(at, at + piece), state=other)
            ys.append(part)
            at += piece
        close(torch.cat(ys, 1), y, 2e-6), close(other, end, 2e-6)
        for t in range(6):
            part, state = step(*(t_ if i in fixed else t_[:, 0] for i, t_ in enumerate(cut(t, t + 1))), state=state)
            ones.append(part)
        close(torch.stack(ones, 1), y, 2e-6), close(state, end, 2e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_change_only_rounding(chunk):
    *tensors, state = ssd_inputs(1, 150, 2, 4, 1, 5)
    want = gradients(lambda *t: Sm.ssd(*t[:-1], state=t[-1]), *tensors, state)
    got = gradients(lambda *t: Sm.ssd(*t[:-1], state=t[-1], chunk=chunk), *tensors, state)
    for a, b in zip(sum(got, []), sum(want, [])):
        close(a, b, 1e-12)


def test_gradients_of_state_spaces_in_float64_are_slopes():
    tensors = [t.requires_grad_() for t in ssd_inputs(1, 9, 2, 2, 1, 2, n=4)]
    cu = packed([4, 0, 1, 3])
    assert torch.autograd.gradcheck(lambda *t: Sm.ssd(*t[:-1], state=t[-1], chunk=3, cu_seqlens=cu), tensors)
    tensors = [t.requires_grad_() for t in delta_inputs(1, 9, 2, 2, 2, n=4)]
    assert torch.autograd.gradcheck(lambda *t: Sm.gated_delta(*t[:-1], state=t[-1], cu_seqlens=cu), tensors)


def test_no_tokens_leave_the_state(path):
    for op, tensors in ((Sm.ssd, ssd_inputs(2, 0, 2, 3, 1, 4)), (Sm.gated_delta, delta_inputs(2, 0, 2, 3, 4))):
        tensors = [t.float() for t in tensors]
        (y, state), grads = gradients(lambda *t: op(*t[:-1], state=t[-1]), *tensors)
        assert y.shape[1] == 0 and torch.equal(state, tensors[-1])
        close(grads[-1], randn(*state.shape, seed=10).float(), 0)


def test_state_spaces_take_tensors_as_they_lie_and_keep_the_bits(small_chunks):
    for op, tensors in ((Sm.ssd, ssd_inputs(2, 20, 2, 3, 1, 4)), (Sm.gated_delta, delta_inputs(2, 20, 2, 3, 4))):
        plain = [t.float() for t in tensors]
        turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t for t in plain]
        call = lambda *t: op(*t[:-1], state=t[-1])
        for a, b in zip(sum(gradients(call, *plain), []), sum(gradients(call, *plain), [])):
            assert torch.equal(a, b)
        for a, b in zip(sum(gradients(call, *plain), []), sum(gradients(call, *turned), [])):
            close(a, b, 2e-6)
        y, state = call(*[t.requires_grad_() for t in plain])
        y.sum().backward()                                                   # one number, expanded; the state's is none
        assert all(bool(torch.isfinite(t.grad).all()) for t in plain)


def bad_ssd(op="ssd", **changes):
    tensors = dict(zip(("x", "dt", "A", "B", "C", "D", "state"), (t.float() for t in ssd_inputs(2, 5, 4, 3, 2, 6))))
    if op == "ssd_step":
        tensors = {n: t[:, 0] if n in ("x", "dt", "B", "C") else t for n, t in tensors.items()}
    return getattr(Sm, op)(**tensors | changes)


def bad_delta(op="gated_delta", **changes):
    tensors = dict(zip(("q", "k", "v", "decay", "beta", "state"), (t.float() for t in delta_inputs(2, 5, 4, 3, 6))))
    if op == "gated_delta_step":
        tensors = {n: t if n == "state" else t[:, 0] for n, t in tensors.items()}
    return getattr(Sm, op)(**tensors | changes)


@pytest.mark.parametrize("call,words", [
    (lambda: bad_ssd(x=torch.ones(2, 5, 4)), r"x \(2, 5, 4\)"),
    (lambda: bad_ssd(x=torch.ones(2, 5, 4, 3).int()), "x .*floating"),
    (lambda: bad_ssd(dt=torch.ones(2, 5)), r"dt \(2, 5\)"),
    (lambda: bad_ssd(A=-torch.ones(3)), r"A \(3,\).*4"),
    (lambda: bad_ssd(A=torch.tensor([-1., -1, 2, -1])), "A must not be above 0.*2"),
    (lambda: bad_ssd(D=torch.ones(2)), r"D \(2,\)"),
    (lambda: bad_ssd(B=torch.ones(2, 5, 2, 7)), r"B \(2, 5, 2, 7\) and C \(2, 5, 2, 6\)"),
    (lambda: bad_ssd(B=torch.ones(2, 5, 3, 6), C=torch.ones(2, 5, 3, 6)), r"G a divisor of the 4"),
    (lambda: bad_ssd(state=torch.ones(2, 4, 3, 8)), r"state \(2, 4, 3, 8\).*\(2, 4, 3, 6\).*another layer"),
    (lambda: bad_ssd(chunk=0), "chunk"),
    (lambda: bad_ssd(cu_seqlens=packed([5])), "cu_seqlens.*batch must be 1"),
    (lambda: bad_ssd("ssd_step", state=None), "state"),
    (lambda: bad_ssd("ssd_step", state=torch.ones(2, 4, 3, 7)), r"state \(2, 4, 3, 7\).*\(2, 4, 3, 6\)"),
    (lambda: bad_ssd("ssd_step", A=torch.ones(4)), "A must not be above 0"),
    (lambda: bad_delta(k=torch.ones(2, 5, 4, 7)), r"q \(2, 5, 4, 3\) and k \(2, 5, 4, 7\)"),
    (lambda: bad_delta(v=torch.ones(2, 5, 3, 6)), r"v \(2, 5, 3, 6\)"),
    (lambda: bad_delta(v=torch.ones(2, 5, 4, 6).double()), "v .*floating dtype"),
    (lambda: bad_delta(beta=torch.ones(2, 5)), r"beta \(2, 5\)"),
    (lambda: bad_delta(decay=torch.ones(2, 5, 4) / 4), "decay.*above 0.*0.25"),
    (lambda: bad_delta(state=torch.ones(2, 4, 6, 3)), r"state \(2, 4, 6, 3\).*\(2, 4, 3, 6\)"),
    (lambda: bad_delta("gated_delta_step", state=None), "state"),
    (lambda: bad_delta("gated_delta_step", decay=torch.ones(2, 4)), "decay.*above 0")])
def test_wrong_arguments_of_state_spaces_are_named(call, words, path_of_cpu):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("cu", [[0, 3, 2, 5], [1, 5], [0, 6], [[0, 5]], [0.0, 5.0]])
def test_wrong_offsets_of_state_spaces_are_named(cu, path_of_cpu):
    cu = torch.tensor(cu)
    for op, tensors in ((Sm.ssd, ssd_inputs(1, 5, 2, 3, 1, 4)), (Sm.gated_delta, delta_inputs(1, 5, 2, 3, 4))):
        with pytest.raises(ValueError, match="cu_seqlens"):
            op(*tensors[:-1], cu_seqlens=cu)


@settings(FAST, max_examples=12)
@given(st.data())
def test_state_space_kernels_at_random_shapes(data):
    whole = lambda lo, hi: data.draw(st.integers(lo, hi))
    G, T, P, N = whole(1, 2), whole(1, 40), whole(1, 20), whole(1, 20)
    H, dtype = G * whole(1, 2), data.draw(st.sampled_from([torch.float32, torch.float16]))
    cu = data.draw(st.lists(st.integers(0, T), max_size=3).map(sorted))
    cu, n = (None, None) if not cu else (torch.tensor([0, *cu], dtype=torch.int32), len(cu))
    with kernels(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sm, "CHUNK", 16)
        is_its_definition(SSD, ssd_inputs(1, T, H, P, G, N, n=n), dtype, cu=cu, chunk=16)
        is_its_definition(DELTA, delta_inputs(1, T, H, N, P, n=n), dtype, cu=cu)


AHEAD_SSM = """
import ssm as Sm
def launch(target):
    Sm.on_kernel = A.on_kernel
    t = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    f = lambda *shape: torch.zeros(shape, requires_grad=True)
    sum(y.sum() for y in Sm.causal_conv1d(t(1, 40, 128), t(128, 4), t(128), t(1, 128, 3))).backward()
    sum(y.sum() for y in Sm.selective_scan(t(1, 40, 128), f(1, 40, 128), f(128, 16) - 1, *[t(1, 40, 16)] * 2, f(128),
                                           f(1, 128, 16))).backward()
    sum(y.sum() for y in Sm.ssd(t(1, 128, 2, 128), f(1, 128, 2), f(2), *[t(1, 128, 2, 128)] * 2, f(2))).backward()
    sum(y.sum() for y in Sm.gated_delta(*[t(1, 128, 2, 128)] * 3, *[f(1, 128, 2)] * 2)).backward()
    with torch.no_grad():
        Sm.ssd_step(t(2, 4, 64), f(2, 4), f(4), *[t(2, 1, 128)] * 2, f(4), f(2, 4, 64, 128))
        Sm.gated_delta_step(*[t(2, 4, 128)] * 3, *[f(2, 4)] * 2, f(2, 4, 128, 128))
"""


def test_state_space_kernels_compile_ahead_fit_and_use_the_matrix_units(tmp_path):
    """No vector register in memory at head size and state 128."""
    helpers = {"_spot", "_slots", "_load", "_store", "_steps", "_decays", "_within", "_dot", "_from_here_on",
               "_segments", "_unit_lower_inverse", "_conv_in", "_conv_sum"}
    room = {"80": 163, "90": 227, "100": 227, "gfx942": 64, "gfx950": 160}
    for chip, made in ahead(AHEAD_SSM, Sm, helpers, tmp_path).items():
        for kernel in made:
            assert kernel["memory"] == 0 and kernel["shared"] <= room[chip] * 1024, (chip, kernel)
            alone = kernel["name"].endswith("_step") or kernel["name"].startswith(("_causal", "_selective"))
            assert kernel["matrix"] or alone, (chip, kernel)
