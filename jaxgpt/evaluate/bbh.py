"""BIG-bench Hard: 27 tasks whose answers are generated, and compared with the right ones.

Each prompt is the task's instruction, worked examples, and "Q: ...\\nA:". The files hold questions
alone, so the worked examples are the first questions of a task, which are then not asked; those of
its authors have chains of thought, and numbers with three shots cannot be compared with theirs.

Source: Suzgun et al. 2022, "Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve
Them", arXiv:2210.09261. The instructions are those of its prompts.
"""

import json
import pathlib
import re

from jaxgpt.evaluate.tasks import Question, Task

SHUFFLED = (
    "A task requiring determining the final positions of a set of objects given their initial "
    "positions and a description of a sequence of swaps."
)
DEDUCTION = "A logical deduction task which requires deducing the order of a sequence of objects."
INSTRUCTIONS = {
    "boolean_expressions": "Evaluate the result of a random Boolean expression.",
    "causal_judgement": "Answer questions about causal attribution.",
    "date_understanding": "Infer the date from context.",
    "disambiguation_qa": "Clarify the meaning of sentences with ambiguous pronouns.",
    "dyck_languages": "Correctly close a Dyck-n word.",
    "formal_fallacies": "Distinguish deductively valid arguments from formal fallacies.",
    "geometric_shapes": "Name geometric shapes from their SVG paths.",
    "hyperbaton": "Order adjectives correctly in English sentences.",
    "logical_deduction_five_objects": DEDUCTION,
    "logical_deduction_seven_objects": DEDUCTION,
    "logical_deduction_three_objects": DEDUCTION,
    "movie_recommendation": "Recommend movies similar to the given list of movies.",
    "multistep_arithmetic_two": "Solve multi-step arithmetic problems.",
    "navigate": "Given a series of navigation instructions, determine whether one would end up "
    "back at the starting point.",
    "object_counting": "Questions that involve enumerating objects and asking the model to count "
    "them.",
    "penguins_in_a_table": "Answer questions about a table of penguins and their attributes.",
    "reasoning_about_colored_objects": "Answer extremely simple questions about the colors of "
    "objects on a surface.",
    "ruin_names": "Select the humorous edit that 'ruins' the input movie or musical artist name.",
    "salient_translation_error_detection": "Detect the type of error in an English translation of "
    "a German source sentence.",
    "snarks": "Determine which of two sentences is sarcastic.\n\nAccording to Cambridge University "
    'Dictionary, sarcasm is "the use of remarks that clearly mean the opposite of what they say, '
    "made in order to hurt someone's feelings or to criticize something in a humorous way.\" "
    "Sarcastic sentences often contain satirical or ironic utterances, hyperboles, ambivalent or "
    "witty remarks.",
    "sports_understanding": "Determine whether an artificially constructed sentence relating to "
    "sports is plausible or not.",
    "temporal_sequences": "Task description: Answer questions about which times certain events "
    "could have occurred.",
    "tracking_shuffled_objects_five_objects": SHUFFLED,
    "tracking_shuffled_objects_seven_objects": SHUFFLED,
    "tracking_shuffled_objects_three_objects": SHUFFLED,
    "web_of_lies": "Evaluate a random boolean function expressed as a word problem.",
    "word_sorting": "Sort a list of words.",
}
# Their two answers are not listed as options.
TWO_ANSWERS = ("boolean_expressions", "sports_understanding", "web_of_lies")
STOPS = {True: ("\n\n", "Q:"), False: ("Q:",)}  # with worked examples, and without
CHOICES = re.compile(r"^\([A-Z]\) |^- ", re.MULTILINE)


def read_bbh(folder: pathlib.Path, shots: int) -> list[Question]:
    """Return the questions of all tasks; the answer is a text."""
    questions = []
    for path in sorted(folder.glob("*.json")):
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        name = path.stem
        header = f"{INSTRUCTIONS[name]}\n\n" if name in INSTRUCTIONS else ""
        for row in examples[:shots]:
            header += f"Q: {row['input']}\nA: {row['target']}\n\n"
        for number, row in enumerate(examples[shots:], shots):
            questions.append(
                Question(
                    f"{name}/{number}",
                    name,
                    answer=row["target"],
                    prompt=f"{header}Q: {row['input']}\nA:",
                    stop=STOPS[shots > 0],
                )
            )
    return questions


def normalize(text: str) -> str:
    """Return a text without case, outer space, a final period, commas, quotes and backslashes."""
    return re.sub(r'[,"\\\n]', "", text.strip()).rstrip(".").strip().lower()


def measure_bbh(question: Question, text: str) -> dict[str, float]:
    """Return whether the generated text is the answer, as `normalize` leaves both."""
    return {"exact_match": float(normalize(text) == normalize(question.answer))}


def guess_bbh(question: Question) -> dict[str, float]:
    """Return the accuracy of a guess among the options that the question lists; 0 without any."""
    if question.group in TWO_ANSWERS:
        return {"exact_match": 0.5}
    options = len(CHOICES.findall(question.prompt.rsplit("\n\nQ: ", 1)[-1]))
    return {"exact_match": 1 / options if options else 0.0}


BBH = Task(
    title="BIG-bench Hard: 27 tasks, generated answers",
    read=read_bbh,
    measure=measure_bbh,
    guess=guess_bbh,
    files=("*.json",),
    origin="github.com/suzgunmirac/BIG-Bench-Hard (bbh/*.json)",
    shots=3,
    most_shots=3,
    generates=True,
)
