"""Benchmarks of the benchmarks: agreement with transformers, speed, a random model, tables.

    python -m benchmarks.evaluate agree model.gguf --data FOLDER --limit 1
    python -m benchmarks.evaluate speed model.gguf --data FOLDER --rows 16
    python -m benchmarks.evaluate random model.gguf runs/random    a model of its shape, untrained
    python -m benchmarks.evaluate table a.json b.json              of `jaxgpt evaluate --out`

`agree` and `speed` export the model for transformers, on the same weights in float32. `agree`
compares the log-likelihoods of every question, each of which transformers computes on its own.
`speed` times `loglikelihood` of the hf backend of lm-evaluation-harness against that of jaxgpt,
with the same requests and as many rows to a batch, after a first pass that is timed separately.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence

TASKS = "blimp,mmlu,truthfulqa,wic,winobias"


def export(run: str, folder: str):
    """Write a model for transformers, and return it as jaxgpt reads it."""
    import jaxgpt
    from jaxgpt.interop import convert, huggingface

    model = jaxgpt.load(run, dtype="float32")
    huggingface.write_folder(convert.to_archive(model), folder)
    return model


def read_requests(args: argparse.Namespace) -> dict[str, list]:
    """Return the questions of each task."""
    from jaxgpt.evaluate.tasks import find_task, read_questions

    found = {}
    for name in args.tasks.split(","):
        if find_task(name).generates:
            raise SystemExit(f"{name} is generated, and has no likelihoods to compare")
        found[name] = read_questions(name, args.data, args.limit).questions
    return found


def agree(args: argparse.Namespace):
    """Print how far the likelihoods are from those of transformers, question by question."""
    import torch
    import transformers

    from jaxgpt.evaluate.likelihood import compute_likelihoods

    with tempfile.TemporaryDirectory() as folder:
        model = export(args.run, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        encode = transformers.AutoTokenizer.from_pretrained(folder)

    def score(context: str, continuation: str) -> tuple[float, bool]:
        before = encode(context)["input_ids"] if context else [encode.bos_token_id]
        whole = encode(context + continuation)["input_ids"]
        after = whole[len(before) :] if context else encode(
            continuation, add_special_tokens=False)["input_ids"]  # fmt: skip
        with torch.no_grad():
            row = torch.tensor([(before + after)[:-1]])
            logits = theirs(row, logits_to_keep=len(after)).logits[0].double()
        targets = torch.tensor(after)
        total = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        return float(total), bool((logits.argmax(-1) == targets).all())

    print(f"{'task':12} {'questions':>9} {'texts':>6} {'largest difference, nats':>25} "
          f"{'relative':>9} {'same answers':>13}")  # fmt: skip
    for name, questions in read_requests(args).items():
        requests = [request for question in questions for request in question.requests]
        found = compute_likelihoods(model.config, model.params, model.tokenizer, requests)
        expected = [score(*request) for request in requests]
        gaps = [abs(x.total - y) for x, (y, _) in zip(found, expected, strict=True)]
        parts = [abs(x.total - y) / abs(y) for x, (y, _) in zip(found, expected, strict=True)]
        same = count_same(questions, [x.total for x in found], [y for y, _ in expected])
        same_greedy = sum(x.is_greedy == y for x, (_, y) in zip(found, expected, strict=True))
        print(f"{name:12} {len(questions):>9} {len(requests):>6} {max(gaps):>25.2e} "
              f"{max(parts):>9.1e} {same:>6} of {len(questions)}; greedy {same_greedy} of "
              f"{len(requests)}", flush=True)  # fmt: skip


def count_same(questions, mine: Sequence[float], theirs: Sequence[float]) -> int:
    """Return for how many questions both models prefer the same text."""
    same, start = 0, 0
    for question in questions:
        end = start + len(question.requests)
        a, b = mine[start:end], theirs[start:end]
        same += a.index(max(a)) == b.index(max(b))
        start = end
    return same


def speed(args: argparse.Namespace):
    """Print the time of the same requests in lm-evaluation-harness's hf backend and here."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from jaxgpt.evaluate.harness import JaxgptLM
    from jaxgpt.evaluate.likelihood import round_up

    with tempfile.TemporaryDirectory() as folder:
        export(args.run, folder)
        theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=args.rows)
        mine = JaxgptLM(folder)
        print(f"{'task':12} {'texts':>6} {'tokens':>7} {'hf s':>8} {'jaxgpt s':>9} {'ratio':>6} "
              f"{'first pass':>11} {'largest difference':>19}")  # fmt: skip
        for name, questions in read_requests(args).items():
            requests = [request for question in questions for request in question.requests]
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
            cells = [content["tasks"].get(task, {"metrics": {}})["metrics"].get(metric)
                     for content in files]  # fmt: skip
            texts = [f"{x['value']:.3f} ± {x['error']:.3f}" if x and x["error"] is not None else "-"
                     for x in cells]  # fmt: skip
            chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
            print(f"| {task} | {first['subset']} | {metric} | {chance} | {' | '.join(texts)} |")


def main():
    """Run one of the actions."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    actions = {"agree": agree, "speed": speed, "random": random, "table": table}
    parser.add_argument("action", choices=actions)
    parser.add_argument("run", help="a model; a file of results for table")
    parser.add_argument("out", nargs="?", help="of random: the new run; of table: another file")
    parser.add_argument("more", nargs="*", help="of table: more files")
    parser.add_argument("--data", default="", help="the folder of the benchmarks' files")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=1, help="questions of each group (1)")
    parser.add_argument("--rows", type=int, default=16, help="of a batch (16)")
    args = parser.parse_args()
    actions[args.action](args)


if __name__ == "__main__":
    main()
