"""The files of deploy/: valid for their systems, and going on by themselves, with stand-ins."""

import os
import pathlib
import signal
import subprocess
import time

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jaxgpt import trainer
from jaxgpt.cli import train as train_cli
from jaxgpt.trainer import Progress

ROOT = pathlib.Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DEADLINE = 60  # seconds until a script that hangs is killed, and its test fails
UNFINISHED = 75

# The fields of a JobSet that a file here may have: jobset.x-k8s.io/v1alpha2, without the Jobs.
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 0}
JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"], "properties": {"name": NAME}},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": COUNT,
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                    },
                },
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": NAME,
                        "publishNotReadyAddresses": {"type": "boolean"},
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": NAME,
                            "replicas": COUNT,
                            "template": {"type": "object"},
                        },
                    },
                },
            },
        },
    },
}


# --- Kubernetes ------------------------------------------------------------------------------


def validate(resource: dict):
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(resource, version, strict=True)


def read_jobset() -> dict:
    return yaml.safe_load((DEPLOY / "kubernetes" / "jobset.yaml").read_text())


def read_job(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def check_jobset(jobset: dict):
    jsonschema.validate(jobset, JOBSET)
    for replicated in jobset["spec"]["replicatedJobs"]:
        head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        validate(head | replicated["template"])


def test_the_jobset_is_valid():
    check_jobset(read_jobset())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda j: j["spec"].update(restarts=3), jsonschema.ValidationError),
        (lambda j: j["spec"]["failurePolicy"].update(maxRestarts="3"), jsonschema.ValidationError),
        (lambda j: read_job(j).update(paralelism=4), kubernetes_validate.ValidationError),
        (lambda j: read_job(j).pop("template"), kubernetes_validate.ValidationError),
    ],
)
def test_the_schemas_refuse_a_jobset_with_an_error(change, error):
    jobset = read_jobset()
    change(jobset)
    with pytest.raises(error):
        check_jobset(jobset)


def test_the_claim_is_valid_and_the_one_that_the_jobset_mounts():
    claim = yaml.safe_load((DEPLOY / "kubernetes" / "claim.yaml").read_text())
    validate(claim)
    volumes = read_job(read_jobset())["template"]["spec"]["volumes"]
    claims = [v["persistentVolumeClaim"] for v in volumes if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": claim["metadata"]["name"]}]


def test_the_pods_of_the_jobset_are_the_processes_of_one_run():
    jobset = read_jobset()
    job = read_job(jobset)
    (container,) = job["template"]["spec"]["containers"]
    pods = {"name": "JAXGPT_PODS", "value": str(job["completions"])}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert pods in container["env"]
    name = jobset["metadata"]["name"]
    worker = jobset["spec"]["replicatedJobs"][0]["name"]
    (command,) = container["args"]
    assert f"--coordinator {name}-{worker}-0-0.{name}:1234 " in command
    assert command.startswith("exec jaxgpt train ")


# --- scripts, with stand-ins for the launchers -----------------------------------------------


def write_program(folder: pathlib.Path, name: str, text: str):
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


class Stage:
    """A folder with stand-ins for programs, which record their calls."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.calls, self.bin = folder, folder / "calls", folder / "bin"
        self.bin.mkdir()
        self.calls.touch()

    def add(self, name: str, text: str):
        write_program(self.bin, name, f'echo {name} "$@" >> {self.calls}\n{text}')

    def start(self, *command, **environment) -> subprocess.Popen:
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.Popen(
            list(map(str, command)),
            env=os.environ | {"PATH": path, "HOME": str(self.folder)} | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command, **environment) -> tuple[int, str]:
        process = self.start(*command, **environment)
        try:
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
        return process.returncode, output

    def count(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.calls.read_text().splitlines())

    def wait_for(self, start: str):
        deadline = time.monotonic() + DEADLINE
        while not self.count(start):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end_with(self, *statuses: int) -> str:
        """Return shell text that ends with the statuses in turn, one a call, then with the last."""
        file = self.folder / "statuses"
        file.write_text("".join(f"{status}\n" for status in statuses))
        return (
            f'status=$(head -n 1 {file}); [ "$(wc -l < {file})" = 1 ] || sed -i 1d {file}\n'
            "exit $status"
        )


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


SBATCH = DEPLOY / "slurm" / "train.sbatch"


@pytest.mark.parametrize(
    ("status", "restarts", "is_requeued"),
    [
        (0, 0, False),
        (2, 0, False),  # a wrong setting
        (UNFINISHED, 0, True),
        (137, 3, True),  # a task was killed
        (1, 20, False),
    ],
)
def test_a_slurm_job_requeues_itself_until_the_run_is_done(status, restarts, is_requeued, stage):
    stage.add("srun", f"exit {status}")
    stage.add("scontrol", "")
    count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    ended, _ = stage.run("bash", SBATCH, "name=mine", SLURM_JOB_ID="7", **count)
    assert ended == status
    assert stage.count("srun --kill-on-bad-exit=1 ") == 1
    assert (
        stage.calls.read_text()
        .splitlines()[0]
        .endswith(f"jaxgpt train --stop-status {UNFINISHED} name=mine")
    )
    assert stage.count("scontrol requeue 7") == is_requeued


MPI = DEPLOY / "openmpi" / "train.sh"


@pytest.mark.parametrize(
    ("statuses", "expected", "calls"),
    [((0,), 0, 1), ((2,), 2, 1), ((137, UNFINISHED, 0), 0, 3), ((1,), 1, 4)],
)
def test_mpirun_is_started_again_until_the_run_is_done(statuses, expected, calls, stage):
    stage.add("mpirun", stage.end_with(*statuses))
    status, _ = stage.run(
        MPI, "-np", "4", "--hostfile", "hosts", "--", "name=mine", MAX_RESTARTS="3"
    )
    assert (status, stage.count("mpirun ")) == (expected, calls)
    line = stage.calls.read_text().splitlines()[0]
    assert line.endswith(
        f" -np 4 --hostfile hosts jaxgpt train --stop-status {UNFINISHED} name=mine"
    )


def test_sigterm_reaches_mpirun_which_is_not_started_again(stage):
    stage.add("mpirun", "trap 'echo saved; exit 75' TERM; echo mpirun is there >> calls\n"
              "while true; do sleep 0.05; done")  # fmt: skip
    process = stage.start(MPI, "-np", "2", "--", "name=mine")
    stage.wait_for("mpirun is there")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, output) == (UNFINISHED, "saved\n")
    assert stage.count("mpirun --") == 1


POD = DEPLOY / "tpu" / "pod.sh"
# Runs the commands for hosts here; the pod is as the file `state` has it.
GCLOUD = """
case "$*" in
  *" describe "*) cat state 2> /dev/null || exit 1 ;;
  *" create "*) echo ACTIVE > state ;;
  *" delete "*) rm -f state jaxgpt.* ;;
  *" ssh "*) bash -c "${@: -1}" ;;
