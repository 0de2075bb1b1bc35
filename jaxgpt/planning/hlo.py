"""The collectives of a compiled program, read from its text.

    list_collectives(compiled.as_text())   every collective, with what it moves and how often

A program runs once. A loop that it runs says in its text how many turns it has
(`known_trip_count`), and so a collective inside loops runs as many times as their turns multiply
to. Groups of devices are written in four ways, all of which become lists of devices here.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# Bytes that a device sends, by the algorithm that sends least: a ring of n devices, in shares of
# the whole array (Thakur et al. 2005, "Optimization of collective communication operations").
SENT_FRACTION = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Collective(NamedTuple):
    """One instruction by which devices exchange arrays."""

    kind: str
    arrays: tuple[int, ...]  # bytes of each on one device, before or after, where it is more
    groups: tuple[tuple[int, ...], ...]  # devices that talk with each other
    times: int | None  # in a run of the program; None in a loop of unknown length
    label: str  # where it comes from

    def axes(self, mesh) -> tuple[str, ...]:
        """The axes of a mesh of devices 0, 1, ... along which the groups reach."""
        return find_axes(self.groups, dict(mesh.shape))


def list_collectives(text: str) -> list[Collective]:
    """Every collective among more than one device that the program runs, in the text's order."""
    programs = split_computations(text)
    times = count_runs(programs)
    found: list[Collective] = []
    channels: set[tuple[str, str]] = set()
    for name, lines in programs.items():
        for line in lines:
            match = COLLECTIVE.search(line)
            if not match or name not in times:
                continue
            groups = parse_groups(line, count_devices(text))
            if max(map(len, groups)) == 1:
                continue
            # A TPU runs a collective in parts that share a channel, beside other instructions.
            channel = re.search(r"channel_id=\d+", line)
            if channel and FUSED_COLLECTIVE in text and name != "ENTRY":
                if (channel[0], match["type"]) in channels:
                    continue
                channels.add((channel[0], match["type"]))
            label = re.search(r'op_name="([^"]*)"', line)
            arrays = list_arrays(match, len(groups[0]))
            is_scattered = name.startswith("all-reduce-scatter")  # a fusion, run as one
            kind = "reduce-scatter" if is_scattered else match["kind"]
            found.append(Collective(kind, arrays, groups, times[name], label[1] if label else ""))
    return found


FUSED_COLLECTIVE = "async_collective_fusion"


