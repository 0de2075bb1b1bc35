"""Documents of Hugging Face data sets: by name, or from a folder on this machine.

The library stores what it downloads or converts as Arrow files below HF_HOME, and maps them.
"""

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from jaxgpt.config import DataConfig
from jaxgpt.data.units import (
    WHOLE_RECORD,
    RawDocuments,
    SourceUnit,
    Split,
    extract_texts,
    make_split_units,
    split_source,
)
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError


def list_units(cfg: DataConfig) -> list[SourceUnit]:
    """Return the units of the data set `cfg.source`: hf:name, hf:org/name:config, or hf:./folder.

    Each may end in @split: hf:name@test.

    A folder is one written by `save_to_disk`, or has files that the library reads (parquet, csv,
    json, ...).

    Args:
        cfg: `text_key` is the column with the text, `target_key` the one with the answer (text or
            a class number) if texts come in pairs.

    Returns:
        The units; see `make_split_units` for what is held out.

    Raises:
        ConfigError: the package, the data set or the column is missing, or it cannot be read.
    """
    splits = _load_dataset(split_source(cfg.source)[0])
    keys = [key for key in (cfg.text_key, cfg.target_key) if key]
    found = {}
    facts: list[Any] = ["hf", *keys]
    for name, data in sorted(splits.items()):
        if cfg.text_key == WHOLE_RECORD:
            keys = list(data.column_names)
        for setting, key in zip(("data.text_key", "data.target_key"), keys, strict=False):
            if key not in data.column_names:
                raise ConfigError(
                    f"{setting}={key!r} is not a column of {cfg.source}/{name}: it has "
                    f"{', '.join(data.column_names)}."
                )
        data = data.select_columns(keys)
        make_reader = partial(partial, _read_range, cfg, name, data)  # (begin, end, part) -> read
        found[name] = Split(len(data), data.data.nbytes, make_reader)
        facts += [name, len(data), data._fingerprint]
    return make_split_units(cfg.source, found, facts)


def _read_range(
    cfg: DataConfig, split: str, data: Any, begin: int, end: int, part: str
) -> RawDocuments:
    rows: Iterable[dict] = (
        dict(zip(batch, row, strict=True))
        for batch in data.select(range(begin, end)).iter(1000)
        for row in zip(*batch.values(), strict=True)
    )
    for index, example in enumerate(rows, start=begin):
        name = f"{cfg.source}/{split}/{index}"
        content, target = extract_texts(cfg, example, name)
        yield name, content, part, target


def _load_dataset(source: str) -> dict[str, Any]:
    """Return the splits by name."""
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
    except Exception as error:  # from the library, pyarrow or the network
        first = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
        arguments = ", ".join(repr(x) for x in (name, config) if x)
        raise ConfigError(
            f"data.source={source!r} cannot be loaded: {type(error).__name__}: {first}. It must "
            "be hf:name, hf:org/name:config, or hf: and a folder. Without a network, load it once "
            "on a machine that has one, with\n"
            f'  python -c "import datasets; datasets.load_dataset({arguments})'
            ".save_to_disk('folder')\"\n"
            "and copy the folder here: data.source=hf:folder."
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}
