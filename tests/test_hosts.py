"""Several processes on loopback train as one does: started, killed, stopped, and resumed."""

import ast
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_bits, restore_latest, write_text
from xla_flags import make_xla_flags

from jaxgpt import config as configs
from jaxgpt import hosts
from jaxgpt.config import MeshConfig, override
from jaxgpt.data.tasks import CausalTask
from jaxgpt.saved_arrays import latest_step
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh
from jaxgpt.trainer import loop, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.autopsy import list_autopsies
from jaxgpt.trainer.barrier import Barrier, BrokenBarrierError
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.verification import is_usable, verify

ROOT = pathlib.Path(__file__).parent.parent
DEADLINE = 240  # seconds until a process that hangs is killed, and its test fails

# --- cluster detection from the environment --------------------------------------------------

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
def test_a_launcher_of_several_processes_is_detected(environment, name):
    assert hosts.detect_cluster(environment) == name


@pytest.mark.parametrize("name", [method for _, method in hosts.CLUSTERS.values() if method])
def test_the_cluster_names_exist_in_jax(name):
    from jax._src.clusters import ClusterEnv

    assert name in {getattr(kind, "name", "") for kind in ClusterEnv._cluster_types}


def test_a_single_process_does_not_initialize_jax_distributed():
    assert hosts.make_initialize_args({}) is None
    assert hosts.make_initialize_args(SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "none") is None


def test_the_three_flags_take_precedence_over_a_detected_cluster():
    init_args = hosts.make_initialize_args(
        SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "[::1]:1234", 2, 1
    )
    assert init_args == dict(
        coordinator_address="[::1]:1234",
        num_processes=2,
        process_id=1,
        cluster_detection_method="deactivate",
    )


STEP = SLURM | {"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "4"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1"}
MPI |= {"OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (STEP | {"SLURM_STEP_NUM_NODES": "1"}, [0]),
        (STEP | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0]),
        (STEP | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "2"}, []),  # its own
        (STEP | {"SLURM_STEP_NUM_NODES": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, []),  # alone
        (MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, [1]),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
    ],
)
def test_a_process_takes_all_gpus_that_are_its_own_or_the_one_of_its_number(
    environment, devices, monkeypatch
):
    from jax._src.clusters import ClusterEnv

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = hosts.make_initialize_args(environment)
    *_, found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, args.get("local_device_ids"), args["cluster_detection_method"], 1
    )
    assert found == devices  # [] does not restrict the visible ones


def test_auto_leaves_the_detection_to_jax():
    assert hosts.make_initialize_args({}, "auto") == {}


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
def test_inconsistent_flags_are_rejected(flags, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        hosts.make_initialize_args({}, *flags)


# --- one process -----------------------------------------------------------------------------


def test_collectives_are_trivial_in_one_process():
    assert hosts.all_gather_text("key", "text") == ["text"]
    hosts.check_equal({"seed": 1})
    assert hosts.run_on_all(lambda: 3) == 3
    assert hosts.run_on_first(lambda: 4)() == 4
    with pytest.raises(KeyError):
        hosts.run_on_all(lambda: {}["nothing"])


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "context": 2}, {"tensor": 8}])
def test_placing_and_fetching_a_batch_is_lossless(mesh):
    where = make_mesh(MeshConfig(**{"data": 1} | mesh))
    batch = {"tokens": np.arange(64).reshape(8, 8), "class": np.arange(8), "none": None}
    back = hosts.fetch(hosts.place_batch(batch, where, 8))
    assert hosts.find_local_rows(where, 8).tolist() == list(range(8))
    jax.tree.map(np.testing.assert_array_equal, back, batch)


@pytest.fixture
def two_processes(monkeypatch):
    """Make this process one of two, as far as `hosts` can see."""
    monkeypatch.setattr(hosts, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "process_index", lambda: 1)


@pytest.fixture
def statuses(monkeypatch):
    """Record the statuses with which a command's `end_process` is called."""
    recorded = []
    token = hosts._end_process.set(recorded.append)
    yield recorded
    hosts._end_process.reset(token)


class Store(dict):
    """Stands for JAX's client of the coordinator."""

    def key_value_set(self, key, value):
        assert key not in self, "ALREADY_EXISTS"
        self[key] = value

    def key_value_delete(self, prefix):
        for key in [key for key in self if key.startswith(prefix)]:
            del self[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]


