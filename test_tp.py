from test_all import *
import types


# --- 12. Several processes divide a model -----------------------------------------------------------------------------

INFER = "import sys, infer, train; train.leave(infer.main(sys.argv[1:]))"


def test_two_processes_write_what_one_writes(corpus, tmp_path):
    out = tmp_path / "model"
    code, _, err = run(train, "--data", corpus, "--steps", 30, "--vocab", 400, "--dim", 64, "--heads", 4, "--kv-heads",
                       2, "--layers", 2, "--context", 64, "--out", out)
    assert code == 0, err
    flags = [START, "--model", out, "--max-tokens", 20, "--ignore-eos", "--json"]
    for extra in (["--temperature", 0, "--draft", "ngram"], ["--quantize", "int8", "--seed", 1], ["--seed", 5]):
        one = json.loads(run(infer, *flags, *extra)[1])
        first, second = pair(INFER, *flags, *extra)
        (told,) = [json.loads(line) for line in first.splitlines() if line.startswith("{")]
        if "int8" not in extra:                                              # there a row's scale is that of its part
            assert told["tokens"] == one["tokens"]
        assert "{" not in second                                             # one voice


def test_what_does_not_divide_is_one_clear_line(trained):
    model, _ = train.load(trained)
    with pytest.raises(train.UserError, match="3 processes can't divide . attention heads evenly"):
        infer.divide(model, types.SimpleNamespace(size=3, rank=0))
