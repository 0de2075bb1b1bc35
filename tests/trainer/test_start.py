"""`train.start`, and what resume=force keeps of a run."""

import io
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from reliability.damage import change_number
from tiny_runs import assert_same_bits, make_training, restore_latest, run_config, write_text

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import override
from jaxgpt.loading import hash_labels, load
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import Hook, evaluate, loop, read_config, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.logging import Console, write_text_atomically

SETTINGS = ["train.steps=4", "train.eval_every=2", "train.save_every=2", "train.keep=2"]
ENCODER = ["model.family=encoder", "model.vocab=261", "sample.prompt=", "train.objective=masked"]

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("start")


def train_scripted(cfg, losses=(), **options):
    """Train with these held-out losses."""
    script = iter(losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        if losses:
            patch.setattr(loop, "evaluate", lambda *args: evaluate(*args) | {"loss": next(script)})
            patch.setattr(loop, "show_untrained", lambda run: None)  # has no scripted loss
        return train(cfg, is_quiet=True, **options)


@pytest.fixture(scope="module")
def decoder(folder):
    """A run of 4 steps, of which step 2 is the best."""
    cfg = run_config(folder, "name=decoder", *SETTINGS)
    train_scripted(cfg, [1.0, 2.0])
    return cfg


class FirstParams(Hook):
    """Keeps the parameters before the first step."""

    def on_start(self, view):
        self.params = jax.tree.map(np.array, view.params)


def begin(cfg, *assignments):
    """Return the parameters that a new run begins with."""
    hook = FirstParams()
    train(override(cfg, assignments), hooks=[hook], is_quiet=True)
    return hook.params


def other_text(folder):
    text = write_text(folder / "other", documents=10, words=80)
    (text / "00.txt").write_text("Quite another text, of other words and letters. " * 30)
    return str(text)


# --- starting from another run ---


@pytest.mark.parametrize(
    ("path", "step"),
    [("{}", 2), ("{}@best", 2), ("{}@latest", 4), ("{}/checkpoints", 4), ("{}/checkpoints/2", 2),
     ("{}/best/2/", 2)],
)  # fmt: skip
def test_a_run_begins_with_the_parameters_that_are_named(decoder, path, step):
    found = run_module.find_start(path.format(decoder.run_folder))
    assert os.path.basename(found.folder) == str(step)
    parent = os.path.basename(os.path.dirname(found.folder))
    which = "latest" if step == 4 else "best"
    expected = load(decoder.run_folder, checkpoint=which)
    assert parent in ("best", "checkpoints")
    abstract = make_training(decoder, jax.device_count())
    state = run_module.take_params(
        run_module.match_start(found, decoder, expected.tokenizer),
        abstract.make_state(),
        abstract.abstract,
    )
    assert_same_bits(state.params, expected.params)


def test_a_run_continues_with_another_text_and_its_own_schedule_and_best(decoder, folder):
    shutil.copytree(decoder.run_folder, moved := str(folder / "moved"))
    settings = ["name=next", f"train.start={moved}", f"data.source={other_text(folder)}"]
    cfg = override(decoder, [*settings, "optimizer.name=sgd", "mesh.data=4", "mesh.fsdp=2"])
    assert_same_bits(begin(cfg), load(moved).params)
    progress = restore_latest(cfg)[1]
    assert progress.step == 4
    assert progress.best_step > 0
    # A resumed run does not read it again.
    shutil.rmtree(moved)
    assert train(cfg, is_quiet=True).step == 4
    assert read_config(cfg.run_folder).train.start == moved


def test_a_damaged_checkpoint_to_start_from_is_passed_over(decoder, folder, capsys):
    moved = shutil.copytree(decoder.run_folder, folder / "damaged")
    change_number(moved / "best/2/params", "embed.table")
    cfg = override(decoder, ["name=after_damage", f"train.start={moved}"])
    assert_same_bits(begin(cfg), load(f"{moved}/checkpoints/4").params)
    warning = (
        "best/2 is damaged (params.embed.table has another checksum than when it was saved). "
        f"{moved}/checkpoints/4 is used in its place."
    )
    assert warning in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"best/2 is damaged \(params.embed.table has"):
        begin(cfg, "name=after_named", f"train.start={moved}/best/2")
    os.truncate(moved / "checkpoints/4/progress/metadata", 3)
    latest = ["name=after_two", f"train.start={moved}@latest"]
    assert_same_bits(begin(cfg, *latest), load(f"{moved}/checkpoints/2").params)


