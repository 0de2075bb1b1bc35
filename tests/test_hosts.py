"""Many processes on loopback train as one does: started, killed, stopped, and in other numbers."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_bits, saved, write_text

from jaxgpt import config as configs
from jaxgpt import hosts
from jaxgpt.config import MeshConfig, override
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh
from jaxgpt.trainer import loop, train
from jaxgpt.trainer.checkpoint import latest_step
from jaxgpt.trainer.logging import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
DEADLINE = 240  # seconds until a process that hangs is killed, and its test fails

# --- who belongs together: functions of the environment --------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"HOME": "/root"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "Slurm"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM, None),  # the script of a job, which is no step
        (
            {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"},
            "Open MPI",
        ),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPI"),  # Open MPI 5
        ({"PMI_SIZE": "2"}, "MPI"),
        ({"PMI_SIZE": "1"}, None),
        ({"PMI_SIZE": "many"}, None),
        (POD | {"JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        (POD, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "TPU pod"),
        (POD | {"JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod"),
    ],
)
def test_a_process_knows_whether_it_was_started_as_one_of_several(environment, name):
    assert hosts.detect(environment) == name


@pytest.mark.parametrize("name", [method for _, method in hosts.CLUSTERS.values() if method])
def test_jax_knows_the_names_of_the_clusters(name):
    from jax._src.clusters import ClusterEnv

    assert name in {kind.name for kind in ClusterEnv._cluster_types}


def test_a_process_by_itself_joins_nothing():
    assert hosts.plan({}) is None
    assert hosts.plan(SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "none") is None


def test_three_flags_are_taken_before_any_cluster():
    how = hosts.plan(SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "[::1]:1234", 2, 1)
    assert how == dict(
        coordinator_address="[::1]:1234",
        num_processes=2,
        process_id=1,
        cluster_detection_method="deactivate",
    )


def test_a_cluster_that_is_not_known_is_left_to_jax():
    assert hosts.plan({}, "auto") == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", 2, None), "--coordinator and --processes without --process: give all three"),
        ((None, None, 0), "--process without --coordinator and --processes"),
        (("auto", 2, 1), "--coordinator auto must be host:port"),
        (("h", 2, 1), "--coordinator h must be host:port"),
        (("h:x", 2, 1), "--coordinator h:x must be host:port"),
        ((":1", 2, 1), "--coordinator :1 must be host:port"),
        (("h:1", 2, 2), "--process 2 with --processes 2: processes are numbered from 0 to 1"),
        (("h:1", 2, -1), "--process -1 with --processes 2"),
        (("h:1", 0, 0), "--process 0 with --processes 0"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        hosts.plan({}, *flags)


# --- one process -----------------------------------------------------------------------------


def test_one_process_agrees_with_itself():
    assert hosts.exchange("word", "mine") == ["mine"]
    hosts.agree({"seed": 1})
    assert hosts.together(lambda: 3) == 3
    assert hosts.once(lambda: 4)() == 4
    with pytest.raises(KeyError):
        hosts.together(lambda: {}["nothing"])


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "context": 2}, {"tensor": 8}])
def test_a_batch_comes_back_from_the_devices(mesh):
    where = make_mesh(MeshConfig(**{"data": 1} | mesh))
    batch = {"tokens": np.arange(64).reshape(8, 8), "class": np.arange(8), "none": None}
    back = hosts.fetch(hosts.place(batch, where, 8))
    assert hosts.rows(where, 8).tolist() == list(range(8))
    jax.tree.map(np.testing.assert_array_equal, back, batch)


# --- two processes, without training ---------------------------------------------------------


def address() -> str:
    """A free place on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def environment(devices: int, **more) -> dict[str, str]:
    # Cheaply compiled, in all runs alike.
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    count = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": f"{count} {fast}", "PYTHONPATH": str(ROOT)} | more


