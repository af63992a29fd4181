from test_all import *
os.environ["TRITON_INTERPRET"] = "1" if not GPU else "0"
import ssm as Sm
os.environ.pop("TRITON_INTERPRET", None)


# --- 3. ssm.py: S4D, the short convolution, Mamba's scan --------------------------------------------------------------

def test_hippo_and_discretization():
    A, B = Sm.hippo_legs(4)
    assert A[2, 1] == -math.sqrt(15) and A[3, 3] == -4 and A[0, 1] == 0 and B[2] == math.sqrt(5)
    for method, order in (("zoh", 1e-12), ("bilinear", 3e-3)):
        A_bar, B_bar = Sm.discretize(A, B, 0.02, method)
        values, vectors = np.linalg.eig(A)
        exact = (vectors * np.exp(0.02 * values)) @ np.linalg.inv(vectors)
        assert np.abs(A_bar - exact).max() < order
        assert np.abs(B_bar - np.linalg.solve(A, (exact - np.eye(4)) @ B)).max() < order
        a, b = Sm.discretize(np.diag(A)[None], B[None], np.array([0.02]), method)
        whole = Sm.discretize(np.diag(np.diag(A)), B, 0.02, method)
        assert np.allclose(a[0], np.diag(whole[0])) and np.allclose(b[0], whole[1])
    with pytest.raises(ValueError, match="method"):
        Sm.discretize(A, B, 0.1, "euler")


