"""The comparison of all choices: every omission is reported, and nothing is measured twice."""

import json
import pathlib
import sys

import numpy as np
import pytest
from tiny_runs import write_text

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks are not installed

from benchmarks import ablate, ablation_page
from benchmarks.ablate import (
    AXES,
    BASE,
    CONTEXT_FACTORS,
    Batches,
    Choice,
    Entry,
    Rejection,
    plan,
    resolve_choice,
)
from jaxgpt.config import Config, ConfigError, override
from jaxgpt.model import count_params
from jaxgpt.model.block import WIRINGS
from jaxgpt.model.feedforward import ACTIVATIONS, FEEDFORWARDS
from jaxgpt.model.masks import PATTERNS
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITION_ENCODINGS

REGISTRIES = {
    "position": (POSITION_ENCODINGS, lambda m: m.position),
    "norm": (NORMS, lambda m: m.norm),
    "activation": (ACTIVATIONS, lambda m: m.activation),
    "mixer": (MIXERS, lambda m: m.mixers[0]),
    "wiring": (WIRINGS, lambda m: m.wiring),
    "feedforward": (FEEDFORWARDS, lambda m: m.feedforward),
    "pattern": (PATTERNS, lambda m: m.pattern[0]),
}


# --- choices ---


@pytest.mark.parametrize("axis", AXES)
def test_every_row_of_a_registry_is_trained_or_rejected_by_name(axis):
    registry, get_setting = REGISTRIES[axis]
    planned = plan(BASE, [axis], is_product=False)
    trained = {get_setting(x.cfg.model) for x in planned if isinstance(x, Entry)}
    rejected = {x.name for x in planned if isinstance(x, Rejection)}
    assert trained | rejected == set(registry)
    assert not trained & rejected


def test_only_choices_for_other_objectives_are_rejected():
    planned = plan(BASE, list(AXES), is_product=False)
    rejected = {x.name: x for x in planned if isinstance(x, Rejection)}
    assert set(rejected) == {"linformer", "prefix"}
    assert rejected["linformer"].objectives == ("masked",)
    assert rejected["prefix"].objectives == ("prefix",)
    assert "is not causal" in rejected["linformer"].reason
    assert all(x.reason.endswith(".") and "\n" not in x.reason for x in rejected.values())


def test_a_new_registry_row_is_included_automatically(monkeypatch):
    monkeypatch.setitem(NORMS, "other", NORMS["rms"])
    assert [x.name for x in plan(BASE, ["norm"], is_product=False)] == [*NORMS]
    assert "other" in NORMS


def test_every_axis_contains_the_base_once():
    for axis in AXES:
        planned = plan(BASE, [axis], is_product=False)
        assert sum(isinstance(x, Entry) and x.cfg == BASE for x in planned) == 1, axis


def test_a_mixer_that_cannot_rotate_runs_without_position_encoding_and_is_named_so():
    entries = {x.name: x for x in plan(BASE, ["mixer"], is_product=False) if isinstance(x, Entry)}
    assert entries["performer"].cfg.model.position == "rope"
    assert entries["mamba (position none)"].cfg.model.position == "none"


def test_a_mixer_tries_rope_before_none():
    base = override(BASE, ["model.position=alibi"])
    choice = Choice("performer", ("model.mixers=performer",))
    assert resolve_choice(base, "mixer", choice).cfg.model.position == "rope"


def test_a_product_has_every_combination_and_rejects_by_name():
    planned = plan(BASE, ["position", "mixer"], is_product=True)
    assert len(planned) == len(POSITION_ENCODINGS) * len(MIXERS)
    rejected = {x.name: x for x in planned if isinstance(x, Rejection)}
    assert "has no effect" in rejected["alibi / mamba"].reason
    assert "none / mamba" not in rejected  # chosen explicitly, so not replaced either


def test_axes_that_change_the_same_setting_have_no_product():
    with pytest.raises(ConfigError, match=r"two of these set model\.feedforward"):
        plan(BASE, ["activation", "feedforward"], is_product=True)


def test_plain_and_gated_layers_have_equally_many_parameters():
    entries = plan(BASE, ["activation"], is_product=False)
    assert len({count_params(x.cfg.model)["total"] for x in entries}) == 1


# --- measurement ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    write_text(folder / "text", documents=24)
    return folder


def make_settings(folder):
    return [
        *("model.context=16", "model.width=16", "model.heads=2", "model.ffn=16", "train.batch=4"),
        *("train.eval_batches=0", f"data.cache={folder / 'tokens'}"),
    ]


@pytest.fixture(scope="module")
def batches(folder):
    return Batches(override(BASE, [f"data.source={folder / 'text'}", *make_settings(folder)]))