def test_a_masked_encoder_becomes_a_classifier(folder, capsys):
    masked = run_config(folder, "name=masked", *SETTINGS, *ENCODER)
    train(masked, is_quiet=True)
    for name in ("animals", "trees"):
        (folder / "classes" / name).mkdir(parents=True, exist_ok=True)
        lines = [f"{i} {name[:3]} {i % 7} and more" for i in range(60)]
        (folder / "classes" / name / "all.txt").write_text("\n".join(lines) + "\n")
    classifier = override(
        masked,
        ["name=classifier", "train.objective=classify", "model.classes=2",
         f"data.source=classes:{folder / 'classes'}", f"train.start={masked.run_folder}"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="do not fit") as error:
        train(classifier, is_quiet=True)
    assert "classes" in str(error.value)
    assert "nothing there, [" in str(error.value)
    assert str(error.value).endswith("train.start_missing=init.")
    assert not os.path.exists(classifier.run_folder)

    hook = FirstParams()
    train(override(classifier, ["train.start_missing=init"]), hooks=[hook])
    source = load(masked.run_folder).params
    assert_same_bits(hook.params["stack"], source["stack"])
    assert_same_bits(hook.params["embed"], source["embed"])
    fresh = make_training(classifier).make_state().params
    new = set(fresh) - set(source)
    assert new
    for name in new:
        assert_same_bits(hook.params[name], fresh[name])
    out = capsys.readouterr().out
    assert "not taken: " in out
    assert "settings: model.classes: 0 -> 2" in out

    # The names of the classes belong to the run.
    assert restore_latest(classifier)[1].labels == hash_labels(["animals", "trees"])
    (folder / "classes" / "trees").rename(folder / "classes" / "plants")
    renamed = override(classifier, ["train.start_missing=init", "train.steps=5"])
    with pytest.raises(ConfigError, match="has changed since"):
        train(override(renamed, ["train.steps=4"]), is_quiet=True)
    assert train(override(renamed, ["resume=force"]), is_quiet=True).best_step == 5
    assert load(classifier.run_folder).labels == ("animals", "plants")


def test_parameters_of_other_shapes_are_named_with_both(decoder):
    cfg = override(decoder, ["name=wide", "model.ffn=64", f"train.start={decoder.run_folder}"])
    with pytest.raises(ConfigError) as error:
        train(cfg, is_quiet=True)
    assert "ffn.down.w: [2, 48, 32] there, [2, 64, 32] here" in str(error.value)
    assert "embed" not in str(error.value)


def test_a_run_takes_the_tokenizer_of_its_start(decoder, folder):
    cfg = override(
        decoder, ["name=words", "data.tokenizer=train", f"train.start={decoder.run_folder}"]
    )
    begin(cfg)
    there, here = (
        tokenizers.load(os.path.join(c.run_folder, "tokenizer.json")) for c in (decoder, cfg)
    )
    assert here.fingerprint == there.fingerprint


def test_the_vocabulary_of_another_tokenizer_does_not_fit(decoder, folder):
    path = folder / "other_tokenizer.json"
    tokenizers.train(["zz zz zz " * 20], 262).save(path)
    cfg = override(
        decoder,
        ["name=renamed", f"data.tokenizer={path}", f"train.start={decoder.run_folder}",
         "model.vocab=262"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"embed.table: \[260, 32\] there, \[262, 32\] here"):
        train(cfg, is_quiet=True)
    wide = override(decoder, ["name=wide_vocab", "model.vocab=262", "train.steps=2"])
    train(wide, is_quiet=True)
    with pytest.raises(ConfigError, match=r"embed.table: \[262, 32\] of another tokenizer there"):
        train(override(cfg, [f"train.start={wide.run_folder}"]), is_quiet=True)


def test_a_start_that_is_no_run_is_rejected(decoder, folder):
    cfg = override(decoder, ["name=lost", f"train.start={folder}/nowhere"])
    with pytest.raises(ConfigError, match=r"train.start='.*nowhere': "):
        train(cfg, is_quiet=True)
    assert not os.path.exists(cfg.run_folder)


# --- partial training ---


def test_a_resumed_run_of_some_parameters_equals_an_uninterrupted_one(folder, capsys):
    settings = ["train.steps=4", "train.save_every=2", "optimizer.train=stack.layers.*,*.table"]
    sharded = ["mesh.fsdp=2", "mesh.data=4", "optimizer.moments=int8"]
    whole = run_config(folder, "name=whole", *settings, *sharded)
    train(whole)
    assert "of them are trained" in capsys.readouterr().out
    parted = run_config(folder, "name=parted", *settings, *sharded)

    class Interrupt(Hook):
        def on_step(self, view):
            if view.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parted, hooks=[Interrupt()], is_quiet=True)
    train(parted, is_quiet=True)
    assert_same_bits(restore_latest(parted)[0], restore_latest(whole)[0])


def test_a_pattern_without_parameters_is_rejected_before_anything_is_written(folder):
    cfg = run_config(folder, "name=none", "optimizer.train=blocks.*")
    with pytest.raises(ConfigError, match=r"optimizer.train='blocks.\*' matches no parameter"):
        train(cfg, is_quiet=True)
    assert not os.path.exists(cfg.run_folder)


# --- resume=force ---


def copy_run(cfg, name):
    new = override(cfg, [f"name={name}"])
    shutil.copytree(cfg.run_folder, new.run_folder)
    write_text_atomically(
        os.path.join(new.run_folder, "config.json"), run_module.configs.to_json(new)
    )
    return new


CHANGES = [
    ["data.source={text}"],
    ["data.holdout=0.3"],
    ["data.packing=documents"],
    ["train.eval_batches=1"],
    ["model.documents=joined"],
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0].split("=")[0])
def test_force_with_another_held_out_loss_forgets_the_best(decoder, folder, change):
    cfg = copy_run(decoder, f"forced_{change[0].split('=')[0]}")
    change = [x.format(text=other_text(folder)) for x in change]
    cfg = override(cfg, [*change, "train.steps=6", "resume=force"])
    progress = train_scripted(cfg, [3.0])  # worse than the best one before
    assert (progress.best_step, progress.best_loss, progress.stale) == (6, 3.0, 0)
    assert load(cfg.run_folder).step == 6
    # The next plain resume is not refused.
    longer = override(cfg, ["resume=auto"])
    assert train_scripted(longer).step == 6


