"""The Jinja environment that chat templates run in: what they need, and no way to do harm.

A template comes with a model, from anybody. It runs in Jinja's immutable sandbox, without
attributes that begin with an underscore, with the filters of ALLOWED_FILTERS only, and with a
budget: iterations, calls and the characters of every text that it makes are counted, so that it
ends, and fits in memory.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxgpt import optional
from jaxgpt.settings import ConfigError

MAX_SOURCE_CHARACTERS = 1 << 18
MAX_WORK = 1 << 24  # characters that a template may make, beside 64 for each of its input
STEP_COST = 64  # characters that an iteration or a call counts for
OWN_NAMES = ("_budget", "_step", "_concat")  # variables that every rendering has
_MAX_INTEGER_BITS = 64
_MAX_WIDTH = 1000  # of an indent or of a padded number

ALLOWED_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "indent", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title",
    "tojson", "trim", "unique", "upper",
)  # fmt: skip
_GROWING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate")


class Budget:
    """Counts the work of one rendering.

    Args:
        size: characters of the template's input.
    """

    def __init__(self, size: int):
        self.left = self.total = MAX_WORK + STEP_COST * size

    def spend(self, work: int):
        """Take this much off.

        Raises:
            ConfigError: nothing is left.
        """
        self.left -= work
        if self.left < 0:
            raise ConfigError(
                f"the chat template does not end, or makes more than {self.total:,} characters"
            )


def measure(value: Any) -> int:
    """Return the characters or elements of a value."""
    return len(value) if isinstance(value, str | bytes | Sequence) else 1


def strftime_now(pattern: str) -> str:
    """Format the present time, for templates that state the date."""
    if len(pattern) > _MAX_WIDTH or re.search(r"%\D?\d{3,}", pattern):
        raise ConfigError("the chat template formats a date with a very long pattern")
    return datetime.datetime.now().strftime(pattern)


def raise_exception(message: str):
    """Refuse a conversation, as a template asks for."""
    raise ConfigError(f"the chat template refuses this conversation: {message}")


def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Write JSON without escapes for HTML, which models were not trained on."""
    if isinstance(indent, int) and indent > 16:
        raise ConfigError(f"the chat template indents by {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


@functools.cache
def make_environment(marks: tuple[str, str]) -> Any:
    """Return a Jinja environment.

    Args:
        marks: characters that enclose what a `generation` block writes.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    jinja2 = optional.require("jinja2", "a chat template")
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class GenerationTag(Extension):
        """Marks what `{% generation %}...{% endgeneration %}` encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller):
            return marks[0] + caller() + marks[1]

    class Counted(NodeTransformer):
        """Adds a step to the body of every loop and macro; `~` is checked as `+` is."""

        def _count(self, node):
            self.generic_visit(node)
            step = nodes.ExprStmt(nodes.Call(nodes.Name("_step", "load"), [], [], None, None))
            node.body.insert(0, step.set_lineno(node.lineno))
            return node

        visit_For = visit_Macro = visit_CallBlock = _count  # noqa: N815

        def visit_Concat(self, node):  # noqa: N802
            self.generic_visit(node)
            call = nodes.Call(nodes.Name("_concat", "load"), node.nodes, [], None, None)
            return call.set_lineno(node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])
        concat = staticmethod(_join_pieces)

        def _parse(self, source, name, filename):
            tree = super()._parse(source, name, filename)
            for node in tree.find_all((nodes.Name, nodes.Getattr)):
                is_name = isinstance(node, nodes.Name)
                written = node.name if is_name else node.attr
                if written in OWN_NAMES if is_name else written.startswith("_"):
                    raise jinja2.TemplateSyntaxError(f"{written} begins with _", node.lineno)
            return Counted().visit(tree).set_environment(self)

        def is_safe_attribute(self, obj, attr, value):
            is_hidden = str(attr).startswith("_") or (isinstance(obj, str) and "format" in attr)
            return not is_hidden and super().is_safe_attribute(obj, attr, value)

        def call_binop(self, context, operator, left, right):
            _check_operation(context["_budget"], operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805
            _check_call(__context["_budget"], __obj, args, kwargs)
            return super().call(__context, __obj, *args, **kwargs)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    filters = environment.filters | {"tojson": to_json}
    environment.filters = {name: _count_filter(jinja2, name, filters[name])
                           for name in ALLOWED_FILTERS}  # fmt: skip
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _join_pieces(pieces: Iterable[str]) -> str:
    found = list(pieces)
    if sum(map(len, found)) > 4 * MAX_WORK:
        raise ConfigError(f"the chat template makes more than {4 * MAX_WORK:,} characters")
    return "".join(found)


def make_own_names(size: int) -> dict[str, Any]:
    """Return the variables OWN_NAMES of one rendering, for an input of this many characters."""
    budget = Budget(size)

    def concat(*parts):
        texts = [str(part) for part in parts]
        budget.spend(sum(map(len, texts)))
        return "".join(texts)

    return {"_budget": budget, "_step": lambda: "", "_concat": concat}  # a call is counted


def _check_operation(budget: Budget, operator: str, left: Any, right: Any):
    """Refuse an operation with a gigantic result."""
    if operator == "+":
        budget.spend(measure(left) + measure(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)
    elif isinstance(left, int | float) and isinstance(right, int | float):
        bits = [int(x).bit_length() if abs(x) < 1 << 200 else 200 for x in (left, right)]
        size = bits[0] * max(int(right), 1) if operator == "**" else sum(bits)
        if size > _MAX_INTEGER_BITS:
            raise ConfigError(f"the chat template computes {left} {operator} {right}")
    elif operator == "*":
        texts, counts = (left, right) if isinstance(right, int) else (right, left)
        budget.spend(measure(texts) * max(int(counts), 0))


def _check_format(pattern: str):
    if re.search(r"\d{4,}|\*", pattern):
        raise ConfigError("the chat template formats a text with a very large width")


def _check_call(budget: Budget, function: Any, args: Sequence[Any], kwargs: dict[str, Any]):
    """Refuse a call of a text's method that would make a gigantic text."""
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    budget.spend(STEP_COST + (len(text) if isinstance(text, str) else 0))
    if not isinstance(text, str):
        return
    values = [*args, *kwargs.values()]
    if name in _GROWING_METHODS:
        if any(isinstance(value, int) and value > _MAX_WIDTH for value in values):
            raise ConfigError(f"the chat template calls {name} with {values}")
    elif name == "replace" and len(values) > 1:
        budget.spend(_measure_replacement(text, *values[:2]))
    elif name == "join":
        budget.spend(_measure_join(values[0] if values else "", text))


def _measure_replacement(text: str, old: Any, new: Any) -> int:
    count = text.count(str(old)) if str(old) else len(text) + 1
    return len(text) + count * len(str(new))


def _measure_join(values: Any, between: str) -> int:
    items = list(values) if isinstance(values, Sequence) else []
    return sum(measure(item) + len(between) for item in items)


def _count_filter(jinja2: Any, name: str, function: Callable) -> Callable:
    """Return a filter that spends what its value, and its result, measure."""
    first = getattr(function, "jinja_pass_arg", None)
    place = 0 if first is None else 1  # of the value: others come after the context

    def check(budget: Budget, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        values = list(args)
        value = values[place]
        if name == "join" and not isinstance(value, str):
            values[place] = value = list(value)  # a generator would be used up
            more = [*values[place + 1 :], *kwargs.values()]
            budget.spend(_measure_join(value, str(more[0]) if more else ""))
        if name == "replace":
            more = [*values[place + 1 :], *kwargs.values()]
            budget.spend(_measure_replacement(str(value), *more[:2]))
        widths = [*values[place + 1 :], *kwargs.values()]
        if name == "indent" and any(isinstance(w, int) and w > _MAX_WIDTH for w in widths):
            raise ConfigError(f"the chat template indents by {widths}")
        budget.spend(STEP_COST + measure(value) * (16 if name in ("indent", "tojson") else 1))
        return values

    @jinja2.pass_context
    def counted(context, *args, **kwargs):
        given = {None: (), "context": (context,), "environment": (context.environment,),
                 "eval_context": (context.eval_ctx,)}[getattr(first, "name", first)]  # fmt: skip
        values = check(context["_budget"], [*given, *args], kwargs)
        return function(*values, **kwargs)

    return counted
