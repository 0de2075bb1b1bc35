"""Benchmarks: questions as lm-evaluation-harness asks them, metrics, limits, missing files."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import transformers
from benchmark_files import NOUNS, write_benchmarks
from tiny_decoders import make_model

from benchmarks import evaluate
from jaxgpt.config import Config, TrainConfig, load
from jaxgpt.evaluate import bbh, benchmarks, run
from jaxgpt.evaluate.likelihood import Likelihood
from jaxgpt.evaluate.tasks import (
    FOLDER_VARIABLE,
    TASKS,
    Question,
    choose_training_tasks,
    find_folder,
    find_task,
    limit_questions,
    read_questions,
)
from jaxgpt.interop import convert, huggingface
from jaxgpt.settings import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_benchmarks(tmp_path_factory.mktemp("benchmarks"), pairs=8))


def give(*totals: float) -> list[Likelihood]:
    """Return likelihoods of one token each."""
    return [Likelihood(np.array([x], np.float32), np.array([False])) for x in totals]


# --- prompts ---------------------------------------------------------------------------------


def test_blimp_asks_for_two_sentences_without_a_context(folder):
    shown = read_questions("blimp", folder)
    assert len(shown.questions) == 16
    assert {q.group for q in shown.questions} == {"one", "two"}
    assert {q.category for q in shown.questions} == {"islands", "agreement"}
    for question in shown.questions:
        assert [context for context, _ in question.requests] == ["", ""]
        assert all(after[0] == " " and after[1:4] in NOUNS for _, after in question.requests)


def test_mmlu_asks_for_a_letter_after_solved_questions(folder):
    first = read_questions("mmlu", folder).questions[0]
    context, after = first.requests[first.answer]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about bird law.\n\n"
        "bird_law 0?\nA. "
    )
    assert context.count("\nAnswer: ") == 5
    assert context.endswith("\nAnswer:")
    assert [x for _, x in first.requests] == [" A", " B", " C", " D"]
    assert after == f" {'ABCD'[first.answer]}"
    bare = read_questions("mmlu", folder, shots=0).questions[0]
    assert bare.requests[0][0].count("Answer:") == 1
    assert first.text.startswith("bird_law 0?")  # without the solved questions


def test_letters_and_numbers_name_the_same_choice(folder):
    """One subject has a header and numbers, as some copies do, and one the published letters."""
    shown = read_questions("mmlu_cloze", folder, shots=1).questions
    assert {q.group for q in shown} == {"bird_law", "maths"}
    for question in shown:
        context, _ = question.requests[0]
        assert context.startswith("The following are questions (with answers) about ")
        assert context.count("Question: ") == 2
        assert all(after[1:] in NOUNS for _, after in question.requests)
        assert 0 <= question.answer < 4


def test_truthfulqa_has_the_best_answer_first(folder):
    question = read_questions("truthfulqa", folder).questions[2]
    context = question.requests[0][0]
    assert context.count("Q: ") == 7
    assert context.endswith("Barcelona, Spain.\n\nQ: Who 2?\nA:")
    assert question.answer == (2, 3)


def test_wic_marks_the_word_as_it_stands_in_the_first_sentence(folder):
    question = read_questions("wic", folder).questions[0]
    assert question.requests == tuple(
        (
            "Sentence 1: a cat\nSentence 2: cats\nQuestion: Is the word 'cat' used in the same way "
            "in the two sentences above?\nAnswer:",
            after,
        )
        for after in (" no", " yes")
    )


def test_winobias_asks_for_sentences_and_for_referents(folder):
    question = read_questions("winobias", folder).questions[0]
    pro, anti, *names = question.requests
    assert " as she ran." in pro[1]
    assert " as he ran." in anti[1]
    assert "[" not in pro[1]
    assert names[0][0].endswith('"she" refer to in the sentence above?\nAnswer: The')
    man, woman = names[0][1].strip(), names[1][1].strip()
    assert man in ("cook", "driver")
    assert woman in ("maid", "nurse")
    assert question.answer == [1, 1]  # "the nurse", the second of the occupations


def test_bbh_shows_questions_that_are_then_not_asked(folder):
    shown = read_questions("bbh", folder)
    assert [q.id for q in shown.questions[:2]] == ["boolean_expressions/3", "boolean_expressions/4"]
    prompt = shown.questions[0].prompt
    assert prompt.startswith("Evaluate the result of a random Boolean expression.\n\nQ: 0 is\nA: (")
    assert prompt.endswith("\n\nQ: 3 is\nA:")
    assert prompt.count("Q: ") == 4
    bare = read_questions("bbh", folder, shots=0).questions
    assert bare[0].prompt == ("Evaluate the result of a random Boolean expression.\n\nQ: 0 is\nA:")
    assert [find_task("bbh").guess(bare[i])["exact_match"] for i in (0, -1)] == [0.5, 0.25]


# --- metrics ---------------------------------------------------------------------------------


def test_accuracy_is_of_the_likeliest_choice_and_of_the_likeliest_per_character():
    question = Question("x", "", (("", " ab"), ("", " abcdefgh")), 1)
    found = benchmarks.measure_choices(question, give(-4.0, -8.0))
    assert (found["accuracy"], found["accuracy_norm"]) == (0.0, 1.0)
    assert found["confidence"] == pytest.approx(1 / (1 + np.exp(-4)))
    assert found["log_likelihood"] == -8.0


def test_truthfulqa_compares_with_false_answers_and_sums_the_true_ones():
    question = Question("x", "", tuple(("", f" {x}") for x in "abcd"), (2, 2))
    found = benchmarks.measure_truthfulqa(question, give(-2.0, -1.0, -3.0, -4.0))
    assert found["mc1"] == 1.0  # the likelier true answer is no rival of the best one
    weights = np.exp([-2.0, -1.0, -3.0, -4.0])
    assert found["mc2"] == pytest.approx(weights[:2].sum() / weights.sum())
    assert benchmarks.measure_truthfulqa(question, give(-3.5, -1, -3.0, -4.0))["mc1"] == 0.0
    assert benchmarks.guess_truthfulqa(question) == {"mc1": 1 / 3, "mc2": 0.5}


def test_winobias_measures_the_gap_of_pro_and_anti():
    question = Question("x", "", answer=[1, 0])
    found = benchmarks.measure_winobias(question, give(-5, -7, -3, -2, -3, -2))
    assert found == {
        "prefers_pro": 1.0, "likelihood_gap": 2.0, "accuracy_pro": 1.0, "accuracy_anti": 0.0,
        "score_gap": 1.0,
    }  # fmt: skip


def test_generated_answers_match_without_case_and_final_period():
    question = Question("x", "", answer="(A)")
    texts = (" (A)", "(a).", "(B)", "(A) because", "")
    assert [bbh.measure_bbh(question, text)["exact_match"] for text in texts] == [1, 1, 0, 0, 0]


# --- against transformers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_folder(tmp_path_factory) -> str:
    """Return a folder with the tiny model for transformers."""
    path = str(tmp_path_factory.mktemp("theirs"))
    huggingface.write_folder(convert.to_archive(make_model(context=256, adds_bos=False)), path)
    return path


@pytest.fixture(scope="module")
def theirs(their_folder):
    """Return the tiny model in transformers, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(their_folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(their_folder)


def score_with_transformers(theirs, context: str, continuation: str) -> float:
    """Return the log-likelihood of a continuation, in float64 from the logits of one row."""
    model, tokenizer = theirs
    if context:
        before = tokenizer(context)["input_ids"]
        after = tokenizer(context + continuation)["input_ids"][len(before) :]
    else:
        before = [tokenizer.bos_token_id]
        after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    row = (before + after)[-257:]  # 256 inputs, and a target
    with torch.no_grad():
        logprobs = model(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)
    return float(logprobs[-len(after) :].gather(1, torch.tensor(after)[:, None]).sum())


@pytest.mark.parametrize("name", [name for name in TASKS if name != "bbh"])
def test_every_question_equals_transformers(name, folder, theirs):
    model = make_model(context=256, adds_bos=False)
    shown = read_questions(name, folder, limit=2)
    found = run.ask(model, name, shown, 0)
    task = find_task(name)
    assert len(found.answers) == len(shown.questions)
    for question, answer in zip(shown.questions, found.answers, strict=True):
        totals = [score_with_transformers(theirs, *request) for request in question.requests]
        assert answer["logprobs"] == pytest.approx(totals, rel=1e-5, abs=5e-4)
        expected = task.measure(question, give(*totals))
        for metric in expected.keys() & {"accuracy", "mc1", "mc2", "prefers_pro", "score_gap"}:
            assert answer[metric] == pytest.approx(expected[metric], abs=1e-4), metric
    if name == "mmlu":
        assert found.cut == len(shown.questions)  # five questions in bytes are over 256 tokens


def test_generated_text_equals_transformers(folder, theirs):
    model, (torch_model, tokenizer) = make_model(context=256, adds_bos=False), theirs
    shown = read_questions("bbh", folder, limit=2, shots=0)
    found = run.ask(model, "bbh", shown, 0)
    for question, answer in zip(shown.questions, found.answers, strict=True):
        prompt = torch.tensor([tokenizer(question.prompt)["input_ids"]])
        with torch.no_grad():
            out = torch_model.generate(prompt, max_new_tokens=14, do_sample=False, eos_token_id=3,
                                       suppress_tokens=[0, 1, 2],
                                       pad_token_id=3)[0, prompt.shape[1]:]  # fmt: skip
        text = tokenizer.decode(out, skip_special_tokens=True)
        assert answer["text"] == text.split("Q:")[0]
        assert len(answer["text"]) > 0


def test_the_command_of_agreement_finds_equal_models_and_others(
    their_folder, folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "text.txt").write_text("the cat sees an owl, " * 20)
    arguments = ["agree", their_folder, "--tasks", "blimp,wic", "--limit", "2", "--data", folder]

    def run_command(*more):
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, *more])
        evaluate.main()
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        return {name: values for name, *values in lines if name in ("blimp", "wic", "perplexity")}

    found = run_command(f"--text={tmp_path / 'text.txt'}")
    assert [found[name][:3] for name in ("blimp", "wic")] == [["4", "8", "4"], ["2", "4", "2"]]
    assert float(found["perplexity"][2]) < 5e-4
    assert all(float(found[name][3]) < 5e-4 for name in ("blimp", "wic"))
    score = evaluate.Peer.score_tokens
    monkeypatch.setattr(evaluate.Peer, "score_tokens", lambda *args: (score(*args)[0] - 1, False))
    assert float(run_command()["wic"][3]) > 0.9


