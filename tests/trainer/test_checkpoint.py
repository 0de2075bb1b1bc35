"""Checkpoints restore exactly what was saved, whatever happens in between."""

import functools
import os
import re
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reliability.damage import change_number, flip_value
from tiny_runs import (
    B,
    assert_same_bits,
    config,
    fill,
    make_training,
    random_batch,
    to_numpy,
)

from jaxgpt.config import MeshConfig
from jaxgpt.hosts import place_batch
from jaxgpt.saved_arrays import (
    DamagedError,
    ShapeMismatchError,
    check_shapes,
    describe_read_errors,
    latest_step,
    read_manifest,
)
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import checkpoint as checkpoint_module
from jaxgpt.trainer.checkpoint import Checkpoints, Progress, SaveError
from jaxgpt.trainer.state import TrainState

SHARDED_MESH = MeshConfig(data=2, fsdp=2, tensor=2)
PROGRESS = Progress(step=3, tokens=48, seconds=1.5, best_loss=2.25, best_step=2, stale=1, data="ab")


@pytest.fixture(
    scope="module",
    params=["optimizer.name=adamw", "optimizer.name=muon", "optimizer.moments=int8"],
)
def sharded(request):
    """(what a run is made of, a state on eight devices)."""
    run = make_training(config(request.param, mesh=SHARDED_MESH), devices=8)
    return run, fill(run.make_state()).replace(step=jnp.int32(PROGRESS.step))


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(str(tmp_path), keep=2)
    yield opened
    opened.close()


def test_a_part_that_is_missing_is_not_another_model(tmp_path):
    folder = str(tmp_path / "checkpoints" / "4")
    arrays = {"w": np.zeros((2, 3))}
    with pytest.raises(ConfigError, match="4 lacks its part 'rest'") as error:
        check_shapes(folder, {"params": arrays}, params=arrays, rest=arrays)
    assert not isinstance(error.value, ShapeMismatchError)
    with pytest.raises(ShapeMismatchError, match="of another model or optimizer"):
        check_shapes(folder, {"params": arrays, "rest": {}}, params=arrays, rest=arrays)


# --- save and restore ---


def test_a_state_is_restored_bit_for_bit(sharded, checkpoints):
    run, state = sharded
    checkpoints.save(state, PROGRESS)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(run.abstract)[0], state)


def test_progress_is_restored(sharded, checkpoints):
    run, state = sharded
    checkpoints.save(state, PROGRESS)
    checkpoints.wait()
    assert checkpoints.restore(run.abstract)[1] == PROGRESS


def test_progress_without_a_best_is_restored(sharded, checkpoints):
    run, state = sharded
    checkpoints.save(state, Progress(step=3))
    checkpoints.wait()
    assert checkpoints.restore(run.abstract)[1] == Progress(step=3)


def test_a_state_is_restored_on_another_mesh_bit_for_bit(sharded, checkpoints, request):
    _, state = sharded
    checkpoints.save(state, PROGRESS)
    checkpoints.wait()
    setting = request.node.callspec.params["sharded"]
    for mesh, devices in ((MeshConfig(data=1), 1), (MeshConfig(data=1, fsdp=8), 8)):
        other = make_training(config(setting, mesh=mesh), devices)
        back, _ = checkpoints.restore(other.abstract)
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
def make_layout_training(layout: str):
    mesh, devices = LAYOUTS[layout]
    return make_training(config(mesh=mesh), devices)


@pytest.fixture(scope="module")
def straight():
    """Losses of six steps on one device."""
    return make_layout_training("one device").run(6)[1]


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
def test_a_run_resumes_on_other_devices(before, after, checkpoints, straight):
    state, losses = make_layout_training(before).run(3)
    checkpoints.save(state, Progress(step=3))
    checkpoints.wait()
    back, progress = checkpoints.restore(make_layout_training(after).abstract)
    assert_same_bits(back, state)
    rest = make_layout_training(after).run(
        3, back, lambda number: random_batch(number + progress.step)
    )[1]
    # The order in which devices add, in float32.
    np.testing.assert_allclose(losses + rest, straight, rtol=0, atol=1e-5)


