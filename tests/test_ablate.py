"""The comparison of all choices: nothing is left out unsaid, and nothing is measured twice."""

import json
import pathlib
import sys

import numpy as np
import pytest
from tiny_runs import write_text

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks are not installed

from benchmarks import ablate
from benchmarks.ablate import AXES, BASE, TIMES, Choice, Entry, Refused, Text, plan, settle
from jaxgpt.config import ConfigError, override
from jaxgpt.model import count_params
from jaxgpt.model.block import WIRINGS
from jaxgpt.model.feedforward import ACTIVATIONS, FEEDFORWARDS
from jaxgpt.model.masks import PATTERNS
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITIONS

REGISTRIES = {
    "position": (POSITIONS, lambda m: m.position),
    "norm": (NORMS, lambda m: m.norm),
    "activation": (ACTIVATIONS, lambda m: m.activation),
    "mixer": (MIXERS, lambda m: m.mixers[0]),
    "wiring": (WIRINGS, lambda m: m.wiring),
    "feedforward": (FEEDFORWARDS, lambda m: m.feedforward),
    "pattern": (PATTERNS, lambda m: m.pattern[0]),
}


# --- what is compared ---


@pytest.mark.parametrize("axis", AXES)
def test_every_row_of_a_registry_is_trained_or_refused_by_name(axis):
    registry, of = REGISTRIES[axis]
    planned = plan(BASE, [axis], is_product=False)
    trained = {of(x.cfg.model) for x in planned if isinstance(x, Entry)}
    refused = {x.name for x in planned if isinstance(x, Refused)}
    assert trained | refused == set(registry)
    assert not trained & refused


def test_only_what_is_for_other_objectives_is_refused():
    planned = plan(BASE, list(AXES), is_product=False)
    refused = {x.name: x for x in planned if isinstance(x, Refused)}
    assert set(refused) == {"linformer", "prefix"}
    assert refused["linformer"].elsewhere == ("masked",)
    assert refused["prefix"].elsewhere == ("prefix",)
    assert "looks into the future" in refused["linformer"].reason
    assert all(x.reason.endswith(".") and "\n" not in x.reason for x in refused.values())


def test_a_new_row_takes_part_by_itself(monkeypatch):
    monkeypatch.setitem(NORMS, "other", NORMS["rms"])
    assert [x.name for x in plan(BASE, ["norm"], is_product=False)] == ["rms", "layer", "other"]


def test_every_axis_has_the_base_once():
    for axis in AXES:
        planned = plan(BASE, [axis], is_product=False)
        assert sum(isinstance(x, Entry) and x.cfg == BASE for x in planned) == 1, axis


def test_a_mixer_that_can_not_turn_has_no_positions_and_says_so():
    entries = {x.name: x for x in plan(BASE, ["mixer"], is_product=False) if isinstance(x, Entry)}
    assert entries["performer"].cfg.model.position == "rope"
    assert entries["mamba (position none)"].cfg.model.position == "none"


def test_a_mixer_tries_rope_before_none():
    base = override(BASE, ["model.position=alibi"])
    choice = Choice("performer", ("model.mixers=performer",))
    assert settle(base, "mixer", choice).cfg.model.position == "rope"


def test_a_product_has_every_combination_and_refuses_by_name():
    planned = plan(BASE, ["position", "mixer"], is_product=True)
    assert len(planned) == len(POSITIONS) * len(MIXERS)
    refused = {x.name: x for x in planned if isinstance(x, Refused)}
    assert "nothing to act on" in refused["alibi / mamba"].reason
    assert "none / mamba" not in refused  # asked for, so not replaced either


def test_axes_that_set_the_same_thing_have_no_product():
    with pytest.raises(ConfigError, match=r"two of these set model\.feedforward"):
        plan(BASE, ["activation", "feedforward"], is_product=True)


def test_plain_and_gated_layers_have_as_many_parameters():
    entries = plan(BASE, ["activation"], is_product=False)
    assert len({count_params(x.cfg.model)["total"] for x in entries}) == 1


# --- how it is measured ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    write_text(folder / "text", documents=24)
    return folder


def settings(place):
    return [
        *("model.context=16", "model.width=16", "model.heads=2", "model.ffn=16", "train.batch=4"),
        *("train.eval_batches=0", f"data.cache={place / 'tokens'}"),
    ]


@pytest.fixture(scope="module")
def text(place):
    return Text(override(BASE, [f"data.source={place / 'text'}", *settings(place)]))