def test_the_old_best_is_gone_before_the_first_evaluation(decoder, folder):
    cfg = copy_run(decoder, "interrupted")
    cfg = override(cfg, ["data.holdout=0.3", "train.steps=6", "resume=force"])

    class Interrupt(Hook):
        def on_step(self, view):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cfg, hooks=[Interrupt()], is_quiet=True)
    assert load(cfg.run_folder).step == 4  # the latest
    assert train_scripted(cfg, [3.0]).best_step == 6


def test_force_with_other_settings_keeps_the_best(decoder):
    cfg = override(copy_run(decoder, "kept"), ["optimizer.lr=1e-4", "train.steps=6"])
    progress = train_scripted(override(cfg, ["resume=force"]), [3.0])
    assert (progress.best_step, progress.best_loss, progress.stale) == (2, 1.0, 2)
    assert load(cfg.run_folder).step == 2


def test_force_changes_nothing_of_a_complete_run(decoder, folder):
    cfg = copy_run(decoder, "complete")
    forced = override(cfg, [f"data.source={other_text(folder)}", "resume=force"])
    assert train_scripted(forced).best_step == 2
    assert read_config(cfg.run_folder) == cfg
    assert train_scripted(cfg).best_step == 2


def test_an_early_stopped_run_continues_by_force_with_another_patience(folder, capsys):
    cfg = run_config(folder, "name=impatient", *SETTINGS, "train.eval_every=1", "train.patience=1")
    assert train_scripted(cfg, [1.0, 2.0]).step == 2
    assert train(cfg).step == 2
    out = capsys.readouterr().out
    assert "complete: it stopped early at step 2: no better for 1 evaluations" in out
    assert train(override(cfg, ["resume=force"]), is_quiet=True).step == 2  # as impatient
    patient = override(cfg, ["resume=force", "train.patience=0"])
    assert train_scripted(patient, [3.0, 3.0]).step == 4


# --- a held-out loss of nothing ---


def test_a_held_out_text_without_targets_is_rejected_before_anything_is_written(folder, tmp_path):
    cfg = run_config(tmp_path, "name=nothing", *SETTINGS, *ENCODER, "train.mask_rate=1e-6")
    with pytest.raises(ConfigError, match=r"nothing in the \d+ held-out tokens is to be predicted"):
        train(cfg, is_quiet=True)
    assert not os.path.exists(cfg.run_folder)


def test_the_held_out_loss_of_nothing_is_not_a_number():
    sums = {name: np.float32(0) for name in ("loss", "nats", "weight", "correct")}
    values = evaluate(lambda params, batch: sums, None, [None], place_batch=lambda batch: batch)
    assert np.isnan(values["loss"])
    assert values["tokens"] == 0


# --- output that fails ---


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_text_that_the_output_cannot_represent_does_not_end_a_run(decoder, monkeypatch, encoding):
    cfg = override(
        decoder, [f"name={encoding}", "sample.prompt=\u732b \U0001f408 ", "train.steps=2"]
    )
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    assert train(cfg).step == 2
    output.flush()
    assert b"--- sample at step 2 ---" in output.buffer.getvalue()
    assert b"\n? ? " in output.buffer.getvalue()
    with open(os.path.join(cfg.run_folder, "samples", "step_000002.txt"), "rb") as file:
        assert file.read().startswith("\u732b \U0001f408 ".encode())


def test_a_closed_output_does_not_end_a_run(monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    console = Console(10, 0)
    console.log("one")
    output.close()
    console.log("two")
    console.log_step(1, {"loss": 1.0, "lr": 1.0})


def test_the_checkpoint_is_saved_before_a_sample_is_made(decoder, monkeypatch):
    cfg = override(decoder, ["name=unsampled", "train.steps=2"])

    def fail(*_):
        raise RuntimeError("no sample")

    monkeypatch.setattr(loop, "format_sample", fail)
    with pytest.raises(RuntimeError, match="no sample"):
        train(cfg, is_quiet=True)
    assert restore_latest(cfg)[1].step == 2


def test_a_sample_with_lone_surrogates_is_written(tmp_path):
    write_text_atomically(str(tmp_path / "sample.txt"), "a\udcffb\ud800")
    assert (tmp_path / "sample.txt").read_text().startswith("a")