def test_windows_of_all_lengths_have_the_same_targets(batches):
    targets = {}
    for factor in CONTEXT_FACTORS:
        held_out = [*batches.iterate_held_out(factor)]
        assert held_out[0].tokens.shape == (4 // factor, 16 * factor)
        parts = [np.concatenate([getattr(b, name).reshape(-1) for b in held_out])
                 for name in ("targets", "weights")]  # fmt: skip
        targets[factor] = parts[0][parts[1] > 0]
    corpus = batches.corpus
    assert targets[1].size > 0.9 * (corpus.held_out.ids.size - 1) - corpus.held_out.documents
    np.testing.assert_array_equal(targets[1], targets[2])
    np.testing.assert_array_equal(targets[1], targets[4])


def test_seeds_have_batches_of_their_own(batches):
    first, repeated, second = (batches.get_train_batches(s)[0].tokens for s in (0, 0, 1))
    np.testing.assert_array_equal(first, repeated)
    assert (first != second).any()


@pytest.mark.parametrize(
    ("change", "table"),
    [
        ("model.position=rope", ""),
        ("model.position=learned", "`stack/position/table`"),
        ("model.mixers=synthesizer_random", "`stack/layers/block_0/mixer/scores`"),
    ],
)
def test_parameters_with_a_row_per_position_are_reported_as_not_extensible(change, table):
    position = [] if "position" in change else ["model.position=none"]
    longer, fixed = ablate.extend_context(override(BASE, [change, *position]), 4)
    assert fixed == table
    assert longer.model.context == 4 * BASE.model.context


# --- the command ---


@pytest.fixture(scope="module")
def command(folder):
    """The arguments that train two choices."""
    source = f"--source={folder / 'text'}"
    axes = "--axes=position"
    out = f"--out={folder / 'out'}"
    return ["--steps=3", "--seeds=0,1", source, axes, out, *make_settings(folder)]


@pytest.fixture(scope="module")
def finished_run(folder, command):
    registry = {name: POSITION_ENCODINGS[name] for name in ("rope", "learned")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AXES, "position", ablate.list_choices("model.position", registry))
        assert ablate.main(command) == 0
    return folder / "out"


def test_a_row_has_all_its_figures(finished_run):
    losses, speed = (
        [json.loads(line) for line in (finished_run / f"{phase}.jsonl").read_text().splitlines()]
        for phase in ("losses", "speed")
    )
    assert [x["name"] for x in losses] == [x["name"] for x in speed]
    rope, learned = (a | b for a, b in zip(losses, speed, strict=True))
    assert {factor: len(losses) for factor, losses in rope["losses"].items()} == {
        "1": 2, "2": 2, "4": 2,
    }  # fmt: skip
    assert set(learned["losses"]) == {"1"}
    assert rope["losses"]["1"][0] != rope["losses"]["1"][1]
    # A byte at random costs log 260 = 5.56; three steps change little.
    assert all(4 < loss < 6 for losses in rope["losses"].values() for loss in losses)
    assert learned["parameters"] - rope["parameters"] == 16 * 16  # the table of positions
    for row in (rope, learned):
        assert row["megabytes"] > 4 * 4 * row["parameters"] / 1e6  # with gradients and moments
        assert len(row["seconds_per_step"]) == 3
        assert min(row["seconds_per_step"]) > 0
        seconds = np.median(row["seconds_per_step"])
        assert row["tokens_per_second"] == pytest.approx(4 * 16 / seconds)


def test_the_page_has_tables_reasons_and_plots(finished_run):
    page = (finished_run / "ablation.md").read_text()
    assert "python -m benchmarks.ablate --steps=3" in page
    assert "| **rope** |" in page
    assert "| learned |" in page
    assert "\n\\- learned: `stack/position/table` has no rows for longer windows." in page
    for name in ("loss", "length"):
        assert f"images/ablation_{name}.png" in page
        image = (finished_run / "images" / f"ablation_{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
    assert "ablation_speed" not in page  # no mixers were compared


def test_a_second_run_measures_nothing_and_writes_the_same(finished_run, command, monkeypatch):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    registry = {name: POSITION_ENCODINGS[name] for name in ("rope", "learned")}
    monkeypatch.setitem(AXES, "position", ablate.list_choices("model.position", registry))

    def fail(*_):
        raise AssertionError("it was measured already")

    monkeypatch.setattr(ablate, "PHASES", {"losses": fail, "speed": fail})
    assert ablate.main(command) == 0
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


def test_a_command_that_ended_early_goes_on_where_it_was(
    finished_run, folder, command, monkeypatch, tmp_path
):
    registry = {name: POSITION_ENCODINGS[name] for name in ("rope", "learned")}
    monkeypatch.setitem(AXES, "position", ablate.list_choices("model.position", registry))
    for phase in ablate.PHASES:  # each phase lacks another choice; one line was cut by a kill
        lines = (finished_run / f"{phase}.jsonl").read_text().splitlines()
        kept = lines[0] if phase == "losses" else lines[1]
        (tmp_path / f"{phase}.jsonl").write_text(f"{kept}\n{lines[0][:40]}")
    measured = []
    row = {"losses": {1: [4.5, 5.0]}, "seconds_per_step": [1.0], "tokens_per_second": 64.0}

    def measure(phase):
        return lambda cfg, *_: measured.append((phase, cfg.model.position)) or row

    monkeypatch.setattr(ablate, "PHASES", {p: measure(p) for p in ("losses", "speed")})
    assert ablate.main([*command, f"--out={tmp_path}"]) == 0
    assert measured == [("losses", "learned"), ("speed", "rope")]
    assert ablate.main([*command, f"--out={tmp_path}"]) == 0
    assert len(measured) == 2
    assert "| learned | 4.750 | 0.250 |" in (tmp_path / "ablation.md").read_text()


def test_one_phase_leaves_dashes_and_names_the_whole_command(
    folder, command, monkeypatch, tmp_path
):
    registry = {"rope": POSITION_ENCODINGS["rope"]}
    monkeypatch.setitem(AXES, "position", ablate.list_choices("model.position", registry))
    row = {"losses": {1: [4.5, 5.0]}, "parameters": 10, "reason": ""}

    def fail(*_):
        raise AssertionError("only the losses were asked for")

    monkeypatch.setattr(ablate, "PHASES", {"losses": lambda *_: row, "speed": fail})
    arguments = [*command, f"--out={tmp_path}", "--phase", "losses"]
    assert ablate.main(arguments) == 0
    page = (tmp_path / "ablation.md").read_text()
    assert "| **rope** | 4.750 | 0.250 | - | - | 10 | - | - | - |" in page
    assert "--phase" not in page
    assert "jax (losses)" in page
    assert "jax (speed)" not in page


def test_losses_stay_valid_on_another_machine_and_speeds_do_not(batches, monkeypatch):
    keys = {p: ablate.hash_inputs(BASE, batches, [0], p) for p in ablate.PHASES}
    monkeypatch.setattr(ablate, "describe_environment", lambda: {"device": "another"})
    assert ablate.hash_inputs(BASE, batches, [0], "losses") == keys["losses"]
    assert ablate.hash_inputs(BASE, batches, [0], "speed") != keys["speed"]
    assert ablate.hash_inputs(BASE, batches, [1], "losses") != keys["losses"]


def test_a_key_depends_on_what_differs_from_the_defaults():
    changes = ablate.list_changes(override(BASE, ["model.norm=layer", "seed=3"]), Config())
    assert {"model.norm='layer'", "seed=3", "model.width=64"} <= set(changes)
    assert not any(c.startswith(("model.norm_scale", "mesh.")) for c in changes)
    assert ablate.list_changes(Config(), Config()) == []


def test_another_budget_is_measured_again(finished_run, command, monkeypatch):
    registry = {"rope": POSITION_ENCODINGS["rope"]}
    monkeypatch.setitem(AXES, "position", ablate.list_choices("model.position", registry))
    measured_steps = []

    def stop(cfg, *_):
        measured_steps.append(cfg.train.steps)
        raise KeyboardInterrupt

    monkeypatch.setitem(ablate.PHASES, "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(["--steps=4", *command[1:]])
    assert measured_steps == [4]


def test_rejected_choices_are_on_the_page(finished_run, command, monkeypatch, tmp_path):
    row = next(iter(ablate.read_rows(finished_run / "losses.jsonl").values()))
    monkeypatch.setattr(ablate, "measure_all", lambda *_: None)
    monkeypatch.setattr(ablate, "read_results", lambda *_: ([row], {}))
    registry = {name: MIXERS[name] for name in ("attention", "linformer")}
    monkeypatch.setitem(AXES, "mixer", ablate.list_choices("model.mixers", registry))
    assert ablate.main([*command, "--axes=mixer", f"--docs={tmp_path}"]) == 0
    page = (tmp_path / "ablation.md").read_text()
    assert "Left out: **linformer**. model.mixers='linformer' is not causal" in page
    assert "Accepted with train.objective=masked." in page


def test_a_truncated_line_is_ignored(finished_run, tmp_path):
    line, _ = (finished_run / "losses.jsonl").read_text().splitlines()
    (tmp_path / "losses.jsonl").write_text(f"{line}\n{line[:40]}")
    assert len(ablate.read_rows(tmp_path / "losses.jsonl")) == 1


# --- tables and text ---


def make_row(losses, speed=1.0):
    return {"losses": {1: losses}, "tokens_per_second": speed, "seconds_per_step": [1.0, 1.1]}


def test_the_summary_follows_from_the_figures():
    entries = [Entry("norm", n, c) for n, c in (("a", BASE), ("b", None), ("c", None))]
    rows = [make_row([2.0, 2.2]), make_row([2.15, 2.25], 3.0), make_row([3.0, 3.1])]
    summary = ablation_page.summarize(entries, rows, BASE)
    assert summary == (
        "Lowest loss: a, 2.100; highest: c, 3.050. Seed ranges that overlap with the base's: b. "
        "Fastest: b, 3.0 times the tokens/s of a."
    )


def test_noise_is_the_spread_of_the_step_times_of_blocks():
    assert ablation_page.estimate_noise([make_row([1.0])] * 3) == pytest.approx(0.1)
    assert ablation_page.estimate_noise([make_row([1.0]) | {"seconds_per_step": [1.0]}]) is None


def test_an_unknown_axis_is_named(capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--axes=color"])
    assert "no axis 'color'; there are: position" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_into_longer_windows_is_rejected():
    with pytest.raises(ConfigError, match="multiple of 4"):
        ablate.main(["train.batch=6"])
