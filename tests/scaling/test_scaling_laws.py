"""Scaling laws: exact constants come back, and published data give the published constants."""

import csv
import json
import pathlib

import numpy as np
import pytest
from scipy.optimize import minimize
from tiny_runs import run_config

from jaxgpt import scaling
from jaxgpt.cli import scaling as command
from jaxgpt.scaling import laws, sweep
from jaxgpt.settings import ConfigError

DATA = pathlib.Path(__file__).parents[3] / "shared/data/chinchilla/svg_extracted_data.csv"
TRUE = scaling.PUBLISHED["besiroglu"]


def make_runs(law, sizes=6, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    grid = [(n, d) for n in np.geomspace(1e7, 1e10, sizes) for d in np.geomspace(1e8, 1e11, sizes)]
    return [
        scaling.Run(n, d, float(law.predict(n, d)) * float(np.exp(noise * rng.normal())),
                    name=f"run {i}")
        for i, (n, d) in enumerate(grid)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "law",
    [TRUE, scaling.PUBLISHED["hoffmann"], scaling.Law(1.0, 30.0, 900.0, 0.2, 0.4),
     scaling.Law(2.5, 5000.0, 100.0, 0.6, 0.25)],
)  # fmt: skip
def test_exact_data_give_exact_constants(law):
    found = scaling.fit(make_runs(law))
    assert found.alpha == pytest.approx(law.alpha, abs=1e-3)
    assert found.beta == pytest.approx(law.beta, abs=1e-3)
    assert pytest.approx(law.E, abs=2e-3) == found.E
    assert found.count == 36


def test_noise_is_within_its_errors():
    found = scaling.fit(make_runs(TRUE, noise=0.005), bootstrap=20)
    assert (found.errors > 0).all()
    assert (np.abs(found.constants - TRUE.constants) < 4 * found.errors).all()
    low, high = found.predict_interval(3e10, 3e11)
    assert low < float(found.predict(3e10, 3e11)) < high
    assert low - 2 * (high - low) < float(TRUE.predict(3e10, 3e11)) < high + 2 * (high - low)
    again = scaling.fit(make_runs(TRUE, noise=0.005), bootstrap=20)
    np.testing.assert_array_equal(found.samples, again.samples)


def test_the_fit_is_the_minimum_that_a_slow_search_finds():
    """Without gradients, centering or variable projection: Nelder-Mead on the loss as written."""
    runs = make_runs(TRUE, 4, noise=0.01)
    N, D, L = (np.array([getattr(r, k) for r in runs]) for k in ("parameters", "tokens", "loss"))

    def huber_loss(p):
        a, b, e, alpha, beta = p
        error = np.log(np.exp(a) / N**alpha + np.exp(b) / D**beta + np.exp(e)) - np.log(L)
        small = np.abs(error) <= 1e-3
        return np.where(small, error**2 / 2, 1e-3 * (np.abs(error) - 5e-4)).sum()

    found = scaling.fit(runs)
    mine = huber_loss([np.log(found.A), np.log(found.B), np.log(found.E), found.alpha, found.beta])
    options = dict(maxiter=20000, maxfev=20000, xatol=1e-10, fatol=1e-15, adaptive=True)
    starts = [[6, 8, 0.5, 0.35, 0.37], [5, 5, 0.5, 0.3, 0.3], [8, 9, 0.7, 0.45, 0.4]]
    slow = min(minimize(huber_loss, s, method="Nelder-Mead", options=options).fun for s in starts)
    assert mine <= slow * (1 + 1e-6)


@pytest.mark.skipif(not DATA.exists(), reason="the data of Besiroglu et al. are not here")
def test_chinchillas_runs_give_the_constants_of_besiroglu():
    """Within their standard errors: 0.03, 124.58, 1293.23, 0.02, 0.02 (their table 1)."""
    with open(DATA) as file:
        rows = list(csv.DictReader(file))
    runs = [scaling.Run(float(r["Model Size"]), float(r["Training FLOP"]) / 6
                        / float(r["Model Size"]), float(r["loss"])) for r in rows]  # fmt: skip
    assert len(runs) == 245
    # As they do, without the five that saw the fewest tokens, which are outliers.
    kept = sorted(runs, key=lambda run: run.tokens)[5:]
    found = scaling.fit(kept)
    published = np.array([1.8172, 482.01, 2085.43, 0.3478, 0.3658])
    errors = np.array([0.03, 124.58, 1293.23, 0.02, 0.02])
    assert (np.abs(found.constants - published) < errors).all()


def test_published_laws_and_their_known_contradiction():
    assert scaling.predict_loss(1e9, 20e9) == pytest.approx(2.580, abs=5e-4)
    gopher = 5.76e23
    assert scaling.PUBLISHED["hoffmann"].optimum(gopher)[0] == pytest.approx(32e9, rel=0.02)
    size, tokens = TRUE.optimum(gopher)
    assert 6 * size * tokens == pytest.approx(gopher)
    assert 15 < tokens / size < 25  # about 20 tokens per parameter


def test_the_optimum_is_the_lowest_loss_of_a_budget():
    size, _ = TRUE.optimum(1e20)
    sizes = np.geomspace(size / 30, size * 30, 20001)
    losses = TRUE.predict(sizes, 1e20 / 6 / sizes)
    assert sizes[losses.argmin()] == pytest.approx(size, rel=1e-3)
    assert TRUE.cost_of_overtraining(*TRUE.optimum(1e20)) == pytest.approx(1, abs=1e-6)
    assert TRUE.cost_of_overtraining(8e9, 15e12) > 2


def test_isoflop_gives_the_exponents_of_a_symmetric_law():
    law = scaling.Law(1.7, 400.0, 400.0, 0.3, 0.3)
    runs = []
    for budget in np.geomspace(1e18, 1e21, 4):
        best, _ = law.optimum(budget)
        for size in best * np.geomspace(0.8, 1.25, 5):
            tokens = budget / 6 / size
            runs.append(scaling.Run(size, tokens, float(law.predict(size, tokens))))
    found = scaling.fit_isoflop(runs)
    assert found.parameters.exponent == pytest.approx(0.5, abs=0.005)
    assert found.tokens.exponent == pytest.approx(0.5, abs=0.005)
    with pytest.raises(ConfigError, match="1 budgets"):
        scaling.fit_isoflop(runs[:5])


def test_kaplans_law_of_infinite_data_is_its_power_law():
    law = scaling.KaplanLaw()
    assert float(law.predict(1e9, 1e30)) == pytest.approx((6.4e13 / 1e9) ** 0.076, rel=1e-6)
    assert law.optimum_exponent() == pytest.approx(0.103 / 0.179)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs[:5], "5 runs determine no law"),
        (lambda runs: runs[:6], "1 different numbers of parameters"),
        (lambda runs: [*runs, scaling.Run(1e7, 1e8, float("nan"), name="bad")], "run bad"),
        (lambda runs: [*runs, scaling.Run(0, 1e8, 3.0, name="none")], "run none"),
    ],
)
def test_runs_that_determine_nothing_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        scaling.fit(change(make_runs(TRUE)))


