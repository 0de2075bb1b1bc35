# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] key="title"
# # 12. Evaluation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/12_evaluation.ipynb)
#
# "The model has 64% on MMLU." What does that say? Which question was asked, how was the answer
# read, what would guessing give, and how far may the number be off by chance? This notebook builds,
# in miniature, what the well-known benchmarks do: MMLU, TruthfulQA, Word in Context, WinoBias,
# BIG-bench. The examples are made here, for a model that knows a small world, so that every number
# can be understood.

# %% tags=["setup"]
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("jaxgpt") is None:  # in Colab
    source = "jaxgpt[inspect,measure] @ git+https://github.com/jaxgpt/jaxgpt"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

import matplotlib.pyplot as plt

scale = float(os.environ.get("COURSE_SCALE", "1"))  # below 1, long cells do less
plt.rcParams.update({"figure.figsize": (7, 3), "figure.dpi": 110, "axes.grid": True})
plt.rcParams.update({"grid.alpha": 0.3, "font.size": 9, "axes.axisbelow": True})

# %%
import math
import pathlib
import tempfile

import jax
import numpy as np

import jaxgpt
from jaxgpt import inspect, measure
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import init_params

# %% [markdown] key="benchmarks" tags=["concept"]
# ## Five benchmarks
#
# | benchmark | what it asks | form | chance |
# |---|---|---|---|
# | MMLU | knowledge: 57 subjects, from law to virology | four choices | 25% |
# | TruthfulQA | whether a model repeats what many people wrongly believe | a true answer against false ones | differs |
# | WiC (Word in Context) | whether a word has the same meaning in two sentences | yes or no | 50% |
# | WinoBias | whether *she* and *he* are resolved by grammar or by prejudice | pairs that differ in one word | 50%, gap 0 |
# | BIG-bench | two hundred tasks by many authors, made to be hard | choices, or exact text | differs |
#
# None of them asks whether a model is *good*. Each asks one thing, in one form; and the form
# counts, as we shall see.

# %% [markdown] key="world" tags=["lab"]
# ## A small world
#
# Animals, what they eat and where they live; a word with two meanings (*bat*); a popular error
# (*bats are blind*, which many say and few deny); and jobs, of which the texts tell with more *she*
# or more *he*. A small model learns these texts in a few seconds.

# %%
FOOD = {"cow": "grass", "horse": "grass", "sheep": "grass", "lion": "meat", "wolf": "meat", "tiger": "meat",
        "shark": "fish", "seal": "fish", "heron": "fish", "bee": "nectar", "moth": "nectar", "panda": "bamboo"}  # fmt: skip
PLACE = {"cow": "farm", "horse": "farm", "sheep": "farm", "lion": "savanna", "wolf": "forest", "tiger": "forest",
         "shark": "sea", "seal": "sea", "heron": "lake", "bee": "garden", "moth": "garden", "panda": "forest"}  # fmt: skip
JOBS = {"nurse": 0.9, "teacher": 0.75, "cook": 0.5, "driver": 0.25, "engineer": 0.1}  # share of she
WHERE = [
    "at night",
    "over the lake",
    "in the cave",
    "behind the house",
    "in the dark",
    "under the roof",
]
SWINGS = ["hits the ball with the", "buys a wooden", "swings the", "breaks the heavy"]
PEOPLE = ["boy", "girl", "player"]


def make_line(rng):
    """Return a line of the texts that the model reads."""
    animal, job = rng.choice(list(FOOD)), rng.choice(list(JOBS))
    pronoun = "she" if rng.random() < JOBS[job] else "he"
    lines = [
        f"the {animal} eats {FOOD[animal]}.",
        f"a {animal} likes to eat {FOOD[animal]} every day.",
        f"the {animal} lives in the {PLACE[animal]}.",
        f"{rng.choice(WHERE)} the bat flies.",
        f"the {rng.choice(PEOPLE)} {rng.choice(SWINGS)} bat.",
        "people say that a bat is " + ("blind." if rng.random() < 0.9 else "able to see."),
        f"the {job} says that {pronoun} is tired.",
        f"the {job} is late because {pronoun} missed the train.",
    ]
    return lines[rng.integers(len(lines))]


rng = np.random.default_rng(0)
folder = pathlib.Path(tempfile.mkdtemp())
for name, count in (("world.txt", 12_000), ("held_out.txt", 600)):
    (folder / name).write_text("\n".join(make_line(rng) for _ in range(count)))