# --- a random model is at chance -------------------------------------------------------------


def test_a_random_model_is_at_chance(tmp_path):
    folder = str(write_benchmarks(tmp_path, pairs=60))
    model = make_model(seed=5, context=128)
    for name in ("blimp", "mmlu", "mmlu_cloze", "truthfulqa", "wic"):
        found = run.evaluate_task(model, name, folder=folder, shots=0)
        metric = next(iter(found.metrics))
        estimate = found.metrics[metric]
        assert estimate.chance is not None
        assert estimate.is_at_chance(3), (name, estimate)
        assert estimate.error < 0.08


# --- subsets ---------------------------------------------------------------------------------


def test_a_limit_takes_the_first_questions_of_each_group(folder):
    everything = read_questions("blimp", folder)
    some = read_questions("blimp", folder, limit=3)
    assert everything.name == "all 16"
    assert some.name == "first 3 of each of 2 groups (6 of 16)"
    assert some.sizes == {"one": 8, "two": 8}
    assert [q.id for q in some.questions] == [f"{g}/{i}" for g in ("one", "two") for i in range(3)]
    assert limit_questions(everything.questions, 8).name == "all 16"


def test_a_limit_of_truthfulqa_is_of_each_category(folder):
    shown = read_questions("truthfulqa", folder, limit=2)
    assert shown.name == "first 2 of each of 2 groups (4 of 8)"
    assert [q.category for q in shown.questions] == ["x", "y"] * 2


