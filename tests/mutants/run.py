"""Plant each fault of mutants.toml in a copy of the project; run the tests that should notice it.

    python tests/mutants/run.py                     all, and print which survived
    python tests/mutants/run.py stop_string dropout those whose name has one of these words
    python tests/mutants/run.py --list              names, files and reasons

A mutant is killed if its tests fail, and survives if they pass: then a test is missing. The tests
first have to pass without it. It is no part of the test suite, since it takes a minute per mutant;
tests/test_mutants.py keeps the list applicable to the code.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[2]
LIST = pathlib.Path(__file__).with_name("mutants.toml")
KILLED, SURVIVED, INVALID = "killed", "SURVIVED", "INVALID"


@dataclass(frozen=True)
class Mutant:
    """A planted fault: in `file`, the only occurrence of `old` becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    why: str  # what users would lose
    tests: tuple[str, ...]  # pytest's arguments, of the tests that should fail

    def apply(self, text: str) -> str:
        """Return the text of the file with the fault.

        Raises:
            ValueError: `old` is not in it exactly once, or nothing would change.
        """
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.name}: {self.old!r} is {text.count(self.old)} times in {self.file}; it "
                "must be there once: adapt tests/mutants/mutants.toml to the code."
            )
        return text.replace(self.old, self.new)


def read_mutants(path: pathlib.Path = LIST) -> list[Mutant]:
    """Read the list of mutants."""
    rows = tomllib.loads(path.read_text())["mutant"]
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def copy_project(folder: pathlib.Path) -> pathlib.Path:
    """Copy the files that git knows, or would add, to a new folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(folder: pathlib.Path, tests: tuple[str, ...], log) -> int:
    """Run tests in a copy of the project. Return pytest's exit code."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log).returncode


def judge(mutant: Mutant, passing: dict[tuple[str, ...], bool], log) -> str:
    """Return whether the mutant is killed by its tests."""
    with tempfile.TemporaryDirectory() as name:
        folder = copy_project(pathlib.Path(name))
        if mutant.tests not in passing:
            passing[mutant.tests] = run_tests(folder, mutant.tests, log) == 0
        if not passing[mutant.tests]:
            return INVALID  # its tests fail, or do not exist, without it
        path = folder / mutant.file
        path.write_text(mutant.apply(path.read_text()))
        return SURVIVED if run_tests(folder, mutant.tests, log) == 0 else KILLED


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="words of names; default: all mutants")
    parser.add_argument("--list", action="store_true", help="only print the list")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once (default: 1)")
    parser.add_argument("--log", default=os.devnull, help="a file for the output of the tests")
    args = parser.parse_args()
    mutants = [m for m in read_mutants() if not args.words or any(w in m.name for w in args.words)]
    if args.list:
        print("\n".join(f"{m.name:40} {m.file:36} {m.why}" for m in mutants))
        return 0
    passing: dict[tuple[str, ...], bool] = {}
    verdicts: dict[str, list[str]] = {KILLED: [], SURVIVED: [], INVALID: []}
    with open(args.log, "a") as log, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda mutant: judge(mutant, passing, log), mutants)
        for mutant, verdict in zip(mutants, results, strict=True):
            verdicts[verdict].append(mutant.name)
            print(f"{verdict:9} {mutant.name}", flush=True)
    print(", ".join(f"{len(names)} {verdict.lower()}" for verdict, names in verdicts.items()))
    return 0 if len(verdicts[KILLED]) == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