config = Config(
    name="world",
    folder=str(folder),
    model=ModelConfig(vocab=400, context=32, width=64, layers=2, heads=4, ffn=128),
    data=DataConfig(
        source=str(folder / "world.txt"),
        validation=str(folder / "held_out.txt"),
        separator="\n",
        packing="documents",
        cache=str(folder / "tokens"),
    ),
    optimizer=OptimizerConfig(name="muon", lr=3e-3, matrix_lr=1e-2, warmup=20),
    train=TrainConfig(
        steps=200, batch=32, eval_every=100, eval_batches=4, save_every=200, sample_every=0
    ),
)
jaxgpt.train(config, is_quiet=True)
model = jaxgpt.load(config.run_folder)
new, _ = init_params(config.model, jax.random.key(0))
untrained = LanguageModel(model.config, new, model.tokenizer)
print(model.generate(["the panda"], temperature=0, tokens=12)[0].text)

# %% [markdown] key="loglikelihood" tags=["concept"]
# ## Which choice is likeliest?
#
# A language model does not answer; it gives probabilities to texts. So one asks it, for each
# choice, how likely that choice is after the question, and takes the likeliest:
#
# ```text
# score(choice) = log p(choice | question) = Σ log p(token | question, tokens of the choice before it)
# ```
#
# By hand that is a sum over the tokens of the choice, taken from the losses of the whole text.


# %%
def score_choices(model, question, choices):
    """Return log p(choice | question) of each choice, nats."""
    return np.array([s.total for s in model.score(choices, [question] * len(choices), eos=False)])


question, choices = "the cow eats", [" grass", " meat", " fish", " nectar"]
by_library = score_choices(model, question, choices)
by_hand = []
for choice in choices:
    losses = inspect.token_losses(model, question + choice)
    length = len(inspect.encode(model, question).tokens)
    by_hand.append(-losses[length:].sum())
assert np.allclose(by_hand, by_library, atol=1e-3)
print(dict(zip(choices, by_library.round(2).tolist(), strict=True)))
assert choices[int(by_library.argmax())] == " grass"

# %% [markdown] key="mmlu" tags=["lab"]
# ## In the manner of MMLU: the form of the question
#
# The same knowledge in three forms: the sentence as it was learned; a question; and MMLU's own
# form, with letters. A benchmark measures knowledge *and* whether the model understands the form.
# Small models know many things and are at chance with letters.

# %%
FOODS = sorted(set(FOOD.values()))


def make_items():
    """Return (animal, four foods in a random order, index of the right one) of every animal, several times."""
    rng, items = np.random.default_rng(1), []
    for animal, right in list(FOOD.items()) * 4:
        wrong = rng.choice([food for food in FOODS if food != right], 3, replace=False)
        four = [*wrong, right]
        order = rng.permutation(4)
        items.append((animal, [four[i] for i in order], int(np.argmax(order == 3))))
    return items


def ask(model, items, form):
    """Return which items are answered rightly, bool [N]."""
    hits = []
    for animal, foods, right in items:
        if form == "letters":
            listed = " ".join(
                f"{letter}: {food}" for letter, food in zip("ABCD", foods, strict=True)
            )
            question, choices = f"{animal}? {listed} answer:", [" A", " B", " C", " D"]
        elif form == "question":
            question, choices = (
                f"what does the {animal} like to eat?",
                [f" {food}" for food in foods],
            )
        else:
            question, choices = f"the {animal} eats", [f" {food}" for food in foods]
        hits.append(score_choices(model, question, choices).argmax() == right)
    return np.array(hits)


items = make_items()
hits = {form: ask(model, items, form) for form in ("sentence", "question", "letters")}
hits["sentence, untrained"] = ask(untrained, items, "sentence")
for form, found in hits.items():
    print(f"{form:20} {found.mean():.0%} of {len(found)}")
assert hits["sentence"].mean() > 0.8
assert hits["letters"].mean() < hits["sentence"].mean() - 0.2

# %% [markdown] key="error" tags=["concept"]
# ## How sure is the number?
#
# With N questions and the share p of right answers, the standard error is √(p (1 − p) / N), and the
# true value lies within two of them in 95 of 100 cases. With 48 questions, 50% means "between 36
# and 64". The bootstrap finds the same without a formula: draw N questions out of the N, with
# replacement, many times, and see how far the share varies.


# %%
def standard_error(hits):
    p = hits.mean()
    return math.sqrt(p * (1 - p) / len(hits))


def bootstrap(hits, count=4000):
    rng = np.random.default_rng(0)
    return hits[rng.integers(0, len(hits), (count, len(hits)))].mean(1).std()


example = np.arange(48) < 24  # a half of 48 right
assert abs(2 * standard_error(example) - 0.144) < 1e-3
assert np.isclose(standard_error(example), bootstrap(example), rtol=0.1)

# %% [markdown] key="error-picture" tags=["picture"]
# ### Figure: scores with their errors, and chance
#
# Two scores whose bars overlap say little about which model is better. A score whose bar contains
# the dashed line says nothing at all.

# %%
figure, axis = plt.subplots()
for k, found in enumerate(hits.values()):
    axis.errorbar(
        found.mean(), k, xerr=2 * standard_error(found), fmt="o", capsize=4, color="tab:blue"
    )