def test_windows_of_all_lengths_ask_for_the_same_tokens(text):
    asked = {}
    for times in TIMES:
        batches = [*text.held(times)]
        assert batches[0].tokens.shape == (4 // times, 16 * times)
        parts = [np.concatenate([getattr(b, name).reshape(-1) for b in batches])
                 for name in ("targets", "weights")]  # fmt: skip
        asked[times] = parts[0][parts[1] > 0]
    assert asked[1].size > 0.9 * (text.corpus.held.ids.size - 1) - text.corpus.held.documents
    np.testing.assert_array_equal(asked[1], asked[2])
    np.testing.assert_array_equal(asked[1], asked[4])


def test_seeds_have_batches_of_their_own(text):
    first, again, second = (text.train(seed)[0].tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()


@pytest.mark.parametrize(
    ("change", "table"),
    [
        ("model.position=rope", ""),
        ("model.position=learned", "`stack/position/table`"),
        ("model.mixers=synthesizer_random", "`stack/layers/block_0/mixer/scores`"),
    ],
)
def test_what_has_a_row_for_every_position_is_not_stretched(change, table):
    place = [] if "position" in change else ["model.position=none"]
    longer, fixed = ablate.stretched(override(BASE, [change, *place]), 4)
    assert fixed == table
    assert longer.model.context == 4 * BASE.model.context


# --- the command ---


@pytest.fixture(scope="module")
def command(place):
    """What two choices are trained by, after it ran once; it ran in another folder than docs."""
    source = f"--source={place / 'text'}"
    axes = "--axes=position"
    out = f"--out={place / 'out'}"
    return ["--steps=3", "--seeds=0,1", source, axes, out, *settings(place)]


@pytest.fixture(scope="module")
def finished(place, command):
    few = {name: POSITIONS[name] for name in ("rope", "learned")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AXES, "position", ablate._choices("model.position", few))
        assert ablate.main(command) == 0
    return place / "out"


def test_a_row_has_all_its_figures(finished):
    lines = (finished / "rows.jsonl").read_text().splitlines()
    rope, learned = map(json.loads, lines)
    assert {times: len(losses) for times, losses in rope["losses"].items()} == {
        "1": 2, "2": 2, "4": 2,
    }  # fmt: skip
    assert set(learned["losses"]) == {"1"}
    assert rope["losses"]["1"][0] != rope["losses"]["1"][1]
    # A byte at random costs log 260 = 5.56; three steps change little.
    assert all(4 < loss < 6 for losses in rope["losses"].values() for loss in losses)
    assert learned["parameters"] - rope["parameters"] == 16 * 16  # the table of positions
    for row in (rope, learned):
        assert row["megabytes"] > 4 * 4 * row["parameters"] / 1e6  # with gradients and moments
        assert min(row["seconds_per_step"], default=0) > 0
        seconds = np.median(row["seconds_per_step"])
        assert row["tokens_per_second"] == pytest.approx(4 * 16 / seconds)


def test_the_page_has_tables_reasons_and_pictures(finished):
    page = (finished / "ablation.md").read_text()
    assert "python -m benchmarks.ablate --steps=3" in page
    assert "| **rope** |" in page
    assert "| learned |" in page
    assert "\n\\- learned: `stack/position/table` has no rows for longer windows." in page
    for name in ("loss", "length"):
        assert f"images/ablation_{name}.png" in page
        picture = (finished / "images" / f"ablation_{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    assert "ablation_speed" not in page  # no mixers were compared


def test_a_second_run_measures_nothing_and_writes_the_same(finished, command, monkeypatch):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    few = {name: POSITIONS[name] for name in ("rope", "learned")}
    monkeypatch.setitem(AXES, "position", ablate._choices("model.position", few))

    def never(*_):
        raise AssertionError("it was measured already")

    monkeypatch.setattr(ablate, "measure", never)
    assert ablate.main(command) == 0
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_another_budget_is_measured_anew(finished, command, monkeypatch):
    few = {"rope": POSITIONS["rope"]}
    monkeypatch.setitem(AXES, "position", ablate._choices("model.position", few))
    asked = []

    def stop(cfg, *_):
        asked.append(cfg.train.steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(["--steps=4", *command[1:]])
    assert asked == [4]


def test_what_is_refused_is_on_the_page(finished, command, monkeypatch, tmp_path):
    rows = ablate.read_rows(finished / "rows.jsonl")
    monkeypatch.setattr(ablate, "measure_all", lambda entries, *_: [*rows.values()][:1])
    few = {name: MIXERS[name] for name in ("attention", "linformer")}
    monkeypatch.setitem(AXES, "mixer", ablate._choices("model.mixers", few))
    assert ablate.main([*command, "--axes=mixer", f"--docs={tmp_path}"]) == 0
    page = (tmp_path / "ablation.md").read_text()
    assert "Left out: **linformer**. model.mixers='linformer' looks into the future" in page
    assert "Accepted with train.objective=masked." in page


def test_a_cut_line_does_not_count(finished, tmp_path):
    whole, _ = (finished / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text(f"{whole}\n{whole[:40]}")
    assert len(ablate.read_rows(tmp_path / "rows.jsonl")) == 1


# --- what is told ---


def row(losses, speed=1.0):
    return {"losses": {1: losses}, "tokens_per_second": speed, "seconds_per_step": [1.0, 1.1]}


def test_findings_follow_the_figures():
    entries = [Entry("norm", n, c) for n, c in (("a", BASE), ("b", None), ("c", None))]
    rows = [row([2.0, 2.2]), row([2.15, 2.25], 3.0), row([3.0, 3.1])]
    said = ablate.findings(entries, rows, BASE)
    assert said == (
        "Lowest loss: a, 2.100; highest: c, 3.050. Ranges over seeds overlap with the base's: b. "
        "Fastest: b, 3.0 times the tokens/s of a."
    )


def test_noise_is_how_far_apart_the_seeds_are():
    assert ablate.noise([row([1.0])] * 3) == pytest.approx(0.1)
    assert ablate.noise([row([1.0]) | {"seconds_per_step": [1.0]}]) is None


def test_an_unknown_axis_is_named(capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--axes=colour"])
    assert "no axis 'colour'; there are: position" in capsys.readouterr().err


def test_a_batch_that_can_not_be_cut_is_refused():
    with pytest.raises(ConfigError, match="multiple of 4"):
        ablate.main(["train.batch=6"])
