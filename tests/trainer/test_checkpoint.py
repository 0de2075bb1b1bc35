"""What is read back is what was written, every bit, whatever happened meanwhile."""

import functools
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import B, alone, assert_same_bits, config, plain, random_batch, training

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import MeshConfig
from jaxgpt.hosts import place
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.checkpoint import (
    Checkpoints,
    OtherShapesError,
    Progress,
    latest_step,
    load_run,
    read_config,
)
from jaxgpt.trainer.state import TrainState

DIVIDED = MeshConfig(data=2, fsdp=2, tensor=2)
PROGRESS = Progress(step=3, tokens=48, seconds=1.5, best_loss=2.25, best_step=2, stale=1, data="ab")


def fill(state, seed=0):
    """The same state with a random number in every place of every float and code."""
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def random(x, key):
        if x.dtype.itemsize == 1:
            return jax.device_put(jax.random.randint(key, x.shape, 0, 127, x.dtype), x.sharding)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jax.device_put(jax.random.normal(key, x.shape), x.sharding)

    return jax.tree.unflatten(tree, [random(x, k) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(
    scope="module",
    params=["optimizer.name=adamw", "optimizer.name=muon", "optimizer.moments=int8"],
)
def divided(request):
    """(what a run is made of, a state on eight devices)."""
    made = training(config(request.param, mesh=DIVIDED), devices=8)
    return made, fill(made.make()).replace(step=jnp.int32(PROGRESS.step))


@pytest.fixture
def files(tmp_path):
    opened = Checkpoints(str(tmp_path), keep=2)
    yield opened
    opened.close()


# --- there and back ---


def test_a_state_comes_back_bit_for_bit(divided, files):
    made, state = divided
    files.save(state, PROGRESS)
    files.wait()
    assert_same_bits(files.restore(made.abstract)[0], state)


def test_progress_comes_back(divided, files):
    made, state = divided
    files.save(state, PROGRESS)
    files.wait()
    assert files.restore(made.abstract)[1] == PROGRESS


def test_progress_without_a_best_comes_back(divided, files):
    made, state = divided
    files.save(state, Progress(step=3))
    files.wait()
    assert files.restore(made.abstract)[1] == Progress(step=3)


def test_a_state_comes_back_on_another_mesh_bit_for_bit(divided, files, request):
    _, state = divided
    files.save(state, PROGRESS)
    files.wait()
    setting = request.node.callspec.params["divided"]
    for mesh, devices in ((MeshConfig(data=1), 1), (MeshConfig(data=1, fsdp=8), 8)):
        other = training(config(setting, mesh=mesh), devices)
        back, _ = files.restore(other.abstract)
        assert_same_bits(back, state)
        placed = jax.tree.map(
            lambda x, y: x.sharding == y.sharding, back.params, other.abstract.params
        )
        assert all(jax.tree.leaves(placed))


LAYOUTS = {
    "one device": (MeshConfig(data=1), 1),
    "fsdp": (MeshConfig(data=1, fsdp=8), 8),
    "tensor": (MeshConfig(data=4, tensor=2), 8),
    "copies of tensor": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
}


@functools.cache
def laid(layout: str):
    mesh, devices = LAYOUTS[layout]
    return training(config(mesh=mesh), devices)


@pytest.fixture(scope="module")
def straight():
    """Losses of six steps on one device."""
    return laid("one device").run(6)[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one device", "fsdp"),
        ("fsdp", "one device"),
        ("fsdp", "tensor"),
        ("tensor", "fsdp"),
        ("copies of tensor", "fsdp"),
    ],
)
def test_a_run_goes_on_where_its_devices_are_others(before, after, files, straight):
    state, losses = laid(before).run(3)
    files.save(state, Progress(step=3))
    files.wait()
    back, progress = files.restore(laid(after).abstract)
    assert_same_bits(back, state)
    rest = laid(after).run(3, back, lambda number: random_batch(number + progress.step))[1]
    # The order in which devices add, in float32.
    np.testing.assert_allclose(losses + rest, straight, rtol=0, atol=1e-5)


def test_only_the_latest_are_kept(divided, files):
    for step in (1, 2, 3):
        files.save(divided[1], Progress(step=step))
    files.wait()
    assert files.latest_step() == 3
    assert sorted(os.listdir(files._latest.directory)) == ["2", "3"]


def test_the_same_step_is_not_saved_twice(divided, files):
    made, state = divided
    files.save(state, PROGRESS)
    files.wait()
    files.save(fill(state, seed=1), PROGRESS)
    files.wait()
    assert_same_bits(files.restore(made.abstract)[0], state)


# --- saving while training goes on ---


def test_training_on_with_donated_arrays_does_not_change_what_is_being_saved(files):
    made = training(config(mesh=DIVIDED), devices=8)
    with jax.set_mesh(made.mesh):
        batch = place(random_batch(), made.mesh, B)
        state, _ = made.step(made.make(), batch)
        copies = {}
        for step in (1, 2):
            copies[step] = plain(state)
            files.save(state, Progress(step=step))
            for _ in range(5):
                state, _ = made.step(state, batch)
        back, progress = files.restore(made.abstract)
    assert progress.step == 2
    assert_same_bits(back.params, copies[2].params)
    assert_same_bits(back.opt_state, copies[2].opt_state)


def test_large_arrays_are_safe_while_they_are_being_saved(files):
    # 40 MB, so that writing takes longer than the steps that follow.
    params = {f"w{i}": jnp.full((1000, 1000), i, jnp.float32) for i in range(10)}
    state = TrainState(jnp.int32(0), params, {}, jax.random.key(0))
    places = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    step = jax.jit(
        lambda s: s.replace(params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
    )
    state = step(state)
    before = plain(state.params)
    files.save(state, Progress(step=1))
    for _ in range(20):
        state = step(state)
    files.wait()
    assert_same_bits(files.restore(places)[0].params, before)


# --- the best one ---


def test_the_best_one_replaces_the_best_before(divided, files):
    for step in (1, 3):
        files.save_best(divided[1], Progress(step=step))
    files.wait()
    assert files._best.all_steps() == [3]


def test_a_run_that_catches_up_with_itself_replaces_best_ones_of_later_steps(divided, files):
    _, state = divided
    files.save_best(state, Progress(step=9))
    files.wait()
    again = fill(state, seed=1)
    for step in (5, 9):
        files.save_best(again, Progress(step=step))
    files.wait()
    assert files._best.all_steps() == [9]
    kept = files._best.restore(9).params
    np.testing.assert_array_equal(kept["embed"]["table"], again.params["embed"]["table"])


def test_a_checkpoint_that_tells_of_a_best_one_finds_it_on_disk(divided, files):
    # A kill between the two would leave a run that believes in parameters that are not there.
    files.save_best(divided[1], Progress(step=3))
    files.save(divided[1], PROGRESS)
    assert latest_step(str(files._best.directory)) == 3


# --- what can not be restored ---


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("model.width=64", r"embed.table: \[260, 32\] is saved, \[260, 64\] is wanted"),
        ("model.qk_norm=true", r"norm.*: nothing is saved, \[.*\] is wanted"),
        ("optimizer.name=muon", r"opt_state.*: .* is saved, nothing is wanted"),
        ("optimizer.moments=int8", r"opt_state.*: .* is saved, nothing is wanted"),
    ],
)
def test_a_state_of_another_kind_is_refused_by_name(setting, line, files):
    files.save(laid("one device").make(), PROGRESS)
    files.wait()
    with pytest.raises(OtherShapesError, match=line):
        files.restore(training(config(setting)).abstract)


