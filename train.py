"""Train a Transformer.

    python train.py                                              a small GPT on Python's own text
    python train.py --config configs/gpt_mini.py data.source=my_texts/
    python train.py --config gpt_mini model.width=512 optimizer.lr=3e-4

The same command resumes from the last checkpoint. Ctrl-C saves a checkpoint and stops.

On several machines, start it once on each. Slurm (srun), TPU pods, Kubernetes and MPI are detected;
elsewhere, three flags describe the processes:

    python train.py --coordinator 10.0.0.1:1234 --processes 2 --process 0    (1 on the other)
"""

import argparse
import os
import sys

from jaxgpt import script


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this text and every setting"
    )
    parser.add_argument("--config", default="configs/stdlib.py", help="a config file")
    parser.add_argument("--coordinator", help="host:port of process 0, auto or none")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="index of this process, from 0")
    parser.add_argument("--timeout", type=int, default=300, help="seconds to wait for the others")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="model.width=512, ...")
    args, more = parser.parse_known_intermixed_args()

    from jaxgpt import config as configs
    from jaxgpt import hosts, trainer
    from jaxgpt.trainer.memory import retain_freed_memory

    if args.help:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe()}")
        return 0
    processes = args.coordinator, args.processes, args.process, args.timeout
    with hosts.distributed(*processes, end_process=os._exit):
        try:
            config = hosts.run_on_all(lambda: configs.load(args.config, args.settings + more))
            retain_freed_memory()
            trainer.train(config)
        except trainer.DivergedError as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    script.run(main)