def test_only_the_latest_are_kept(sharded, checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(sharded[1], Progress(step=step))
    checkpoints.wait()
    assert checkpoints.latest_step() == 3
    assert sorted(os.listdir(checkpoints._latest.manager.directory)) == ["2", "3"]


def test_the_same_step_is_not_saved_twice(sharded, checkpoints):
    run, state = sharded
    checkpoints.save(state, PROGRESS)
    checkpoints.wait()
    checkpoints.save(fill(state, seed=1), PROGRESS)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(run.abstract)[0], state)


# --- saving during training ---


def test_donated_arrays_do_not_change_what_is_being_saved(checkpoints):
    run = make_training(config(mesh=SHARDED_MESH), devices=8)
    with jax.set_mesh(run.mesh):
        batch = place_batch(random_batch(), run.mesh, B)
        state, _ = run.step(run.make_state(), batch)
        copies = {}
        for step in (1, 2):
            copies[step] = to_numpy(state)
            checkpoints.save(state, Progress(step=step))
            for _ in range(5):
                state, _ = run.step(state, batch)
        back, progress = checkpoints.restore(run.abstract)
    assert progress.step == 2
    assert_same_bits(back.params, copies[2].params)
    assert_same_bits(back.opt_state, copies[2].opt_state)


def test_large_arrays_are_safe_while_they_are_being_saved(checkpoints):
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
    before = to_numpy(state.params)
    checkpoints.save(state, Progress(step=1))
    for _ in range(20):
        state = step(state)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(places)[0].params, before)


# --- the best one ---


def test_a_new_best_replaces_the_old(sharded, checkpoints):
    for step in (1, 3):
        checkpoints.save_best(sharded[1], Progress(step=step))
    checkpoints.wait()
    assert checkpoints._best.manager.all_steps() == [3]


def test_the_best_of_a_step_is_replaced_by_that_of_the_same_step(sharded, checkpoints):
    # A run killed after it repeats the step, with other data or settings if it is forced.
    _, state = sharded
    for seed in (1, 2):
        new_state = fill(state, seed=seed)
        checkpoints.save_best(new_state, Progress(step=9))
        checkpoints.wait()
    kept = checkpoints._best.manager.restore(9).params
    np.testing.assert_array_equal(kept["embed"]["table"], new_state.params["embed"]["table"])


def test_a_resumed_run_replaces_best_ones_of_later_steps(sharded, checkpoints):
    _, state = sharded
    checkpoints.save_best(state, Progress(step=9))
    checkpoints.wait()
    new_state = fill(state, seed=1)
    for step in (5, 9):
        checkpoints.save_best(new_state, Progress(step=step))
    checkpoints.wait()
    assert checkpoints._best.manager.all_steps() == [9]
    kept = checkpoints._best.manager.restore(9).params
    np.testing.assert_array_equal(kept["embed"]["table"], new_state.params["embed"]["table"])


def test_a_checkpoint_is_saved_after_the_best_it_refers_to(sharded, checkpoints):
    # A kill between the two would leave a run that refers to missing parameters.
    checkpoints.save_best(sharded[1], Progress(step=3))
    checkpoints.save(sharded[1], PROGRESS)
    assert latest_step(str(checkpoints._best.manager.directory)) == 3


# --- errors of restoring ---


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("model.width=64", r"embed.table: \[260, 32\] is saved, \[260, 64\] is expected"),
        ("model.qk_norm=true", r"norm.*: nothing is saved, \[.*\] is expected"),
        ("optimizer.name=muon", r"opt_state.*: .* is saved, nothing is expected"),
        ("optimizer.moments=int8", r"opt_state.*: .* is saved, nothing is expected"),
    ],
)
def test_a_state_of_other_shapes_is_rejected_by_name(setting, line, checkpoints):
    checkpoints.save(make_layout_training("one device").make_state(), PROGRESS)
    checkpoints.wait()
    with pytest.raises(ShapeMismatchError, match=line):
        checkpoints.restore(make_training(config(setting)).abstract)


REMEDY = r"Move it away or delete it: step 2, the one before, can be read\."
NO_REMEDY = r"No other checkpoint of this run can be read \(train\.keep sets how many are kept\)\."
DAMAGE = [
    ("params/_METADATA", r"is damaged \(.+\)", True),
    ("rest/d", r"is damaged \(.+\)", True),
    ("progress/metadata", r"is damaged \(.+\)", True),
    # Its list of arrays is whole: the error may have another cause, so nothing is advised.
    ("params/ocdbt.process_0/d", r"cannot be read \(.+\)", False),
    ("rest", r"is damaged \(its folder rest is missing\)", True),
    ("params", r"is damaged \(its folder params is missing\)", True),
]


