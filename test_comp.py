from test_all import *


# --- infer.py: fewer bits a weight ------------------------------------------------------------------------------------

def correlated(rng, N, I):
    """Inputs as layers see them: channels of very different size that know of each other."""
    return rng.standard_normal((N, I // 2 + 1)) @ rng.standard_normal((I // 2 + 1, I)) * np.exp(rng.standard_normal(I))


def cost(E, H):
    return ((E @ H) * E).sum()


def int4_of(values, I):
    return infer.int4_weights(*values, I)


@pytest.mark.parametrize("O, I, group", [(1, 1, 2), (5, 7, 4), (33, 288, 256), (16, 130, 64), (3, 64, 64), (4, 10, 6)])
def test_int4_is_within_half_a_step_where_nothing_is_clipped(O, I, group):
    rng = np.random.default_rng(O * I)
    w = rng.standard_normal((O, I))
    w[0, 0], w[-1] = 1e4, 0                                                  # an outlier, an all-zero row
    q, scale, zero = infer.int4_numpy(w, group)
    assert q.shape == (O, -(-I // group), group) and q.min() >= 0 and q.max() <= 15 and (q == np.rint(q)).all()
    assert np.isfinite(scale).all() and (scale >= 0).all()
    for x in (scale, zero):                                                  # no more digits than are stored
        assert torch.equal(torch.from_numpy(x), torch.from_numpy(x).bfloat16().double())
    got = int4_of((q, scale, zero), I)
    assert got.shape == w.shape and not got[-1].any()
    g = infer.grouped(w, group)
    plain = np.abs(g.max(-1) - g.min(-1)) / 15                               # minmax: what a smaller range must beat
    mid = (g.max(-1) + g.min(-1)) / 2 + plain / 2
    q0 = np.clip(np.rint((g - mid[..., None]) / np.where(plain, plain, 1)[..., None]) + 8, 0, 15)
    rtn = ((infer.int4_value(q0, plain[..., None], mid[..., None]) - g) ** 2).sum()
    best = ((infer.int4_value(q, scale[..., None], zero[..., None]) - g) ** 2).sum()
    assert best <= rtn * 1.05 + 1e-12 + (np.abs(g).max() * 2 ** -8) ** 2 * group
    torch_q = infer.int4_numpy(torch.from_numpy(w), group)                   # one text: the same numbers
    assert all(np.array_equal(a, b.numpy()) for a, b in zip((q, scale, zero), torch_q))


def gptq_by_definition(w, H, group, damping=0.01):
    """Optimal brain surgery, a column at a time: the inverse of what is left is made anew for each."""
    H = H + damping * np.diag(np.where(np.diag(H) > 0, np.diag(H), 1))
    scale, zero = infer.int4_grid(infer.grouped(w, group))
    left, w, got = list(np.argsort(-np.diag(H))), w.copy(), np.zeros_like(w)
    while left:
        i, g = left[0], left[0] // group
        got[:, i] = infer.int4_value(infer.int4_round(w[:, i], scale[:, g], zero[:, g]), scale[:, g], zero[:, g])
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        w[:, left] -= ((w[:, i] - got[:, i]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    return got


@pytest.mark.parametrize("O, I, group", [(5, 12, 4), (7, 100, 8), (3, 9, 16)])
def test_gptq_is_optimal_brain_surgery(O, I, group):
    rng = np.random.default_rng(I)
    w, x = rng.standard_normal((O, I)), rng.standard_normal((300, I)) @ rng.standard_normal((I, I))
    H = x.T @ x
    wanted = gptq_by_definition(w, H, group)
    close(int4_of(infer.gptq_numpy(w, H, group), I), wanted, 1e-9)
    close(int4_of(infer.gptq_numpy(torch.from_numpy(w), torch.from_numpy(H), group), I), wanted, 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_gptq_and_awq_cost_the_layer_less_than_rounding_to_nearest(seed):
    rng = np.random.default_rng(seed)
    O, I, group = 24, int(rng.integers(40, 150)), int(rng.choice([16, 32, 64]))
    w, x = rng.standard_normal((O, I)), correlated(rng, 400, I)
    x[:, 3] *= 1e4 if seed % 2 else 1                                        # a channel thousands of times larger
    x[:, 5] = 0                                                              # and a dead one
    H = x.T @ x
    nearest = cost(int4_of(infer.int4_numpy(w, group), I) - w, H)
    outlier = seed % 2                                                       # its own rounding is most of all there is:
    assert cost(int4_of(infer.gptq_numpy(w, H, group), I) - w, H) < (0.99 if outlier else 0.7) * nearest
    c = infer.awq_numpy(w, H, group)
    awq = int4_of(infer.int4_numpy(w * c, group), I) / c
    assert (c > 0).all() and np.isfinite(c).all() and cost(awq - w, H) <= (0.02 if outlier else 1) * nearest
    close(infer.awq_numpy(torch.from_numpy(w), torch.from_numpy(H), group).numpy(), c)


def test_a_singular_hessian_an_empty_one_and_one_that_is_not_finite():
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 40)), rng.standard_normal((2, 40))        # two tokens for forty channels
    assert np.isfinite(int4_of(infer.gptq_numpy(w, x.T @ x, 16), 40)).all()
    for empty in (np.zeros((40, 40)), torch.zeros(40, 40, dtype=torch.float64)):
        v = w if isinstance(empty, np.ndarray) else torch.from_numpy(w)
        assert infer.gptq_numpy(v, empty, 16) is None                        # nothing says more than the nearest
        assert (infer.awq_numpy(v, empty, 16) == 1).all()
        empty[0, 0] = math.inf
        assert infer.gptq_numpy(v, empty, 16) is None and (infer.awq_numpy(v, empty, 16) == 1).all()


@given(st.integers(0, 2 ** 31), st.sampled_from([0.0, 0.25, 0.5, 0.9, "2:4"]))
@FAST
def test_pruning_keeps_what_counts_most(seed, sparsity):
    rng = np.random.default_rng(seed)
    O, I = int(rng.integers(1, 6)), 4 * int(rng.integers(1, 9))
    w, norms = rng.standard_normal((O, I)), np.exp(rng.standard_normal(I))
    keep, score = infer.wanda_numpy(w, norms, sparsity), np.abs(w) * norms
    rows = (keep.reshape(-1, 4), score.reshape(-1, 4)) if sparsity == "2:4" else (keep, score)
    gone = 2 if sparsity == "2:4" else round(I * sparsity)
    for k, s in zip(*rows):
        assert (~k).sum() == gone and (not gone or gone == len(k) or s[~k].max() <= s[k].min())
    assert np.array_equal(infer.wanda_numpy(torch.from_numpy(w), torch.from_numpy(norms), sparsity).numpy(), keep)
    with pytest.raises(ValueError, match="in fours"):
        infer.wanda_numpy(w[:, :-1], norms[:-1], "2:4")


SHAPES = [(1, 7, 5, 4), (1, 130, 37, 64), (2, 288, 20, 256), (3, 64, 33, 32), (9, 66, 70, 64), (17, 40, 65, 6),
          (0, 8, 8, 4)]


@pytest.mark.parametrize("N, I, O, group", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantising_kernels_are_their_numpy_twins(N, I, O, group, dtype, kernels):
    rng = np.random.default_rng(N + I)
    w, x = rng.standard_normal((O, I)), rng.standard_normal((N, I))
    w[0, 0], w[-1] = 40.0, 0
    x = torch.from_numpy(x).to(dtype)
    exact = x.double().numpy()
    q, scale = infer.int8_numpy(w)
    bound = 2e-3 if dtype == torch.float16 else 1e-5                         # y, and in a product w, are rounded to x's
    got = infer.int8_linear(x, torch.from_numpy(q), torch.from_numpy(scale).float())
    close(got.double(), exact @ (q * scale[:, None]).T, bound)
    q, scale, zero = infer.int4_numpy(w, group)
    low = torch.from_numpy(q).to(torch.uint8)
    packed = low[..., :group // 2] | low[..., group // 2:] << 4
    sz = torch.from_numpy(np.stack([scale, zero], -1))
    got = infer.int4_linear(x, packed, sz.float(), group)
    close(got.double(), infer.int4_linear_numpy(exact, q, scale, zero), bound)
    with pytest.raises(ValueError, match="do not fit"):
        infer.int4_linear(x[:, :1], packed, sz[:, :, :1], group)
    with pytest.raises(ValueError, match="do not fit"):
        infer.int8_linear(x, torch.from_numpy(np.zeros((O, I + 1), np.int8)), torch.ones(O))


@pytest.fixture
def kernels(monkeypatch):
    if not A.triton:
        pytest.skip("Triton is not installed: the kernels run on Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


AHEAD_BITS = """
import infer
infer.on_kernel = lambda x: True
def launch(target):
    for N in (1, 8, 512):
        x = torch.zeros(N, 4096, dtype=torch.bfloat16)
        infer.int8_linear(x, torch.zeros(4096, 4096, dtype=torch.int8), torch.zeros(4096))
        steps = torch.zeros(4096, 64, 2, dtype=torch.bfloat16)
        infer.int4_linear(x, torch.zeros(4096, 64, 32, dtype=torch.uint8), steps, 64)
"""


def test_dequantising_kernels_compile_ahead_without_spills(tmp_path):
    for made in ahead(AHEAD_BITS, infer, set(), tmp_path).values():
        for kernel in made:
            assert kernel["memory"] == 0
            assert kernel["matrix"] or kernel["small"] or kernel["name"].endswith("_row")


@pytest.mark.parametrize("I, O, group, bias", [(64, 48, 32, False), (288, 70, 256, True), (100, 33, 64, True),
                                               (40, 9, 6, False)])
def test_the_int4_layer_gives_what_its_weights_say(I, O, group, bias):
    """Few rows in torch's packed product (of bfloat16), many unpacked; shapes that it does not take as well."""
    torch.manual_seed(I)
    linear = torch.nn.Linear(I, O, bias=bias).requires_grad_(False)
    linear.weight[0, 0], linear.weight[-1] = 1e4, 0
    for smooth in (None, torch.rand(I) + 0.5):
        layer = infer.Int4(linear, group, smooth=smooth)
        w = linear.weight if smooth is None else linear.weight * smooth
        w = int4_of(infer.int4_numpy(w.double().numpy(), group), I) / (1 if smooth is None else smooth.double().numpy())
        before = {N: torch.randn(N, I) for N in (1, 3, 40)}
        for ready in (False, True):
            layer = layer.ready() if ready else layer
            assert (layer.packed is not None) == (ready and group in (32, 64, 128, 256))
            for N, x in before.items():
                wanted = x.double().numpy() @ w.T + (linear.bias.double().numpy() if bias else 0)
                rounded = N < 40 and layer.packed is not None
                unit = np.abs(x.double().numpy()) @ np.abs(w).T + 1
                assert (np.abs(layer(x).double().numpy() - wanted) <= (0.012 if rounded else 1e-5) * unit).all()


def stack(letters, tmp_path, tied=False, dim=64, hidden=192):
    """A small model of ours of any layers, with random weights, as a folder."""
    tokenizer = train.make_tokenizer("bytes", 257, [])
    raw = train.our_config(letters, dim, 2, 1, tokenizer.vocab_size, 64, tokenizer.eos_ids)
    model = train.Model(train.parse_config(raw | dict(tie_word_embeddings=tied, intermediate_size=hidden)))
    torch.manual_seed(1)
    with torch.no_grad():
        model.initialize(0)
        for w in model.parameters():
            if w.ndim > 1:
                w.add_(torch.randn(w.shape) * 0.08)
        for block in model.blocks:
            if hasattr(block, "predictor"):
                block.predictor[-1].bias.fill_(9.0)                              # every token is chosen
    folder = tmp_path / f"{letters}{tied}"
    folder.mkdir(exist_ok=True)
    train.save(model.eval(), tokenizer, folder)
    return folder


CODE = np.frombuffer((HERE / "attention.py").read_bytes()[:3000], np.uint8)


@pytest.mark.parametrize("letters, tied", [("aa", True), ("ad", False), ("sm", False), ("aA", False)])
@pytest.mark.parametrize("quantize", ["int8", "int4", "gptq", "awq"])
def test_every_layer_of_every_stack_is_compressed_saved_and_read_back(letters, tied, quantize, tmp_path):
    folder, text = stack(letters, tmp_path, tied), bytes(CODE[:400]).decode()
    exact = infer.score(infer.LLM(folder), text)["bits_per_byte"]
    m = infer.LLM(folder, quantize=quantize, group_size=48, calibration=CODE, save=tmp_path / "small")
    assert not list(infer.linears(m.model)) and m.told["layers"] == sum(
        isinstance(layer, infer.Compressed) for layer in m.model.modules()) and not m.told["nearest"]
    assert not any(isinstance(x, infer.Compressed) for name, x in m.model.named_modules()
                   if {"dt_proj", "router", "predictor"} & {*name.split(".")})
    got = infer.score(m, text)["bits_per_byte"]
    assert got != exact and abs(got / exact - 1) < (0.01 if quantize == "int8" else 0.1)
    again = infer.LLM(tmp_path / "small")
    assert again.quantize == quantize and again.weight_bytes == m.weight_bytes and again.weights == m.weights
    assert infer.score(again, text)["bits_per_byte"] == got                  # the same bits
    prompt = [3, 5, 8]
    assert m.generate(prompt, max_tokens=8, temperature=0)[0].tokens == again.generate(prompt, max_tokens=8,
                                                                                    temperature=0)[0].tokens
    size = lambda at: (at / "model.safetensors").stat().st_size
    assert size(tmp_path / "small") < size(folder) * 0.6
    about = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert about["method"] == quantize and about["layers"] == m.told["layers"]
    with pytest.raises(train.UserError, match="fewer bits"):
        train.load(tmp_path / "small")
    with pytest.raises(train.UserError, match="already"):
        infer.LLM(tmp_path / "small", quantize="int8")


def test_a_tied_model_keeps_its_embeddings_when_the_head_gets_fewer_bits(tmp_path):
    folder = stack("a", tmp_path, True)
    w = infer.LLM(folder).model.embed.weight
    for quantize in ("int4", "awq", "gptq"):
        m = infer.LLM(folder, quantize=quantize, calibration=CODE)
        error = (m.model.embed(torch.arange(len(w))) - w).abs().amax(1) / w.abs().amax(1)
        assert (error <= 0.5001 / 127).all() and m.model.embed.weight.shape == w.shape


@pytest.mark.parametrize("letters", ["a", "d", "s", "A"])
def test_what_awq_folds_leaves_the_function_as_it_is(letters, tmp_path):
    model, _ = train.load(stack(letters, tmp_path))
    x = torch.arange(30)[None] % 250
    with torch.no_grad():
        before = model(x)
        for linear, sources in infer.folds(model).items():
            c = torch.rand(linear.in_features) + 0.5
            for w, start in sources:
                w[start:start + len(c)] /= c if w.ndim == 1 else c[:, None]
            linear.weight.mul_(c)
        close(model(x), before, 2e-5)


def test_pruned_folders_are_plain_folders(tmp_path):
    folder = stack("am", tmp_path)
    code, _, err = run(infer, "--model", folder, "--prune", "wanda", "--data", HERE / "attention.py", "--save",
                       tmp_path / "thin")
    assert code == 0, err
    whole, thin = train.load(folder)[0], train.load(tmp_path / "thin")[0]
    for (path, _, _, a), (_, _, _, b) in zip(infer.linears(whole), infer.linears(thin)):
        share = (b.weight == 0).float().mean(1)
        assert torch.equal(share, torch.full_like(share, 0 if path == "head" else 0.5)), path
        assert torch.equal(b.weight[b.weight != 0], a.weight[b.weight != 0])
    m = infer.LLM(folder, prune="magnitude", sparsity="2:4")
    w = m.model.blocks[0].mlp.down.weight
    assert ((w.view(-1, 4) == 0).sum(1) == 2).all()
    code, _, err = run(infer, "x", "--model", stack("a", tmp_path, dim=68, hidden=90), "--prune", "magnitude",
                       "--sparsity", "2:4")
    assert code == 2 and "in fours" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("flags, word", [
    (("--quantize", "fp8"), "fp8 needs a GPU"), (("--quantize", "int4", "--group-size", 7), "even"),
    (("--quantize", "int3"), "--quantize"), (("--prune", "all"), "--prune"),
    (("--prune", "magnitude", "--sparsity", "1.5"), "--sparsity"), (("--save", "there"), "--quantize or --prune"),
    (("--quantize", "gptq", "--data", "/nowhere"), "/nowhere"), (("--compare", "--bench"), "give one")])
def test_bad_compression_is_one_clear_line(flags, word, tmp_path):
    if GPU and "fp8" in flags:
        pytest.skip("this machine has fp8")
    code, _, err = run(infer, *(() if "--bench" in flags else ("x",)), "--model", stack("a", tmp_path), *flags)
    assert code == 2 and word in err.strip().splitlines()[-1] and "Traceback" not in err, err


def test_folders_of_fewer_bits_that_are_broken_or_anothers_are_refused(tmp_path):
    infer.LLM(stack("a", tmp_path), quantize="int4", save=tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    raw = json.loads(path.read_text())

    def says(**changes):
        path.write_text(json.dumps(raw | dict(quantization_config=raw["quantization_config"] | changes)))
        with pytest.raises((train.UserError, ValueError)) as error:
            infer.LLM(tmp_path / "small")
        return str(error.value)
    assert "int3" in says(format="int3") and "group_size" in says(group_size=0)
    assert "awq" in says(quant_method="awq", group_size=128) and "tensors" in says(format="int8")
    assert "tensors" in says(group_size=32)


def test_one_short_sentence_is_enough_for_gptq(tmp_path):
    m = infer.LLM(stack("a", tmp_path), quantize="gptq", calibration=CODE[:5])
    assert m.told["layers"] == 5 and not m.told["nearest"]
    with pytest.raises(train.UserError, match="fewer than two"):
        infer.LLM(stack("a", tmp_path), quantize="gptq", calibration=CODE[:1])
    with pytest.raises(ValueError, match="calibration"):
        infer.LLM(stack("a", tmp_path), quantize="awq")


def test_a_layer_without_a_usable_hessian_is_rounded_and_named(tmp_path):
    model, _ = train.load(stack("aa", tmp_path))
    model.blocks[1].mlp_norm.weight.data[0] = math.nan
    told = infer.compress(model, "gptq", 64, CODE)
    assert "blocks.1.mlp.gate_up" in told["nearest"] and "blocks.0.mlp.gate_up" not in told["nearest"]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_compiled_steps_of_fewer_bits_say_what_eager_ones_do(quantize, tmp_path):
    if not train.compiler_there():
        pytest.skip("no compiler")
    folder = stack("a", tmp_path)
    make = lambda compile: infer.LLM(folder, quantize=quantize, compile=compile, max_num_seqs=1, prefix_caching=False)
    compiled, eager = (make(c).generate([1, 2, 3], max_tokens=6, temperature=0, logprobs=3)[0] for c in (True, False))
    likely = lambda r: [list(step.values())[0] for step in r.logprobs]
    close(np.exp(likely(compiled)), np.exp(likely(eager)), 0.02)             # products of bfloat16


def test_compare_says_which_to_take(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(infer, "--model", trained, "--compare", "--data", corpus, "--json")
    assert code == 0, err
    record = json.loads(out)
    ways = {r["way"]: r for r in record["rows"]}
    assert list(ways)[:5] == ["float32", "int8", "int4", "awq", "gptq"] and record["recommended"] in ways
    assert ways["int4"]["disk"] < ways["int8"]["disk"] < ways["float32"]["disk"]
    assert ways["int8"]["bits_per_byte"] / ways["float32"]["bits_per_byte"] - 1 < 0.002
    assert all(r[key] > 0 for r in ways.values() for key in ("decode_1", "decode_8", "prefill", "memory"))
    assert (tmp_path / "compare.png").stat().st_size > 1000
