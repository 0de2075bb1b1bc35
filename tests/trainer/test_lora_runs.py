"""Runs with adapters: what is trained, saved, resumed and loaded."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_runs import assert_same_bits, run_config

from jaxgpt import verification
from jaxgpt.cli import merge as merge_command
from jaxgpt.config import ConfigError, override
from jaxgpt.loading import load, save
from jaxgpt.model import init_params
from jaxgpt.seeds import make_key
from jaxgpt.trainer import Hook, train
from jaxgpt.trainer import run as run_module

SETTINGS = ["train.steps=4", "train.eval_every=2", "train.save_every=2", "train.keep=2",
            "model.unroll=1"]  # fmt: skip
LORA = ["lora.rank=2", "lora.targets=q,v,down"]

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module", autouse=True)
def known_peak():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


class Record(Hook):
    """Keeps the parameters before the first step, and the losses."""

    def __init__(self):
        self.first, self.losses, self.evals = None, [], []

    def on_start(self, view):
        self.first = jax.tree.map(np.array, view.params)

    def on_metrics(self, view, step, values):
        self.losses.append(values["loss"])

    def on_eval(self, view, values):
        self.evals.append(values["loss"])

    def on_untrained(self, view, values):
        self.evals.append(values["loss"])


@pytest.fixture(scope="module")
def base(folder):
    """Return the config of a run that is the base."""
    cfg = run_config(folder, "name=base", *SETTINGS, "train.log_every=1")
    train(cfg, is_quiet=True)
    return cfg


@pytest.fixture(scope="module")
def tuned(base):
    """Return the config of a run with adapters on it, and what it has recorded."""
    cfg = override(base, ["name=tuned", f"train.start={base.run_folder}", *LORA])
    record = Record()
    train(cfg, hooks=[record], is_quiet=True)
    return cfg, record


def test_a_run_trains_adapters_alone_on_the_base(base, tuned):
    cfg, record = tuned
    model, start = load(cfg.run_folder), load(base.run_folder)
    assert_same_bits(model.base, start.params)
    trained = flatten_dict(model.adapters["tuned"].trained, sep=".")
    names = {path.rpartition(".lora.")[0].rpartition(".")[2] for path in trained}
    assert names == {"q", "v", "down"}
    assert all(np.any(x) for x in trained.values())
    # The first loss is the base's, bit for bit, and the last is lower.
    base_losses = Record()
    train(override(base, ["name=again", f"train.start={base.run_folder}"]), hooks=[base_losses],
          is_quiet=True)  # fmt: skip
    assert record.evals[0] == base_losses.evals[0]
    assert record.evals[-1] < record.evals[0]


def test_a_checkpoint_holds_adapters_alone_and_names_the_base(base, tuned):
    cfg, _ = tuned
    sizes = {
        config.name: sum(
            os.path.getsize(os.path.join(folder, name))
            for folder, _, names in os.walk(os.path.join(config.run_folder, "checkpoints", "4"))
            for name in names
        )
        for config in (base, cfg)
    }
    assert sizes["tuned"] < 0.5 * sizes["base"]
    with open(os.path.join(cfg.run_folder, "base.json")) as file:
        found = json.load(file)
    assert found["path"] == load(base.run_folder).origin
    assert os.path.samefile(os.path.join(cfg.run_folder, found["relative"]), found["path"])
    with open(os.path.join(cfg.run_folder, "checkpoints", "4", "progress", "metadata")) as file:
        assert json.load(file)["base"] == found["fingerprint"]
    assert verification.is_usable(verification.verify(cfg.run_folder))


class StopAt(Hook):
    def __init__(self, step):
        self.step = step

    def on_step(self, view):
        if view.step == self.step:
            view.stop("for the test")


@pytest.mark.parametrize("settings", [
    ["lora.dropout=0.1", "lora.base=bfloat16", "optimizer.train=stack.norm", "train.log_norms=2"],
    ["lora.base=int8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulate=2",
     "train.on_spike=skip"],
])  # fmt: skip
def test_a_run_resumes_bit_for_bit(base, settings):
    name = "_".join(settings).replace("=", "_").replace(".", "_")
    cfg = override(base, [f"name={name}", f"train.start={base.run_folder}", *LORA, *settings])
    whole, parts = override(cfg, [f"name={name}_whole"]), []
    train(whole, is_quiet=True)
    train(cfg, hooks=[StopAt(2)], is_quiet=True)
    train(override(cfg, ["resume=force"]), is_quiet=True)
    for config in (whole, cfg):
        parts.append(jax.tree.map(np.array, load(config.run_folder, checkpoint="latest").params))
    assert_same_bits(*parts)


@pytest.mark.parametrize("settings", [
    ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.remat=full"],
    ["mesh.data=1", "mesh.pipe=2", "mesh.fsdp=4", "train.accumulate=2"],
])  # fmt: skip
def test_losses_do_not_depend_on_devices_nor_on_memory_savings(base, tuned, settings):
    name = "_".join(settings).replace("=", "_")
    cfg = override(base, [f"name={name}", f"train.start={base.run_folder}", *LORA, *settings])
    record = Record()
    train(cfg, hooks=[record], is_quiet=True)
    np.testing.assert_allclose(record.losses, tuned[1].losses, rtol=2e-5)


def test_another_base_is_refused(base, tuned, folder):
    cfg = tuned[0]
    copy = str(folder / "copy")
    shutil.copytree(cfg.run_folder, os.path.join(copy, "tuned"))
    path = os.path.join(copy, "tuned", "base.json")
    with open(path) as file:
        values = json.load(file)
    other = load(base.run_folder, checkpoint="latest")
    changed = jax.tree.map(lambda x: x + 1e-3, other.params)
    save(dataclasses.replace(other, params=changed), str(folder / "other"))
    with open(path, "w") as file:
        json.dump({**values, "path": str(folder / "other")}, file)
    with pytest.raises(ConfigError, match=r"other is not the base of .*its fingerprint is"):
        load(os.path.join(copy, "tuned"))
    resumed = override(cfg, [f"folder={copy}", "train.steps=6", "resume=force"])
    with pytest.raises(ConfigError, match="is not the base of the adapters in"):
        train(resumed, is_quiet=True)
    with open(path, "w") as file:
        json.dump({**values, "path": "/gone", "relative": "gone"}, file)
    assert load(os.path.join(copy, "tuned")).adapter  # train.start is looked at as well
    with open(path, "w") as file:
        file.write("{}")
    with pytest.raises(ConfigError, match=r"base\.json cannot be read"):
        load(os.path.join(copy, "tuned"))


def test_a_merged_run_is_saved_loaded_and_a_start(base, tuned, folder, capsys):
    cfg = tuned[0]
    out = str(folder / "merged")
    assert merge_command.main([cfg.run_folder, out], "jaxgpt merge") == 0
    assert "largest rounding" in capsys.readouterr().err
    merged, model = load(out), load(cfg.run_folder)
    assert not merged.adapters
    texts = ["the cat sat on"]
    np.testing.assert_allclose(
        merged.score(texts)[0].logprobs, model.score(texts)[0].logprobs, atol=1e-5
    )
    with pytest.raises(ConfigError, match="has no adapters to merge"):
        merge_command.main([out, str(folder / "twice")], "jaxgpt merge")
    record = Record()
    start = override(base, ["name=after", f"train.start={cfg.run_folder}"])
    train(start, hooks=[record], is_quiet=True)
    np.testing.assert_allclose(record.evals[0], tuned[1].evals[-1], atol=1e-5)


def test_adapters_of_a_start_go_on(base, tuned):
    cfg, before = tuned
    record = Record()
    more = override(base, ["name=more", f"train.start={cfg.run_folder}", *LORA])
    train(more, hooks=[record], is_quiet=True)
    assert record.evals[0] == pytest.approx(before.evals[-1], abs=1e-6)
    assert_same_bits(load(more.run_folder).base, load(base.run_folder).params)
    with pytest.raises(ConfigError, match=r"has adapters to go on with.*lora\.rank=2"):
        train(override(more, ["name=wrong", "lora.rank=3"]), is_quiet=True)


def test_a_model_with_adapters_is_saved_without_its_base(base, tuned, folder):
    model = load(tuned[0].run_folder)
    save(model, str(folder / "saved"))
    again = load(str(folder / "saved"))
    assert_same_bits(again.params, model.params)
    assert os.path.isfile(folder / "saved" / "base.json")
    both = model.with_adapters({"x": str(folder / "saved")})
    assert_same_bits(both.switch("x").params, model.params)
    plain = load(base.run_folder).with_adapters({"x": tuned[0].run_folder})
    assert_same_bits(plain.switch("x").params, model.params)
    with pytest.raises(ConfigError, match="it is a sum of several"):
        save(both.switch("x + tuned"), str(folder / "sum"))


def test_a_run_without_a_start_trains_on_the_initial_parameters(base):
    cfg = override(base, ["name=random", *LORA])
    record = Record()
    train(cfg, hooks=[record], is_quiet=True)
    model = load(cfg.run_folder)
    assert record.evals[-1] < record.evals[0]
    assert_same_bits(model.base, jax.tree.map(np.array, _initial(cfg)))


def _initial(cfg):
    init_key, _ = jax.random.split(make_key(cfg.seed))
    return jax.jit(lambda key: init_params(cfg.model, key)[0])(init_key)


def test_a_frozen_parameter_that_is_missing_is_refused(base):
    settings = ["name=lacks", f"train.start={base.run_folder}", "train.start_missing=init", *LORA]
    cfg = override(base, [*settings, "model.qk_norm=head"])
    with pytest.raises(ConfigError, match=r"has no stack.*k_norm.*optimizer\.train="):
        train(cfg, is_quiet=True)
    train(override(cfg, ["optimizer.train=*_norm.scale"]), is_quiet=True)
    assert "layers" in load(cfg.run_folder).adapters["lacks"].trained["stack"]


def test_targets_are_checked_before_anything_is_made(base):
    with pytest.raises(ConfigError, match=r"lora\.targets='qq'"):
        train(override(base, ["name=no", "lora.rank=2", "lora.targets=qq"]), is_quiet=True)
    assert not os.path.exists(os.path.join(base.folder, "no", "config.json"))
    with pytest.raises(ConfigError, match=r"lora\.base='int3' is not known"):
        override(base, ["lora.rank=2", "lora.base=int3"])
