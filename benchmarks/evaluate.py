"""Benchmarks of the benchmarks: agreement with transformers, speed, scores, and their tables.

    python -m benchmarks.evaluate agree model.gguf --data FOLDER --limit 1
    python -m benchmarks.evaluate speed model.gguf --data FOLDER --rows 16
    python -m benchmarks.evaluate random model.gguf runs/random    a model of its shape, untrained
    python -m benchmarks.evaluate scores model.gguf a.json         all tasks, by LIMITS
    python -m benchmarks.evaluate table a.json b.json              of scores, or `evaluate --out`

`agree` and `speed` export the model for transformers, on the same weights in float32. `agree`
compares the log-likelihoods of every question, each of which transformers computes on its own, the
generated text of bbh, and with --text FILE the log-probability of every token of a text.
`speed` times `loglikelihood` of the hf backend of lm-evaluation-harness against that of jaxgpt,
with the same requests and as many rows to a batch, after a first pass that is timed separately.
`scores` goes on with the tasks that its file lacks.
"""

import argparse
import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxgpt.evaluate.tasks import Shown

TASKS = "blimp,mmlu,truthfulqa,wic,winobias"
# Questions of each group, 0 = all: what 135 million parameters answer on two cores in ten minutes.
LIMITS = {
    "blimp": 10, "wic": 0, "winobias": 100, "mmlu": 3, "mmlu_cloze": 3, "truthfulqa": 3, "bbh": 2,
}  # fmt: skip
UNLISTED = ("confidence", "log_likelihood", "word_perplexity")  # of the metrics in a table


def export(run: str, folder: str):
    """Write a model for transformers, and return it as jaxgpt reads it."""
    import jaxgpt
    from jaxgpt.interop import convert, huggingface

    model = jaxgpt.load(run, dtype="float32")
    huggingface.write_folder(convert.to_archive(model), folder)
    return model


def read_requests(args: argparse.Namespace) -> "dict[str, Shown]":
    """Return the questions of each task."""
    from jaxgpt.evaluate.tasks import find_task, read_questions

    found = {}
    for name in args.tasks.split(","):
        shots = args.shots if find_task(name).most_shots else None
        found[name] = read_questions(name, args.data, args.limit, shots)
    return found


# --- agreement -------------------------------------------------------------------------------


