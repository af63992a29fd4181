from test_all import *

os.environ["TRITON_INTERPRET"] = "1"
import hw_profile as Hw
os.environ.pop("TRITON_INTERPRET", None)

from torch.utils.flop_counter import FlopCounterMode


# --- hw_profile.py: what a model costs, exactly; what others measured, nearly -----------------------------------------

HW_MODELS = [dict(layers="a", dim=32, heads=2, kv_heads=1), dict(layers="aaa", dim=48, heads=3, kv_heads=3, tied=True),
             dict(layers="aa", dim=64, heads=4, kv_heads=2)]


def hw_model(layers, dim, heads, kv_heads, tied=False, **raw):
    config = train.parse_config(train.qwen3_config(layers, dim, heads, kv_heads, 101, 64, [0], tied=tied) | raw)
    return train.Model(config), Hw.config_shape(config.raw, "tiny")


@pytest.mark.parametrize("sizes", HW_MODELS)
@pytest.mark.parametrize("T", [1, 7, 32])
def test_hw_parameters_flops_and_cache_are_exact(sizes, T):
    """Against the model itself, torch's own counter and the bytes that lie in the cache."""
    model, shape = hw_model(**sizes)
    k = Hw.cost(shape, T)
    assert k["params"] == sum(w.numel() for w in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(2, T, dtype=torch.long))
    assert counter.get_total_flops() == 2 * T * k["flops"]
    states = model.new_states(3, T)
    assert sum(s.k.nbytes + s.v.nbytes for s in states) == 3 * T * 4 * k["cache"]


@pytest.mark.parametrize("sizes", HW_MODELS)
def test_hw_training_flops_and_train_py_agree(sizes):
    """Three forward passes; train.py's count leaves nothing out."""
    model, shape = hw_model(**sizes)
    assert 3 * Hw.cost(shape, 16)["flops"] == train.flops_per_token(model, 16)


