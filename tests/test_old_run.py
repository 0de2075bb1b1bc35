"""A run folder of an older version, with settings under their old names, still works.

tests/data/old_run was written when `train.mask_rate` was still `train.noise` and
`model.documents=separate` was `model.documents=apart`: a complete run of 4 steps, whose checkpoint
of step 4 was then deleted. Its metrics.jsonl has the losses that resuming from step 2 must repeat.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

from jaxgpt.config import override
from jaxgpt.console import sample_cli
from jaxgpt.loading import load, read_config
from jaxgpt.trainer import train

SAVED = pathlib.Path(__file__).parent / "data" / "old_run"
OLD_NAMES = ["train.noise=0.3", "model.documents=apart"]


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A copy of the run; its data.source is a relative path."""
    shutil.copytree(SAVED, tmp_path / "old_run")
    monkeypatch.chdir(tmp_path)
    return pathlib.Path("old_run")


def read_metrics(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_saved_config_has_the_old_names():
    text = (SAVED / "config.json").read_text()
    assert '"noise": 0.3' in text
    assert '"documents": "apart"' in text


def test_it_opens_with_the_new_names(run_folder):
    model = load(run_folder)
    assert model.step == 2
    assert model.config.train.mask_rate == 0.3
    assert model.config.model.documents == "separate"


def test_it_samples_as_before(run_folder, capsys):
    sample_cli(str(run_folder), "best", None, None, [])
    text, *answers = capsys.readouterr().out.splitlines()
    assert text == read_config(str(run_folder)).sample.prompt  # the older version left it out
    # What the older version printed.
    assert answers == ["<mask>  'a' 0.5%  'd' 0.5%  't' 0.5%  ' ' 0.5%  'n' 0.5%"]


@pytest.mark.parametrize("assignments", [[], OLD_NAMES], ids=["saved config", "old names"])
def test_it_resumes_and_learns_and_evaluates_as_before(run_folder, assignments):
    train(override(read_config(str(run_folder)), assignments), is_quiet=True)
    found, expected = read_metrics(run_folder), read_metrics(SAVED)
    for a, b in zip(found, expected, strict=True):
        assert (a["kind"], a["step"], a["tokens"]) == (b["kind"], b["step"], b["tokens"])
        # float32, summed in another order on another number of devices
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    text = (run_folder / "config.json").read_text()
    assert '"mask_rate": 0.3' in text
    assert '"documents": "separate"' in text
    assert '"noise"' not in text
