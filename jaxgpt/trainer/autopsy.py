"""The autopsy of a loss spike: what its batch did to the model, recomputed when it has happened.

    runs/x/autopsy/<step>/batch_<number>.json

From the state before the spike and the batch follow, by layer, the norms of the gradient, of the
parameters and of the update, and the largest activations; and by row the loss and the text. The
gradient is computed as in the step. Rows are run one at a time, which takes little memory on any
mesh. `jaxgpt autopsy` shows the file.
"""

import fnmatch
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import hosts
from jaxgpt.config import Config
from jaxgpt.data import Batch
from jaxgpt.generate import MASK
from jaxgpt.lora import describe_trained
from jaxgpt.model import Coords, EncoderInput, abstract_params
from jaxgpt.model.capture import capture, find_groups, list_activations
from jaxgpt.selection import select
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.trainer.logging import is_number, read_metrics, write_text_atomically
from jaxgpt.trainer.norms import compute_layer_norms, list_layers
from jaxgpt.trainer.spikes import count_updates
from jaxgpt.trainer.state import TrainState
from jaxgpt.trainer.step import make_update, select_trained

FOLDER = "autopsy"
# Of every layer: its output, and what its mixer and its feed-forward add to it.
ACTIVATIONS = ("*embedding", "*residual_post", "*mixer.out", "*ffn.out", "*final_norm")
LAST_LOSSES = 20  # logged before the spike


def make_diagnosis(
    cfg: Config, model, optimizer: optax.GradientTransformation, schedule: Callable
) -> Callable[[TrainState, Batch], dict[str, Any]]:
    """Return the pure function (state, batch [B T]) -> findings. The state stays valid.

    The findings are the mean `loss`, `grad_norm` and `lr` of the step; by layer the norms
    `grad_norms`, `update_norms` and `param_norms`; by row [B] the `row_losses` (nats per token or
    text) and the largest `activations`, by name, in magnitude.
    """
    selection = select_trained(cfg)
    compute_update = make_update(cfg, model, optimizer, selection)
    names = [
        n for n in list_activations(cfg.model) if any(fnmatch.fnmatch(n, p) for p in ACTIVATIONS)
    ]

    def examine_row(state: TrainState, row: Any):  # a Batch of jax.Array
        row = jax.tree.map(lambda x: x[None], row)
        _, sums = cfg.objective.bind(cfg)(model, state.model_params, row, {}, cfg.train)
        loss = sums["nats"] / jnp.maximum(sums["weight"], 1.0)
        coords = Coords(row.positions, row.segment_ids, row.prefix)
        inputs: dict[str, Any] = {}
        if row.encoder_inputs is not None:
            tokens, *places = row.encoder_inputs
            inputs["source"] = EncoderInput(tokens, Coords(*places))
        _, found = capture(cfg.model, state.model_params, row.tokens, coords, names, **inputs)
        return loss, {name: jnp.max(jnp.abs(x.astype(jnp.float32))) for name, x in found.items()}

    def diagnose(state: TrainState, batch: Batch) -> dict[str, Any]:
        grads, sums, weight, updates, _ = compute_update(state, batch)
        groups = find_groups(abstract_params(cfg.model)[0])
        row_losses, activations = jax.lax.map(lambda row: examine_row(state, row), batch)
        return dict(
            loss=sums["loss"] / weight,
            grad_norm=optax.tree.norm(grads),
            lr=jnp.asarray(schedule(count_updates(state)), jnp.float32),
            grad_norms=compute_layer_norms(grads, groups),
            update_norms=compute_layer_norms(updates, groups),
            param_norms=compute_layer_norms(state.params, groups),
            row_losses=row_losses,
            activations=activations,
        )

    return diagnose


def describe_findings(cfg: Config, findings: Mapping[str, Any]) -> dict[str, Any]:
    """Return findings (NumPy arrays) as a JSON object: the figures of the step, and by layer."""
    params, _ = describe_trained(cfg)
    selection, groups = select_trained(cfg), find_groups(abstract_params(cfg.model)[0])
    layers: dict[str, dict[str, Any]] = {}
    trained = select(params, selection)
    for key, tree in dict(grad_norm=trained, update_norm=trained, param_norm=params).items():
        names = list_layers(tree, groups)
        for name, value in zip(names, findings[f"{key}s"].tolist(), strict=True):
            layers.setdefault(name, {})[key] = value
    for values in layers.values():
        if "update_norm" in values:
            values["update_scale"] = values["update_norm"] / max(values["param_norm"], 1e-30)
    for name, by_row in findings["activations"].items():
        layer, part = _split_activation(name)
        values = layers.setdefault(layer, {}).setdefault("largest_activations", {})
        values[part] = {"value": float(_max(by_row)), "row": _find_max(by_row)}
    return {
        "loss": float(findings["loss"]),
        "grad_norm": float(findings["grad_norm"]),
        "learning_rate": float(findings["lr"]),
        "layers": layers,
    }


