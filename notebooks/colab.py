# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     provenance: []
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a Transformer with jaxgpt
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/colab.ipynb)
#
# On a TPU, a GPU or a CPU: choose one under *Runtime > Change runtime type* (on Kaggle: *Settings >
# Accelerator*, and switch *Internet* on), then *Run all*. Without a change below, this trains a
# small GPT on the documentation and source of Python itself, which are wherever Python is.
#
# **After a disconnect**: *Run all* again. With `save_to` in Google Drive, training goes on from the
# last checkpoint, with the batches that follow, as if nothing had happened.

# %% tags=["parameters"]
# fmt: off
save_to = "drive"  # @param ["drive", "here"] {allow-input: true}
source = "git+https://github.com/jaxgpt/jaxgpt"  # @param {type: "string"}
config_name = "by the plan"  # @param ["by the plan", "largest that fits"] {allow-input: true}
minutes = 30  # @param {type: "integer"}
settings = ""  # @param {type: "string"}
# fmt: on

# %% [markdown]
# `settings` are those of the command line, such as
# `data.source=/content/my_texts train.steps=5000 name=mine`.
#
# ## Install
#
# Every package that is installed here stays at its version: JAX, NumPy and the plugin for the TPU
# or GPU belong together. Only what is missing is added.

# %%
import importlib
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile

RELEASE = r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[\w.]+)?"


def list_versions():
    """Return the version of every installed package, by name."""
    found = importlib.metadata.distributions()
    return {d.name.lower().replace("_", "-"): d.version for d in found if d.name}


def install(source):
    """Install jaxgpt, and what it lacks, beside packages that keep their versions."""
    before = list_versions()
    fixed = {k: v for k, v in before.items() if k != "jaxgpt" and re.fullmatch(RELEASE, v)}
    constraints = pathlib.Path(tempfile.mkdtemp(), "installed.txt")
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in fixed.items()))
    command = [sys.executable, "-m", "pip", "install", "-q", "-c", str(constraints), source]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()
    after = list_versions()
    changed = {name: after.get(name) for name in fixed if after.get(name) != fixed[name]}
    assert not changed, f"changed by the installation: {changed}"
    return {name: version for name, version in after.items() if name not in before}


if importlib.util.find_spec("jaxgpt") is None:
    print("added:", ", ".join(f"{name} {version}" for name, version in install(source).items()))

# %% [markdown]
# ## Where to save
#
# Google asks once whether this notebook may use your Drive. On Kaggle, `/kaggle/working` is kept if
# you save the version; elsewhere the folder is `runs`.

# %%
import os

if save_to == "drive" and importlib.util.find_spec("google.colab"):
    from google.colab import drive

    drive.mount("/content/drive")
    folder = "/content/drive/MyDrive/jaxgpt"
elif save_to in ("drive", "here"):
    folder = "/kaggle/working/runs" if os.path.isdir("/kaggle/working") else "runs"
else:
    folder = save_to
os.makedirs(folder, exist_ok=True)
print(f"runs are saved in {os.path.abspath(folder)}")

# %% [markdown]
# ## The device, and a model that suits it
#
# A T4 has no bfloat16, and cuDNN's attention needs a newer GPU: there jaxgpt computes in float32,
# with its own kernels. A TPU and newer GPUs compute in bfloat16. The config is the largest of three
# that fits and, as the plan has it, ends in `minutes`; or the largest of all that fits.

# %%
import jax

import jaxgpt
from jaxgpt import backend
from jaxgpt import config as configs
from jaxgpt.planning.fit import find_fit


def describe_device(device):
    """Return the name and the memory of a device."""
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return f"{device.device_kind}, {limit / 2**30:.0f} GiB" if limit else device.device_kind


# From small to large: configs, and settings that suit a short run.
OFTEN = ["train.eval_every=200", "train.save_every=200"]
SHORT = ["train.steps=1000", "train.batch=32", "train.accumulate=4", "optimizer.warmup=100"]
LADDER = {"stdlib": [], "gpt_mini": OFTEN, "gpt2_124m": [*OFTEN, *SHORT]}