class Peer:
    """The same model in transformers, which computes one row at a time, without a cache."""

    def __init__(self, folder: str):
        import transformers

        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype="float32").eval()
        self.encode = transformers.AutoTokenizer.from_pretrained(folder)
        self.compute_logprobs = functools.lru_cache(8)(self._compute_logprobs)

    def _compute_logprobs(self, row: tuple[int, ...], count: int):
        """Return the log-probabilities after the last tokens of a row, float64 [count V]."""
        import torch

        with torch.no_grad():
            logits = self.model(torch.tensor([row]), logits_to_keep=count).logits[0]
        return logits.double().log_softmax(-1)

    def score_tokens(self, before: Sequence[int], after: Sequence[int]):
        """Return the log-probability of each token, [n], and whether all are the likeliest."""
        import torch

        logprobs = self.compute_logprobs((*before, *after)[:-1], len(after))
        targets = torch.tensor(after)
        found = logprobs.gather(1, targets[:, None])[:, 0]
        return found.numpy(), bool((logprobs.argmax(-1) == targets).all())

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether it is the likeliest."""
        if context:
            before = self.encode(context)["input_ids"]
            after = self.encode(context + continuation)["input_ids"][len(before) :]
        else:
            before = [self.encode.bos_token_id]
            after = self.encode(continuation, add_special_tokens=False)["input_ids"]
        longest = self.model.config.max_position_embeddings
        before = before[-(longest + 1 - len(after)) :]
        found, is_greedy = self.score_tokens(before, after)
        return float(found.sum()), is_greedy

    def generate(self, prompt: str, tokens: int, stops: Sequence[str]) -> str:
        """Return the text that greedy decoding adds to a prompt, up to one of the stops."""
        import torch

        row = torch.tensor([self.encode(prompt)["input_ids"]])
        with torch.no_grad():
            found = self.model.generate(
                row, max_new_tokens=tokens, do_sample=False, stop_strings=list(stops),
                tokenizer=self.encode, attention_mask=torch.ones_like(row),
                pad_token_id=self.encode.eos_token_id,
            )  # fmt: skip
        text = self.encode.decode(found[0, row.shape[1] :], skip_special_tokens=True)
        for stop in stops:
            text = text.partition(stop)[0]
        return text


def agree(args: argparse.Namespace):
    """Print how far the numbers are from those of transformers, question by question."""
    from jaxgpt.evaluate.tasks import find_task

    with tempfile.TemporaryDirectory() as folder:
        model = export(args.run, folder)
        peer = Peer(folder)
    print(f"{'task':12} {'questions':>9} {'texts':>6} {'same answers':>12} "
          f"{'largest difference, nats':>25} {'relative':>9} {'same greedy':>11}")  # fmt: skip
    for name, shown in read_requests(args).items() if args.tasks else ():
        compare = compare_generated if find_task(name).generates else compare_likelihoods
        print(f"{name:12} {compare(model, peer, name, shown.questions)}", flush=True)
    if args.text:
        print(f"{'perplexity':12} {compare_perplexity(model, peer, args.text)}", flush=True)


def compare_likelihoods(model, peer: Peer, name: str, questions) -> str:
    """Return a line about the log-likelihoods of all texts of a task."""
    from jaxgpt.evaluate.likelihood import compute_likelihoods

    requests = [request for question in questions for request in question.requests]
    found = compute_likelihoods(model.config, model.params, model.tokenizer, requests)
    expected = [peer.score(*request) for request in requests]
    gaps = [abs(x.total - y) for x, (y, _) in zip(found, expected, strict=True)]
    parts = [gap / abs(y) for gap, (y, _) in zip(gaps, expected, strict=True)]
    same = count_same(questions, [x.total for x in found], [y for y, _ in expected])
    greedy = sum(x.is_greedy == y for x, (_, y) in zip(found, expected, strict=True))
    return (f"{len(questions):>9} {len(requests):>6} {same:>12} {max(gaps):>25.1e} "
            f"{max(parts):>9.0e} {greedy:>11}")  # fmt: skip


def compare_generated(model, peer: Peer, name: str, questions) -> str:
    """Return a line about the generated answers of a task."""
    from jaxgpt.evaluate.run import count_answer_tokens, generate_answers
    from jaxgpt.evaluate.tasks import find_task
    from jaxgpt.score import BATCH_TOKENS

    found, _ = generate_answers(model, find_task(name), questions, BATCH_TOKENS)
    tokens = count_answer_tokens(model, questions)
    same = sum(
        peer.generate(question.prompt, tokens, question.stop) == given["text"]
        for question, given in zip(questions, found, strict=True)
    )
    return f"{len(questions):>9} {len(questions):>6} {same:>12}"


def compare_perplexity(model, peer: Peer, path: str) -> str:
    """Return a line about the log-probability of each token of texts."""
    import numpy as np

    from jaxgpt.evaluate.texts import read_texts, roll_windows, score_rolling

    texts = read_texts(path)
    expected, context = [], model.config.model.context
    for text in texts:
        ids = peer.encode(text, add_special_tokens=False)["input_ids"]
        for before, after in roll_windows(ids, peer.encode.bos_token_id, context):
            expected.append(peer.score_tokens(before, after)[0])
    x, y = (np.concatenate(part) for part in (score_rolling(model, texts), expected))
    total, largest = abs(x.sum() - y.sum()) / -y.sum(), abs(x - y).max()
    print(f"perplexity: {np.exp(-x.mean()):.6f} here, {np.exp(-y.mean()):.6f} in transformers")
    return f"{len(x):>9} {len(texts):>6} {'':>12} {largest:>25.1e} {total:>9.0e}"


def count_same(questions, mine: Sequence[float], theirs: Sequence[float]) -> int:
    """Return for how many questions both models prefer the same text."""
    same, start = 0, 0
    for question in questions:
        end = start + len(question.requests)
        a, b = mine[start:end], theirs[start:end]
        same += a.index(max(a)) == b.index(max(b))
        start = end
    return same


# --- speed -----------------------------------------------------------------------------------


def speed(args: argparse.Namespace):
    """Print the time of the same requests in lm-evaluation-harness's hf backend and here."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from jaxgpt.evaluate.harness import JaxgptLM
    from jaxgpt.evaluate.likelihood import round_up
    from jaxgpt.evaluate.tasks import find_task

    for name in args.tasks.split(","):
        if find_task(name).generates:
            raise SystemExit(f"{name} is generated, and has no likelihoods to time")

    with tempfile.TemporaryDirectory() as folder:
        export(args.run, folder)
        theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=args.rows)
        mine = JaxgptLM(folder)
        print(f"{'task':12} {'texts':>6} {'tokens':>7} {'hf s':>8} {'jaxgpt s':>9} {'ratio':>6} "
              f"{'first pass':>11} {'largest difference':>19}")  # fmt: skip
        for name, shown in read_requests(args).items():
            requests = [request for question in shown.questions for request in question.requests]
            instances = [Instance("loglikelihood", {}, request, n)
                         for n, request in enumerate(requests)]  # fmt: skip
            lengths = [len(theirs.tok_encode(a + b)) for a, b in requests]
            mine.batch_tokens = args.rows * round_up(max(lengths))
            times, answers = {}, {}
            for label, model in (("first", mine), ("jaxgpt", mine), ("hf", theirs)):
                start = time.perf_counter()
                answers[label] = model.loglikelihood(instances, disable_tqdm=True)
                times[label] = time.perf_counter() - start
            gaps = [abs(x[0] - y[0]) for x, y in zip(answers["jaxgpt"], answers["hf"], strict=True)]
            ratio = times["hf"] / times["jaxgpt"]
            print(f"{name:12} {len(requests):>6} {sum(lengths):>7,} {times['hf']:>8.1f} "
                  f"{times['jaxgpt']:>9.1f} {ratio:>6.2f} {times['first']:>11.1f} "
                  f"{max(gaps):>19.1e}", flush=True)  # fmt: skip


