"""Check a launcher on this machine: runs that are killed and preempted end as one process does.

    python deploy/try_runs.py slurm FOLDER      (called by try_slurm.sh, with a Slurm of its own)
    python deploy/try_runs.py openmpi FOLDER    (called by try_openmpi.sh)

For two and for four tasks: a run of one process with as many virtual devices, a run through the
files of this folder, one of which a task is killed, and one that is preempted by SIGTERM. Nothing
is started by hand after a kill or a preemption. Compared bit for bit: the last checkpoint's
parameters and optimizer state, and every logged loss.
"""

import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 120, 20
KILL_AT, STOP_AT = 25, 45  # steps
DEADLINE = 900  # seconds for one run
SETTINGS = [
    *("model.vocab=260", "model.context=32", "model.width=64", "model.layers=2", "model.heads=4"),
    *("model.ffn=128", "data.tokenizer=bytes", "data.workers=1", "optimizer.warmup=5"),
    *("train.batch=8", "train.accumulate=1", "train.eval_every=20", "train.eval_batches=2"),
    *(f"train.steps={STEPS}", f"train.save_every={SAVE_EVERY}", "train.log_every=1"),
    *("train.sample_every=0", "sample.tokens=4", "mesh.fsdp=-1", "mesh.data=1"),
]


def make_environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAXGPT": f"{sys.executable} -m jaxgpt",
        "MAX_RESTARTS": "3",
        "SECONDS_TO_SAVE": "60",
    }


class Launcher:
    """How a run is started and preempted; `cancel` is what an administrator's preemption does."""

    variable: str  # with the number of a task

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def make_arguments(self, name: str) -> list[str]:
        where = [f"folder={self.folder / 'runs'}", f"data.source={self.folder / 'text'}"]
        return [*SETTINGS, *where, f"data.cache={self.folder / 'ids'}", f"name={name}"]

    def run_one_process(self, devices: int) -> str:
        name = f"one_process_{devices}"
        command = [sys.executable, "-m", "jaxgpt", "train", *self.make_arguments(name)]
        log = open(self.folder / f"{name}.log", "w")  # noqa: SIM115
        environment = make_environment(devices)
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True, cwd=ROOT)
        return name

    def find_tasks(self, name: str) -> dict[int, int]:
        """Return the process of every running task of a run: {number: pid}."""
        found = {}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes().split(b"\0")
                environment = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"name={name}".encode() not in command or b"jaxgpt" not in command:
                continue
            for entry in environment:
                if entry.startswith(f"{self.variable}=".encode()):
                    found[int(entry.split(b"=")[1])] = int(path.name)
        return found

    def read_losses(self, name: str) -> list[tuple]:
        path = self.folder / "runs" / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return sorted((r["kind"], r["step"], r["loss"]) for r in records)

    def wait_for_step(self, name: str, step: int):
        wait_until(lambda: any(n >= step for _, n, _ in self.read_losses(name)))

    def read_arrays(self, name: str) -> dict:
        """Return every array of the last checkpoint of a run, by its path."""
        logging.getLogger("absl").setLevel(logging.ERROR)
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        found = {}
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        for part in sorted((self.folder / "runs" / name / "checkpoints" / str(STEPS)).iterdir()):
            if not (part / "_METADATA").exists():  # a file, or JSON
                continue
            shapes = checkpointer.metadata(part).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = checkpointer.restore(part, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            for path, x in jax.tree.leaves_with_path(tree):
                found[part.name + jax.tree_util.keystr(path)] = np.asarray(x)
        assert found, f"no arrays in the last checkpoint of {name}"
        return found

    def read_log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


class Slurm(Launcher):
    """deploy/slurm/train.sbatch, whose resources are overridden by those of this machine."""

    variable = "SLURM_PROCID"

    def start(self, name: str, tasks: int) -> int:
        command = [
            *(
                "sbatch",
                "--parsable",
                "--nodes=1",
                f"--ntasks={tasks}",
                f"--ntasks-per-node={tasks}",
            ),
            *("--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder / name}.log"),
            *(f"--chdir={ROOT}", str(ROOT / "deploy" / "slurm" / "train.sbatch")),
            *self.make_arguments(name),
        ]
        output = subprocess.run(
            command, env=make_environment(1), capture_output=True, text=True, check=True
        )
        return int(output.stdout)

    def preempt(self, job: int, name: str):
        """Requeue the running job, as a preemption does: SIGTERM, and SIGKILL after KillWait."""
        subprocess.run(["scontrol", "requeue", str(job)], check=True)

    def wait(self, job: int):
        def is_over() -> bool:
            shown = subprocess.run(
                ["scontrol", "show", "job", str(job)], capture_output=True, text=True
            ).stdout
            state = re.search(r"JobState=(\w+)", shown)
            is_pending = "JobState=PENDING" in shown
            if is_pending and "BeginTime" in shown:  # a requeued job waits two minutes
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"])
            return state is None or state[1] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        wait_until(is_over)


class OpenMPI(Launcher):
    """deploy/openmpi/train.sh."""

    variable = "OMPI_COMM_WORLD_RANK"

    def start(self, name: str, tasks: int) -> subprocess.Popen:
        command = [
            *(str(ROOT / "deploy" / "openmpi" / "train.sh"), "-np", str(tasks)),
            *("--allow-run-as-root", "--oversubscribe", "--", *self.make_arguments(name)),
        ]
        log = open(self.folder / f"{name}.log", "a")  # noqa: SIM115
        return subprocess.Popen(command, env=make_environment(1), stdout=log, stderr=log, cwd=ROOT)

    def preempt(self, process: subprocess.Popen, name: str):
        """Send SIGTERM to the script, as a batch system does, and start it again when it ended."""
        process.send_signal(signal.SIGTERM)
        status = process.wait(DEADLINE)
        print(f"  {name}: train.sh ended with status {status}; started again", flush=True)
        assert status == 75
        self.restarted = self.start(name, int(name.rsplit("_", 1)[1]))

    def wait(self, process: subprocess.Popen):
        process.wait(DEADLINE)
        if hasattr(self, "restarted"):
            self.restarted.wait(DEADLINE)
            del self.restarted


def wait_until(is_true):
    deadline = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.2)


