"""lm-evaluation-harness on a jaxgpt model: the numbers of its hf backend on the same weights."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_decoders import make_model

from jaxgpt.evaluate import harness
from jaxgpt.interop import convert, huggingface
from jaxgpt.settings import ConfigError

ROWS = [
    {"q": "where is the cat", "a": " on the mat", "b": " under it", "label": 0},
    {"q": "", "a": "a first sentence", "b": "another one", "label": 1},
    {"q": "who ran up the hill ", "a": "jack", "b": "jill and jack", "label": 1},
]
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
{rest}
metadata: {{version: 1}}
"""
TASKS = {
    "tiny_choice": ("multiple_choice", 'doc_to_choice: "{{[a, b]}}"\ndoc_to_target: label\n'
                    "target_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]"),
    "tiny_text": ("loglikelihood_rolling", 'doc_to_target: "{{(q + a + b) * 12}}"\n'
                  "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"),
    "tiny_answer": ("generate_until", 'doc_to_target: "{{a}}"\n'
                    "metric_list: [{metric: exact_match}]\n"
                    "generation_kwargs: {until: ['e', '\\n'], do_sample: false, max_gen_toks: 9, "
                    "suppress_tokens: [0, 1, 2]}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the exported model and the files of three tasks."""
    folder = tmp_path_factory.mktemp("harness")
    huggingface.write_folder(convert.to_archive(make_model(adds_bos=False)), str(folder / "model"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "tasks").mkdir()
    for name, (kind, rest) in TASKS.items():
        text = "say {{q}}" if name == "tiny_answer" else "{{q}}"  # none that is empty
        text = YAML.format(name=name, kind=kind, rest=rest, text=text, data=folder / "rows.jsonl",
                           cache=folder / "cache")  # fmt: skip
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Return what the harness finds with both backends."""
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    path = str(folder / "model")
    models = {
        "hf": HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=2),
        "jaxgpt": "jaxgpt",
    }
    return {
        name: lm_eval.simple_evaluate(
            model=model,
            model_args={"run": path} if name == "jaxgpt" else None,
            tasks=list(TASKS),
            task_manager=manager,
            bootstrap_iters=0,
            batch_size=2,
        )
        for name, model in models.items()
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_number_equals_the_hf_backend(task, results):
    found, expected = (results[name]["results"][task] for name in ("jaxgpt", "hf"))
    numbers = {key: x for key, x in expected.items() if isinstance(x, (int, float))}
    assert len(numbers) >= 1
    for key, value in numbers.items():
        assert found[key] == pytest.approx(value, rel=1e-5, nan_ok=True), key


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_equals_the_hf_backend(task, results):
    found, expected = (
        [x["filtered_resps"] for x in results[name]["samples"][task]] for name in ("jaxgpt", "hf")
    )
    assert len(found) == len(ROWS)
    for mine, theirs in zip(found, expected, strict=True):
        if task == "tiny_answer":
            assert mine == theirs
            continue
        for x, y in zip(mine, theirs, strict=True):
            x, y = (x, y) if task == "tiny_choice" else ((x,), (y,))
            assert float(x[0]) == pytest.approx(float(y[0]), rel=1e-5, abs=1e-3)
            assert x[1:] == y[1:]  # is_greedy


def test_special_tokens_in_a_text_are_those_of_transformers(folder):
    model = harness.JaxgptLM(run=str(folder / "model"))
    theirs = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32")
    special = next(iter(model.model.tokenizer.special_ids))
    for text in ("plain", f"a{special}b", f"{special}b", ""):
        assert model.tok_encode(text) == list(theirs.tok_encode(text)), text
        assert model.tok_encode(text, add_special_tokens=False) == list(
            theirs.tok_encode(text, add_special_tokens=False)
        )
    assert model.prefix_token_id == theirs.prefix_token_id
    assert model.eot_token_id == theirs.eot_token_id


def test_a_prompt_that_leaves_no_room_is_refused(folder):
    model = harness.JaxgptLM(run=str(folder / "model"))
    with pytest.raises(ConfigError, match="leaves no room"):
        model._read_request("x", {"until": ["a"], "max_gen_toks": 128})
    ids, sample = model._read_request("x" * 200, {"until": "a", "max_gen_toks": 100})
    assert len(ids) == 28
    assert (sample.temperature, sample.stop, sample.tokens) == (0.0, ("a",), 100)


def test_the_module_is_the_command_of_the_harness():
    code = (
        "import sys, runpy; sys.argv = ['lm_eval', '--help']\n"
        "try: runpy.run_module('jaxgpt.evaluate.harness', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "from lm_eval.api.registry import get_model\n"
        "print(get_model('jaxgpt').__module__, get_model('dummy').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "jaxgpt.evaluate.harness DummyLM"