# --- sweeps ----------------------------------------------------------------------------------


def test_sizes_are_read():
    assert sweep.Size.parse("128x4") == sweep.Size(128, 4)
    assert sweep.Size.parse("128") == sweep.Size(128, 4)
    for text in ("x4", "12", "abc", "64x0"):
        with pytest.raises(ConfigError, match="--sizes"):
            sweep.Size.parse(text)


def test_the_best_rate_is_the_minimum_of_the_parabola():
    rates = np.array([1e-3, 2e-3, 4e-3])
    losses = (np.log(rates) - np.log(2.5e-3)) ** 2
    assert sweep.find_best_rate(rates, losses) == pytest.approx(2.5e-3)
    assert sweep.find_best_rate([1, 2, 3], [3.0, 2.0, np.inf]) == 2
    assert sweep.find_best_rate([1, 2, 3], [1.0, 2.0, 3.0]) == 1


def test_a_sweep_trains_what_is_missing_and_nothing_twice(tmp_path, monkeypatch):
    base = run_config(tmp_path, "train.batch=8")
    sizes, folder = [sweep.Size(16, 1), sweep.Size(8, 1)], str(tmp_path / "sweep")
    lines = []
    rows = sweep.run_sweep(base, sizes, [256], folder, lines.append)
    assert [row["name"] for row in rows] == ["8x1-2", "16x1-2"]  # the cheapest first
    assert [row["tokens"] for row in rows] == [256, 256]
    assert rows[0]["parameters"] - rows[0]["parameters_without_embeddings"] >= 260 * 8
    # 1 / width, through the learning rate of the base at its own width
    assert rows[0]["lr"] == pytest.approx(base.optimizer.lr * base.model.width / 8)
    trained = []
    monkeypatch.setattr(sweep, "train_to_end", lambda c: trained.append(c.name) or rows[0])
    sweep.run_sweep(base, sizes, [256, 512], folder, lines.append)
    assert trained == ["8x1-4", "16x1-4"]
    assert sweep.read_runs(folder, "no_embeddings")[0].parameters < rows[0]["parameters"]
    counted = sweep.read_runs(folder, flops="counted")[1]
    assert counted.compute == rows[1]["flops"]