def start(commands, env):
    """Runs commands at the same time; returns (status, stdout, stderr) of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )
        for command in commands
    ]
    try:
        told = [process.communicate(timeout=DEADLINE) for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, told, strict=True)]


@pytest.fixture(scope="module")
def pair():
    """What two processes of two devices told."""
    at = address()
    worker = pathlib.Path(__file__).parent / "hosts_worker.py"
    told = start([(worker, at, i) for i in range(2)], environment(2))
    assert [status for status, *_ in told] == [0, 0], told
    return [json.loads(out.splitlines()[-1]) for _, out, _ in told]


def test_processes_know_who_they_are(pair):
    assert [told["who"] for told in pair] == [[0, 2], [1, 2]]


def test_what_each_has_to_say_reaches_all_in_their_order(pair):
    assert all(told["exchange"] == [["00", "10"], ["01", "11"], ["02", "12"]] for told in pair)


def test_only_the_first_process_writes(pair):
    assert [told["once"] for told in pair] == ["written", None]


def test_what_succeeds_everywhere_has_its_result(pair):
    assert [told["together"] for told in pair] == [0, 1]


def test_what_fails_in_one_process_fails_in_all(pair):
    own, others = "process {0} has no data", "process {0} of 2: process {0} has no data"
    assert pair[0]["failed"] == [own.format(0), others.format(1)]
    assert pair[1]["failed"] == [others.format(0), own.format(1)]


def test_processes_that_differ_are_refused_everywhere_by_key(pair):
    assert [told["agreed"] for told in pair] == ["", ""]
    text = "process 0 and process 1 do not agree:\n  model.width: 3 there, 4 here"
    assert [told["differ"] for told in pair] == [f"process 1 of 2: {text}", text]


def test_the_first_word_said_is_the_one_that_all_hear(pair):
    assert pair[0]["call"] == pair[1]["call"]
    assert pair[0]["call"] in ("first of 0", "first of 1")


@pytest.mark.parametrize(
    ("mesh", "rows", "shards"),
    [
        ("data", [[0, 1, 2, 3], [4, 5, 6, 7]], [[2, 4]]),
        ("context", [[0, 1, 2, 3], [4, 5, 6, 7]], [[4, 2]]),
        ("across", [list(range(8))] * 2, [[8, 4]]),
    ],
)
def test_each_process_makes_the_rows_of_its_devices(pair, mesh, rows, shards):
    whole = {"tokens": np.arange(32).reshape(8, 4).tolist(), "class": list(range(8))}
    for told, mine in zip(pair, rows, strict=True):
        for placed in told[mesh]:  # of the whole batch, and of the rows
            assert placed == {"rows": mine, "shards": shards, "back": whole}


def test_a_process_that_nobody_joins_says_where_it_waited():
    at = address()
    command = ["train.py", "--coordinator", at, "--processes", 2, "--process", 1, "--timeout", 1]
    ((status, _, err),) = start([command], environment(1))
    assert status == 2
    assert f"train.py: process 1 of 2 waited 1 s for the others at {at}: is every process" in err


# --- whole runs ------------------------------------------------------------------------------

CONFIG = """
import os
from jaxgpt import hosts
from jaxgpt.config import *
from jaxgpt.trainer import loop

config = Config(
    name="straight",
    folder={folder!r},
    model=ModelConfig(vocab=260, context=16, width=16, layers=1, heads=2, kv_heads=2, ffn=32),
    data=DataConfig(source={text!r}, tokenizer="bytes", cache={cache!r}),
    optimizer=OptimizerConfig(lr=1e-2, warmup=2),
    train=TrainConfig(steps=10, batch=8, eval_every=4, save_every=3, sample_every=0, log_every=1),
    sample=SampleConfig(prompt="the ", tokens=4),
)
loop.peak_flops = lambda devices: (1e12, "a guess")
step_to_act, who, number = map(int, os.environ.get("ACT", "0 0 0").split())
log = loop.log


def log_and_act(run, step, metrics):
    log(run, step, metrics)
    if (step, hosts.index()) == (step_to_act, who):
        os.kill(os.getpid(), number)


loop.log = log_and_act
if "SPEAK" not in os.environ:
    loop.speak = lambda run: None