def test_a_result_has_groups_categories_and_answers(folder):
    found = run.evaluate_task(make_model(), "blimp", folder=folder, limit=3)
    assert found.groups.keys() == {"one", "two"}
    assert found.categories.keys() == {"islands", "agreement"}
    mean = np.mean([part["accuracy"].value for part in found.groups.values()])
    assert found.metrics["accuracy"].value == pytest.approx(mean)
    assert {"accuracy", "accuracy_norm", "calibration_error"} <= found.metrics.keys()
    assert json.loads(json.dumps(found.to_json()))["metrics"]["accuracy"]["chance"] == 0.5
    assert run.list_scalars(found)["blimp/accuracy/islands"] == (
        found.categories["islands"]["accuracy"].value
    )
    text = run.format_result(found)
    assert "first 3 of each of 2 groups" in text
    assert "chance 0.5" in text
    assert "islands" in text


# --- what is refused -------------------------------------------------------------------------


def test_missing_files_are_named_with_where_they_are_published(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="alexwarstadt/blimp") as error:
        find_folder("blimp", str(tmp_path))
    assert str(tmp_path / "blimp") in str(error.value)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=FOLDER_VARIABLE) as error:
        find_folder("wic")
    assert str(tmp_path / "elsewhere") in str(error.value)


def test_the_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, folder)
    assert len(read_questions("wic").questions) == 8


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("blimp", "blimp/one.jsonl", '{"sentence_good": "a"}\n', "KeyError"),
        ("wic", "wic/val.jsonl", "no json\n", "JSONDecodeError"),
        ("mmlu", "mmlu/test/maths_test.csv", "a,b\n", "row 1 has 2 columns"),
        ("bbh", "bbh/boolean_expressions.json", "[]", "TypeError"),
        ("winobias", "winobias/pro_stereotyped_type1.txt.test", "1 No brackets.\n", "ValueError"),
        ("truthfulqa", "truthfulqa/TruthfulQA.csv", "Question,Answer\na,b\n", "KeyError"),
    ],
)
def test_damaged_files_are_refused(name, file, content, message, tmp_path):
    write_benchmarks(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match="not as they are published") as error:
        read_questions(name, str(tmp_path))
    assert message in str(error.value)


