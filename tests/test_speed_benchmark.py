"""The comparison with PyTorch: its arithmetic, its table, and how failures are reported."""

import dataclasses
import io
import json
import math
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks are not installed

from benchmarks import speed
from benchmarks.speed import Figure, Limits, Rates, Work
from benchmarks.worker import Case, Contestant, FailedError, Side, Worker, serve
from jaxgpt import config as configs
from jaxgpt.model import count_params
from jaxgpt.trainer.speed import flops_per_token

ABOUT = {"square": "10", "copied": "800"}  # a product of 2,000 FLOPs, and a copy of 800 bytes
CASE = Case("tiny", B=2, T=8, L=3, D=4, H=2, G=1, K=2, F=6, V=11, dtype="float32",
            is_llama=True, config={})  # fmt: skip


def figure(row, name, *seconds, **more):
    return Figure("tiny", row, name, seconds, **more)


# --- floors ---


@pytest.mark.parametrize("name", speed.SHAPES)
def test_weights_and_flops_of_a_case_agree_with_its_model(name):
    case = speed.make_case(name, [], "")
    model = configs.from_json(json.dumps(case.config)).model
    total = count_params(model)["total"]
    # norms, biases and positions are the rest
    assert 0 <= total - speed.count_weights(case) < 0.04 * total
    ratio = speed.count_step_work(case).model_flops / (case.N * flops_per_token(model))
    # flops_per_token counts biases as weights
    assert ratio == pytest.approx(1, rel=1e-2 if model.bias else 1e-12)


def test_only_unmasked_pairs_count_toward_a_floor():
    pairs = sum(s <= t for t in range(CASE.T) for s in range(CASE.T))
    assert speed.count_attention_flops(CASE) == 2 * CASE.B * CASE.H * CASE.K * pairs


def test_a_floor_adds_phases_and_overlaps_work_within_a_phase():
    work = Work(((100, 0), (50, 900), (300, 10)))
    assert work.compute_floor(Rates(flops=10, bytes=100)) == 10 + 9 + 30


def test_rates_are_the_medians_of_the_fastest_side():
    figures = [
        figure("matmul, square", "jax", 4.0, 2.0, 1.0),
        figure("matmul, square", "torch eager", 1.0, 8.0),
        figure("matmul, [N D] x [D F]", "jax", 1e3),  # 0.768 FLOP/s: too small to be fast
        figure("copy", "jax", 5.0),
        figure("copy", "torch eager", error="no memory"),
    ]
    assert speed.measure_rates(figures, {"tiny": CASE}, ABOUT)["tiny"] == Rates(1000.0, 160.0)


def test_without_measurement_there_is_no_rate_and_no_floor():
    rates = speed.measure_rates([], {"tiny": CASE}, ABOUT)["tiny"]
    assert math.isnan(rates.flops)
    assert math.isnan(rates.bytes)
    row = speed.derive_figures(figure("step", "jaxgpt", 1.0), CASE, rates, [], ABOUT)
    assert row["floor"] is None
    assert row["reached"] is None


# --- comparisons ---


def test_a_ratio_is_the_median_over_paired_turns():
    ours = figure("step", "jaxgpt", 1.0, 10.0, 2.0)  # a disturbance affects both in a turn
    peer = figure("step", "torch eager", 3.0, 20.0, 8.0)
    assert speed.compute_ratios(ours, [ours, peer]) == {"torch eager": 3.0}
    assert speed.compute_ratios(peer, [ours, peer]) == {}


def test_a_peer_of_another_row_or_without_figures_is_not_compared():
    ours = figure("step", "jaxgpt", 1.0)
    others = [figure("forward", "torch eager", 1.0), figure("step", "torch compile", error="no")]
    assert speed.compute_ratios(ours, [ours, *others]) == {}


def test_a_peer_of_another_size_has_no_figure():
    ours = figure("step", "jaxgpt", 1.0, parameters=1000)
    small, same = (figure("forward", "torch eager", 1.0, parameters=n) for n in (999, 1000))
    other, kept = speed.reject_other_sizes([small, same], [ours])
    assert (other.seconds, other.error) == ((), "it has 999 parameters, and jaxgpt 1,000")
    assert kept == same


def test_the_parts_of_a_step_and_the_rest_sum_to_the_step():
    rows = ("dense of a block", "attention gradient", "loss gradient", "optimizer")
    figures = [figure(row, "jaxgpt", float(2**i)) for i, row in enumerate(rows)]
    assert speed.split_step(figures, CASE, is_jax=True) == {}
    found = speed.split_step([*figures, figure("step", "jaxgpt", 100.0)], CASE, is_jax=True)
    assert sum(found.values()) == 100.0
    assert found["rest"] == 100 - 3 * (1 + 2) - 4 - 8


