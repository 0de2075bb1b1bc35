"""Select the parameters to train, by path or by letters; the others stay as they are.

A selection is a nested dict like the parameters, with only the selected ones in it. So whatever is
made for a selection (gradients, optimizer state, checkpoints) has nothing for the others.
"""

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.settings import ConfigError

Tree = Any  # nested dicts


def select_letters(letters: Tree, patterns: Sequence[str]) -> Tree:
    """Return the letters of the parameters that match any of the patterns; all if there is none.

    Args:
        letters: the letters of every parameter, such as {"embed": {"table": "V>D"}}.
        patterns: paths with the wildcards of the shell ("stack.layers.*", "*.scale"), the path of
            a group ("stack"), or letters ("L*>*": all matrices in blocks).

    Raises:
        ConfigError: a pattern matches nothing; the message has the nearest paths.

    >>> letters = {"embed": {"table": "V>D"}, "norm": {"scale": "D"}}
    >>> select_letters(letters, ["*>*"]), select_letters(letters, ["norm"])
    ({'embed': {'table': 'V>D'}}, {'norm': {'scale': 'D'}})
    """
    if not patterns:
        return letters
    flat = flatten_dict(letters, sep=".")
    selected: dict[str, str] = {}
    for pattern in patterns:
        found = {path: d for path, d in flat.items() if _is_match(pattern, path, d)}
        if not found:
            near = difflib.get_close_matches(pattern, flat, n=3, cutoff=0) or list(flat)[:3]
            dims = ", ".join(sorted(set(flat.values())))
            raise ConfigError(
                f"optimizer.train={pattern!r} matches no parameter. Nearest: {', '.join(near)}; "
                f"groups end in .*, and letters are {dims}."
            )
        selected |= found
    return unflatten_dict({path: d for path, d in flat.items() if path in selected}, sep=".")


def _is_match(pattern: str, path: str, letters: str) -> bool:
    return any(
        fnmatch.fnmatchcase(*pair)
        for pair in ((path, pattern), (path, f"{pattern}.*"), (letters, pattern))
    )


def select(tree: Tree, selection: Tree) -> Tree:
    """Return the leaves of `tree` that are in `selection`, a nested dict.

    A tree that is no dict is returned as it is: `optax.tree.map_params` passes a placeholder.
    """
    if not isinstance(selection, dict) or not isinstance(tree, dict):
        return tree
    return {key: select(tree[key], selection[key]) for key in tree if key in selection}


def merge(selected: Tree, tree: Tree) -> Tree:
    """Return `tree` with the leaves of `selected`, a part of it, in place of its own."""
    if not isinstance(tree, dict):
        return selected
    return {
        key: merge(selected[key], value) if key in selected else value
        for key, value in tree.items()
    }