def test_tuned_rates_are_used(tmp_path, monkeypatch):
    base = run_config(tmp_path, "train.batch=8")
    sizes = [sweep.Size(w, 1) for w in (8, 16, 32)]

    def lose(config):  # the best rate is 0.1 / sqrt(width)
        best = 0.1 * config.model.width**-0.5
        return {"loss": np.log(config.optimizer.lr / best) ** 2}

    monkeypatch.setattr(sweep, "train_to_end", lose)
    law = sweep.tune(base, sizes, 256, str(tmp_path), report=lambda line: None)
    assert law.exponent == pytest.approx(-0.5, abs=1e-6)
    assert law.coefficient == pytest.approx(0.1, rel=1e-6)
    found = sweep.read_transfer(base, str(tmp_path))
    assert (found.exponent, found.coefficient) == (law.exponent, law.coefficient)
    with pytest.raises(ConfigError, match="three widths"):
        sweep.tune(base, sizes[:2], 256, str(tmp_path))


# --- the command -----------------------------------------------------------------------------


def write_table(path, runs):
    lines = ["name,parameters,tokens,loss", *(f"{r.name},{r.parameters},{r.tokens},{r.loss}"
                                              for r in runs)]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(*arguments):
    return command.main(list(arguments), "jaxgpt scaling")


def test_the_command_fits_predicts_and_plots_a_table(tmp_path, capsys):
    table = write_table(tmp_path / "runs.csv", make_runs(TRUE, 4))
    assert run("fit", table, "--bootstrap", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out.replace("NaN", "null"))
    assert found["law"]["alpha"] == pytest.approx(TRUE.alpha, abs=1e-3)
    assert run("fit", table, "--bootstrap", "3", "--leave-out", "run 15") == 0
    text = capsys.readouterr().out
    assert "of 15 runs" in text
    assert "run 15: predicted" in text
    assert run("predict", table, "--parameters", "1e10", "--tokens", "1e12", "--bootstrap", "0",
               "--json") == 0  # fmt: skip
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert loss == pytest.approx(float(TRUE.predict(1e10, 1e12)), abs=1e-3)
    out = tmp_path / "scaling.png"
    assert run("plot", table, "--leave-out", "run 15", "--bootstrap", "3", "--out", str(out)) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_command_knows_published_laws(capsys):
    assert run("predict", "hoffmann", "--parameters", "1e9", "--tokens", "20e9") == 0
    assert "loss 2.5800 nats" in capsys.readouterr().out
    assert run("predict", "besiroglu", "--flops", "5.76e23", "--json") == 0
    assert json.loads(capsys.readouterr().out)["overtraining"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt", "sweep"], "Did you mean 'fit'"),
        (["fit", "nowhere"], "jaxgpt scaling sweep nowhere"),
        (["predict", "hoffmann"], "predict takes"),
        (["plot", "hoffmann"], "without runs"),
        (["sweep", "out"], "--sizes is missing"),
        (["sweep", "out", "--sizes", "64", "--tokens", "many"], "--tokens many"),
        (["fit", "missing.csv"], "missing.csv cannot be read"),
    ],
)
def test_the_command_refuses_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / laws.__name__).write_text("")
    (tmp_path / "runs.csv").write_text("parameters,loss\n1e6,3\n")
    with pytest.raises(ConfigError, match="line 2"):
        run("fit", str(tmp_path / "runs.csv"))
    (tmp_path / "runs.jsonl").write_text('{"name": "a"}\n')
    with pytest.raises(ConfigError, match=r"runs\.jsonl, line 1"):
        run("fit", str(tmp_path))
