"""Loading and saving models: run folders of any mesh and dtype, and what is not a model."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params
from tiny_runs import assert_same_bits, config, make_training, run_config, single_device_env

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import loading
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import MeshConfig, override
from jaxgpt.language_model import LanguageModel
from jaxgpt.loading import load, read_config, save
from jaxgpt.saved_arrays import DamagedError, latest_step, read_newest
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh
from jaxgpt.trainer import train
from jaxgpt.trainer.checkpoint import Checkpoints, Progress

SHARDED_MESH = MeshConfig(data=2, fsdp=2, tensor=2)
TOKENIZER = tokenizers.make_byte_tokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: (path, parameters at the latest step 4, at the best step 2)."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = make_training(config(mesh=SHARDED_MESH), devices=8)
    shardings = jax.tree.map(lambda x: x.sharding, run.abstract.params)
    latest, best = (
        run.make_state().replace(
            params=jax.device_put(random_params(config().model, seed), shardings)
        )
        for seed in (0, 1)
    )
    checkpoints = Checkpoints(str(folder), keep=1)
    checkpoints.save_best(best, Progress(step=2))
    checkpoints.save(latest, Progress(step=4))
    checkpoints.close()
    (folder / "config.json").write_text(configs.to_json(config()))
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return str(folder), latest.params, best.params


def test_a_run_is_loaded_at_its_best(run):
    folder, _, best = run
    model = load(folder)
    assert (model.config, model.step) == (config(), 2)
    assert model.tokenizer.decode(model.tokenizer.encode("the cat")) == "the cat"
    assert_same_bits(model.params, best)


def test_a_run_is_loaded_at_its_latest_step(run):
    folder, latest, _ = run
    model = load(folder, checkpoint="latest")
    assert model.step == 4
    assert_same_bits(model.params, latest)


@pytest.mark.parametrize(
    ("path", "step"), [("best/2", 2), ("checkpoints/4", 4), ("best", 2), ("checkpoints/", 4)]
)
def test_one_checkpoint_of_a_run_is_loaded_by_its_path(run, path, step):
    folder, latest, best = run
    model = load(f"{folder}/{path}")
    assert model.step == step
    assert model.config == config()
    assert_same_bits(model.params, best if step == 2 else latest)


def test_a_run_without_a_best_is_loaded_at_its_latest_step(run, tmp_path):
    folder, latest, _ = run
    part = tmp_path / "part"
    part.mkdir()
    for name in ("config.json", "tokenizer.json", "checkpoints"):
        os.symlink(os.path.join(folder, name), part / name)
    model = load(part)
    assert model.step == 4
    assert_same_bits(model.params, latest)


def test_only_parameters_are_read(run, tmp_path):
    folder, latest, _ = run
    part = tmp_path / "part"
    (part / "checkpoints" / "4").mkdir(parents=True)
    inside = os.path.join(folder, "checkpoints", "4")
    for name in os.listdir(inside):
        if name not in ("rest", "progress"):
            os.symlink(os.path.join(inside, name), part / "checkpoints" / "4" / name)
    for name in ("config.json", "tokenizer.json"):
        os.symlink(os.path.join(folder, name), part / name)
    assert_same_bits(load(part, checkpoint="latest").params, latest)


def test_a_run_of_eight_devices_is_loaded_on_one(run):
    code = (
        "import sys, jax\n"
        "import jaxgpt\n"
        "params = jaxgpt.load(sys.argv[1]).params\n"
        "print(jax.device_count(), float(params['embed']['table'].sum()))"
    )
    command = [sys.executable, "-c", code, run[0]]
    done = subprocess.run(
        command, env=single_device_env(), capture_output=True, text=True, check=True
    )
    devices, total = done.stdout.split()
    assert devices == "1"
    # Summed in another order on other devices.
    assert float(total) == pytest.approx(float(run[2]["embed"]["table"].sum()), rel=1e-4)


def test_loading_a_run_prints_nothing(run, capfd):
    load(run[0])
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it has no config\.json"):
        load(tmp_path)


def test_a_run_without_a_checkpoint_is_rejected(run, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        os.symlink(os.path.join(run[0], name), tmp_path / name)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        load(tmp_path)


def test_an_incomplete_checkpoint_is_ignored(run, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        os.symlink(os.path.join(run[0], name), tmp_path / name)
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        load(tmp_path)


def test_an_unknown_checkpoint_is_rejected_with_the_nearest(run):
    with pytest.raises(ConfigError, match="Did you mean 'latest'"):
        load(run[0], checkpoint="lastest")


def test_the_error_of_an_invalid_config_gives_its_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match=r"config\.json is not a saved config"):
        read_config(str(tmp_path))


def test_the_error_of_unknown_config_keys_gives_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"widht": 3}}))
    with pytest.raises(ConfigError, match=r"config\.json: .*'model.widht'"):
        read_config(str(tmp_path))


# --- beside a run that writes ---


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_damaged(tmp_path):
    for name in ("3", "7"):
        (tmp_path / name).mkdir()
    read, warnings = [], []

    def read_and_lose(path):
        read.append(os.path.basename(path))
        if len(read) == 1:  # the run saves 9, and deletes the other ones
            (tmp_path / "9").mkdir()
            for name in ("3", "7"):
                (tmp_path / name).rmdir()
            raise DamagedError("half of it is missing")
        return path

    assert read_newest([str(tmp_path)], read_and_lose, warnings.append) == str(tmp_path / "9")
    assert (read, warnings) == (["7", "9"], [])


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(tmp_path):
    (tmp_path / "7").mkdir()
    read = []

    def read_and_replace(path):
        read.append(path)
        if len(read) == 1:
            (tmp_path / "new").mkdir()  # before the other is gone, so that it has another inode
            (tmp_path / "7").rmdir()
            (tmp_path / "new").rename(tmp_path / "7")
            raise ValueError("half of it is missing")
        return path

    assert read_newest([str(tmp_path)], read_and_replace, read.append) == str(tmp_path / "7")
    assert read == [str(tmp_path / "7")] * 2


def test_an_error_that_is_not_damage_is_raised(tmp_path):
    (tmp_path / "7").mkdir()

    def refuse(path):
        raise ConfigError("another model")

    with pytest.raises(ConfigError, match="another model"):
        read_newest([str(tmp_path)], refuse, print)
    with pytest.raises(FileNotFoundError):
        read_newest([str(tmp_path / "nothing")], refuse, print)


# --- dtype and mesh ---


def test_parameters_are_sharded_over_a_mesh_by_their_letters(run):
    mesh = make_mesh(SHARDED_MESH)
    model = load(run[0], mesh=mesh)
    expected = make_training(config(mesh=SHARDED_MESH), devices=8).abstract.params
    jax.tree.map(
        lambda x, y: x.sharding == y.sharding or pytest.fail(str(x)), model.params, expected
    )
    assert not model.params["embed"]["table"].is_fully_replicated
    assert_same_bits(model.params, run[2])


def test_a_mesh_with_other_axes_is_rejected(run):
    mesh = jax.make_mesh((8,), ("devices",))
    with pytest.raises(ConfigError, match=r"axes devices.*make_mesh"):
        load(run[0], mesh=mesh)


def test_parameters_are_loaded_in_the_dtype_that_is_asked_for(run):
    model = load(run[0], dtype="bfloat16")
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), run[2])
    assert_same_bits(model.params, expected)
    assert model.config.model.dtype == "bfloat16"


def test_an_unknown_dtype_is_rejected(run):
    with pytest.raises(ConfigError, match="Known: bfloat16, float32"):
        load(run[0], dtype="float15")


# --- saving ---


def make_model(**changes) -> LanguageModel:
    params = random_params(config().model)
    return LanguageModel(**{"config": config(), "params": params, "tokenizer": TOKENIZER} | changes)


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    model = make_model(labels=("cat", "dog"), step=7)
    jaxgpt.save(model, tmp_path / "inside" / "model")
    for checkpoint in ("best", "latest"):
        loaded = jaxgpt.load(tmp_path / "inside" / "model", checkpoint=checkpoint)
        assert (loaded.config, loaded.labels, loaded.step) == (config(), ("cat", "dog"), 7)
        assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
        assert_same_bits(loaded.params, model.params)
    assert os.listdir(tmp_path / "inside") == ["model"]


def test_a_saved_bfloat16_model_stays_so(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config().model))
    save(make_model(params=params), tmp_path / "model")
    assert_same_bits(load(tmp_path / "model").params, params)


def test_a_sharded_model_is_saved_and_loaded_on_one_device(run, tmp_path):
    save(load(run[0], mesh=make_mesh(SHARDED_MESH)), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert len(loaded.params["embed"]["table"].devices()) == 1
    assert_same_bits(loaded.params, run[2])


def test_a_saved_model_has_the_best_checkpoint_of_a_run(tmp_path):
    model = make_model(step=7)
    save(model, tmp_path / "model")
    assert latest_step(str(tmp_path / "model" / "best")) == 7
    checkpoints = Checkpoints(str(tmp_path / "model"), keep=1)
    assert checkpoints.latest_step() is None
    checkpoints.close()


def test_training_does_not_replace_a_saved_model_but_starts_from_it(tmp_path):
    cfg = run_config(tmp_path, "name=saved", "train.steps=2")
    model = make_model(config=cfg)
    save(model, cfg.run_folder)
    with pytest.raises(ConfigError, match=r"holds a saved model.*train.start="):
        train(cfg, is_quiet=True)
    assert_same_bits(load(cfg.run_folder).params, model.params)
    settings = ["name=next", f"train.start={cfg.run_folder}", "optimizer.lr=1e-30"]
    train(override(cfg, settings), is_quiet=True)
    found = load(tmp_path / "runs" / "next", checkpoint="latest")
    np.testing.assert_allclose(found.params["embed"]["table"], model.params["embed"]["table"])


def test_saving_never_replaces_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="exists: save into a new folder"):
        save(make_model(), tmp_path / "model")
    assert os.listdir(tmp_path / "model") == ["precious.txt"]


def test_an_interrupted_save_leaves_no_model_and_the_next_one_succeeds(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "make_manager", fail)
        with pytest.raises(KeyboardInterrupt):
            save(make_model(), tmp_path / "model")
    with pytest.raises(ConfigError, match="is not a run"):
        load(tmp_path / "model")
    save(make_model(), tmp_path / "model")
    assert_same_bits(load(tmp_path / "model").params, make_model().params)


# --- other kinds of paths ---


def test_the_first_loader_that_is_for_a_path_loads_it(run, monkeypatch):
    recorded = []
    row = loading.Loader(lambda path: path.endswith(".model"), "jaxgpt.loading:load_other")
    record = lambda path, **arguments: recorded.append((path, arguments))  # noqa: E731
    monkeypatch.setattr(loading, "load_other", record, raising=False)
    monkeypatch.setattr(loading, "LOADERS", {"other": row, **loading.LOADERS})
    load("some.model", dtype="bfloat16")
    assert recorded == [
        ("some.model", {"dtype": "bfloat16", "mesh": None, "checkpoint": "best", "plugins": None})
    ]
    assert load(run[0]).step == 2


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, jaxgpt\n"
        "print([m for m in ('jax', 'numpy', 'orbax', 'flax', 'tokenizers') if m in sys.modules])\n"
        "print(jaxgpt.LanguageModel.__name__, jaxgpt.load.__name__, jaxgpt.save.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "LanguageModel load save"]


def test_every_public_name_is_listed_and_exists():
    assert {*jaxgpt.LAZY} <= {*dir(jaxgpt)} & {*jaxgpt.__all__}
    assert all(callable(getattr(jaxgpt, name)) for name in jaxgpt.LAZY)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = jaxgpt.nothing
