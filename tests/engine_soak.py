"""A soak of the engine: random arrivals, cancels and bad requests, for as long as is asked.

    python -m tests.engine_soak --minutes 60

Every finished request must have the tokens of a request alone, and at the end nothing may be left:
no slot, no thread, no handle, and no more memory than after the first tenth.
"""

import argparse
import dataclasses
import gc
import pathlib
import random
import sys
import threading
import time

from jaxgpt.config import ConfigError

FOLDERS = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "engine")]
PROMPTS = ["hello", "", "a text of thirty-seven characters, ok", "x" * 50, "abcabcabcabc", "z"]
BAD = [("x" * 90, {}), ("a", {"bias": {9999: 1.0}}), ("a", {"top": 99})]
LARGEST_GROWTH_MB = 100


def read_memory_mb() -> float:
    """Return the resident memory of this process."""
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def run(seconds: float = 0, count: int = 0, seed: int = 0, log=None) -> dict[str, int]:
    """Run a soak for so many seconds, or of so many requests. Return counts of what happened.

    Raises:
        AssertionError: something was wrong or has leaked.
    """
    sys.path[:0] = [folder for folder in FOLDERS if folder not in sys.path]
    from engine_cases import CFG, DRAWN, GREEDY, PARAMS, TOKENIZER

    from jaxgpt.config import Config
    from jaxgpt.language_model import LanguageModel

    rng = random.Random(seed)
    model = LanguageModel(Config(model=CFG), PARAMS, TOKENIZER)
    rules = [
        GREEDY,
        DRAWN,
        dataclasses.replace(DRAWN, tokens=40),
        dataclasses.replace(DRAWN, regex="[a-d]{2,9}!"),
        dataclasses.replace(GREEDY, stop=("e",), min_tokens=3),
        dataclasses.replace(DRAWN, slide=True, tokens=90),
    ]
    threads = threading.active_count()
    counts = dict.fromkeys(("finished", "cancelled", "refused"), 0)
    expected: dict[tuple, tuple] = {}
    first_memory = None
    with model.start_engine(rows=3, chunk=16, speculate=3) as worker:
        pending: list = []
        start = time.monotonic()

        def is_over():
            done = sum(counts.values())
            return time.monotonic() - start > seconds if seconds else done >= count

        while not is_over():
            for _ in range(rng.randint(1, 8)):
                if rng.random() < 0.1:
                    prompt, more = rng.choice(BAD)
                    try:
                        handle = worker.submit(prompt, GREEDY, **more)
                        handle.result()
                    except ConfigError:
                        counts["refused"] += 1
                        continue
                    raise AssertionError(f"{prompt[:9]!r} {more} was not refused")
                case = rng.randrange(len(PROMPTS)), rng.randrange(len(rules)), rng.randrange(3)
                handle = worker.submit(PROMPTS[case[0]], rules[case[1]], index=case[2])
                pending.append((case, handle))
            rng.shuffle(pending)
            for _ in range(rng.randint(0, len(pending))):
                case, handle = pending.pop()
                if rng.random() < 0.3:
                    handle.cancel()
                found = handle.result()
                if found.ending == "cancelled":
                    counts["cancelled"] += 1
                    continue
                assert found.tokens == expected.setdefault(case, found.tokens), case
                counts["finished"] += 1
            elapsed = time.monotonic() - start
            if seconds and first_memory is None and elapsed > seconds / 10:
                gc.collect()
                first_memory = read_memory_mb()
            if log is not None and rng.random() < 0.01:
                log(f"{elapsed / 60:.1f} min {counts} {read_memory_mb():.0f} MB")
        for _, handle in pending:
            handle.result()
        deadline = time.monotonic() + 30
        while (worker.running or worker.waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (worker.running, worker.waiting, len(worker._handles)) == (0, 0, 0)
    assert threading.active_count() == threads
    gc.collect()
    if first_memory is not None:
        assert read_memory_mb() < first_memory + LARGEST_GROWTH_MB
    # A few of them again, each alone.
    for case in list(expected)[:6]:
        alone = model.generate([PROMPTS[case[0]]] * (case[2] + 1), rules[case[1]])[case[2]]
        assert expected[case] == alone.tokens, case
    return counts


def main():
    """Run the soak that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(run(seconds=60 * options.minutes, seed=options.seed, log=print))


if __name__ == "__main__":
    main()