def _split_activation(name: str) -> tuple[str, str]:
    """Split "layers.3.ffn.out" into "layers.3" and "ffn.out"."""
    keys = name.split(".")
    for end, key in enumerate(keys, 1):
        if key.isdecimal():
            return ".".join(keys[:end]), ".".join(keys[end:])
    return name, "out"


def _max(by_row: np.ndarray) -> np.floating:
    return by_row[_find_max(by_row)]


def _find_max(by_row: np.ndarray) -> int:
    """Return the row with the largest value; with a NaN, the first of them."""
    return int(np.argmax(by_row))  # NumPy counts NaN as the largest


# --- rows ---


def describe_rows(
    cfg: Config, tokenizer: Tokenizer, batch: Batch, losses: np.ndarray, labels: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the loss and the texts of every row of a batch [B T], as JSON objects."""
    rows = []
    for number, loss in enumerate(losses.tolist()):
        row = jax.tree.map(lambda x: x[number], batch)  # noqa: B023
        found = {"row": number, "loss": loss}
        if row.encoder_inputs is not None:
            source = row.encoder_inputs
            found["source"] = _decode(cfg, tokenizer, source.tokens, source.segment_ids)
        found["text"] = _decode(cfg, tokenizer, row.tokens, row.segment_ids)
        if np.ndim(row.targets) == 0:
            found["class"] = labels[row.targets] if labels else int(row.targets)
        rows.append(found)
    return rows


def _decode(cfg: Config, tokenizer: Tokenizer, tokens, segment_ids) -> str:
    """Return the text of a row without its padding; ids beyond the tokenizer's are masks."""
    ids = np.asarray(tokens)[np.asarray(segment_ids) > 0]
    is_mask = ids >= tokenizer.vocab_size
    parts = np.split(ids, np.flatnonzero(is_mask))
    texts = []
    for part in parts:
        if part.size and part[0] >= tokenizer.vocab_size:
            texts.append(MASK)
            part = part[1:]
        texts.append(tokenizer.decode(part) if part.size else "")
    return "".join(texts)


# --- files ---


def write_autopsy(run_folder: str, record: Mapping[str, Any]) -> str:
    """Write the record of a spike into the run folder, and return its path."""
    name = f"batch_{record['batch']}.json"
    path = os.path.join(run_folder, FOLDER, str(record["step"]), name)
    text = json.dumps(_replace_nonfinite(record), indent=1, ensure_ascii=False)
    write_text_atomically(path, text + "\n")
    return path


def _replace_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by their names."""
    if isinstance(value, dict):
        return {key: _replace_nonfinite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_nonfinite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def find_last_losses(run_folder: str, step: int) -> list[dict[str, Any]]:
    """Return the last logged losses before a step, from metrics.jsonl."""
    records = [
        {"step": r["step"], "loss": r["loss"], "grad_norm": r.get("grad_norm")}
        for r in read_metrics(run_folder)
        if r["kind"] == "train" and r["step"] < step and is_number(r.get("loss"))
    ]
    return records[-LAST_LOSSES:]


@hosts.run_on_first
def save_record(
    cfg: Config,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    batch: Batch,
    findings: Mapping[str, Any],
    event: Mapping[str, Any],
):
    """Write the autopsy of a spike.

    Args:
        batch: arrays [B T] in the memory of the host.
        findings: of `make_diagnosis`, likewise.
        event: step, batch, action, reason, and what else belongs into the record.
    """
    rows = describe_rows(cfg, tokenizer, batch, findings["row_losses"], labels)
    last = find_last_losses(cfg.run_folder, event["step"])
    more = {"last_losses": last, "rows": rows}
    write_autopsy(cfg.run_folder, {**event, **describe_findings(cfg, findings), **more})


def list_autopsies(run_folder: str) -> list[tuple[int, str]]:
    """Return the (step, path) of every autopsy of a run, in order of the steps and batches.

    Raises:
        ConfigError: there is none.
    """
    folder = os.path.join(run_folder, FOLDER)
    found = []
    for step in os.listdir(folder) if os.path.isdir(folder) else ():
        inside = os.path.join(folder, step)
        if step.isdecimal() and os.path.isdir(inside):
            names = (name for name in os.listdir(inside) if fnmatch.fnmatch(name, "batch_*.json"))
            found += [(int(step), os.path.join(inside, name)) for name in names]
    if not found:
        raise ConfigError(
            f"{run_folder} has no autopsy: there was no loss spike, or train.on_spike=stop has "
            "not seen one."
        )
    return sorted(found, key=lambda pair: (pair[0], len(pair[1]), pair[1]))


def read_autopsy(path: str) -> dict[str, Any]:
    """Read the record of a spike.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if not isinstance(record, dict) or not {"step", "batch", "layers", "rows"} <= record.keys():
            raise ValueError("it is not an autopsy")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    return record