def save_and_damage(folder, part: str, steps=(2, 3)):
    """Save checkpoints, and truncate a file, or delete a folder, of the last one."""
    run = make_layout_training("one device")
    with closing(Checkpoints(str(folder), keep=len(steps))) as checkpoints:
        for step in steps:
            checkpoints.save(run.make_state(), Progress(step=step))
        checkpoints.wait()
    damaged = folder / "checkpoints" / str(steps[-1]) / part
    if damaged.is_file():
        os.truncate(damaged, damaged.stat().st_size // 2)
    else:
        shutil.rmtree(damaged)
    return run


@pytest.mark.parametrize(("part", "message", "is_advised"), DAMAGE)
def test_a_run_continues_before_a_damaged_checkpoint(part, message, is_advised, tmp_path):
    run = save_and_damage(tmp_path, part)
    with closing(Checkpoints(str(tmp_path), keep=2)) as checkpoints:
        state, progress = checkpoints.restore(run.abstract)
        assert progress.step == 2
        assert_same_bits(state.params, run.make_state().params)
        folder = re.escape(f"{tmp_path}/checkpoints/3")
        note = (
            rf"warning: the checkpoint {folder} {message}\. The run continues from step 2, the "
            r"checkpoint before: 1 step after it are made again\. What is damaged is kept as "
            r"3\.damaged until you delete it\."
        )
        assert re.fullmatch(note, checkpoints.note, re.DOTALL)
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]  # nothing is written yet
        checkpoints.save(run.make_state(), Progress(step=3))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3", "3.damaged"]
    with closing(Checkpoints(str(tmp_path), keep=2)) as checkpoints:
        assert checkpoints.restore(run.abstract)[1].step == 3
        assert not checkpoints.note


@pytest.mark.parametrize(("part", "message", "is_advised"), DAMAGE)
def test_the_error_of_the_only_checkpoint_gives_its_folder(part, message, is_advised, tmp_path):
    run = save_and_damage(tmp_path, part, steps=(3,))
    with closing(Checkpoints(str(tmp_path), keep=2)) as checkpoints:
        for _ in range(2):  # it is not forgotten
            with pytest.raises(DamagedError) as refusal:
                checkpoints.restore(run.abstract)
            pattern = rf"the checkpoint {re.escape(f'{tmp_path}/checkpoints/3')} {message}\."
            pattern += f" {NO_REMEDY}" if is_advised else ""
            assert re.fullmatch(pattern, str(refusal.value), re.DOTALL)
    assert os.listdir(tmp_path / "checkpoints") == ["3"]


def test_the_advice_names_the_checkpoint_before(tmp_path):
    save_and_damage(tmp_path, "params/_METADATA")
    folder = str(tmp_path / "checkpoints" / "3")
    with pytest.raises(DamagedError, match=REMEDY), describe_read_errors(folder):
        read_manifest(folder)


def test_a_flipped_bit_in_an_array_is_found_and_named(tmp_path):
    run = make_layout_training("one device")
    with closing(Checkpoints(str(tmp_path), keep=2)) as checkpoints:
        for step in (2, 3):
            checkpoints.save(fill(run.make_state()), Progress(step=step))
        checkpoints.wait()
        name = flip_value(tmp_path / "checkpoints" / "3" / "rest")
        assert checkpoints.restore(run.abstract)[1].step == 2
    # Compressed values may be refused before their checksum is compared.
    assert re.search(rf"3 (is damaged|cannot be read) \(.*{re.escape(name)}", checkpoints.note)


def test_another_number_in_an_array_is_found_and_named(tmp_path):
    run = make_layout_training("one device")
    with closing(Checkpoints(str(tmp_path), keep=2)) as checkpoints:
        for step in (2, 3):
            checkpoints.save(fill(run.make_state()), Progress(step=step))
        checkpoints.wait()
        change_number(tmp_path / "checkpoints" / "3" / "params", "embed.table")
        assert checkpoints.restore(run.abstract)[1].step == 2
    note = r"3 is damaged \(params\.embed\.table has another checksum than when it was saved\)"
    assert re.search(note, checkpoints.note)


