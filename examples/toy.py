"""Toy data for tuning a model on two cores, and what the tuned model makes of it.

    python examples/toy.py write toy                    chat.jsonl, preferences.jsonl, ... in toy/
    python examples/toy.py check runs/toy_chat          how many answers end, and have the format
    python examples/toy.py compare runs/toy_chat DIR    logits of transformers, or of peft, for an
                                                        export of it

The questions are sums in words; an answer has the format "Result: 7." Configs: toy_chat.py and
toy_preference.py in this folder. `reward` is for train.objective=online.
"""

import json
import os
import random
import re
import sys

QUESTIONS = ("What is {} plus {}?", "Add {} and {}.", "{} + {} = ?", "Please add {} to {}.")
REJECTED = (
    "The sum of {} and {} is {}, of course!",
    "Well, {} and {} make {} I think",
    "{}, {}: {}",
)
FORMAT = re.compile(r"Result: -?\d+\.")


def make_records(count: int, seed: int) -> list[dict]:
    """Return records that have a question, an answer, its format, and one in another format."""
    dice, records = random.Random(seed), []
    for _ in range(count):
        a, b = dice.randrange(50), dice.randrange(50)
        records.append({
            "prompt": dice.choice(QUESTIONS).format(a, b),
            "answer": a + b,
            "completion": f"Result: {a + b}.",
            "rejected": dice.choice(REJECTED).format(a, b, a + b),
        })  # fmt: skip
    return records


def write(folder: str, count: str = "400"):
    """Write the three files."""
    os.makedirs(folder, exist_ok=True)
    records = make_records(int(count), seed=0)
    files = {
        "chat.jsonl": [{key: r[key] for key in ("prompt", "completion")} for r in records],
        "preferences.jsonl": [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["rejected"]}
            for r in records
        ],
        "prompts.jsonl": [{key: r[key] for key in ("prompt", "answer")} for r in records],
    }
    for name, rows in files.items():
        with open(os.path.join(folder, name), "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{count} records each in {', '.join(files)} of {folder}")


def reward(record: dict, answer: str) -> float:
    """Return 0.5 for the format, and 0.5 more if the sum is right."""
    if not FORMAT.fullmatch(answer.strip()):
        return 0.0
    return 1.0 if re.findall(r"-?\d+", answer)[0] == str(record["answer"]) else 0.5


def check(run: str, count: str = "40"):
    """Print how many greedy answers to new questions end by themselves, and have the format."""
    import jaxgpt

    model, records = jaxgpt.load(run), make_records(int(count), seed=1)
    prompts = [
        model.tokenizer.encode_chat(
            [{"role": "user", "content": record["prompt"]}], add_generation_prompt=True
        )
        for record in records
    ]
    answers = model.generate(prompts, temperature=0.0, tokens=32)
    ended = sum(answer.ending == "eos" for answer in answers)
    formatted = sum(bool(FORMAT.fullmatch(answer.text.strip())) for answer in answers)
    right = sum(reward(r, a.text) == 1.0 for r, a in zip(records, answers, strict=True))
    print(f"of {count} greedy answers of {run}: {ended} end by themselves, {formatted} have the "
          f"format, {right} are right")  # fmt: skip
    print(f"{records[0]['prompt']!r} -> {answers[0].text!r}")


def compare(run: str, folder: str):
    """Print how far the logits of transformers or peft are from ours, for a conversation."""
    import numpy as np
    import torch
    import transformers

    import jaxgpt
    from jaxgpt.model import build, compute_logits
    from jaxgpt.score import make_whole_coords

    ours = jaxgpt.load(run)
    where, library = folder, transformers.AutoModelForCausalLM
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        import peft

        library = peft.AutoPeftModelForCausalLM
        where = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
    theirs = library.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    messages = [{"role": "user", "content": "What is 3 plus 4?"},
                {"role": "assistant", "content": "Result: 7."}]  # fmt: skip
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == ours.tokenizer.encode_chat(messages).tolist(), "the templates differ"
    tokens = np.array([ids], np.int32)
    hidden, _ = build(ours.config.model).apply(
        {"params": ours.params}, tokens, make_whole_coords(ours.config.model, tokens)
    )
    found = np.asarray(compute_logits(ours.config.model, ours.params, hidden))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.astype(np.int64))).logits.float().numpy()
    ends = theirs.generation_config.eos_token_id
    print(f"logits differ by at most {np.abs(found - expected).max():.1e}, of a spread of "
          f"{expected.std():.1f}; texts end at {ends}")  # fmt: skip


if __name__ == "__main__":
    commands = {"write": write, "check": check, "compare": compare}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