def choose_run(always, settings, minutes):
    """Return the largest config of LADDER that fits and ends in time here, with its settings."""
    best = "stdlib", always
    for name, own in LADDER.items():
        plan = jaxgpt.plan(configs.load(name, [*own, *always, *settings]), quick=True)
        fitting = "fits" if plan.is_fitting else "does not fit"
        print(f"{name}: {fitting}, about {plan.seconds / 60:.0f} min for {plan.steps} steps")
        if not plan.is_fitting or plan.seconds > minutes * 60:
            break
        best = name, [*own, *always]
    return best


device = jax.devices()[0]
always = [f"model.dtype={backend.choose_dtype(device)}", f"folder={folder}"]
if config_name == "by the plan":
    name, chosen = choose_run(always, settings.split(), minutes)
elif config_name == "largest that fits":  # it may take days
    fit = find_fit("here", [*always, *settings.split()], None, True)
    name, chosen = fit.config, list(fit.settings)
else:
    name, chosen = config_name, always
config = configs.load(name, [*chosen, *settings.split()])
print(f"{len(jax.devices())} x {describe_device(device)}: {name} {' '.join(chosen)}")

# %% [markdown]
# ## Train
#
# The first step waits for the compiler. *Interrupt* (the square at the left of the cell) saves and
# stops; run the cell again to go on.

# %%
progress = jaxgpt.train(config)

# %% [markdown]
# ## Go on after a disconnect
#
# A new runtime has lost what was installed and what was in memory, not what is in `folder`. Run the
# cells above again, or all of them: `jaxgpt.train` says *resuming from step ...*, and does the
# steps that are left. The same cell trains longer, by more steps and `resume=force`:

# %%
more = []  # ["train.steps=5000", "resume=force"]

progress = jaxgpt.train(configs.load(name, [*chosen, *settings.split(), *more]))
print(f"{progress.step} steps done; best held-out loss {progress.best_loss:.4f}")

# %% [markdown]
# ## The curve

# %%
from IPython.display import Image, display

display(Image(os.path.join(config.run_folder, "plots", "loss.png")))

# %% [markdown]
# ## Generate text

# %%
model = jaxgpt.load(config.run_folder)
for result in model.generate([config.sample.prompt or "The "] * 2, tokens=80, temperature=0.7):
    print(result.text, "\n---")

# %% [markdown]
# ## Look inside
#
# The attention weights of one layer: each row is a token, and shows which earlier tokens it reads.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt

from jaxgpt.model.capture import capture
from jaxgpt.model.masks import Coords

layer = 0
ids = model.tokenizer.encode("def main(self):\n    return self.main")[: config.model.context]
tokens = jnp.asarray([ids])
where = Coords(jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), jnp.int32))
weights_name = f"layers.{layer}.mixer.weights"
_, found = capture(model.config.model, model.params, tokens, where, [weights_name])
weights = found[weights_name][0]  # [H T S]
labels = [model.tokenizer.decode([i]) for i in ids]
figure, axes = plt.subplots(1, len(weights), figsize=(4 * len(weights), 4), squeeze=False)
for head, (axis, image) in enumerate(zip(axes[0], weights, strict=True)):
    axis.imshow(image, cmap="Blues", vmin=0)
    axis.set_title(f"layer {layer}, head {head}")
    axis.set_xticks(range(len(ids)), labels, rotation=90, fontsize=7)
    axis.set_yticks(range(len(ids)), labels, fontsize=7)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Take the model with you
#
# `jaxgpt export` writes a folder that `transformers` reads, loads it again and compares the logits.
# The archive lies beside the runs.

# %%
import shutil

from jaxgpt.cli import export

exported = os.path.join(folder, f"{config.name}_transformers")
shutil.rmtree(exported, ignore_errors=True)
export.main([config.run_folder, exported], "jaxgpt export")
print(shutil.make_archive(exported, "zip", exported))
