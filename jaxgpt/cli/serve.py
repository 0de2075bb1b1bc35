"""Serve a model over HTTP, as OpenAI's API, with a chat page.

    jaxgpt serve runs/mine
    jaxgpt serve models/SmolLM2-135M-Instruct.gguf --port 9000 --rows 16 temperature=0.7
    jaxgpt serve runs/base --adapter polite=runs/polite --adapter terse=runs/terse
    JAXGPT_API_KEY=secret jaxgpt serve runs/mine --host 0.0.0.0 --allow-host models.example.org

The page is at http://127.0.0.1:8000/, the interface below /v1: models, completions,
chat/completions, embeddings. /health is for balancers, /metrics for Prometheus. Only this machine
is served unless --host is another address; then a key is needed.

SIGTERM or Ctrl-C: requests that run are finished, for 30 seconds at most; new ones are refused.

The settings are those of `jaxgpt sample`: rules of requests that do not give their own.
"""

import argparse
import os
from typing import Any

from jaxgpt import config as configs
from jaxgpt.cli import add_quantize, add_run, check_model, get_quantization, make_parser
from jaxgpt.cli.sample import parse_sampling
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError, find_nearest

PACKAGES = ("starlette", "uvicorn", "prometheus_client")
KEY_VARIABLE = "JAXGPT_API_KEY"
DRAFT_TOKENS = 4  # that a draft model guesses at once


def main(argv: list[str], program: str) -> int:
    """Serve a model until a signal comes.

    Returns:
        The exit status: 0, or 2 if no model is given.

    Raises:
        ConfigError: there is no such model, an option is invalid, or the port is taken.
    """
    parser = make_parser(program, __doc__)
    add_run(parser)
    add_options(parser)
    add_quantize(parser)
    parsed = parse_sampling(argv, parser, program)
    if isinstance(parsed, int):
        return parsed
    args, settings = parsed
    check_sizes(args)
    adapters = parse_pairs(args.adapter, "--adapter")
    mesh = parse_mesh(args.mesh)
    for path in [*adapters.values(), *filter(None, [args.draft])]:
        check_model(path)
    rules = {key.removeprefix("sample."): x for key, x in configs.parse_assignments(
        x for x in settings if not x.startswith("plugins=")).items()}  # fmt: skip
    for package in PACKAGES:
        require(package, "jaxgpt serve")

    from jaxgpt.serve import server

    keys = args.api_key or list(filter(None, [os.environ.get(KEY_VARIABLE)]))
    return server.run_cli(
        args.host, args.port, args.rows, args.queue,
        lambda: load(args, settings, rules, adapters, mesh),
        keys=keys, hosts=args.allow_host, origins=args.cors,
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server to those that name a model."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine)")
    add("--port", type=int, default=8000, help="port to listen on (8000); 0 = any free one")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"key that requests must have; may be repeated (or the variable {KEY_VARIABLE})",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name of this server in the Host header, besides localhost; may be repeated",
    )
    add(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="site whose pages may read answers, as https://example.org; may be repeated",
    )
    add("--name", default="", help="name of the model in /v1/models (that of its folder or file)")
    add(
        "--template",
        default="",
        help="chatml, llama3, gemma, mistral, plain or a file with Jinja source",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="adapter that requests choose as their model; may be repeated",
    )
    add("--rows", type=int, default=8, help="texts that are generated at once (8)")
    add("--slots", type=int, help="tokens of a text with its prompt (the context of the model)")
    add("--queue", type=int, default=256, help="texts that may wait for a row (256)")
    add("--chunk", type=int, default=256, help="tokens of a prompt that are read at once (256)")
    add("--speculate", type=int, metavar="TOKENS", help="tokens that are guessed at once (0)")
    add("--draft", default="", metavar="MODEL", help="smaller model that guesses tokens")
    add("--dtype", help="float32 or bfloat16 (as the model is saved)")
    add("--mesh", default="", metavar="AXIS=N", help="devices that share the model: tensor=2")


def check_sizes(args: argparse.Namespace):
    """Raise ConfigError for an option that is out of range."""
    for name, low in (("rows", 1), ("slots", 2), ("queue", 1), ("chunk", 1), ("speculate", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name} {value} must be at least {low}.")
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port {args.port} must be 0 to 65535.")


def parse_pairs(pairs: list[str], option: str) -> dict[str, str]:
    """Return NAME=VALUE arguments as a table.

    Raises:
        ConfigError: one has no name or no value, or a name is given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise ConfigError(f"{option} {pair}: expected NAME=VALUE.")
        if name in found:
            raise ConfigError(f"{option} {pair}: {name} is given twice.")
        found[name] = value
    return found


def parse_mesh(text: str) -> dict[str, int]:
    """Return the sizes of mesh axes: "tensor=2,fsdp=2".

    Raises:
        ConfigError: an axis is not known, or a size is no number.
    """
    values = parse_pairs([part for part in text.split(",") if part], "--mesh")
    known = [key.partition(".")[2] for key in configs.list_fields(configs.Config)
             if key.startswith("mesh.")]  # fmt: skip
    for axis, size in values.items():
        if axis not in known:
            near = find_nearest(axis, known)
            hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}."
            raise ConfigError(f"--mesh {axis}={size}: there is no axis {axis!r}.{hint}")
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh {axis}={size}: the size is a whole number of devices.")
    return {axis: int(size) for axis, size in values.items()}


def load(
    args: argparse.Namespace, settings: list[str], rules: dict[str, Any],
    adapters: dict[str, str], mesh: dict[str, int],
) -> Any:  # fmt: skip
    """Load what is served, and start its engine."""
    import math

    import jax

    from jaxgpt import loading
    from jaxgpt.config import MeshConfig
    from jaxgpt.plugins import parse_plugins
    from jaxgpt.serve.served import name_model, serve_model
    from jaxgpt.sharding import make_mesh

    devices = None
    if mesh:
        count = math.prod(mesh.values())
        devices = make_mesh(MeshConfig(**{"data": 1, **mesh}), jax.devices()[:count])
    model = loading.load(
        args.run, checkpoint=args.checkpoint, plugins=parse_plugins(settings), dtype=args.dtype,
        mesh=devices, **get_quantization(args),
    )  # fmt: skip
    draft = loading.load(args.draft, dtype=args.dtype, mesh=devices) if args.draft else None
    speculate = args.speculate
    if speculate is None:
        speculate = DRAFT_TOKENS if draft else 0
    return serve_model(
        model, args.name or name_model(args.run), rules=rules, template=args.template,
        adapters=adapters, rows=args.rows, slots=args.slots, queue=args.queue, chunk=args.chunk,
        speculate=speculate, draft=draft,
    )  # fmt: skip