@pytest.mark.parametrize(
    "part", ["params/_METADATA", "params/ocdbt.process_0/d", "rest/d", "rest", "progress/metadata"]
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(part, tmp_path):
    made = laid("one device")
    with closing(Checkpoints(str(tmp_path), keep=2)) as files:
        for step in (2, 3):
            files.save(made.make(), Progress(step=step))
        files.wait()
    damaged = tmp_path / "checkpoints" / "3" / part
    if damaged.is_file():
        os.truncate(damaged, damaged.stat().st_size // 2)
    else:
        shutil.rmtree(damaged)
    with closing(Checkpoints(str(tmp_path), keep=2)) as files:
        with pytest.raises(ConfigError) as refusal:
            files.restore(made.abstract)
        assert str(refusal.value).startswith(f"the checkpoint {tmp_path}/checkpoints/3 is damaged")
        assert "Delete this folder: step 2, the one before, is used then." in str(refusal.value)
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    with closing(Checkpoints(str(tmp_path), keep=2)) as files:
        assert files.restore(made.abstract)[1].step == 2


# --- reading a run to use it ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: (path, parameters at the latest step 4, at the best step 2)."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    made = training(config(mesh=DIVIDED), devices=8)
    latest, best = fill(made.make(), 0), fill(made.make(), 1)
    files = Checkpoints(str(folder), keep=1)
    files.save_best(best, Progress(step=2))
    files.save(latest, Progress(step=4))
    files.close()
    (folder / "config.json").write_text(configs.to_json(config()))
    tokenizers.from_bytes().save(str(folder / "tokenizer.json"))
    return str(folder), latest.params, best.params


def test_a_run_is_read_at_its_best(run):
    folder, _, best = run
    cfg, tokenizer, params, step = load_run(folder)
    assert (cfg, step) == (config(), 2)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert_same_bits(params, best)


def test_a_run_is_read_at_its_latest_step(run):
    folder, latest, _ = run
    *_, params, step = load_run(folder, "latest")
    assert step == 4
    assert_same_bits(params, latest)


def test_a_run_without_a_best_is_read_at_its_latest_step(run, tmp_path):
    folder, latest, _ = run
    part = tmp_path / "part"
    part.mkdir()
    for name in ("config.json", "tokenizer.json", "checkpoints"):
        os.symlink(os.path.join(folder, name), part / name)
    *_, params, step = load_run(str(part))
    assert step == 4
    assert_same_bits(params, latest)


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
    assert_same_bits(load_run(str(part), "latest")[2], latest)


def test_a_run_of_eight_devices_is_read_where_there_is_one(run):
    code = (
        "import sys, jax\n"
        "from jaxgpt.trainer import load_run\n"
        "params = load_run(sys.argv[1])[2]\n"
        "print(jax.device_count(), float(params['embed']['table'].sum()))"
    )
    command = [sys.executable, "-c", code, run[0]]
    done = subprocess.run(command, env=alone(), capture_output=True, text=True, check=True)
    devices, total = done.stdout.split()
    assert devices == "1"
    # Summed in another order on other devices.
    assert float(total) == pytest.approx(float(run[2]["embed"]["table"].sum()), rel=1e-4)


def test_reading_a_run_writes_nothing(run, capfd):
    load_run(run[0])
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it has no config\.json"):
        load_run(str(tmp_path))


def test_a_run_without_a_checkpoint_says_so(run, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        os.symlink(os.path.join(run[0], name), tmp_path / name)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        load_run(str(tmp_path))


def test_a_checkpoint_that_was_cut_short_is_passed_over(run, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        os.symlink(os.path.join(run[0], name), tmp_path / name)
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        load_run(str(tmp_path))


def test_an_unknown_checkpoint_is_answered_with_the_nearest(run):
    with pytest.raises(ConfigError, match="Did you mean 'latest'"):
        load_run(run[0], "lastest")


def test_a_broken_config_is_named_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match=r"config\.json is not a saved config"):
        read_config(str(tmp_path))


def test_a_config_with_unknown_keys_is_named_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"widht": 3}}))
    with pytest.raises(ConfigError, match=r"config\.json: .*'model.widht'"):
        read_config(str(tmp_path))