@pytest.fixture
def barriers(monkeypatch):
    """Barriers of two processes, as functions that wait there for a moment."""
    monkeypatch.setattr(hosts, "process_count", lambda: 2)
    store, made = Store(), []

    def call(barrier, index, name, **arguments):
        monkeypatch.setattr(hosts, "process_index", lambda: index)
        return getattr(barrier, name)(**arguments)

    for index in range(2):
        barrier = Barrier("checkpoints", store)
        barrier._key = "one of both"
        call(barrier, index, "begin")
        made.append(partial(call, barrier, index))
    return made


def test_a_barrier_opens_when_all_have_come(barriers):
    first, second = barriers
    with pytest.raises(TimeoutError, match="1 of 2 processes have come"):
        first("wait", key="start", timeout_ms=1)
    second("wait", key="start", timeout_ms=1)
    with pytest.raises(TimeoutError):  # the key again is another place
        second("wait", key="start", timeout_ms=1)


def test_a_process_that_has_failed_breaks_the_barrier_of_this_save(barriers):
    first, second = barriers
    second("break_it")
    second("break_it")  # a mark cannot be left twice
    with pytest.raises(BrokenBarrierError):
        first("wait", key="start", timeout_ms=60_000)
    first("begin")
    with pytest.raises(TimeoutError):
        first("wait", key="start", timeout_ms=1)


def test_a_process_that_passes_by_a_place_has_failed(barriers):
    """It could not write, and waits at the end of the save, where the others have to come."""
    first, second = barriers
    with pytest.raises(TimeoutError):
        second("wait", key="end", timeout_ms=1)
    with pytest.raises(BrokenBarrierError):
        first("wait", key="async_write_complete.6", timeout_ms=60_000)
    first("wait", key="end", timeout_ms=60_000)


@pytest.mark.parametrize(("error", "status"), [(KeyError("x"), 1), (KeyboardInterrupt(), 130)])
def test_a_local_error_ends_the_process_of_a_command(error, status, two_processes, statuses, capfd):
    with hosts.abort_on_error(ValueError):
        raise error
    assert statuses == [status]
    assert "process 1 of 2 ends here" in capfd.readouterr().err


@pytest.mark.parametrize("error", [ConfigError("x"), ValueError("x")])
def test_an_error_of_all_processes_is_raised(error, two_processes, statuses):
    with pytest.raises(type(error)), hosts.abort_on_error(ValueError):
        raise error
    assert not statuses


def test_a_library_call_never_ends_the_process(two_processes):
    with pytest.raises(KeyError), hosts.abort_on_error():
        raise KeyError("x")


def test_only_a_command_ends_the_process():
    calls = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jaxgpt").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "_exit"
    }
    # Interrupts: Ctrl-C before any work. Script: the end of every command. Server: its `run_cli`.
    commands = {"jaxgpt/cli/train.py", "jaxgpt/serve/server.py"}
    assert calls == commands | {"jaxgpt/interrupts.py", "jaxgpt/script.py"}


# --- two processes, without training ---------------------------------------------------------


