"""The list of planted faults fits the code, so that tests/mutants/run.py can plant them."""

import ast
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "mutants"))
from run import ROOT, Mutant, read_mutants

MUTANTS = read_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_planted_and_its_tests_exist(mutant):
    text = (ROOT / mutant.file).read_text()
    planted = mutant.apply(text)
    if mutant.file.endswith(".py"):
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text))
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_does_not_fit_is_refused():
    mutant = Mutant("name", "file.py", "x", "y", "why", ())
    with pytest.raises(ValueError, match=r"2 times in file\.py"):
        mutant.apply("x x")
