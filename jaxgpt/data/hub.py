"""Documents of Hugging Face data sets: by name, or from a folder on this machine.

The library keeps what it downloads or converts as Arrow files below HF_HOME, and maps them.
"""

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from jaxgpt.config import DataConfig
from jaxgpt.data.units import Split, Texts, Unit, from_splits, texts
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError


def units(cfg: DataConfig) -> list[Unit]:
    """The data set that `cfg.source` names as hf:name, hf:org/name:config, or hf:./folder.

    A folder is one that `save_to_disk` wrote, or has files that the library reads (parquet, csv,
    json, ...).

    Args:
        cfg: `text_key` is the column that holds the text, `target_key` the one that holds the
            answer, if texts come in pairs: text, or the number of a class.

    Returns:
        The units of `from_splits`, which says what is held out.

    Raises:
        ConfigError: the package, the data set or the column is missing, or it can not be read.
    """
    splits = _load(cfg.source)
    keys = [key for key in (cfg.text_key, cfg.target_key) if key]
    found = {}
    facts: list[Any] = ["hf", *keys]
    for name, data in sorted(splits.items()):
        for setting, key in zip(("data.text_key", "data.target_key"), keys, strict=False):
            if key not in data.column_names:
                raise ConfigError(
                    f"{setting}={key!r} is not a column of {cfg.source}/{name}: it has "
                    f"{', '.join(data.column_names)}."
                )
        data = data.select_columns(keys)
        reader = partial(partial, _range, cfg, name, data)  # (begin, end, part) -> () -> texts
        found[name] = Split(len(data), data.data.nbytes, reader)
        facts += [name, len(data), data._fingerprint]
    return from_splits(cfg.source, found, facts)


def _range(cfg: DataConfig, split: str, data: Any, begin: int, end: int, part: str) -> Texts:
    rows: Iterable[dict] = (
        dict(zip(batch, row, strict=True))
        for batch in data.select(range(begin, end)).iter(1000)
        for row in zip(*batch.values(), strict=True)
    )
    for index, example in enumerate(rows, start=begin):
        name = f"{cfg.source}/{split}/{index}"
        content, target = texts(cfg, example, name)
        yield name, content, part, target


def _load(source: str) -> dict[str, Any]:
    datasets = require("datasets", f"data.source={source}")
    datasets.disable_progress_bars()
    path = source.removeprefix("hf:")
    folder = os.path.expanduser(path)
    name, _, config = path.partition(":")
    try:
        if not os.path.isdir(folder):
            found = datasets.load_dataset(name, config or None)
        elif any(
            os.path.isfile(os.path.join(folder, x)) for x in ("dataset_dict.json", "state.json")
        ):
            found = datasets.load_from_disk(folder)
        else:
            found = datasets.load_dataset(folder)
    except Exception as error:  # of the library, of pyarrow, of the network
        first = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
        arguments = ", ".join(repr(x) for x in (name, config) if x)
        raise ConfigError(
            f"data.source={source!r} can not be loaded: {type(error).__name__}: {first}. It must "
            "be hf:name, hf:org/name:config, or hf: and a folder. Without a network, load it once "
            "where there is one, with\n"
            f'  python -c "import datasets; datasets.load_dataset({arguments})'
            ".save_to_disk('folder')\"\n"
            "and bring the folder here: data.source=hf:folder."
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}