def find_free_address() -> str:
    """Return a free host:port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def make_environment(devices: int, **more) -> dict[str, str]:
    flags = f"{make_xla_flags(devices)} --xla_llvm_disable_expensive_passes=true"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | more


def run_commands(commands, env):
    """Run commands at the same time; return (status, stdout, stderr) of each."""
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
        results = [process.communicate(timeout=DEADLINE) for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, results, strict=True)]


@pytest.fixture(scope="module")
def pair():
    """The JSON output of two processes of two devices each."""
    address = find_free_address()
    worker = pathlib.Path(__file__).parent / "hosts_worker.py"
    results = run_commands([(worker, address, i) for i in range(2)], make_environment(2))
    assert [status for status, *_ in results] == [0, 0], results
    return [json.loads(out.splitlines()[-1]) for _, out, _ in results]


def test_processes_have_their_index_and_count(pair):
    assert [outputs["index_and_count"] for outputs in pair] == [[0, 2], [1, 2]]


def test_all_gather_returns_the_texts_in_process_order(pair):
    assert all(
        outputs["all_gather_text"] == [["00", "10"], ["01", "11"], ["02", "12"]] for outputs in pair
    )


def test_run_on_first_runs_in_process_0_only(pair):
    assert [outputs["run_on_first"] for outputs in pair] == ["written", None]


def test_run_on_all_returns_the_local_result(pair):
    assert [outputs["run_on_all"] for outputs in pair] == [0, 1]


def test_run_on_all_fails_everywhere_if_one_process_fails(pair):
    own, others = "process {0} has no data", "process {0} of 2: process {0} has no data"
    assert pair[0]["failed"] == [own.format(0), others.format(1)]
    assert pair[1]["failed"] == [others.format(0), own.format(1)]


def test_different_values_are_rejected_everywhere_by_key(pair):
    assert [outputs["equal"] for outputs in pair] == ["", ""]
    text = "process 0 and process 1 differ:\n  model.width: 3 there, 4 here"
    assert [outputs["different"] for outputs in pair] == [f"process 1 of 2: {text}", text]


def test_a_broadcast_delivers_the_first_message(pair):
    assert pair[0]["broadcast"] == pair[1]["broadcast"]
    assert pair[0]["broadcast"] in ("first of 0", "first of 1")


@pytest.mark.parametrize(
    ("mesh", "rows", "shards"),
    [
        ("data", [[0, 1, 2, 3], [4, 5, 6, 7]], [[2, 4]]),
        ("context", [[0, 1, 2, 3], [4, 5, 6, 7]], [[4, 2]]),
        ("across", [list(range(8))] * 2, [[8, 4]]),
    ],
)
def test_each_process_places_the_rows_of_its_devices(pair, mesh, rows, shards):
    whole = {"tokens": np.arange(32).reshape(8, 4).tolist(), "class": list(range(8))}
    for outputs, local_rows in zip(pair, rows, strict=True):
        for placed in outputs[mesh]:  # of the whole batch, and of the rows
            assert placed == {"rows": local_rows, "shards": shards, "back": whole}


def test_a_process_without_peers_times_out_with_the_address():
    address = find_free_address()
    command = [
        "train.py",
        "--coordinator",
        address,
        "--processes",
        2,
        "--process",
        1,
        "--timeout",
        1,
    ]
    ((status, _, err),) = run_commands([command], make_environment(1))
    assert status == 2
    assert (
        f"train.py: process 1 of 2 waited 1 s for the others at {address}: is every process" in err
    )


# --- whole runs ------------------------------------------------------------------------------

CONFIG = """
import os
import resource
import numpy as np
from jaxgpt import hosts
from jaxgpt.config import *
from jaxgpt.data.tasks import CausalTask
from jaxgpt.trainer import loop, run as run_module

config = Config(
    name="straight",
    folder={folder!r},
    model=ModelConfig(vocab=260, context=16, width=16, layers=1, heads=2, kv_heads=2, ffn=32),
    data=DataConfig(source={text!r}, tokenizer="bytes", cache={cache!r}),
    optimizer=OptimizerConfig(lr=1e-2, warmup=2),
    train=TrainConfig(steps=10, batch=8, eval_every=4, save_every=3, sample_every=0, log_every=1),
    sample=SampleConfig(prompt="the ", tokens=4),
)
run_module.peak_flops = lambda devices: (1e12, "a guess")
step_to_act, who, number = map(int, os.environ.get("ACT", "0 0 0").split())
log_metrics = loop.log_metrics


def log_and_act(run, step, metrics):
    log_metrics(run, step, metrics)
    if (step, hosts.process_index()) == (step_to_act, who):
        os.kill(os.getpid(), number)


loop.log_metrics = log_and_act
make_batch, save = CausalTask.make_batch, loop.save


def make_poisoned_batch(task, number, rows=slice(None)):
    # Spoils the first row of a batch, which one process places.
    batch = make_batch(task, number, rows)
    is_spoilt = (np.arange(8)[rows] == 0) & (str(number) == os.environ.get("POISON"))
    return batch._replace(weights=np.where(is_spoilt[:, None], np.nan, batch.weights))


def save_on_small_disk(run):
    # From step 6 on, process 1 cannot write a file of more than 1,000 bytes.
    if run.progress.step >= 6 and hosts.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    save(run)


