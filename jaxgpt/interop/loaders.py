"""Foreign models of any format as archives and as models: see `formats.FORMATS`."""

import warnings

import jax

from jaxgpt.interop import convert, hub, huggingface
from jaxgpt.interop.archive import Archive
from jaxgpt.interop.formats import FORMATS, find_format
from jaxgpt.language_model import LanguageModel
from jaxgpt.settings import ConfigError, resolve_table


def open_archive(path: str) -> Archive:
    """Return the archive of a path of any format; nothing but headers is read.

    Raises:
        ConfigError: it is of no format, or damaged.
    """
    name = find_format(path)
    if not name:
        raise ConfigError(
            f"{path} is no model: give a folder of transformers, a .gguf file, a .bin of llama2.c, "
            "or user/name of the Hugging Face hub."
        )
    read = resolve_table(FORMATS[name].open)
    return read(path)  # type: ignore[operator]


def load(
    path: str,
    *,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    checkpoint: str = "best",
    plugins: object = None,
) -> LanguageModel:
    """Load a foreign model; see `jaxgpt.load`, of whose arguments the last two are for runs."""
    try:
        return convert.to_model(open_archive(path), dtype=dtype, mesh=mesh, log=warnings.warn)
    except MemoryError as error:
        raise ConfigError(f"there is not enough memory for the model {path}.") from error


def open_hub(name: str) -> Archive:
    """Return the archive of a model of the Hugging Face hub."""
    return huggingface.open_folder(hub.download(name))


def open_other_file(path: str) -> Archive:
    """Return the archive of a file of llama2.c; refuse a pickle."""
    is_llama2c, open_file = (
        resolve_table(f"jaxgpt.interop.llama2c:{name}") for name in ("is_llama2c", "open_file")
    )
    if is_llama2c(path):  # type: ignore[operator]
        return open_file(path)  # type: ignore[operator]
    if path.endswith(".safetensors"):
        raise ConfigError(f"{path} is a file of tensors alone: give its folder, with config.json.")
    raise ConfigError(
        f"{path} is not a file of llama2.c; if it is a pickle of torch, it could execute anything "
        "and is never opened. Convert it to safetensors where you trust it: with transformers, "
        "`AutoModel.from_pretrained(FOLDER).save_pretrained('converted/')`."
    )
