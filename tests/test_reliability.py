"""A small dose of what tests/reliability does: `python -m tests.reliability` has the large one."""

import signal
import sys

import pytest
from reliability import Commands, damage, disks, kills, readers
from reliability import __main__ as large_dose

from jaxgpt.saved_arrays import list_steps
from jaxgpt.verification import verify


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return damage.SavedRun(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize(
    ("how", "times"),
    [(damage.flip, 16), (damage.cut, 8), (damage.zero, 8), (damage.remove, 8)],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_nothing_that_is_damaged_is_used(saved, how, times):
    outcome = damage.damage(saved, how, times)
    assert outcome.failures == []
    assert sum(outcome.facts.values()) > times  # in every way, where a byte has changed


def test_the_harness_notices_what_is_wrong(saved, monkeypatch):
    """Without the check of arrays, another number is used: the dose above is not blind."""
    saved.reset()
    damage.change_number(saved.folder / "checkpoints/3/params", "embed.table")
    uses = {"resume": "fell back", "sample latest": "fell back", "sample best": "right"}
    assert {use: saved.use(use) for use in damage.USES} == {**uses, "verify": "refused"}
    monkeypatch.setattr("jaxgpt.checksums.hash_array", lambda data: "0" * 16)
    monkeypatch.setattr("jaxgpt.checksums.make_box_reader", _read_without_check)
    uses = {"resume": "wrong", "sample latest": "wrong", "sample best": "right"}
    assert {use: saved.use(use) for use in uses} == uses


def _read_without_check(name, store, record):
    from jaxgpt.checksums import read_part

    return lambda box: read_part(store, box)


def test_readers_beside_a_writer_never_meet_half_of_a_checkpoint(tmp_path):
    outcome = readers.read_beside_writer(tmp_path / "run", 60)
    assert outcome.failures == []
    assert outcome.facts["different ones read"] > 1


def test_a_killed_run_is_whole_and_continues(tmp_path):
    commands = Commands(tmp_path)
    reference = kills.make_reference(commands, 12)[1]
    assert sorted(reference) == list(range(1, 13))
    arguments = commands.list_arguments("killed", *kills.SETTINGS, "train.steps=12")
    process = commands.start("train", *arguments)
    lines = kills.follow(process, 5, 0.0, signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:  # it may have been faster
        assert process.returncode == 0, lines
    failures, lost = kills.check_run(str(tmp_path / "runs" / "killed"), reference, lines)
    assert failures == []
    assert lost <= 12
    status, out = commands.train("killed", *kills.SETTINGS, "train.steps=12")
    assert status == 0, out
    assert kills.read_records(str(tmp_path / "runs" / "killed"), 12) == reference[12]


def test_a_disk_that_is_full_ends_in_one_line(tmp_path):
    if not disks.can_mount():
        pytest.skip("no permission to mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    with disks.small_disk(folder, 500):
        small = Commands(tmp_path, folder)
        status, out = small.train("run", *disks.SETTINGS)
        assert disks.check("500 kB", folder / "run", status, out) == []
        assert status == 1
        assert "could not be saved (No space left on device)" in out
        steps = list_steps(str(folder / "run" / "checkpoints"))
        assert steps
        assert all(finding.state == "good" for finding in verify(str(folder / "run")))


def test_the_large_dose_is_one_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    arguments = ["--only", "flips", "--flips", "5", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["tests.reliability", *arguments])
    assert large_dose.main() == 0
    assert "| one flipped bit | 5 | 0 |" in capsys.readouterr().out
    assert path.read_text().count('"scenario"') == 4
