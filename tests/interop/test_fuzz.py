"""A dose of the fuzzer; the whole one is `python -m tests.interop.fuzz --count 10000`."""

from interop import fuzz


def test_mutated_files_are_refused_or_loaded():
    found = fuzz.run(180, list(fuzz.KINDS), seed=100_000, imports_every=60)
    for kind in ("safetensors", "index", "config.json", "tokenizer.json"):
        assert found[f"{kind} refused"] > 5
    assert sum(count for name, count in found.items() if "loaded" in name) > 20


def test_the_fuzzer_finds_an_error_that_is_none_of_ours(monkeypatch):
    errors: list[Exception] = []

    def fail(path):
        raise KeyError("offset")

    def break_loading(path, dice):
        monkeypatch.setattr(fuzz.jaxgpt, "load", fail)

    kind = fuzz.KINDS["safetensors"]._replace(mutate=break_loading)
    monkeypatch.setitem(fuzz.KINDS, "bad", kind)
    found = fuzz.run(1, ["bad"], seed=1, on_error=errors.append)
    assert found == {"bad FOUND": 1}
    assert "KeyError: 'offset'" in str(errors[0])
    assert "--seed 1 --count 1" in str(errors[0])