COLLECTIVE = re.compile(rf" = (?P<type>.+?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def count_array_bytes(kind: str, shape: str) -> int:
    """count_array_bytes("bf16", "2,3") is 12."""
    bits = re.search(r"\d+", kind)
    size = int(bits[0]) if bits else 8  # pred
    return math.prod(map(int, filter(None, shape.split(",")))) * size // 8


def list_arrays(match: re.Match, group: int) -> tuple[int, ...]:
    """The arrays of an instruction, from the type of its result: see `Collective.arrays`."""
    sizes = [count_array_bytes(*array) for array in ARRAY.findall(match["type"])]
    kind = match["kind"]
    if match["start"] and kind == "collective-permute":
        sizes = sizes[1:2]  # (operand, result, and maybe two words of its own)
    elif match["start"] and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # (operands, results)
    if kind == "all-to-all" and len(sizes) == group:
        sizes = [sum(sizes)]  # one array in pieces, one for each device
    return tuple(size * group if kind == "reduce-scatter" else size for size in sizes)


# --- computations and how often they run -----------------------------------------------------


def split_computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation, by its name; the one that is run has the name "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            lines = found["ENTRY" if header[1] else header[2]] = []
        else:
            lines.append(line)
    return found


def count_runs(programs: dict[str, list[str]]) -> dict[str, int | None]:
    """How often each computation runs: None where a loop above it has an unknown length."""
    times: dict[str, int | None] = {}

    def visit(name: str, count: int | None):
        before = times.get(name, 0)
        times[name] = None if count is None or before is None else before + count
        for line in programs.get(name, ()):
            turns: int | None = 1
            if " while(" in line:
                known = re.search(r'known_trip_count":?\{"n":"(\d+)"', line)
                turns = int(known[1]) if known else None
            for called in CALLED.findall(line):
                for each in re.findall(r"[\w.\-]+", called):
                    visit(each, None if turns is None or count is None else count * turns)

    visit("ENTRY", 1)
    return times


def add_trip_counts(text: str) -> str:
    """Add the trip counts of loops, which the TPU compiler omits, from the loops' conditions."""
    programs = split_computations(text)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        loop = re.search(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", line)
        if not loop or "known_trip_count" in line:
            continue
        condition = "\n".join(programs[loop[1]])
        bounds = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", condition)
        if len(bounds) == 1 and "direction=LT" in condition:
            counter = re.search(r"get-tuple-element\(.*index=(\d+)", condition)
            step = _find_increment(programs.get(loop[2], []), counter[1] if counter else "0")
            turns = -(-int(bounds[0]) // step)
            lines[number] += f', "known_trip_count":{{"n":"{turns}"}}'
    return "\n".join(lines)


def _find_increment(body: list[str], index: str) -> int:
    """Return what a loop's body adds to the counter at this index of its state; 1 if unclear."""
    text = "\n".join(body)
    counter = re.search(rf"%([\w.\-]+) = [su]32\[\]\S* get-tuple-element\(.*index={index}\b", text)
    if not counter:
        return 1
    name = re.escape(counter[1])
    sums = re.findall(rf"add\(%{name}, %([\w.\-]+)\)", text)
    steps = [re.search(rf"%{re.escape(s)} = [su]32\[\]\S* constant\((\d+)\)", text) for s in sums]
    return max((int(step[1]) for step in steps if step), default=1) or 1


CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"\{?((?:%[\w.\-]+(?:, )?)+)"
)


# --- groups of devices ------------------------------------------------------------------------


def count_devices(text: str) -> int:
    """How many devices the program is for."""
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return math.prod(map(int, counts))


def parse_groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of an instruction's line."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}?", line)
    if pairs:
        return tuple(tuple(map(int, p.split(","))) for p in re.findall(r"\d+,\d+", pairs[0]))
    written = line.partition("replica_groups=")[2]
    for form, read in FORMS.items():
        match = re.match(form, written)
        if match:
            return tuple(tuple(map(int, group)) for group in read(match))
    if written and not written.startswith("{}"):
        raise ValueError(f"groups of an unknown form: {written[:100]}")
    return (tuple(range(devices)),)  # {}: all


def _parse_list(match: re.Match):  # {{0,1},{2,3}}
    return [group.split(",") for group in re.findall(r"\{([\d,]+)\}", match[0])]


def _expand_iota(sizes: str, order: str | None) -> Any:
    """[2,4]T(1,0): 0, 1, ... in rows of 4, then turned."""
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _parse_reshape(match: re.Match):  # [4,2]<=[2,2,2]T(2,1,0)
    return _expand_iota(match[2], match[3]).reshape([int(n) for n in match[1].split(",")])


def _parse_mesh(match: re.Match):  # mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a','b':(1)2}
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    ids = _expand_iota(match[2], match[3]) if match[2] else np.arange(math.prod(sizes.values()))
    talk = {}  # of an axis: the factor that talks, and the one before it
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4]):
        if name in talk:
            raise ValueError(f"two factors of one axis in {match[0]}")
        talk[name] = (int(before), int(size)) if size else (1, sizes[name])
    shape = []
    for name, whole in sizes.items():
        before, size = talk.get(name, (whole, 1))
        shape += [before, size, whole // before // size]
    inside = range(1, len(shape), 3)
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    group = math.prod(shape[axis] for axis in inside)
    return ids.reshape(shape).transpose(*outside, *inside).reshape(-1, group)


FORMS = {
    r"\{\{[\d,{}]+\}\}": _parse_list,
    r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?": _parse_reshape,
    r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}": (
        _parse_mesh
    ),
}


def find_axes(groups, shape: dict[str, int]) -> tuple[str, ...]:
    """Along which axes of a mesh (its sizes by name, devices in order) the groups reach."""
    places = np.stack(np.unravel_index([*range(math.prod(shape.values()))], [*shape.values()]))
    reach = [np.ptp(places[:, list(group)], axis=1) > 0 for group in groups]
    return tuple(
        name for name, is_along in zip(shape, np.any(reach, axis=0), strict=True) if is_along
    )
