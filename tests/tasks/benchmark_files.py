"""The files of small benchmarks, in the forms in which the real ones are published."""

import csv
import gzip
import json
import pathlib
import random

NOUNS = ("cat", "dog", "owl", "fox", "hen", "cow", "pig", "ant")
VERBS = ("eats", "sees", "hits", "gets")


def write_benchmarks(root: pathlib.Path, pairs: int = 6) -> pathlib.Path:
    """Write the files of every task below a folder, and return it.

    The choices of a question have equal lengths, so that a random model is at chance.
    """
    dice = random.Random(0)
    for writer in (write_blimp, write_mmlu, write_truthfulqa, write_bbh, write_wic, write_winobias):
        writer(root, dice, pairs)
    return root


def make_folder(root: pathlib.Path, name: str) -> pathlib.Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_blimp(root, dice, pairs):
    folder = make_folder(root, "blimp")
    for number, (name, term) in enumerate((("one", "islands"), ("two", "agreement"))):
        rows = []
        for pair in range(pairs):
            a, b = dice.sample(NOUNS, 2)
            verb = dice.choice(VERBS)
            good, bad = f"{a} {verb} {b}", f"{b} {verb} {a}"
            rows.append(dict(sentence_good=good, sentence_bad=bad, UID=name,
                             linguistics_term=term, pairID=str(pair)))  # fmt: skip
        text = "\n".join(map(json.dumps, rows)) + "\n"
        if number:
            (folder / f"{name}.jsonl").write_text(text)
        else:
            with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
                file.write(text)


def write_mmlu(root, dice, pairs):
    folder = make_folder(root, "mmlu")
    for part, count in (("dev", 5), ("test", pairs)):
        make_folder(folder, part)
        for subject, is_published in (("bird_law", True), ("maths", False)):
            rows = []
            for number in range(count):
                answer = dice.randrange(4)
                letter = "ABCD"[answer] if is_published else answer
                rows.append([f"{subject} {number}?", *dice.sample(NOUNS, 4), letter])
            header = [] if is_published else [["question", *"0123", "answer"]]
            with open(folder / part / f"{subject}_{part}.csv", "w", newline="") as file:
                csv.writer(file).writerows(header + rows)


def write_truthfulqa(root, dice, pairs):
    rows = []
    for number in range(pairs):
        words = dice.sample(NOUNS, 5)
        rows.append([f"Who {number}?", words[0], "; ".join(words[:2]), "; ".join(words[2:]),
                     "xy"[number % 2]])  # fmt: skip
    path = make_folder(root, "truthfulqa") / "TruthfulQA.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        columns = ["Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Category"]
        csv.writer(file).writerows([columns, *rows])


def write_bbh(root, dice, pairs):
    folder = make_folder(root, "bbh")
    for name in ("boolean_expressions", "date_understanding"):
        options = "\nOptions:\n(A) 1\n(B) 2\n(C) 3\n(D) 4" if name.startswith("date") else ""
        rows = [dict(input=f"{n} is{options}", target=dice.choice(("(A)", "(B)")))
                for n in range(pairs)]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps({"examples": rows}))


def write_wic(root, dice, pairs):
    rows = [
        dict(word="cat", sentence1="a cat", sentence2="cats", start1=2, end1=5, start2=0, end2=4,
             idx=n, label=dice.choice((True, "false")))
        for n in range(pairs)
    ]  # fmt: skip
    path = make_folder(root, "wic") / "val.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))


def write_winobias(root, dice, pairs):
    folder = make_folder(root, "winobias")
    jobs = {"male": ["cook", "driver"], "female": ["maid", "nurse"]}
    for kind, names in jobs.items():
        (folder / f"{kind}_occupations.txt").write_text("\n".join(names))
    for kind in ("type1", "type2"):
        lines = {"pro": [], "anti": []}
        for number in range(1, pairs + 1):
            man, woman = dice.choice(jobs["male"]), dice.choice(jobs["female"])
            for side, pronoun in (("pro", "she"), ("anti", "he")):
                lines[side].append(f"{number} The {man} met [the {woman}] as [{pronoun}] ran.")
        for side, found in lines.items():
            path = folder / f"{side}_stereotyped_{kind}.txt.test"
            path.write_text("\n".join(found) + "\n")