def write_text(folder: pathlib.Path):
    dice = random.Random(0)
    words = ("the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "to", "hill", "red", "big")
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(" ".join(dice.choices(words, k=300)) + ".\n")


def compare(launcher: Launcher, a: str, b: str) -> bool:
    """Compare two runs bit for bit and print the result; return whether they are equal."""
    trees = [launcher.read_arrays(name) for name in (a, b)]
    assert trees[0].keys() == trees[1].keys(), "different arrays"
    different = [k for k in trees[0] if trees[0][k].tobytes() != trees[1][k].tobytes()]
    largest = max((abs(trees[0][k] - trees[1][k]).max() for k in different), default=0.0)
    losses = [launcher.read_losses(name) for name in (a, b)]
    same_losses = losses[0] == losses[1]
    largest_loss = max((abs(x[2] - y[2]) for x, y in zip(*losses, strict=True)), default=0.0)
    size = sum(x.size for x in trees[0].values())
    print(
        f"  {b} = {a}: {len(trees[0]) - len(different)} of {len(trees[0])} arrays ({size:,} "
        f"numbers) bit for bit"
        + (f", largest difference {largest:.1e}" if different else "")
        + f"; {len(losses[0])} logged losses "
        + ("equal" if same_losses else f"differ by up to {largest_loss:.1e}"),
        flush=True,
    )
    return not different and same_losses


def check(launcher: Launcher, tasks: int) -> bool:
    """Make the four runs of so many tasks and compare them."""
    print(f"{tasks} tasks", flush=True)
    start = time.monotonic()
    one = launcher.run_one_process(tasks)
    whole, killed, stopped = (f"{kind}_{tasks}" for kind in ("whole", "killed", "preempted"))
    launcher.wait(launcher.start(whole, tasks))

    job = launcher.start(killed, tasks)
    launcher.wait_for_step(killed, KILL_AT)
    os.kill(launcher.find_tasks(killed)[tasks - 1], signal.SIGKILL)
    print(f"  {killed}: task {tasks - 1} killed after step {KILL_AT}", flush=True)
    launcher.wait(job)

    job = launcher.start(stopped, tasks)
    launcher.wait_for_step(stopped, STOP_AT)
    launcher.preempt(job, stopped)
    launcher.wait(job)

    for name in (whole, killed, stopped):
        for step in re.findall(r"resuming from step (\d+)", launcher.read_log(name)):
            print(f"  {name}: resumed from step {step}", flush=True)
            assert int(step) < STEPS, "the run was complete before it was stopped: more STEPS"
        for line in re.findall(r"Stopped by .*", launcher.read_log(name)):
            print(f"  {name}: {line}", flush=True)
    results = [compare(launcher, whole, name) for name in (killed, stopped)]
    compare(launcher, one, whole)
    print(f"  {time.monotonic() - start:.0f} s", flush=True)
    return all(results)


def main():
    name, folder = sys.argv[1], pathlib.Path(sys.argv[2]).resolve()
    shutil.rmtree(folder / "runs", ignore_errors=True)
    if not (folder / "text").exists():
        write_text(folder / "text")
    launcher = {"slurm": Slurm, "openmpi": OpenMPI}[name](folder)
    counts = [int(n) for n in sys.argv[3:]] or [2, 4]
    results = [check(launcher, tasks) for tasks in counts]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
