"""Rerun tests with other random draws, and rank their thresholds by how near the values come.

    python -m tests.margins tests/model/test_fp8.py -k overfits
    python -m tests.margins --seeds 20 tests/model/mixers tests/test_moments.py

A test that compares a random draw with a threshold may pass by luck, and fail on another processor
or another version of a library. Here every seed of NumPy's and JAX's generators is replaced, the
tests run once for each replacement, and a table shows for every line that compares numbers how near
the worst value came: 1 is at the threshold, more is a failure. It is no part of the suite.

Comparisons are those of `assert a < b` (and >, <=, >=), of pytest.approx, and of assert_allclose.
What is drawn by hypothesis, or when a module is imported by another package, is not replaced.
"""

import argparse
import math
import pathlib
import re
import sys
import tempfile
import time
from collections import defaultdict

import jax
import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parent
NUMBER = r"(?:np\.float\d+\(|Array\()?(-?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf|nan))(?:, dtype=\w+)?\)?"
COMPARISON = re.compile(rf"^{NUMBER} (<|<=|>|>=) {NUMBER}(?=$|\s)")
CHAIN = re.compile(rf"^{NUMBER} (<|<=) {NUMBER} (<|<=) {NUMBER}(?=$|\s)")
APPROX = re.compile(rf"^{NUMBER} == {NUMBER} ± {NUMBER}(?=$|\s)")


def measure_nearness(explanation: str) -> float | None:
    """Return how near a comparison came to failing: 0 is far, 1 the threshold, more failed.

    For numbers of the same sign it is the quotient of the smaller and the greater side.

    >>> measure_nearness("0.02 < 0.04"), measure_nearness("0.3 == 0.25 ± 0.1")
    (0.5, 0.5)
    """
    text = explanation.removeprefix("assert ").strip()
    if found := APPROX.match(text):
        value, target, tolerance = map(float, found.groups())
        return abs(value - target) / tolerance
    if found := CHAIN.match(text):
        low, _, value, _, high = found.groups()
        return max(_divide(float(low), float(value)), _divide(float(value), float(high)))
    if found := COMPARISON.match(text):
        left, sign, right = found.groups()
        low, high = (left, right) if "<" in sign else (right, left)
        return _divide(float(low), float(high))
    return None


def _divide(low: float, high: float) -> float:
    """Return how near `low` is to `high`, which it should be below."""
    if low <= 0 <= high:
        return 0.0
    if low < 0 and high < 0:
        low, high = -high, -low
    return math.inf if high <= 0 else low / high


class Recorder:
    """A pytest plugin: the nearness of all comparisons of one run, by place."""

    def __init__(self):
        self.found: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []
        self._item = ""

    def record(self, place: str, nearness: float):
        self.found[place] = max(self.found[place], nearness)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self._item = item.nodeid

    def pytest_assertion_pass(self, item, lineno, orig, expl):
        nearness = measure_nearness(expl)
        if nearness is not None:
            self.record(f"{item.nodeid}:{lineno}  {orig}", nearness)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message.splitlines()[0] if crash else ""
            nearness = measure_nearness(message.removeprefix("AssertionError: "))
            self.record(f"{report.nodeid}:{crash.lineno if crash else '?'}  {message}",
                        math.inf if nearness is None else nearness)  # fmt: skip

    def wrap_allclose(self, original):
        """Return np.testing.assert_allclose that also records its errors."""

        def assert_allclose(actual, desired, rtol=1e-7, atol=0.0, **more):
            frame = sys._getframe(1)
            try:
                a, b = (np.asarray(x, np.float64) for x in (actual, desired))
                with np.errstate(all="ignore"):
                    error = np.abs(a - b) / (atol + rtol * np.abs(b))
                worst = float(np.nanmax(np.where(a == b, 0, error), initial=0))
                place = f"{self._item}:{frame.f_lineno}  assert_allclose(rtol={rtol}, atol={atol})"
                self.record(place, worst)
            except (TypeError, ValueError):
                pass
            return original(actual, desired, rtol=rtol, atol=atol, **more)

        return assert_allclose


def shift_seeds(patch: pytest.MonkeyPatch, shift: int):
    """Replace the seeds that are given to NumPy's and JAX's generators."""
    default_rng, key, prng_key = np.random.default_rng, jax.random.key, jax.random.PRNGKey
    step = 7919 * shift  # a prime: tests use small seeds next to each other

    def shifted_rng(seed=None):
        return default_rng(seed if seed is None or not shift else [shift, *np.atleast_1d(seed)])

    patch.setattr(np.random, "default_rng", shifted_rng)
    patch.setattr(jax.random, "key", lambda seed, **more: key(seed + step, **more))
    patch.setattr(jax.random, "PRNGKey", lambda seed, **more: prng_key(seed + step, **more))


def run_tests(arguments: list[str], shift: int) -> Recorder:
    """Run pytest once with other seeds."""
    recorder = Recorder()
    for name, module in list(sys.modules.items()):  # what they drew or cached for other seeds
        path = getattr(module, "__file__", None)
        if path and TESTS in pathlib.Path(path).parents and name not in (__name__, "__main__"):
            del sys.modules[name]
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        shift_seeds(patch, shift)
        original = np.testing.assert_allclose
        patch.setattr(np.testing, "assert_allclose", recorder.wrap_allclose(original))
        options = ["-q", "--no-header", "-o", "enable_assertion_pass_hook=true", "--tb=line"]
        pytest.main([*options, "-p", "no:cacheprovider", *arguments], plugins=[recorder])
    return recorder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="how many replacements of the seeds")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no draw after these")
    parser.add_argument("--above", type=float, default=0.5, help="show what comes nearer than this")
    args, arguments = parser.parse_known_args()
    values: dict[str, list[float]] = defaultdict(list)
    failures: dict[str, int] = defaultdict(int)
    folder = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", folder.name)  # the same programs every time
    end, draws = time.monotonic() + 60 * args.minutes, 0
    for shift in range(args.seeds):  # the first one has the tests' own seeds
        if time.monotonic() > end:
            break
        draws += 1
        recorder = run_tests(arguments, shift)
        for place, nearness in recorder.found.items():
            values[place].append(nearness)
        for name in recorder.failed:
            failures[name] += 1
    print(f"\n{'worst':>8} {'median':>8}  of {draws} draws; 1 is at the threshold")
    for place, found in sorted(values.items(), key=lambda x: -max(x[1])):
        if max(found) >= args.above:
            print(f"{max(found):8.3f} {sorted(found)[len(found) // 2]:8.3f}  {place}")
    for name, count in failures.items():
        print(f"failed in {count} of {draws}: {name}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
