"""Tell what a run needs before anything runs: memory, time, communication, and what fits.

    jaxgpt plan --config gpt_mini                             on this machine
    jaxgpt plan --config llama_7b --topology v5e:4x4          on TPUs that are not here
    jaxgpt plan --config gpt2_124m --device T4                on a GPU that is not here (estimated)
    jaxgpt plan --fit T4                                      the largest config that fits a device

Nothing is allocated. The settings are those of `jaxgpt train`, which shows the same by --plan.
Plans for TPUs need their compiler: pip install 'jaxgpt[tpu-plan]' in an environment of its own, and
JAXGPT_TPU_PYTHON set to its interpreter.
"""

import argparse
import json
import textwrap
from collections.abc import Sequence

from jaxgpt import config as configs
from jaxgpt.cli import make_parser
from jaxgpt.config_files import list_configs
from jaxgpt.script import print_text
from jaxgpt.suggestions import check_options, check_train_arguments


def main(argv: list[str], program: str) -> int:
    """Print the plan of a run, or the largest config that fits a device.

    Returns:
        The exit status: 0; 1 if the run does not fit, or no config does.

    Raises:
        ConfigError: there is no such config or device, a setting is invalid, or the compiler for
            TPUs is missing.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("--config", default="", help="a config file, or the name of one")
    parser.add_argument(
        "--fit",
        metavar="DEVICE",
        default="",
        help="name the largest config that comes with jaxgpt and fits: T4, H100, v5e-1, here, ...",
    )
    add_plan_options(parser)
    parser.add_argument("settings", nargs="*", metavar="path=value", help="model.width=512, ...")
    check_options(argv, parser, configs.list_fields(configs.Config))
    args, more = parser.parse_known_intermixed_args(argv)
    settings = args.settings + more
    if args.help:
        parser.print_help()
        print(f"\nconfigs:\n{textwrap.indent(textwrap.fill(', '.join(list_configs()), 96), '  ')}")
        return 0
    if args.fit:
        for option in ("config", "topology", "device"):
            if value := getattr(args, option):
                raise configs.ConfigError(f"--fit {args.fit} chooses the config: leave out "
                                          f"--{option} {value}.")  # fmt: skip
        return show_fit(args.fit, settings, args)
    check_train_arguments(settings, program)
    return show_plan(args.config or "stdlib", settings, args)


def add_plan_options(parser: argparse.ArgumentParser):
    """Add the options that `jaxgpt plan` and `jaxgpt train --plan` share."""
    parser.add_argument(
        "--topology", default="", help="plan for a slice of TPUs: v5e:2x2, v5p:4x4x4, v6e:4x8, ..."
    )
    parser.add_argument("--device", default="", help="plan for another device: T4, 8xH100, ...")
    parser.add_argument("--mfu", type=float, help="fraction of the peak speed to plan with")
    parser.add_argument(
        "--quick", action="store_true", help="plan with one compilation, the rest estimated"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def check_plan_options(args: argparse.Namespace, program: str):
    """Raise ConfigError for an option of the plan without --plan."""
    given = [name for name in ("topology", "device", "mfu", "quick", "json") if getattr(args, name)]
    if given and not args.plan:
        raise configs.ConfigError(f"--{given[0]} belongs to a plan: write {program} --plan.")


def check_mfu(mfu: float | None):
    """Raise ConfigError unless a fraction is one."""
    if mfu is not None and not 0 < mfu <= 1:
        raise configs.ConfigError(f"--mfu {mfu:g} must be above 0 and at most 1, such as 0.4.")


def show_plan(config: str, settings: Sequence[str], args: argparse.Namespace) -> int:
    """Print the plan of a config. Returns 0, or 1 if it does not fit."""
    check_mfu(args.mfu)
    from jaxgpt.compile_cache import enable_compile_cache
    from jaxgpt.planning.plan import find_chips, plan

    find_chips(args.topology, args.device)  # refuses a wrong name before anything is compiled
    enable_compile_cache()
    cfg = configs.load(config, list(settings))
    found = plan(cfg, topology=args.topology, device=args.device, mfu=args.mfu, quick=args.quick)
    print(json.dumps(found.to_dict())) if args.json else print_text(str(found))
    return 0 if found.is_fitting else 1


def show_fit(device: str, settings: Sequence[str], args: argparse.Namespace) -> int:
    """Print the largest config that fits a device. Returns 0, or 1 if none does."""
    check_mfu(args.mfu)
    from jaxgpt.planning.fit import find_fit

    found = find_fit(device, list(settings), args.mfu, args.quick)
    print(json.dumps(found.to_dict())) if args.json else print_text(str(found))
    return 0 if found.config else 1