CausalTask.make_batch = make_poisoned_batch
if "SMALL_DISK" in os.environ:
    loop.save = save_on_small_disk
if "LOG_SAMPLE" not in os.environ:
    loop.log_sample = lambda run: None
"""


class Launcher:
    """Starts runs of several processes in one folder."""

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
        address = find_free_address()
        command = ["train.py", "--config", self.file, *settings]
        if processes > 1:
            command += ["--coordinator", address, "--processes", processes, "--timeout", 30]
        each = [["--process", i] if processes > 1 else [] for i in range(processes)]
        return run_commands(
            [command + who for who in each], make_environment(devices, **self.compiled, **more)
        )

    def config(self, *settings):
        with pytest.MonkeyPatch.context() as patch:  # the config file patches the loop
            patch.setattr(run_module, "peak_flops", run_module.peak_flops)
            patch.setattr(CausalTask, "make_batch", CausalTask.make_batch)
            for name in ("log_metrics", "log_sample", "save"):
                patch.setattr(loop, name, getattr(loop, name))
            return configs.load(str(self.file), settings)


def read_records(cfg):
    """Return the records of metrics.jsonl, without times."""
    found = (r for r in read_metrics(cfg.run_folder) if "loss" in r)
    return [(r["kind"], r["step"], r["loss"], r["accuracy"]) for r in found]


def get_statuses(results):
    return [status for status, *_ in results]


def assert_near(a, b):
    """Assert that two runs are equal up to the order of float32 sums, logged with six digits."""
    steps = [[line[:2] for line in sorted(read_records(cfg))] for cfg in (a, b)]
    losses = [np.array([line[2] for line in sorted(read_records(cfg))]) for cfg in (a, b)]
    assert steps[0] == steps[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1.1e-5)
    for x, y in zip(
        *(jax.tree.leaves(restore_latest(cfg)[0].params) for cfg in (a, b)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)  # AdamW takes 1e-2 of noise's sign


PAIR = ["mesh.fsdp=2"]  # two processes of two devices: parameters sharded within each


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    return Launcher(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def single_process_run(launcher):
    """A run of one process with one device."""
    cfg = launcher.config("name=alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        patch.setattr(run_module, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        patch.setattr(loop, "log_sample", lambda run: None)
        train(cfg, is_quiet=True)
    return cfg


@pytest.fixture(scope="module")
def two_process_run(launcher):
    """A run of two processes, not interrupted: (config, results)."""
    results = launcher.run(2, 2, "name=together", *PAIR, LOG_SAMPLE="1")
    assert get_statuses(results) == [0, 0], results
    return launcher.config("name=together", *PAIR), results


@pytest.fixture(scope="module")
def killed_run(launcher):
    """The same, but process 1 is killed after step 7: (config, results, step of the checkpoint)."""
    results = launcher.run(2, 2, "name=killed", *PAIR, ACT=f"7 1 {signal.SIGKILL}")
    cfg = launcher.config("name=killed", *PAIR)
    shutil.copytree(cfg.run_folder, os.path.join(cfg.folder, "elastic"))
    return cfg, results, latest_step(os.path.join(cfg.run_folder, "checkpoints"))


@pytest.mark.slow
def test_training_with_two_processes_equals_training_with_one(single_process_run, two_process_run):
    assert_near(single_process_run, two_process_run[0])


@pytest.mark.slow
def test_a_run_of_two_processes_prints_and_writes_once(two_process_run):
    cfg, ((_, out, _), (_, quiet_out, _)) = two_process_run
    assert "4 cpu device(s) (data 2 x fsdp 2)" in out
    assert "step 10/10  loss " in out
    assert "--- sample at step 10 ---" in out
    # Gloo's threads print too, at times on one line.
    assert re.sub(r"\[Gloo\] Rank \d+ is connected .*?is : \d+", "", quiet_out).split() == []
    kinds = [(kind, step) for kind, step, *_ in read_records(cfg)]
    assert sorted(kinds) == [("eval", n) for n in (0, 4, 8, 10)] + [
        ("train", n) for n in range(1, 11)
    ]
    assert sorted(os.listdir(cfg.run_folder)) == [
        "best", "checkpoints", "config.json", "metrics.jsonl", "plots", "samples", "tensorboard",
        "tokenizer.json",
    ]  # fmt: skip
    assert sorted(os.listdir(os.path.join(cfg.run_folder, "checkpoints"))) == ["10", "9"]
    assert len(os.listdir(os.path.join(cfg.run_folder, "tensorboard"))) == 1


@pytest.mark.slow
def test_the_other_processes_end_if_one_is_killed(killed_run):
    _, results, step = killed_run
    assert results[1][0] == -signal.SIGKILL
    assert results[0][0] not in (0, 2)
    assert "another" in results[0][2]
    assert step in (3, 6)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(launcher, two_process_run, killed_run):
    cfg, _, step = killed_run
    results = launcher.run(2, 2, "name=killed", *PAIR)
    assert get_statuses(results) == [0, 0], results
    assert f"(resuming from step {step})" in results[0][1]
    assert_same_bits(restore_latest(cfg)[0], restore_latest(two_process_run[0])[0])
    assert sorted(read_records(cfg)) == sorted(read_records(two_process_run[0]))


@pytest.mark.slow
def test_another_number_of_processes_resumes_and_stops_at_one_step(
    launcher, single_process_run, killed_run
):
    mesh = ["name=elastic", "mesh.tensor=2", "mesh.fsdp=2", "mesh.data=1"]
    config = os.path.join(killed_run[0].folder, "elastic", "config.json")
    with open(config, "w") as file:
        file.write(configs.to_json(launcher.config(*mesh)))
    results = launcher.run(4, 1, *mesh, ACT=f"7 2 {signal.SIGTERM}")
    assert get_statuses(results) == [0, 0, 0, 0], results
    assert "Stopped by SIGTERM after " in results[0][1]
    stopped = latest_step(os.path.join(os.path.dirname(config), "checkpoints"))
    assert stopped in (8, 9)  # received during step 8
    # Resume on the eight devices of this process.
    cfg = override(launcher.config(*mesh), ["mesh.tensor=1", "mesh.data=4"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        patch.setattr(loop, "log_sample", lambda run: None)
        train(cfg, is_quiet=True)
    assert_near(single_process_run, cfg)


@pytest.mark.slow
@pytest.mark.parametrize(("action", "passed"), [("rollback", 2), ("skip", 0)])
def test_a_spike_in_the_rows_of_one_process_is_answered_by_both(launcher, action, passed):
    settings = [f"train.on_spike={action}", "train.spike_threshold=10", "train.steps=8"]
    results = launcher.run(2, 2, f"name={action}", *settings, *PAIR, POISON="4")
    assert get_statuses(results) == [0, 0], results
    cfg = launcher.config(f"name={action}", *settings, *PAIR)
    [spike] = [r for r in read_metrics(cfg.run_folder) if r["kind"] == "spike"]
    assert (spike["step"], spike["batch"], spike["action"]) == (5, 4, action)
    assert [step for step, _ in list_autopsies(cfg.run_folder)] == [5]
    progress = restore_latest(cfg)[1]
    assert (progress.step, progress.passed, progress.spikes) == (8, passed, [4])
    alone = launcher.config(f"name={action}_alone", *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        patch.setattr(run_module, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        make_batch = CausalTask.make_batch

        def make(task, number, rows=slice(None)):
            batch = make_batch(task, number, rows)
            return batch._replace(weights=batch.weights * (np.nan if number == 4 else 1))

        patch.setattr(CausalTask, "make_batch", make)
        train(alone, is_quiet=True)
    assert_near(cfg, alone)


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_fails_in_both(launcher):
    results = launcher.run(2, 2, "name=small_disk", *PAIR, SMALL_DISK="1")
    assert get_statuses(results) == [1, 1], results
    (_, out, err), (_, quiet_out, quiet_err) = results
    folder = launcher.config("name=small_disk").run_folder
    for step in (6, 9):
        message = f"{folder}/checkpoints/{step} could not be saved (File too large); "
        message += "the last good checkpoint is of step 3. Training goes on to the next save"
        assert (out + err).count(message) == 1, out + err
    assert "checkpoints/10 could not be saved (File too large)" in err
    assert "Traceback" not in out + err + quiet_out + quiet_err
    assert "could not be saved" not in quiet_out
    assert os.listdir(os.path.join(folder, "checkpoints")) == ["3"]
    assert is_usable(verify(folder))
