"""Verify the checkpoints of a run: every array, and what belongs to it, against its checksums.

No model is built: arrays are read one at a time, so that any run can be verified on any machine.
"""

import os
from typing import Any, NamedTuple

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.checksums import (
    ChecksumError,
    Record,
    find_record,
    make_box,
    make_box_reader,
    make_opener,
    name_arrays,
    parse_box,
)
from jaxgpt.config_files import find_run_config
from jaxgpt.loading import LABELS, check_labels, read_labels
from jaxgpt.saved_arrays import (
    FOLDERS,
    PARTS,
    describe_error,
    list_steps,
    read_manifest,
    read_progress,
)
from jaxgpt.settings import ConfigError

GOOD, UNKNOWN, DAMAGED = "good", "no checksums", "damaged"


class Finding(NamedTuple):
    """The state of one file or checkpoint of a run.

    Attributes:
        path: inside the run folder.
        state: GOOD; DAMAGED; or UNKNOWN, if it can be read and an older version made no checksums.
        arrays, bytes: of a checkpoint, how many were read.
        problems: a line for each.
    """

    path: str
    state: str
    arrays: int = 0
    bytes: int = 0
    problems: tuple[str, ...] = ()


def verify(run_folder: str) -> list[Finding]:
    """Read everything that a run needs to resume and to be sampled from, and check it.

    Raises:
        ConfigError: the folder is not a run.
    """
    find_run_config(run_folder)
    found, fingerprint, labels = _verify_files(run_folder)
    for folder in FOLDERS:
        for step in list_steps(os.path.join(run_folder, folder)):
            path = os.path.join(folder, str(step))
            finding = _verify_checkpoint(run_folder, path, fingerprint, labels)
            if os.path.isdir(os.path.join(run_folder, path)):  # not deleted meanwhile by the run
                found.append(finding)
    return found


def is_usable(found: list[Finding]) -> bool:
    """Return whether nothing is damaged."""
    return all(finding.state != DAMAGED for finding in found)


def _verify_files(run_folder: str) -> tuple[list[Finding], str, list[str] | None]:
    """Check the files of a run.

    Returns:
        What was found, the fingerprint of the tokenizer, and the class names; None if they cannot
        be read.
    """
    findings, fingerprint = [], ""
    labels: list[str] | None = None
    path = os.path.join(run_folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            has_checksum = configs.check_json(file.read(), path)
        findings.append(Finding("config.json", GOOD if has_checksum else UNKNOWN))
    except (ConfigError, OSError, ValueError) as error:
        findings.append(Finding("config.json", DAMAGED, problems=(_shorten(error),)))
    try:
        fingerprint = tokenizers.load(os.path.join(run_folder, "tokenizer.json")).fingerprint
        findings.append(Finding("tokenizer.json", GOOD))
    except (ConfigError, OSError, ValueError) as error:
        findings.append(Finding("tokenizer.json", DAMAGED, problems=(_shorten(error),)))
    try:
        labels = read_labels(run_folder)
        findings += [Finding(LABELS, GOOD)] if labels else []
    except ConfigError as error:
        findings.append(Finding(LABELS, DAMAGED, problems=(_shorten(error),)))
    return findings, fingerprint, labels


def _verify_checkpoint(
    run_folder: str, path: str, fingerprint: str, labels: list[str] | None
) -> Finding:
    folder = os.path.abspath(os.path.join(run_folder, path))
    arrays = size = 0
    problems = []
    records: dict[str, Record] | None = None
    try:
        progress, records = read_progress(folder)
        shapes = read_manifest(folder)
        expected = progress.get("tokenizer", "")
        if expected and fingerprint and expected != fingerprint:
            problems.append("tokenizer.json is not the tokenizer that it was trained with")
        if labels is not None:
            problems += _check_labels(run_folder, labels, progress.get("labels", ""))
        for part in (part for part in PARTS if part in shapes):
            opener = make_opener(folder, part)
            for name, x in name_arrays(part, shapes[part]):
                if not hasattr(x, "shape"):
                    continue
                arrays += 1
                try:
                    size += _read_array(opener(name), name, records)
                except Exception as error:  # TensorStore raises all kinds of errors
                    text = describe_error(error)
                    problems.append(text if isinstance(error, ChecksumError) else f"{name}: {text}")
        missing = {} if records is None else records.keys() - _list_names(shapes)
        problems += [f"{name} is missing" for name in sorted(missing)]
    except Exception as error:  # Orbax raises all kinds of errors
        problems.append(describe_error(error))
    state = DAMAGED if problems else UNKNOWN if records is None else GOOD
    return Finding(path, state, arrays, size, tuple(problems))


def _check_labels(run_folder: str, labels: list[str], expected: str) -> list[str]:
    """Return what is wrong with the class names, in one line, or nothing."""
    try:
        check_labels(labels, expected, run_folder)
    except ConfigError as error:
        return [_shorten(error)]
    return []


def _read_array(store: Any, name: str, records: dict[str, Record] | None) -> int:
    """Read and check all of an array, a saved part at a time; return its size in bytes."""
    if records is None:
        record, boxes = None, [make_box((slice(None),) * store.rank, store.shape)]
    else:
        record = find_record(records, name)
        boxes = [parse_box(text) for text in record["parts"]]
    read_box = make_box_reader(name, store, record)
    total = sum(read_box(box).nbytes for box in boxes)
    if total != store.size * store.dtype.numpy_dtype.itemsize:
        raise ChecksumError(f"{name} has no checksums for some of its elements")
    return total


def _list_names(shapes: dict[str, Any]) -> set[str]:
    return {name for part in PARTS if part in shapes for name, _ in name_arrays(part, shapes[part])}


def _shorten(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def format_findings(run_folder: str, found: list[Finding]) -> str:
    """Format what was found as a table, and what it means."""
    rows = [("", "arrays", "MB", "state")]
    for x in found:
        sizes = (f"{x.arrays:,}", f"{x.bytes / 1e6:,.1f}") if x.arrays else ("", "")
        rows.append((x.path, *sizes, x.state))
        rows += [("", "", "", f"  {problem}") for problem in x.problems]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", _format_summary(run_folder, found)])


def _format_summary(run_folder: str, found: list[Finding]) -> str:
    damaged = [x.path for x in found if x.state == DAMAGED]
    if not damaged:
        unknown = [x.path for x in found if x.state == UNKNOWN]
        if unknown:
            return f"{run_folder} can be read; an older version made no checksums of {unknown[0]}."
        return f"{run_folder} is as it was saved."
    text = f"{run_folder} is damaged: {', '.join(damaged)}."
    good = {name: [x.path for x in found if x.path.startswith(f"{name}{os.sep}")
                   and x.state != DAMAGED] for name in FOLDERS}  # fmt: skip
    if good["checkpoints"]:
        text += f" Training resumes from {good['checkpoints'][0]}."
    if usable := good["best"] + good["checkpoints"]:
        text += f" Sampling uses {usable[0]}."
    return text if usable else f"{text} No checkpoint is left that is good."
