"""Train a Transformer.

    jaxgpt train                                           a small GPT on Python's own text
    jaxgpt train --config gpt_mini data.source=my_texts/
    jaxgpt train --config my_config.py model.width=512 optimizer.lr=3e-4

The same command resumes from the last checkpoint. Ctrl-C saves a checkpoint and stops.

On several machines, start it once on each. Slurm (srun), TPU pods, Kubernetes and MPI are detected;
elsewhere, three flags describe the processes:

    jaxgpt train --coordinator 10.0.0.1:1234 --processes 2 --process 0    (1 on the other)
"""

import os
import sys
import textwrap
from functools import partial

from jaxgpt import config as configs
from jaxgpt import interrupts
from jaxgpt.cli import make_parser
from jaxgpt.cli.plan import add_plan_options, check_plan_options, show_plan
from jaxgpt.config_files import find_config, list_configs
from jaxgpt.plugins import import_plugins, parse_plugins, read_plugins
from jaxgpt.suggestions import check_data_settings, check_options, check_train_arguments


def main(argv: list[str], program: str) -> int:
    """Train the model that the arguments configure.

    Returns:
        The exit status: 0, `--stop-status` if a signal stopped the run before its last step, or 1
        if training diverged, or cannot write its files.

    Raises:
        ConfigError: there is no such config, or a setting is invalid.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument(
        "--config",
        help="a config file, or the name of one in ./configs or of one that comes with jaxgpt; by "
        "default stdlib, or with train.start the model that it names",
    )
    parser.add_argument("--coordinator", help="host:port of process 0, auto or none")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="index of this process, from 0")
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="compile anew; otherwise programs are kept in $JAX_COMPILATION_CACHE_DIR, by default "
        "~/.cache/jaxgpt",
    )
    parser.add_argument("--timeout", type=int, default=300, help="seconds to wait for the others")
    parser.add_argument(
        "--plan", action="store_true", help="only show what the run needs, as `jaxgpt plan` does"
    )
    add_plan_options(parser)
    parser.add_argument(
        "--stop-status",
        type=int,
        default=0,
        help="exit status if a signal stops the run before its last step; a scheduler starts the "
        "same command again if it is not 0",
    )
    parser.add_argument("settings", nargs="*", metavar="path=value", help="model.width=512, ...")
    check_options(argv, parser, configs.list_fields(configs.Config))
    args, more = parser.parse_known_intermixed_args(argv)
    settings = args.settings + more
    if args.help:
        import_plugins(parse_plugins(settings) or (), configs.list_tables())
        parser.print_help()
        names = textwrap.fill(", ".join(list_configs()), 96)
        print(f"\nconfigs:\n{textwrap.indent(names, '  ')}")
        print(f"\nsettings and their defaults:\n{configs.describe()}")
        return 0
    check_train_arguments(settings, program)
    name = args.config or "stdlib"
    has_plugins = bool(read_plugins(find_config(name)) or parse_plugins(settings))
    values = configs.parse_assignments(settings, check_names=not has_plugins)
    if not has_plugins:
        check_data_settings(values)
    check_plan_options(args, program)
    if args.plan:
        return show_plan(name, settings, args)

    from jaxgpt import hosts, trainer
    from jaxgpt.compile_cache import enable_compile_cache
    from jaxgpt.trainer.memory import retain_freed_memory

    interrupts.raise_keyboard_interrupt()
    if not args.no_compile_cache:
        enable_compile_cache()

    processes = args.coordinator, args.processes, args.process, args.timeout
    with hosts.distributed(*processes, end_process=os._exit):
        try:
            has_start = args.config is None and values.get("train.start")
            load = trainer.load_config if has_start else partial(configs.load, name)
            config = hosts.run_on_all(lambda: load(settings))
            retain_freed_memory()
            progress = trainer.train(config)
        except trainer.RunError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 1
    return 0 if progress.is_done or progress.step >= config.train.steps else args.stop_status