@pytest.mark.parametrize("sizes", HW_MODELS)
def test_hw_activations_are_what_autograd_keeps(sizes):
    """Every storage that a block's forward pass saves for the backward one, counted once, weights and tables apart."""
    model, shape = hw_model(**sizes)
    B, T = 2, 16
    weights, kept = {w.untyped_storage().data_ptr() for w in model.parameters()}, {}

    def keep(x):
        s = x.untyped_storage()
        if s.data_ptr() not in weights and x.shape[-1:] != (shape.head_dim // 2,) and x.is_floating_point():
            kept[s.data_ptr()] = (s.nbytes(), x)
        return x
    x = torch.randn(B, T, shape.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = model.blocks[0](x, torch.arange(T))
    assert sum(size for size, _ in kept.values()) == B * T * 4 * Hw.activation_floats(shape), y.shape


@pytest.mark.parametrize("name,params", [("0.6B", 596_049_920), ("8B", 8_030_261_248), ("70B", 70_553_706_496),
                                         ("405B", 405_853_388_800), ("Llama-2-7B", 6_738_415_616),
                                         ("Mamba-2.8B", 2_768_345_600)])
def test_hw_knows_the_models_that_all_know(name, params):
    """Parameters as their cards and transformers count them."""
    assert Hw.cost(Hw.MODELS[name], 1)["params"] == params


def test_hw_other_kinds_of_layer():
    """Latent attention caches 576 numbers a layer; 37 of 671 billion weights see a token; a routed block costs less."""
    k = Hw.cost(Hw.MODELS["DeepSeek-V3"], 4096)
    assert k["cache"] == 61 * 576 and 670e9 < k["params"] < 672e9 and 36e9 < k["active"] < 38e9
    plain, routed = (Hw.cost(Hw.replace(Hw.MODELS["8B"], layers=letters), 1024) for letters in ("aaaa", "aAaA"))
    assert routed["flops"] < plain["flops"] and routed["params"] == plain["params"] + 2 * 4096
    state = Hw.cost(Hw.MODELS["Mamba2-1.3B"], 10)
    assert state["cache"] == 0 and state["state"] == 48 * (4096 * 128 + (4096 + 256) * 3)


@pytest.mark.parametrize("kind,sizes", [
    ("Mamba2", dict(hidden_size=32, num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=2, num_hidden_layers=2)),
    ("Mamba", dict(hidden_size=32, state_size=8, expand=2, num_hidden_layers=2)),
    ("Llama", dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                   num_hidden_layers=2))])
def test_hw_reads_the_configs_of_transformers(kind, sizes, tmp_path):
    """The library's own model of that config has as many parameters."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind + "Config")(vocab_size=50, **sizes)
    with torch.device("meta"):
        model = getattr(transformers, kind + "ForCausalLM")(config)
    config.save_pretrained(tmp_path)
    shape = Hw.model_shape(str(tmp_path))
    assert Hw.cost(shape, 1)["params"] == sum(w.numel() for w in model.parameters())


def test_hw_validation_never_uses_its_own_row_and_is_near(monkeypatch):
    """A changed measurement changes every ratio but its own prediction's; the median error stays within a quarter."""
    code, out, _ = run(Hw, "--validate", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) >= 30
    assert {"kind", "system", "model", "hardware", "setting", "measured", "predicted", "ratio"} <= set(rows[0])
    assert all(row["ratio"] == pytest.approx(row["predicted"] / row["measured"]) for row in rows)
    errors = sorted(abs(row["ratio"] - 1) for row in rows)
    assert errors[len(errors) // 2] <= 0.25
    for row in Hw.PUBLISHED:
        if row.kind not in ("serve", "attention", "decode"):                 # these never look at the table
            before = Hw.predict(row)
            changed = row._replace(measured=row.measured * 3)
            chip = Hw.ACCELERATORS[row.hardware]
            with monkeypatch.context() as patch:
                patch.setattr(Hw, "PUBLISHED", [changed if r is row else r for r in Hw.PUBLISHED])
                if row.kind == "matmul":
                    patch.setitem(Hw.ACCELERATORS, chip.name, chip._replace(best=3 * (chip.best or 0)))
                assert Hw.predict(changed) == pytest.approx(before)


def test_hw_model_json_and_its_relations():
    """The keys of the contract; twice the chips halve what is read; a batch shares the weights; few bits are faster."""
    def cost(*flags):
        code, out, err = run(Hw, "--model", "8B", "--accelerator", "H100", "--json", *flags)
        assert code == 0, err
        return json.loads(out)
    one = cost()
    assert list(one)[:15] == ["model", "accelerator", "dtype", "batch", "prompt_tokens", "context", "params",
                              "flops_per_token", "weight_bytes", "cache_bytes_per_token", "prefill_seconds",
                              "decode_seconds_per_token", "tokens_per_second", "tokens_per_joule", "devices"]
    assert one["cache_bytes_per_token"] == 2 * 2 * 32 * 8 * 128 and one["devices"] == 1 and one["dtype"] == "bf16"
    assert cost("--batch", 16)["tokens_per_second"] > 10 * one["tokens_per_second"]
    assert cost("--dtype", "int8")["decode_seconds_per_token"] < one["decode_seconds_per_token"]
    assert cost("--devices", 4)["decode_seconds_per_token"] < one["decode_seconds_per_token"]
    assert cost("--batch", 64, "--context", 8192)["devices"] == 2


def test_hw_compare_and_unknown_names():
    code, out, _ = run(Hw, "--compare", "B200,MI455X,TPU v7x")
    assert code == 0 and "announced" in out and max(map(len, out.splitlines())) <= 100
    for flags, near in ((["--accelerator", "H1000"], "H100 SXM"), (["--compare", "MI300"], "MI300X"),
                        (["--model", "9B"], "8B"),
                        (["--model", "8B", "--accelerator", "TPU v4", "--dtype", "fp8"], "bf16")):
        code, out, err = run(Hw, *flags)
        assert (code, out) == ((2, "") if near != "MI300X" else (0, out)) and (near in err or near in out)
        assert code == 0 or len(err.splitlines()) == 1


def test_hw_every_table_is_at_most_100_wide():
    for flags in (["--validate"], ["--model", "405B"], ["--accelerator", ",".join(Hw.ACCELERATORS)],
                  ["--plan", "train", "--model", "70B"]):
        code, out, err = run(Hw, *flags)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 100, max(out.splitlines(), key=len)


def test_hw_plan_keeps_its_goals():
    """The service's replicas, run through the scheduler again, keep both; impossible goals are said to be so."""
    flags = ["--plan", "serve", "--model", "8B", "--accelerator", "H100", "--requests", 20, "--json"]
    code, out, err = run(Hw, *flags)
    plan = json.loads(out)
    assert code == 0 and plan["devices"] == plan["replicas"] * plan["chips_a_replica"] >= 1
    assert plan["first_token_p95"] <= 1 and plan["per_token_p95"] <= 0.05
    code, out, _ = run(Hw, *flags, "--per-token", 1e-6)
    assert code == 0 and json.loads(out)["devices"] is None
    code, out, _ = run(Hw, "--plan", "train", "--model", "8B", "--accelerator", "H100", "--tokens", 1e12, "--days", 10,
                       "--json")
    assert json.loads(out)["days"] <= 10


def test_hw_simulation_is_the_engine_with_a_clock():
    """All new tokens come, in no less than the roofline allows; a small memory sets requests back."""
    c, chip = Hw.MODELS["0.6B"], Hw.ACCELERATORS["A100 SXM"]
    requests = [(0.0, 64, 32)] * 8
    run_ = Hw.simulate(c, chip, "bf16", requests)
    bound = 8 * 32 / (32 * 2 * Hw.cost(c, 1)["params"] / (chip.bandwidth * 1e12))
    assert run_["steps"] == 32 and run_["tokens_per_second"] < bound and run_["preemptions"] == 0
    tight = Hw.simulate(c, chip._replace(memory=1.7), "bf16", [(0.0, 100, 400)] * 12)
    assert tight["preemptions"] > 0
    with pytest.raises(ValueError, match="do not fit"):
        Hw.simulate(c, chip._replace(memory=1), "bf16", requests)


def test_hw_passes_are_counted_from_what_torch_runs():
    x, w = torch.randn(8, 16), torch.randn(16, 32)
    with Hw.Passes() as passes:
        (x @ w).exp().view(-1)
    matmul, exp, view = passes.made
    assert (matmul.kind, matmul.flops, matmul.bytes) == ("matmul", 2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))
    assert (exp.kind, exp.numbers, exp.bytes) == ("exp", 256, 2 * 4 * 256) and view.kind == "view"


def test_hw_measures_and_draws(tmp_path, monkeypatch):
    """The whole program at small sizes: figures above 0, a prediction for every op, a picture."""
    monkeypatch.setattr(Hw, "SMALL", Hw.Sizes(2, 32, 2, 1, 16, 32, 48, 64, 16, 1))
    monkeypatch.setattr(Hw, "seconds", lambda work, *_, real=Hw.seconds, **__: real(work, budget=0.0))
    code, out, err = run(Hw, "--device", "cpu", "--out", tmp_path / "roofline.png", "--json")
    assert code == 0, err
    machine, *rows = [json.loads(line) for line in out.splitlines()]
    assert machine["bandwidth"] > 0 and len(rows) == len(Hw.ops(Hw.SMALL))
    assert all(r["measured"] > 0 and r["predicted"] > 0 and r["passes"] > 0 for r in rows)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_hw_kernels_where_there_is_no_triton(monkeypatch):
    monkeypatch.setattr(A, "triton", None)
    code, _, err = run(Hw, "--kernels")
    assert code == 2 and len(err.splitlines()) == 1 and "Triton" in err