def random(args: argparse.Namespace):
    """Save a model of the shape and tokenizer of another one, with initial random parameters."""
    import jax

    import jaxgpt
    from jaxgpt.model import init_params

    model = jaxgpt.load(args.run)
    params, _ = init_params(model.config.model, jax.random.key(0))
    jaxgpt.save(dataclasses.replace(model, params=params, step=0, origin=""), args.out)
    print(f"{args.out}: {model.config.name}, untrained")


def scores(args: argparse.Namespace):
    """Evaluate a model on the tasks of LIMITS, and on --text, and write what it scores."""
    import jaxgpt
    from jaxgpt.compile_cache import enable_compile_cache
    from jaxgpt.evaluate import evaluate_task, measure_perplexity
    from jaxgpt.evaluate.run import format_result
    from jaxgpt.evaluate.texts import PERPLEXITY, read_texts

    enable_compile_cache()
    content = {"run": args.run, "tasks": {}}
    if os.path.exists(args.out):
        with open(args.out, encoding="utf-8") as file:
            content = json.load(file)
    kind = {"dtype": "float32"} if os.path.isfile(args.run) else {}
    model = jaxgpt.load(args.run, **kind)
    for name in [*([PERPLEXITY] if args.text else []), *LIMITS]:
        if name in content["tasks"]:
            continue
        if name == PERPLEXITY:
            found = measure_perplexity(model, read_texts(args.text))
        else:
            found = evaluate_task(model, name, folder=args.data, limit=LIMITS[name])
        print(format_result(found), flush=True)
        values = found.to_json()
        content["tasks"][name] = {k: v for k, v in values.items() if k not in ("answers", "groups")}
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)


def table(args: argparse.Namespace):
    """Print a table of Markdown: metrics by model, with standard errors and chance."""
    files = []
    for path in (args.run, *([args.out] if args.out else []), *args.more):
        with open(path, encoding="utf-8") as file:
            files.append(json.load(file))
    names = [content["run"].rstrip("/").rpartition("/")[2] for content in files]
    print("| task | questions | metric | chance | " + " | ".join(names) + " |")
    print("|---|---|---|---|" + "---|" * len(names))
    for task, first in files[0]["tasks"].items():
        for metric, one in first["metrics"].items():
            if metric in UNLISTED:
                continue
            cells = [content["tasks"].get(task, {"metrics": {}})["metrics"].get(metric)
                     for content in files]  # fmt: skip
            texts = [f"{x['value']:.3f} ± {x['error']:.3f}" if x and x["error"] is not None else "-"
                     for x in cells]  # fmt: skip
            chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
            subset = first["subset"].replace(" of each of ", " of ").replace(" groups", "")
            print(f"| {task} | {subset} | {metric} | {chance} | {' | '.join(texts)} |")


def main():
    """Run one of the actions."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    actions = {"agree": agree, "speed": speed, "random": random, "scores": scores, "table": table}
    parser.add_argument("action", choices=actions)
    parser.add_argument("run", help="a model; a file of results for table")
    parser.add_argument("out", nargs="?", help="of random: the new run; of scores: its file")
    parser.add_argument("more", nargs="*", help="of table: more files")
    parser.add_argument("--data", default="", help="the folder of the benchmarks' files")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=1, help="questions of each group (1)")
    parser.add_argument("--shots", type=int, help="worked examples, as published")
    parser.add_argument("--text", default="", help="of agree, scores: a text")
    parser.add_argument("--rows", type=int, default=16, help="of a batch (16)")
    args = parser.parse_args()
    actions[args.action](args)


if __name__ == "__main__":
    main()