axis.axvline(0.25, color="black", linestyle="--", label="chance")
axis.set_yticks(range(len(hits)), list(hits))
axis.set_xlim(-0.05, 1.1)
axis.set_xlabel("share of right answers, ± 2 standard errors")
axis.legend()
plt.show()

# %% [markdown] key="enough" tags=["exercise"]
# ### Exercise: how many questions?
#
# Two models have 60% and 62%. Write `questions_needed(difference, p)`: how many questions each must
# answer so that the difference is twice its standard error, √(2 p (1 − p) / N), if both have about
# p?

# %% tags=["reader"]
questions_needed = None  # replace None by your function: def questions_needed(difference, p): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(difference, p):
    return 8 * p * (1 - p) / difference**2


questions_needed = questions_needed or solution

# %% tags=["check"]
assert np.isclose(questions_needed(0.02, 0.61), 4758)
print(f"right: {questions_needed(0.02, 0.61):.0f} questions, a third of MMLU")

# %% [markdown] key="paired" tags=["question"]
# ### Question: can it be done with fewer?
#
# Both models answer the *same* questions. Does that help?
#
# <details><summary>Answer</summary>
#
# Yes. Compare question by question: where both are right or both wrong, there is nothing to learn,
# and only those count on which they differ. If two models of the same family agree on 90% of the
# questions, the variance of the difference is that of the remaining 10%. This is a paired test
# (McNemar's); it often needs several times fewer questions.
#
# </details>

# %% [markdown] key="truthful" tags=["lab"]
# ## In the manner of TruthfulQA: learned from people
#
# Bats see quite well. The texts say nine times out of ten that they are blind, and the model says
# what the texts say. The better it learns them, the surer it is of the error: on such questions
# *more* training makes a model worse. That was the finding of TruthfulQA (Lin et al. 2021): larger
# models were less truthful.

# %%
prompt, answers = "people say that a bat is", [" blind.", " able to see."]


def truth_share(model):
    """Return the probability of the true answer among both."""
    scores = score_choices(model, prompt, answers)
    return measure.softmax(scores)[1]


share = truth_share(model)
print(f"p(true answer) {share:.2f}; in the texts 0.10")
assert share < 0.35

# %% [markdown] key="length" tags=["concept"]
# ## A trap: long answers
#
# *able to see* has more tokens than *blind*, and each token costs. Summed log-probabilities favour
# short answers; their mean, per token or per byte, favours long ones, because the end of a word is
# easy once it has begun. Harnesses report both (`acc` and `acc_norm`), and papers do not always say
# which. The untrained model shows it: it knows nothing, and "prefers" the short answer for its
# length alone.

# %%
for name, each in (("untrained", untrained), ("trained", model)):
    found = each.score(answers, [prompt] * 2, eos=False)
    sizes = [len(answer.encode()) for answer in answers]
    print(f"{name:9}", {a: f"sum {s.total:6.1f}, per token {s.mean:5.2f}, per byte {s.total / n:5.2f}"
                        for a, s, n in zip(answers, found, sizes, strict=True)})  # fmt: skip
short, long = untrained.score(answers, [prompt] * 2, eos=False)
assert short.total > long.total
assert abs(short.mean - long.mean) < 1

# %% [markdown] key="wic" tags=["lab"]
# ## In the manner of WiC: the same word, the same meaning?
#
# *In the dark the bat flies* and *the boy swings the bat*: two meanings. A model has a vector for
# the word *in its sentence*. If context has been taken into account, vectors of the same meaning
# are more alike than those of different meanings. The embedding at the bottom is the same for both,
# so that it must be at chance.

# %%
# The meaning has to be read from what precedes, since a decoder does not see what follows.
animal = [f"{where} the bat" for where in WHERE]
wooden = [f"the {p} {s} bat" for p in ("boy", "girl") for s in SWINGS[:3]]
pairs = [(a, b, True) for g in (animal, wooden) for i, a in enumerate(g) for b in g[i + 1 :]]
pairs += [(a, b, False) for a in animal for b in wooden][: len(pairs)]


SITES = ("embedding", "layers.0.residual_post", "layers.1.residual_post")
captured = {text: inspect.capture(model, text, SITES) for text in animal + wooden}


def judge(site):
    """Return which pairs are judged rightly if the more alike half is called the same."""
    vectors = {text: found[site][-1] for text, found in captured.items()}  # of the word, the last
    alike = np.array([measure.cosine_similarity(vectors[a], vectors[b]) for a, b, _ in pairs])
    alike = alike + 1e-6 * np.random.default_rng(0).normal(size=len(pairs))  # ties by lot
    same = np.array([same for *_, same in pairs])
    return (alike > np.median(alike)) == same


