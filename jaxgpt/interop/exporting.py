"""Export of a model: written under another name, loaded again, compared, and only then named.

export(model, "mine/", "hf")
export(model, "mine.gguf", "gguf", quantize="Q8_0")
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.hosts import fetch
from jaxgpt.interop import convert, huggingface, peft, peft_write
from jaxgpt.interop.archive import Archive
from jaxgpt.interop.formats import FORMATS
from jaxgpt.interop.model_card import write_model_card
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import EncoderInput, build, compute_logits
from jaxgpt.quantization import check_unquantized
from jaxgpt.score import make_whole_coords
from jaxgpt.settings import ConfigError, choose, resolve_table

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
VERIFY_TOKENS = 16
# The largest difference of logits, relative to their spread, by how parameters are stored.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1, "quantized": 0.7}


def export(
    model: LanguageModel,
    path: str,
    format: str = "hf",
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    license: str = "unknown",
    run: str = "",
    log: Callable[[str], None] = print,
) -> float:
    """Write a model for other libraries.

    Args:
        path: a new folder, or a new file for a format of one file.
        format: a row of `FORMATS` that can be written: "hf", "gguf", or "peft", which is the
            adapters of a model alone. The others have them merged into the weights.
        dtype: of the tensors, one of EXPORT_DTYPES; None = that of the parameters.
        quantize: of a GGUF file, such as "Q8_0".
        license: for the model card.
        run: the run folder of the model, whose metrics the model card names.
        log: takes lines about the progress.

    Returns:
        The largest difference of the logits of what was written, relative to their spread.

    Raises:
        ConfigError: the model has no counterpart, the path is not new, or what was written computes
            something else; then nothing is left.
    """
    row = choose({n: f for n, f in FORMATS.items() if f.write}, format, "--format")
    if dtype is not None:
        choose(dict.fromkeys(EXPORT_DTYPES), dtype, "--dtype")
    check_unquantized(model.params, "an export")
    path = os.path.normpath(os.path.expanduser(path))
    _check_new(path, row.is_folder)
    if format == "peft":
        return _export_adapters(model, path, dtype, log)
    model = model.merge(log=log)
    archive = convert.to_archive(model, dtype)
    log(f"writing {archive.config['model_type']}, {len(archive.tensors)} tensors")
    root, ending = (path, "") if row.is_folder else os.path.splitext(path)
    partial = f"{root}.partial{ending}"
    _remove(partial)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        resolve_table(row.write)(archive, partial, quantize)  # type: ignore[operator]
        found = resolve_table(row.open)(partial)  # type: ignore[operator]
        difference = verify(model, found, dtype, quantize)
        if row.is_folder:
            card = write_model_card(model, archive, license, run)
            huggingface.write_text(os.path.join(partial, "README.md"), card)
        _name(partial, path)
    except BaseException:
        _remove(partial)
        raise
    log(f"verified: logits differ by {difference:.1e} of their spread")
    return difference


def _export_adapters(
    model: LanguageModel, path: str, dtype: str | None, log: Callable[[str], None]
) -> float:
    """Write the adapter in use as a folder of peft, read it, compare logits, and then name it."""
    partial = f"{path}.partial"
    _remove(partial)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        peft_write.write_folder(model, partial, dtype)
        written = model.with_adapters({"written": peft.read_folder(partial, model)})
        expected, actual = compute_scores(model), compute_scores(written.switch("written"))
        difference = _compare(expected, actual, TOLERANCES[dtype or "float32"])
        _name(partial, path)
    except BaseException:
        _remove(partial)
        raise
    log(f"verified: logits differ by {difference:.1e} of their spread")
    return difference


def _check_new(path: str, is_folder: bool):
    is_empty_folder = is_folder and os.path.isdir(path) and not os.listdir(path)
    if os.path.exists(path) and not is_empty_folder:
        raise ConfigError(f"{path} exists: export to a new path, or delete it first.")


def _remove(path: str):
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def _name(partial: str, path: str):
    if os.path.isdir(path):
        os.rmdir(path)
    os.rename(partial, path)


# --- verification --------------------------------------------------------------------------------


def verify(
    model: LanguageModel, archive: Archive, dtype: str | None, quantize: str | None
) -> float:
    """Return by how much the logits of an archive differ from those of a model.

    Raises:
        ConfigError: by more than how the parameters are stored explains.
    """
    written = convert.to_model(archive, dtype="float32")
    if written.tokenizer.vocab_size > written.config.model.vocab:
        raise ConfigError(f"{archive.origin}: the tokenizer has more ids than the model.")
    if written.config.model.head == "linear":
        model = _drop_transform(model)
    expected, actual = (compute_scores(x) for x in (model, written))
    spread = float(np.std(expected)) or 1.0
    kind = dtype or _name_dtype(model)
    is_quantized = quantize is not None and quantize not in ("F32", "F16", "BF16")
    tolerance = TOLERANCES["quantized" if is_quantized else kind]
    if quantize in ("F16", "BF16"):
        tolerance = max(tolerance, TOLERANCES["bfloat16"])
    if is_quantized:  # single logits may differ by much
        root = float(np.sqrt(np.mean(np.square(actual - expected)))) / spread
        return _check_difference(root, tolerance)
    return _compare(expected, actual, tolerance)


def _compare(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> float:
    """Return the largest difference of logits, relative to their spread, which is checked."""
    spread = float(np.std(expected)) or 1.0
    return _check_difference(float(np.max(np.abs(actual - expected))) / spread, tolerance)


def _check_difference(difference: float, tolerance: float) -> float:
    if not difference <= tolerance:
        raise ConfigError(
            f"what was exported computes other logits: they differ by {difference:.2g} of their "
            f"spread, and {tolerance:g} is expected. Nothing was kept."
        )
    return difference


def _drop_transform(model: LanguageModel) -> LanguageModel:
    """Return a BERT without what comes before its head, which GGUF has no place for."""
    if "transform" not in model.params:
        return model
    cfg = dataclasses.replace(model.config.model, head="linear")
    config = dataclasses.replace(model.config, model=cfg)
    params = {name: part for name, part in model.params.items() if name != "transform"}
    return dataclasses.replace(model, config=config, params=params)


def _name_dtype(model: LanguageModel) -> str:
    names = {np.dtype(x.dtype).name for x in jax.tree.leaves(model.params)}
    return "bfloat16" if "bfloat16" in names else "float32"


def compute_scores(model: LanguageModel) -> np.ndarray:
    """Return the logits of a model for the same random tokens, computed in float32."""
    cfg = dataclasses.replace(model.config.model, dtype="float32")
    T = min(VERIFY_TOKENS, cfg.context)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, T)).astype(np.int32)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), model.params)
    return np.asarray(fetch(_score(cfg, params, tokens)))


@functools.partial(jax.jit, static_argnames="cfg")
def _score(cfg: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Return class logits [B A], or logits [B T V]; of tokens [B T]."""
    coords = make_whole_coords(cfg, tokens)
    variables, module = {"params": params}, build(cfg)
    if cfg.classes:
        return module.apply(variables, tokens, coords, method="classify")
    is_pair = cfg.family == "encoder_decoder"
    more = {"source": EncoderInput(tokens[:, ::-1], coords)} if is_pair else {}
    hidden, _ = module.apply(variables, tokens, coords, **more)
    return compute_logits(cfg, params, hidden)