# --- the table ---


def test_the_table_has_figures_and_reasons_for_failures():
    figures = [
        figure("matmul, square", "jax", 20.0),  # 100 FLOP/s
        figure("copy", "jax", 8.0),
        figure("loss gradient", "jaxgpt", 200.0, 300.0, 250.0),
        figure("loss gradient", "torch eager", 500.0),
        figure("loss gradient", "torch compile", error="no compiler"),
    ]
    page = speed.format_page({"command": "x"}, {"tiny": CASE}, figures, ABOUT)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    ours, _, failed = [line for line in lines if line and line[0] == "loss gradient"]
    floor = 6 * 16 * 4 * 11 / 100
    assert ours[1:4] == ["jaxgpt", "250,000", "200,000 to 300,000"]
    assert ours[5:7] == [speed.format_number(1e3 * floor), f"{floor / 250:.0%}"]
    assert ours[-1] == "2.50 torch eager"
    assert failed[1:3] == ["torch compile", "no compiler"]
    widths = {len(line) for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


# --- contests ---


class Fake(Worker):
    """A worker that returns at once; contestants in `broken` fail at their run `fails_at`."""

    def __init__(self, seconds, broken=(), fails_at=1):
        self.seconds, self.broken, self.fails_at, self.calls = seconds, broken, fails_at, []

    def make(self, limit, row, name, case):
        self.calls.append(("make", name))
        return {"parameters": 7, "peak": 0}

    def run(self, limit, row, name, times=1):
        self.calls.append(("run", name))
        if name in self.broken and self.calls.count(("run", name)) >= self.fails_at:
            raise FailedError("broken")
        return {"seconds": self.seconds, "peak": 5}

    def drop(self):
        self.calls.append(("drop", ""))


LIMITS = Limits(repeats=3, turns=1e9, until=math.inf)


def test_contestants_take_turns():
    worker = Fake(1.0)
    found = speed.run_in_turns(CASE, "step", [("jaxgpt", worker), ("torch eager", worker)], LIMITS)
    assert [(f.name, f.seconds, f.parameters, f.peak) for f in found] == [
        ("jaxgpt", (1.0,) * 3, 7, 5),
        ("torch eager", (1.0,) * 3, 7, 5),
    ]
    turns = [name for do, name in worker.calls if do == "run"][-6:]
    one_turn = ["jaxgpt", "torch eager"]
    assert turns == [*one_turn, *one_turn[::-1], *one_turn]
    assert worker.calls[-1] == ("drop", "")


def test_short_turns_are_taken_more_often():
    worker = Fake(0.1)
    found = speed.run_in_turns(CASE, "step", [("jaxgpt", worker), ("torch eager", worker)], LIMITS)
    assert [len(f.seconds) for f in found] == [9, 9]


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_failure_is_reported_and_the_others_have_figures(fails_at):
    ours, theirs = Fake(1.0), Fake(1.0, ["torch compile"], fails_at)
    entries = [("jaxgpt", ours), ("torch eager", theirs), ("torch compile", theirs)]
    found = speed.run_in_turns(CASE, "step", entries, LIMITS)
    assert [(f.name, len(f.seconds), f.error) for f in found] == [
        ("jaxgpt", 3, ""),
        ("torch eager", 3, ""),
        ("torch compile", 0, "broken"),
    ]


def test_a_contestant_leaves_time_for_the_others():
    asked = []

    class Asked(Fake):
        def make(self, limit, row, name, case):
            asked.append(limit)
            return super().make(limit, row, name, case)

    entries = [(name, Asked(1.0)) for name in ("jaxgpt", "torch eager", "torch compile")]
    until = speed.time.perf_counter() + 90
    speed.run_in_turns(CASE, "step", entries, dataclasses.replace(LIMITS, until=until))
    assert len(asked) == 3
    assert max(asked) <= 30


def test_slow_rows_have_fewer_turns_and_none_begins_too_late():
    worker = Fake(4.0)
    short = dataclasses.replace(LIMITS, turns=9.0)
    assert len(speed.run_in_turns(CASE, "step", [("jaxgpt", worker)], short)[0].seconds) == 2
    late = dataclasses.replace(LIMITS, until=0.0)
    (found,) = speed.run_in_turns(CASE, "step", [("jaxgpt", worker)], late)
    assert (found.seconds, found.error) == ((), "no time was left")


# --- the order ---

ACCELERATOR = tuple(speed.ELSEWHERE)


def test_an_accelerator_measures_whole_steps_before_anything_else():
    first, second, *rest = speed.plan_stages(ACCELERATOR, (), is_cpu=False)
    steps = (*speed.RATES, "step")
    assert (first.shapes, first.rows) == (("gpt2_124m",), steps)
    assert (second.shapes, second.rows) == (("llama3_1b", "gpt2_1558m"), steps)
    assert not any("step" in stage.rows for stage in rest)


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("asked", [(), ("step",), ("compile", "copy"), ("decode 1 row",)])
def test_a_plan_has_every_row_of_every_shape_once(is_cpu, asked):
    planned = [
        (shape, row)
        for stage in speed.plan_stages(ACCELERATOR, asked, is_cpu)
        for row in stage.rows
        for shape in stage.shapes
    ]
    wanted = {*speed.RATES, *(asked or speed.ROWS)}
    left_out = set(speed.ACCELERATED) if is_cpu and not asked else set()
    assert len(planned) == len(set(planned))
    assert set(planned) == {(s, row) for s in ACCELERATOR for row in wanted - left_out}


class Clock:
    """A clock that only workers advance."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("compiling", [5, 40, 1000])
def test_important_steps_are_measured_however_slow_compilers_are(compiling, monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)

    class Slow(Fake):
        """Every contestant takes `compiling` seconds to build, and is stopped at its limit."""

        def make(self, limit, row, name, case):
            is_heavy = row in ("step", speed.SETTINGS, "start-up")
            wanted = compiling if is_heavy else compiling / 40
            clock.now += min(limit, wanted)
            if wanted > limit:
                raise FailedError("not done")
            return super().make(limit, row, name, case)

        def close(self):
            clock.now += 10  # and the next start

    jax_side, torch_side = ["jaxgpt"], ["torch eager", "torch compile"]
    bench = object.__new__(speed.Bench)
    bench.a = speed.parse_arguments(["--out", str(tmp_path), "--rows", "step", "forward"])
    bench.is_cpu, bench.figures, bench.notes, bench.start = False, [], [], 0.0
    bench.about = ABOUT | {"platform": "gpu"}
    bench.workers = {speed.JAX: Slow(0.01), speed.TORCH: Slow(0.01)}
    bench.makers = {
        speed.JAX: dict.fromkeys(speed.ROWS, jax_side),
        speed.TORCH: dict.fromkeys(speed.ROWS, torch_side),
    }
    bench.cases = {name: speed.make_case(name, [], "") for name in ACCELERATOR}
    bench.until = 450.0
    bench.run()
    assert clock.now < 480
    steps = {(f.shape, f.name): bool(f.seconds) for f in bench.figures if f.row == "step"}
    assert steps.keys() == {(s, n) for s in ACCELERATOR for n in (*jax_side, *torch_side)}
    assert all(steps.values()) == (compiling == 5)
    if compiling == 40:
        assert all(done for (_, name), done in steps.items() if name == "jaxgpt")
        assert all(done for (shape, _), done in steps.items() if shape == "gpt2_124m")


# --- the process of a side ---


def talk(side, *requests):
    answers = io.StringIO()
    serve(side, io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.mark.parametrize(("is_queue", "waits"), [(False, 4), (True, 1)])
def test_a_side_runs_as_often_as_requested_and_waits(is_queue, waits):
    ran, waited = [], []

    def make(case):
        assert case == CASE
        return Contestant(lambda: ran.append(1), parameters=5)

    side = Side({"step": {"x": make}}, waited.append, {"jax": "1"}, is_queue, peak=lambda: 9)
    where = {"row": "step", "name": "x"}
    about, made, turn = talk(
        side,
        {"do": "about"},
        {"do": "make", **where, "case": dataclasses.asdict(CASE)},
        {"do": "run", **where, "times": 3},
    )
    assert about == {"about": {"jax": "1"}, "makers": {"step": ["x"]}}
    assert made == {"parameters": 5, "peak": 0}
    assert turn["seconds"] >= 0
    assert turn["peak"] == 9
    assert (len(ran), len(waited)) == (3, waits)


def test_an_error_affects_only_one_answer(capsys):
    side = Side({"step": {"x": lambda case: 1 / 0}}, lambda x: x, {})
    bad, good = talk(
        side,
        {"do": "make", "row": "step", "name": "x", "case": dataclasses.asdict(CASE)},
        {"do": "drop"},
    )
    assert bad == {"error": "ZeroDivisionError: division by zero"}
    assert good == {}
    assert "Traceback" in capsys.readouterr().err


def test_a_process_that_ends_is_reported(tmp_path):
    with open(tmp_path / "log", "w") as log:
        worker = Worker("benchmarks.worker", log)  # has nothing to run
        with pytest.raises(FailedError, match="its process ended"):
            worker.ask(60, do="about")