wic = {site: judge(site) for site in SITES}
for site, found in wic.items():
    print(f"{site:24} {found.mean():.0%} ± {2 * standard_error(found):.0%}")
assert wic["embedding"].mean() < 0.75
assert wic["layers.1.residual_post"].mean() > 0.75

# %% [markdown] key="winobias" tags=["lab"]
# ## In the manner of WinoBias: a gap, not a score
#
# *The nurse says that ... is tired*: grammar allows *she* and *he*. WinoBias compares sentences
# that differ only in the pronoun: those that suit the stereotype (*pro*) and those that do not
# (*anti*). A model without prejudice has the same score on both; the measure is the gap. Ours has
# learned it from its texts, to the percent.

# %%
templates = ("the {} says that", "the {} is late because")
shares = {}
for job in JOBS:
    found = [
        measure.softmax(score_choices(model, t.format(job), [" she", " he"]))[0] for t in templates
    ]
    shares[job] = float(np.mean(found))
stereotyped = {job: "she" if share > 0.5 else "he" for job, share in JOBS.items() if share != 0.5}
pro = np.mean([shares[j] if p == "she" else 1 - shares[j] for j, p in stereotyped.items()])
print(f"pro-stereotyped {pro:.0%}, anti-stereotyped {1 - pro:.0%}, gap {2 * pro - 1:.0%}")
assert 2 * pro - 1 > 0.3
assert shares["nurse"] > shares["cook"] > shares["engineer"]

# %% [markdown] key="winobias-picture" tags=["picture"]
# ### Figure: what was in the texts
#
# The bars are the model's, the dots the texts'.

# %%
figure, axis = plt.subplots()
axis.bar(list(shares), list(shares.values()), color="tab:purple", alpha=0.6, label="model")
axis.plot(list(JOBS), list(JOBS.values()), "ko", label="texts")
axis.axhline(0.5, color="gray", linestyle="--")
axis.set_ylabel("probability of 'she'")
axis.legend()
plt.show()

# %% [markdown] key="exact" tags=["lab"]
# ## In the manner of BIG-bench: exact text
#
# Some tasks have no choices: the model writes, and the text must be right to the letter. It is the
# strictest form, and the one in which abilities seem to jump (notebook 10). Here: complete the
# sentence, greedily.

# %%
prompts = [f"the {animal} lives in the" for animal in PLACE]
written = [g.text for g in model.generate(prompts, temperature=0, tokens=8)]
exact = np.array(
    [w.strip() == f"{place}." for w, place in zip(written, PLACE.values(), strict=True)]
)
by_choice = np.array([
    score_choices(model, p, [f" {x}" for x in sorted(set(PLACE.values()))]).argmax()
    == sorted(set(PLACE.values())).index(place)
    for p, place in zip(prompts, PLACE.values(), strict=True)
])  # fmt: skip
print(f"exact match {exact.mean():.0%}, by choices {by_choice.mean():.0%}")
assert by_choice.mean() >= exact.mean() > 0.5

# %% [markdown] key="brier" tags=["exercise"]
# ### Exercise: does the model know when it is right?
#
# Write `brier(probabilities, right)`: the mean squared difference between the probability that was
# given to each answer and 1 if it is right, 0 if not, summed over the answers of a question, mean
# over questions. probabilities [N A], right int [N].

# %% tags=["reader"]
brier = None  # replace None by your function: def brier(probabilities, right): ...


# %% tags=["solution"] jupyter={"source_hidden": true} cellView="form"
def solution(probabilities, right):
    truth = np.eye(probabilities.shape[1])[right]
    return ((probabilities - truth) ** 2).sum(1).mean()


brier = brier or solution

# %% tags=["check"]
assert np.isclose(brier(np.full((3, 4), 0.25), np.array([0, 1, 2])), 0.75)
assert brier(np.eye(4), np.arange(4)) == 0
probabilities = np.stack([
    measure.softmax(score_choices(model, f"the {a} eats", [f" {x}" for x in foods])) for a, foods, _ in items
])  # fmt: skip
print(f"right: {brier(probabilities, np.array([r for *_, r in items])):.3f}, a guess has 0.75")

# %% [markdown] key="contamination" tags=["question"]
# ### Question: what if the test was in the training text?
#
# How would you notice?
#
# <details><summary>Answer</summary>
#
# Look for long common sequences of the test and the training text (13 tokens, say): that is
# contamination in the narrow sense. If the text is not known: compare the loss on the original
# questions with that on rewordings, or on questions that are newer than the model. A model that has
# the questions in memory is much better on the originals, and often even on the order of the
# choices.
#
# </details>

# %% [markdown] key="tasks"
# ## On real benchmarks
#
# `jaxgpt evaluate RUN --tasks ...` runs the real ones from their files, with chance and standard
# errors in the table. A small model that was trained on your laptop will be at chance on MMLU; that
# is not a failure but a measurement.