def test_one_process_that_cannot_read_makes_all_continue_before(tmp_path, monkeypatch):
    """The outcomes of the processes are all-gathered: the other one has found damage."""
    run = make_layout_training("one device")
    with closing(Checkpoints(str(tmp_path), keep=2)) as checkpoints:
        for step in (2, 3):
            checkpoints.save(run.make_state(), Progress(step=step))
        checkpoints.wait()
        answers = iter(['["damaged", "params.w is damaged"]', '["", ""]'])

        def gather(name, text):
            return [text, next(answers)] if name == "read" else [text]

        monkeypatch.setattr(checkpoint_module.hosts, "all_gather_text", gather)
        assert checkpoints.restore(run.abstract)[1].step == 2
        assert "process 1: params.w is damaged. The run continues from step 2" in checkpoints.note


# --- errors of saving ---


def test_a_checkpoint_that_cannot_be_saved_leaves_the_others_and_the_next_one_is(
    tmp_path, monkeypatch
):
    run = make_layout_training("one device")
    with closing(Checkpoints(str(tmp_path), keep=1)) as checkpoints:
        checkpoints.save(run.make_state(), Progress(step=1))
        checkpoints.wait()

        def fail():
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes [os_error_code='28']")

        checkpoints.save(run.make_state(), Progress(step=2))
        with monkeypatch.context() as patch:
            manager = checkpoints._latest.manager
            before = manager.wait_until_finished
            patch.setattr(manager, "wait_until_finished", lambda: [before(), fail()])
            with pytest.raises(
                SaveError, match=r"checkpoints/2 could not be saved \(No space left"
            ):
                checkpoints.wait()
        assert checkpoints.latest_step() == 1
        checkpoints.save(run.make_state(), Progress(step=3))
        checkpoints.wait()
        assert checkpoints.latest_step() == 3
        assert checkpoints.restore(run.abstract)[1].step == 3


def test_the_rest_of_a_failed_save_is_deleted(tmp_path, monkeypatch):
    run = make_layout_training("one device")
    with closing(Checkpoints(str(tmp_path), keep=1)) as checkpoints:
        rest = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "params"

        def fail(*_, **__):
            rest.mkdir(parents=True)
            raise OSError(30, "Read-only file system", "/disk")

        monkeypatch.setattr(checkpoints._latest.manager, "save", fail)
        with pytest.raises(SaveError, match=r"could not be saved \(Read-only file system: /disk\)"):
            checkpoints.save(run.make_state(), Progress(step=2))
        assert not rest.parent.exists()


@pytest.mark.parametrize("has_failed", [False, True])
def test_closing_after_a_failed_save_raises_nothing_more(has_failed, tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    run = make_layout_training("one device")
    manager = checkpoints._latest.manager
    close = manager.close

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def close_and_fail():
        close()
        raise ValueError("RESOURCE_EXHAUSTED: of another write")

    monkeypatch.setattr(manager, "close", close_and_fail)
    if has_failed:
        monkeypatch.setattr(manager, "save", fail)
        with pytest.raises(SaveError, match="No space left"):
            checkpoints.save(run.make_state(), Progress(step=1))
        checkpoints.close()
    else:
        with pytest.raises(ValueError, match="of another write"):
            checkpoints.close()


def test_a_checkpoint_loses_its_name_before_it_is_deleted(tmp_path, monkeypatch):
    run = make_layout_training("one device")
    seen = []
    rmtree = shutil.rmtree

    def look(path, **arguments):
        if os.path.exists(path):
            seen.append((sorted(os.listdir(tmp_path / "checkpoints")), len(os.listdir(path))))
        rmtree(path, **arguments)

    with closing(Checkpoints(str(tmp_path), keep=1)) as checkpoints:
        checkpoints.save(run.make_state(), Progress(step=1))
        checkpoints.save(run.make_state(), Progress(step=2))
        monkeypatch.setattr(checkpoint_module.shutil, "rmtree", look)
        checkpoints.wait()
    assert ([".deleted", "2"], 1) in seen
    assert os.listdir(tmp_path / "checkpoints") == ["2"]