@pytest.mark.parametrize("T", [1, 2, 63, 64, 100])
def test_s4d_is_a_recurrence_a_convolution_and_a_scan(T):
    rng = np.random.default_rng(T)
    A, C = Sm.s4d_init(3, 8), rng.standard_normal((3, 8)) + 1j * rng.standard_normal((3, 8))
    x, dt = rng.standard_normal((T, 3)), np.array([1e-3, 0.03, 0.4])
    y, h = Sm.s4d_recurrence_numpy(x, A, np.ones((3, 8)), C, dt)
    for view in (Sm.s4d_convolution_numpy, Sm.s4d_scan_numpy):
        assert np.abs(view(x, A, np.ones((3, 8)), C, dt) - y).max() < 1e-11
    first, mid = Sm.s4d_recurrence_numpy(x[:T // 2], A, np.ones((3, 8)), C, dt)
    second, end = Sm.s4d_recurrence_numpy(x[T // 2:], A, np.ones((3, 8)), C, dt, mid)
    assert np.allclose(np.concatenate([first, second]), y) and np.allclose(end, h)


def inputs_of(op, seed, T, packed, dtype=np.float64, low=1e-3, high=2.0):
    """Random arguments of the convolution or of the scan: a batch, or a pack with an empty sequence in it."""
    rng = np.random.default_rng(seed)
    C, K, N = int(rng.integers(1, 70)), int(rng.integers(2, 6)), int(rng.integers(1, 20))
    cu = None
    if packed:
        cuts = np.sort(rng.integers(0, T + 1, 4))
        cu = np.array([0, *cuts, cuts[-1]], dtype=np.int32)                  # the last sequence is empty
    B = 1 if packed else int(rng.integers(1, 4))
    S = B if cu is None else len(cu) - 1
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    if op == "causal_conv1d":
        return (normal(B, T, C), normal(C, K), normal(C), normal(S, C, K - 1)), cu
    dt = np.exp(rng.uniform(np.log(low), np.log(high), (B, T, C))).astype(dtype)
    A = -np.exp(rng.uniform(-1, 2, (C, N))).astype(dtype)
    return (normal(B, T, C), dt, A, normal(B, T, N), normal(B, T, N), normal(C), normal(S, C, N)), cu


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"])
@pytest.mark.parametrize("packed", [False, True])
def test_backward_of_the_definitions_is_their_slope(op, packed):
    f, back = getattr(Sm, op + "_numpy"), getattr(Sm, op + "_backward_numpy")
    args, cu = inputs_of(op, 5, 9, packed)
    rng = np.random.default_rng(1)
    dys = [rng.standard_normal(o.shape) for o in f(*args, cu_seqlens=cu)]
    grads = back(*args, cu_seqlens=cu, grad=tuple(dys))
    assert len(grads) == len(args)
    for i, g in enumerate(grads):
        bump = 1e-6 * rng.standard_normal(args[i].shape)
        up, down = (f(*args[:i], args[i] + s * bump, *args[i + 1:], cu_seqlens=cu) for s in (1, -1))
        slope = sum(((a - b) * d).sum() for a, b, d in zip(up, down, dys)) / 2
        assert abs(slope - (g * bump).sum()) <= 1e-7 * max(1e-6, np.abs(g * bump).sum()), i


def against_the_definition(op, args, cu, tolerance, cast=torch.float32):
    """The op in `cast`, outputs and gradients, against NumPy in float64 of the same numbers."""
    tensors = [torch.tensor(a).to(cast) for a in args]
    exact = [t.double().numpy() for t in tensors]
    f, back = getattr(Sm, op + "_numpy"), getattr(Sm, op + "_backward_numpy")
    outputs, grads = gradients(lambda *a: getattr(Sm, op)(*a[:-1], state=a[-1], cu_seqlens=None if cu is None else
                                                          torch.tensor(cu)), *tensors)
    wanted = f(*exact, cu_seqlens=cu)
    dys = tuple(randn(*o.shape, seed=9 + i).to(o.dtype).double().numpy() for i, o in enumerate(outputs))
    for a, b in zip(outputs + grads, [*wanted, *back(*exact, cu_seqlens=cu, grad=dys)]):
        assert a.isfinite().all()
        close(a, b, tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 2, 31, 33, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"])
def test_the_ops_of_mamba_are_their_definitions(op, T, packed):
    args, cu = inputs_of(op, T, T, packed)
    against_the_definition(op, args, cu, 1e-5)
    against_the_definition(op, args, cu, 1e-11, torch.float64)


@pytest.mark.parametrize("T, packed", [(1, False), (3, True), (21, False), (38, True), (70, False)])
@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"])
def test_the_kernels_of_mamba_are_the_definitions(op, T, packed):
    args, cu = inputs_of(op, T + 100, T, packed)
    with kernels():
        against_the_definition(op, args, cu, 1e-5)


@pytest.mark.parametrize("low, high", [(1e-8, 1e-6), (1e-6, 1e2), (10, 100)])
def test_decays_near_one_and_near_nothing(low, high):
    args, cu = inputs_of("selective_scan", 3, 150, False, low=low, high=high)
    against_the_definition("selective_scan", args, cu, 1e-5)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_scans_of_half_precision_are_summed_in_single(cast):
    args, _ = inputs_of("selective_scan", 3, 60, False)
    half = [torch.tensor(a).to(cast) for a in args[:-1]]
    y, state = Sm.selective_scan(*half)
    wanted, end = Sm.selective_scan_numpy(*(t.double().numpy() for t in half))
    assert y.dtype == cast and state.dtype == torch.float32
    close(state, end, 1e-5)
    close(y.float(), wanted, 2e-3 if cast == torch.float16 else 1.6e-2)


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"])
def test_in_pieces_and_in_steps_it_is_the_whole(op):
    args, _ = inputs_of(op, 8, 40, False)
    *given, state = (torch.tensor(a).float() for a in args)
    by_token = (0,) if op == "causal_conv1d" else (0, 1, 3, 4)
    y, end = getattr(Sm, op)(*given, state=state)
    for cuts in ((40,), (1,) * 40, (3, 20, 1, 16)):
        h, at, parts = state, 0, []
        for n in cuts:
            own = [a[:, at:at + n] if i in by_token else a for i, a in enumerate(given)]
            if n == 1:
                own = [a[:, 0] if i in by_token else a for i, a in enumerate(own)]
                out, h = getattr(Sm, op + "_step")(*own, state=h)
                out = out[:, None]
            else:
                out, h = getattr(Sm, op)(*own, state=h)
            parts.append(out)
            at += n
        close(torch.cat(parts, 1), y, 1e-5)
        close(h, end, 1e-5)
    if op == "selective_scan":
        a, b = Sm.selective_scan_associative_numpy(*args[:-1], state=args[-1])
        close(a, Sm.selective_scan_numpy(*args)[0], 1e-11)
        close(b, Sm.selective_scan_numpy(*args)[1], 1e-11)


@pytest.mark.parametrize("way", ["torch", "kernel"])
@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"])
def test_mamba_takes_tensors_as_they_lie(op, way):
    """Every argument a slice or transposed: the same numbers as of its copy."""
    args, _ = inputs_of(op, 8, 11, False)
    whole = [torch.tensor(a).float() for a in args]
    lying = [torch.stack([a, a + 1], -1)[..., 0] if a.ndim == 1 else a.mT.contiguous().mT for a in whole]
    with kernels() if way == "kernel" else contextlib.nullcontext():
        want, got = (gradients(lambda *a: getattr(Sm, op)(*a[:-1], state=a[-1]), *given) for given in (whole, lying))
    for a, b in zip(want[0] + want[1], got[0] + got[1]):
        close(b, a.detach(), 1e-6)


@pytest.mark.parametrize("way", ["torch", "kernel"])
@pytest.mark.parametrize("cu", [(0,), (0, 0), (0, 0, 0), (0, 0, 4, 4, 6)])
@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan"])
def test_packs_with_no_token_hand_their_states_on(op, cu, way):
    args, _ = inputs_of(op, 4, 9, True)
    n, K1 = len(cu) - 1, args[-1].shape[-1]
    *given, _ = (torch.tensor(a).float().requires_grad_() for a in args)
    state = randn(n, args[-1].shape[1], K1, seed=3).float().requires_grad_()
    with kernels() if way == "kernel" else contextlib.nullcontext():
        y, end = getattr(Sm, op)(*given, state=state, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
        dx, dstate = torch.autograd.grad(y.sum() + (2 * end).sum(), (given[0], state), allow_unused=True)
    assert y.shape == given[0].shape and not y[:, cu[-1]:].any() and (dx is None or not dx[:, cu[-1]:].any())
    for i in range(n):
        if cu[i] == cu[i + 1]:
            assert torch.equal(end[i], state[i]) and (dstate[i] == 2).all()


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["torch", "kernel", "step"])
def test_half_precision_beside_single_weights_is_summed_in_single(way, cast):
    args, _ = inputs_of("causal_conv1d", 3, 20, False)
    x, w, bias, state = (torch.tensor(a).to(d) for a, d in zip(args, (cast, torch.float32, torch.float32, cast)))
    wanted, end = Sm.causal_conv1d_numpy(*(a.double().numpy() for a in (x, w, bias, state)))
    if way == "step":
        y, after = Sm.causal_conv1d_step(x[:, 0], w, bias, state)
        wanted, end = wanted[:, 0], np.concatenate([state.double().numpy(), x[:, :1].double().numpy().swapaxes(1, 2)],
                                                   2)[:, :, 1:]
    else:
        with kernels() if way == "kernel" else contextlib.nullcontext():
            y, after = Sm.causal_conv1d(x.requires_grad_(), w.requires_grad_(), bias, state.requires_grad_())
            (y.float().sum() + after.float().sum()).backward()
        assert all(a.grad.isfinite().all() and a.grad.dtype == a.dtype for a in (x, w, state))
    assert y.dtype == cast == after.dtype and np.array_equal(after.detach().double().numpy(), end)
    error = np.abs(y.detach().double().numpy() - wanted)
    assert (error <= torch.finfo(cast).eps * np.abs(wanted) + 1e-6).all()   # one rounding: nothing was summed in half


def test_what_does_not_fit_mamba_is_refused_by_name():
    (x, dt, A, B, C, D, state), _ = inputs_of("selective_scan", 1, 7, False)
    x, dt, A, B, C, D, state = map(torch.tensor, (x, dt, A, B, C, D, state))
    given = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, state=state)
    for change in (dict(A=-A), dict(dt=-dt), dict(state=state.repeat(1, 1, 2)), dict(B=B[:, :-1]), dict(D=D.repeat(2)),
                   dict(x=x[0])):
        with pytest.raises(ValueError, match=f"selective_scan: .*{next(iter(change))}"):
            Sm.selective_scan(**given | change)
    with pytest.raises(ValueError, match="selective_scan: .*cu_seqlens"):
        Sm.selective_scan(x[:1], dt[:1], A, B[:1], C[:1], cu_seqlens=torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match="causal_conv1d: state"):
        Sm.causal_conv1d(torch.zeros(2, 3, 4), torch.zeros(4, 4), state=torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="causal_conv1d: x"):
        Sm.causal_conv1d(torch.zeros(2, 3, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="causal_conv1d_step: x .*, w"):
        Sm.causal_conv1d_step(torch.zeros(2, 4), torch.zeros(1, 4), state=torch.zeros(2, 4, 3))


def test_the_probes_tasks_ask_what_they_say():
    rng = np.random.default_rng(0)
    tokens, targets = Sm.recall(rng, 3, 32, 8)
    for row, wanted in zip(tokens, targets):
        pairs = dict(zip(row[0:16:2], row[1:16:2]))
        asked = np.flatnonzero(wanted >= 0)
        assert len(pairs) == 8 == len(asked)
        assert all(wanted[i] == pairs[row[i]] and row[i + 1] == wanted[i] for i in asked)
    tokens, targets = Sm.selective_copying(rng, 2, 40, 5)
    for row, wanted in zip(tokens, targets):
        assert row[:35][row[:35] > 0].tolist() == wanted[35:].tolist() and (wanted[:35] < 0).all()
    tokens, targets = Sm.induction(rng, 2, 30, 0)
    for row, wanted in zip(tokens, targets):
        assert row[-1] == 17 and row[np.flatnonzero(row == 17)[0] + 1] == wanted[-1] and (wanted[:-1] < 0).all()
    tokens, targets = Sm.parity(rng, 2, 9, 0)
    assert (targets == np.cumsum(tokens == 2, 1) % 2).all()


def test_the_probe_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(Sm, "TASKS", {k: Sm.TASKS[k] for k in ("recall, 4 pairs", "parity")})
    code, out, _ = run(Sm, "--probe", "--minutes", 0.001, "--out", tmp_path)
    assert code == 0 and (tmp_path / "probe.png").exists()
    assert len((tmp_path / "probe.jsonl").read_text().splitlines()) == 8
    monkeypatch.setattr(Sm, "train_probe", None)                             # all is known by now
    assert run(Sm, "--probe", "--minutes", 0.001, "--out", tmp_path)[1] == out
    code, _, err = run(Sm, "--probe", "--minutes", -1)
    assert code == 2 and "--minutes" in err