"""


class Place:
    """Where runs lie, and how they are started."""

    def __init__(self, folder):
        self.file = folder / "tiny.py"
        where = dict(folder=folder / "runs", text=write_text(folder / "text"), cache=folder / "ids")
        self.file.write_text(CONFIG.format(**{k: str(v) for k, v in where.items()}))
        self.compiled = {  # once for runs of the same layout
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def run(self, processes, devices, *settings, **more):
        at = address()
        command = ["train.py", "--config", self.file, *settings]
        if processes > 1:
            command += ["--coordinator", at, "--processes", processes, "--timeout", 30]
        each = [["--process", i] if processes > 1 else [] for i in range(processes)]
        return start([command + who for who in each], environment(devices, **self.compiled, **more))

    def config(self, *settings):
        with pytest.MonkeyPatch.context() as patch:  # the file sets what it likes in the loop
            for name in ("peak_flops", "log", "speak"):
                patch.setattr(loop, name, getattr(loop, name))
            return configs.load(str(self.file), settings)


def story(cfg):
    """What metrics.jsonl tells, without the times."""
    return [(r["kind"], r["step"], r["loss"], r["accuracy"]) for r in read_metrics(cfg.run_folder)]


def statuses(told):
    return [status for status, *_ in told]


def assert_near(a, b):
    """Two runs are equal but for the order in which devices add: float32, told with six digits."""
    steps = [[line[:2] for line in sorted(story(cfg))] for cfg in (a, b)]
    losses = [np.array([line[2] for line in sorted(story(cfg))]) for cfg in (a, b)]
    assert steps[0] == steps[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1.1e-5)
    for x, y in zip(*(jax.tree.leaves(saved(cfg)[0].params) for cfg in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)  # AdamW takes 1e-2 of noise's sign


PAIR = ["mesh.fsdp=2"]  # two processes of two devices: parameters divided inside of each


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def alone(place):
    """A run of one process with one device."""
    cfg = place.config("name=alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda devices: (1e12, "a guess"))
        patch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        patch.setattr(loop, "speak", lambda run: None)
        train(cfg, is_quiet=True)
    return cfg


@pytest.fixture(scope="module")
def together(place):
    """A run of two processes, without a stop: (config, what they told)."""
    told = place.run(2, 2, "name=together", *PAIR, SPEAK="1")
    assert statuses(told) == [0, 0], told
    return place.config("name=together", *PAIR), told


@pytest.fixture(scope="module")
def killed(place):
    """The same, but process 1 is killed after step 7: (config, what they told, checkpoint)."""
    told = place.run(2, 2, "name=killed", *PAIR, ACT=f"7 1 {signal.SIGKILL}")
    cfg = place.config("name=killed", *PAIR)
    shutil.copytree(cfg.run_folder, os.path.join(cfg.folder, "elastic"))
    return cfg, told, latest_step(os.path.join(cfg.run_folder, "checkpoints"))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(alone, together):
    assert_near(alone, together[0])


@pytest.mark.slow
def test_a_run_of_two_processes_is_told_and_written_once(together):
    cfg, ((_, out, _), (_, silent, _)) = together
    assert "4 cpu device(s) (data 2 x fsdp 2)" in out
    assert "step 10/10  loss " in out
    assert "--- sample at step 10 ---" in out
    assert [line for line in silent.splitlines() if not line.startswith("[Gloo]")] == []
    kinds = [(kind, step) for kind, step, *_ in story(cfg)]
    assert sorted(kinds) == [("eval", n) for n in (4, 8, 10)] + [("train", n) for n in range(1, 11)]
    assert sorted(os.listdir(cfg.run_folder)) == [
        "best", "checkpoints", "config.json", "metrics.jsonl", "plots", "samples", "tensorboard",
        "tokenizer.json",
    ]  # fmt: skip
    assert os.listdir(os.path.join(cfg.run_folder, "checkpoints")) == ["10"]
    assert len(os.listdir(os.path.join(cfg.run_folder, "tensorboard"))) == 1


@pytest.mark.slow
def test_when_a_process_is_killed_the_others_end(killed):
    _, told, step = killed
    assert told[1][0] == -signal.SIGKILL
    assert told[0][0] not in (0, 2)
    assert "another" in told[0][2]
    assert step in (3, 6)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bits(place, together, killed):
    cfg, _, step = killed
    told = place.run(2, 2, "name=killed", *PAIR)
    assert statuses(told) == [0, 0], told
    assert f"(going on from step {step})" in told[0][1]
    assert_same_bits(saved(cfg)[0], saved(together[0])[0])
    assert sorted(story(cfg)) == sorted(story(together[0]))


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_and_stop_at_the_same_step(place, alone, killed):
    mesh = ["name=elastic", "mesh.tensor=2", "mesh.fsdp=2", "mesh.data=1"]
    config = os.path.join(killed[0].folder, "elastic", "config.json")
    with open(config, "w") as file:
        file.write(configs.to_json(place.config(*mesh)))
    told = place.run(4, 1, *mesh, ACT=f"7 2 {signal.SIGTERM}")
    assert statuses(told) == [0, 0, 0, 0], told
    assert "Stopped by SIGTERM after " in told[0][1]
    stopped = latest_step(os.path.join(os.path.dirname(config), "checkpoints"))
    assert stopped in (8, 9)  # heard while step 8 was under way
    # And then on the eight devices of this process.
    cfg = override(place.config(*mesh), ["mesh.tensor=1", "mesh.data=4"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda devices: (1e12, "a guess"))
        patch.setattr(loop, "speak", lambda run: None)
        train(cfg, is_quiet=True)
    assert_near(alone, cfg)