esac
"""
ON_POD = dict(POD="mine", ZONE="z", TYPE="v5litepod-16", NFS="h:/share", PAUSE="0.05")


@pytest.fixture
def pod(stage):
    stage.add("gcloud", GCLOUD)
    for name in ("pip", "sudo", "tar", "git"):
        stage.add(name, "")
    return stage


def test_a_run_on_a_tpu_pod_is_started_stopped_and_goes_on(pod):
    run = "trap 'echo saved; exit 75' TERM; while true; do sleep 0.02; done"
    pod.add("jaxgpt", run)
    assert pod.run(POD, "status", **ON_POD)[1] == "none\n"
    assert pod.run(POD, "start", "--config", "c", "name=two words", **ON_POD)[0] == 0
    pod.wait_for(f"jaxgpt train --stop-status {UNFINISHED} folder=/runs --config c name=two words")
    assert pod.run(POD, "status", **ON_POD)[1] == "running\n"
    assert pod.run(POD, "stop", **ON_POD)[0] == 0
    assert pod.run(POD, "status", **ON_POD)[1] == f"{UNFINISHED}\n"
    assert (pod.folder / "jaxgpt.log").read_text() == "saved\n"


def test_keep_goes_on_after_a_preemption_of_the_pod(pod):
    (pod.folder / "state").write_text("SUSPENDED\n")
    pod.add("jaxgpt", pod.end_with(UNFINISHED, 1, 0))
    status, output = pod.run(POD, "keep", "name=mine", **ON_POD)
    assert status == 0
    assert output.endswith("mine: done\n")
    assert pod.count("gcloud compute tpus queued-resources delete mine") == 1
    assert pod.count("gcloud compute tpus queued-resources create mine") == 1
    assert pod.count("jaxgpt train") == 3


def test_keep_ends_with_the_message_of_a_wrong_setting(pod):
    (pod.folder / "state").write_text("ACTIVE\n")
    pod.add("jaxgpt", "echo no such setting; exit 2")
    assert pod.run(POD, "keep", **ON_POD) == (2, "mine: status none: started\nno such setting\n")


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_executable_and_have_no_syntax_error(path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_the_skypilot_task_recovers_from_a_stopped_run():
    task = yaml.safe_load((DEPLOY / "skypilot" / "train.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [UNFINISHED]
    assert f"--stop-status {UNFINISHED}" in task["run"]
    assert "exec jaxgpt train" in task["run"]
    subprocess.run(["bash", "-n", "-c", task["setup"] + task["run"]], check=True)


# --- the status that they rely on ------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "status"),
    [
        (Progress(step=3), UNFINISHED),  # stopped by a signal
        (Progress(step=10), 0),
        (Progress(step=3, is_done=True), 0),  # stopped early
    ],
)
def test_a_run_that_a_signal_stops_ends_with_the_stop_status(progress, status, monkeypatch):
    monkeypatch.setattr(trainer, "train", lambda config: progress)
    arguments = ["--no-compile-cache", "train.steps=10"]
    assert train_cli.main(arguments, "jaxgpt train") == 0
    flags = ["--stop-status", str(UNFINISHED)]
    assert train_cli.main([*flags, *arguments], "jaxgpt train") == status
