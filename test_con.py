from test_all import *
import test_all


# --- 11. Constraints: regular expressions and JSON schemas ------------------------------------------------------------

SCHEMAS = [
    True, {"type": "object"}, {"type": "string"}, {"type": "integer", "minimum": -3, "maximum": 120}, {"const": 3},
    {"type": "number", "exclusiveMinimum": 0}, {"enum": ["a", 1, None, [2, {"b": 3}]]}, {"type": ["null", "boolean"]},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False},
    {"type": "object", "properties": {"z": {"type": "string", "maxLength": 8}, "a": {"type": "integer"}},
     "required": ["z", "a"], "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 3},
    {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer"}},
     "required": ["kind"]},
    {"anyOf": [{"type": "string", "pattern": "^[a-z]{2,5}$"}, {"type": "array", "items": {"type": "null"}}]},
    {"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}, {"type": "string", "minLength": 3},
    {"type": "string", "pattern": "^hello\\!$"}, {"allOf": [{"type": "integer"}, {"minimum": 5}]},
    {"$defs": {"tree": {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {
        "type": "array", "items": {"$ref": "#/$defs/tree"}}}, "required": ["v"], "additionalProperties": False}},
     "$ref": "#/$defs/tree"},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
]


@pytest.mark.parametrize("options", [{}, dict(draft="ngram", max_num_batched_tokens=5, num_blocks=40)], ids=str)
def test_a_text_is_json_of_its_schema_or_cut_by_its_length(trained, options):
    jsonschema = pytest.importorskip("jsonschema")
    m = infer.LLM(trained, **options)
    m.learn, m.costs = lambda *_: None, {(n, False): 1.0 for n in range(99)}
    results = m.generate(["x = "] * len(SCHEMAS), max_tokens=50, temperature=1.5, json_schema=SCHEMAS, n=2,
                         seed=list(range(len(SCHEMAS))))
    done = 0
    for schema, pair in zip(SCHEMAS, results):
        for r in pair:
            if r.finish_reason == "length":
                assert len(r.tokens) == 50
                continue
            done += 1
            value = json.loads(r.text)
            jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
            assert r.text == r.text.rstrip() and "  " * 17 not in r.text
    assert done > len(SCHEMAS) and idle(m)
    plain = infer.LLM(trained)
    for schema, seed, pair in list(zip(SCHEMAS, range(99), results))[::4]:
        assert pair[1].tokens == plain.generate("x = ", max_tokens=50, temperature=1.5, json_schema=schema, n=2,
                                                seed=seed)[0][1].tokens      # batched, drafted: the same text


def test_properties_come_in_the_order_of_the_schema_and_escapes_are_whole(trained):
    m = infer.LLM(trained)
    matcher = lambda schema: infer.Constraints(m.tokenizer, m.eos_ids, m.model.config.vocab).matcher(
        infer.Sampling(json_schema=schema))
    ids = m.tokenizer.encode
    takes = lambda schema, text: matcher(schema).try_consume_tokens(ids(text)) == len(ids(text))
    assert takes(json.dumps(SCHEMAS[10]), '{"z": "",\n  "a": 1}') and not takes(SCHEMAS[10], '{"a": 1')
    assert not takes(SCHEMAS[10], '{"z":  ""') and not takes(SCHEMAS[10], '{"z": "", "a": 1} ')
    assert takes({"type": "string"}, '"can\\u0007t"') and not takes({"type": "string"}, '"can\\u27t"')


@pytest.mark.parametrize("regex", ["[a-z]+ [0-9]{2}", "(yes|no)", "a*", "\\d{3}-\\d{4}", "[^a]{5}", "é+🙂"])
def test_a_text_matches_its_regular_expression_whole(trained, regex):
    m = infer.LLM(trained)
    for r in m.generate(["x"] * 6, max_tokens=30, regex=regex, seed=list(range(6)),
                        temperature=[0.0, 1, 1, 1.5, 1.5, 1]):
        assert r.finish_reason == "length" or re.fullmatch(regex, r.text, re.DOTALL), r.text
        assert r.tokens[-1] not in m.eos_ids or r.finish_reason == "stop"


def test_constraints_keep_raw_log_probabilities_and_end_at_what_cannot_go_on(trained):
    m = infer.LLM(trained)
    (free,) = m.generate("x", max_tokens=1, logprobs=3, seed=1)
    (r,) = m.generate("x", max_tokens=20, logprobs=3, seed=1, regex="(yes|no)", ignore_eos=True)
    assert r.text in ("yes", "no") and r.finish_reason == "stop" and len(r.logprobs) == len(r.tokens)
    common = set(free.logprobs[0]) & set(r.logprobs[0])
    assert len(common) >= 3 and all(abs(free.logprobs[0][t] - r.logprobs[0][t]) < 1e-5 for t in common)


@pytest.mark.parametrize("arguments, said", [
    (dict(regex="(", json_schema=True), "regex.*json_schema"), (dict(regex="("), "regex.*unclosed"),
    (dict(regex="a(?=b)"), "regex.*look"), (dict(json_schema=False), "json_schema.*false"),
    (dict(json_schema={"enum": []}), "json_schema"),
    (dict(json_schema={"not": {"type": "string"}}), 'json_schema.*"not"'),
    (dict(json_schema={"not": {}, "x-guidance": {"lenient": True}}), "json_schema.*not"),
    (dict(json_schema={"type": "array", "uniqueItems": True}), "json_schema.*uniqueItems"),
    (dict(json_schema={"type": "integer", "minimum": 5, "maximum": 3}), "json_schema.*minimum"),
    (dict(json_schema={"$ref": "http://a.b/c"}), "json_schema"), (dict(json_schema="{"), "json_schema"),
    (dict(json_schema=3), "json_schema"), (dict(regex=3), "regex")], ids=str)
def test_a_constraint_that_cannot_be_is_refused_before_anything_runs(trained, arguments, said):
    m = infer.LLM(trained)
    with pytest.raises(ValueError, match=f"prompt 1: (?s:.*){said}"):
        m.generate(["x", "y"], max_tokens=4, **{k: [None, v] for k, v in arguments.items()})
    assert idle(m) and m.stats()["waiting"] == 0


def test_constraints_from_the_command_line(trained):
    code, out, err = run(infer, "x", "--model", trained, "--json-schema", '{"enum": ["yes", "no"]}', "--max-tokens", 20)
    assert code == 0 and json.loads(out) in ("yes", "no"), err
    code, out, _ = run(infer, "x", "--model", trained, "--regex", "[0-9]{4}", "--max-tokens", 20)
    assert code == 0 and re.fullmatch("[0-9]{4}", out.strip())
    for flags in (["--regex", "("], ["--json-schema", "{"], ["--regex", "a", "--json-schema", "true"]):
        code, _, err = run(infer, "x", "--model", trained, *flags)
        assert code == 2 and len(err.strip().splitlines()) == 1 and flags[0][2:].replace("-", "_") in err
