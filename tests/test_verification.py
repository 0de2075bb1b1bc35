"""`jaxgpt verify`: what is damaged is found and named, and the exit status tells it."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
from reliability.damage import flip_value
from tiny_runs import config, fill, make_training, single_device_env

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.cli.verify import main
from jaxgpt.config import MeshConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.checkpoint import Checkpoints, Progress
from jaxgpt.verification import DAMAGED, GOOD, UNKNOWN, is_usable, verify

OLD_RUN = pathlib.Path(__file__).parent / "data" / "old_run"
TOKENIZER = tokenizers.make_byte_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints 2, 3 and best 2, whose arrays are divided among eight devices."""
    folder = tmp_path_factory.mktemp("verified")
    state = fill(make_training(config(mesh=MeshConfig(data=2, fsdp=4)), devices=8).make_state())
    checkpoints = Checkpoints(str(folder), keep=2)
    progress = {"tokenizer": TOKENIZER.fingerprint}
    checkpoints.save_best(state, Progress(step=2, **progress))
    for step in (2, 3):
        checkpoints.save(state, Progress(step=step, **progress))
    checkpoints.close()
    (folder / "config.json").write_text(configs.to_json(config()))
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return folder, state


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run")


def find_states(folder) -> dict[str, str]:
    return {finding.path: finding.state for finding in verify(str(folder))}


def test_a_whole_run_is_good(saved):
    folder, state = saved
    found = {finding.path: finding for finding in verify(str(folder))}
    paths = ["config.json", "tokenizer.json", "checkpoints/3", "checkpoints/2", "best/2"]
    assert list(found) == paths
    assert {finding.state for finding in found.values()} == {GOOD}
    leaves = jax.tree.leaves((state.params, state.opt_state))
    latest, best = found["checkpoints/3"], found["best/2"]
    assert latest.arrays == len(leaves) + 1  # and the random key
    assert latest.bytes == sum(x.nbytes for x in leaves) + 8
    assert best.bytes == sum(x.nbytes for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("part", ["checkpoints/3/params", "checkpoints/2/rest", "best/2/params"])
def test_a_flipped_bit_is_found_in_its_checkpoint_alone(part, run):
    name = flip_value(run / part)
    damaged = str(pathlib.PurePath(part).parent)
    for finding in verify(str(run)):
        assert finding.state == (DAMAGED if finding.path == damaged else GOOD), finding.path
        if finding.path == damaged:
            assert any(name in text for text in finding.problems), finding.problems


@pytest.mark.parametrize(
    ("damage", "path", "problem"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints/3/rest"), "checkpoints/3", "rest is missing"),
        (
            lambda run: shutil.rmtree(run / "checkpoints/3/progress"),
            "checkpoints/3",
            "No such file or directory",
        ),
        (
            lambda run: (run / "config.json").write_text(
                (run / "config.json").read_text().replace('"width": 32', '"width": 33')
            ),
            "config.json",
            "is not as it was written",
        ),
        (
            lambda run: (run / "tokenizer.json").write_text(
                (run / "tokenizer.json").read_text().replace("<unk>", "<unl>")
            ),
            "best/2",
            "is not the tokenizer that it was trained with",
        ),
        (lambda run: (run / "tokenizer.json").write_text("{"), "tokenizer.json", "tokenizer.json"),
    ],
    ids=["rest", "progress", "config", "another tokenizer", "tokenizer"],
)
def test_what_is_missing_or_changed_is_named(damage, path, problem, run):
    damage(run)
    (finding,) = (finding for finding in verify(str(run)) if finding.path == path)
    assert finding.state == DAMAGED
    assert any(problem in text for text in finding.problems), finding.problems


def test_a_run_of_an_older_version_has_no_checksums():
    states = find_states(OLD_RUN)
    assert states["checkpoints/2"] == states["config.json"] == UNKNOWN
    assert is_usable(verify(str(OLD_RUN)))


def test_an_array_of_an_older_version_that_cannot_be_read_is_found(tmp_path):
    run = shutil.copytree(OLD_RUN, tmp_path / "old")
    for path in (run / "checkpoints").rglob("d/*"):
        path.write_bytes(b"")
    assert find_states(run)["checkpoints/2"] == DAMAGED


def test_a_saved_model_is_verified(saved, tmp_path):
    model = LanguageModel(config(), saved[1].params, TOKENIZER)
    jaxgpt.save(model, tmp_path / "model")
    assert find_states(tmp_path / "model") == {
        "config.json": GOOD, "tokenizer.json": GOOD, "best/0": GOOD,
    }  # fmt: skip
    flip_value(tmp_path / "model/best/0/params")
    assert find_states(tmp_path / "model")["best/0"] == DAMAGED
    with pytest.raises(ConfigError, match=r"best/0 (is damaged|cannot be read) \(.+\)"):
        jaxgpt.load(tmp_path / "model")


def test_the_class_names_of_a_model_are_verified(saved, tmp_path):
    folder = tmp_path / "model"
    jaxgpt.save(LanguageModel(config(), saved[1].params, TOKENIZER, ("bad", "good")), folder)
    assert find_states(folder)["labels.json"] == find_states(folder)["best/0"] == GOOD
    assert jaxgpt.load(folder).labels == ("bad", "good")
    (folder / "labels.json").write_text('["good", "bad"]')
    finding = next(finding for finding in verify(str(folder)) if finding.path == "best/0")
    assert finding.state == DAMAGED
    assert "labels.json does not hold the class names" in finding.problems[0]
    with pytest.raises(ConfigError, match=r"labels\.json does not hold the class names that"):
        jaxgpt.load(folder)
    (folder / "labels.json").write_text('["good", 1]')
    assert find_states(folder)["labels.json"] == DAMAGED
    with pytest.raises(ConfigError, match="is not a list of class names"):
        jaxgpt.load(folder)
    (folder / "labels.json").unlink()
    assert find_states(folder)["best/0"] == DAMAGED


# --- the command ---


def test_the_command_prints_a_table_and_exits_with_0_or_1(run, capsys):
    assert main([str(run)], "jaxgpt verify") == 0
    assert f"{run} is as it was saved." in capsys.readouterr().out
    flip_value(run / "checkpoints/3/rest")
    assert main([str(run)], "jaxgpt verify") == 1
    out = capsys.readouterr().out
    assert f"{run} is damaged: checkpoints/3. Training resumes from checkpoints/2. " in out
    assert "Sampling uses best/2." in out


def test_the_command_prints_json(run, capsys):
    flip_value(run / "best/2/params")
    assert main([str(run), "--json"], "jaxgpt verify") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["is_good"]) == (str(run), False)
    states = {finding["path"]: finding["state"] for finding in found["findings"]}
    assert states["best/2"] == DAMAGED
    assert states["checkpoints/3"] == GOOD


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run"):
        main([str(tmp_path)], "jaxgpt verify")


def test_the_command_is_one_of_jaxgpt(run):
    command = [sys.executable, "-m", "jaxgpt", "verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=single_device_env())
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoints/3" in done.stdout