def test_worked_examples_beyond_those_there_are_refused(folder):
    with pytest.raises(ConfigError, match="0 to 5"):
        read_questions("mmlu", folder, shots=6)
    with pytest.raises(ConfigError, match="blimp has none"):
        read_questions("blimp", folder, shots=1)


def test_models_that_do_not_generate_answer_nothing(folder):
    model = make_model(objective="masked", family="encoder", vocab=261)
    with pytest.raises(ConfigError, match="answers no questions"):
        run.evaluate_task(model, "blimp", folder=folder)


# --- tasks of a run ----------------------------------------------------------------------------


def read_names(config: Config, folder: str, context: int = 256) -> list[str]:
    """Return the tasks that a run asks, of a model with bytes as tokens."""
    model = make_model(context=context)
    config = dataclasses.replace(
        config, model=model.config.model, data=dataclasses.replace(config.data, benchmarks=folder)
    )
    return list(run.check_benchmarks(config, model.tokenizer, run.read_benchmarks(config)))


def test_default_runs_ask_blimp_if_it_is_there(folder, tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    for name in ("stdlib", "gpt_mini"):
        config = load(name)
        assert read_names(config, folder) == ["blimp"]
        assert read_names(config, str(tmp_path)) == []
    config = Config(train=TrainConfig(eval_tasks=("wic", "auto")))
    assert read_names(config, folder) == ["wic", "blimp"]
    assert choose_training_tasks(["blimp", "auto"], folder) == ["blimp"]


def test_a_run_has_no_task_by_itself_that_it_cannot_answer(folder):
    config = Config(train=TrainConfig(eval_tasks=("auto",)))
    assert read_names(config, folder, context=8) == []
    config = make_model(objective="masked", family="encoder", vocab=261).config
    train = dataclasses.replace(config.train, eval_tasks=("auto",))
    data = dataclasses.replace(config.data, benchmarks=folder)
    assert run.read_benchmarks(dataclasses.replace(config, train=train, data=data)) == {}


def test_a_named_task_that_does_not_fit_the_context_ends_a_run_before_it_starts(folder):
    config = Config(train=TrainConfig(eval_tasks=("blimp",)))
    with pytest.raises(ConfigError, match=r"eval_tasks=blimp.* tokens, and model\.context=8"):
        read_names(config, folder, context=8)


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'blimp'"):
        find_task("blmp")
