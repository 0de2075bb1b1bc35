"""Execute colab.ipynb with the packages of another Python: python notebooks/execute.py PYTHON

The first time, the kernel is killed when the first checkpoint is complete, as by a disconnect. The
second time every cell has to run, and training to go on from that checkpoint. No package that was
installed before may have another version afterwards. A small model, on the CPU.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEADLINE = 1200  # seconds for a cell
SMALL = (
    "model.width=32 model.heads=2 model.layers=2 model.ffn=64 model.context=64 model.vocab=512 "
    "train.steps=60 train.save_every=20 train.eval_every=20 train.eval_batches=2 "
    "train.sample_every=0 optimizer.warmup=5"
)


def list_versions(python: str) -> dict[str, str]:
    """Return the version of every package that a Python has, by name."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {row["name"]: row["version"] for row in rows}


def read_notebook(folder: pathlib.Path) -> nbformat.NotebookNode:
    """Read the notebook, with parameters of a small run of this checkout after its own."""
    notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {"save_to": str(folder / "drive"), "source": str(ROOT), "settings": SMALL}
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    return notebook


def make_client(python: str, folder: pathlib.Path) -> NotebookClient:
    """Return a client of the notebook whose kernel is `python`."""
    kernel = folder / "kernels" / "colab"
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    spec = {"argv": argv, "display_name": "Colab", "language": "python", "env": environment}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    manager = AsyncKernelManager(kernel_name="colab")
    manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[str(folder / "kernels")])
    here = {"metadata": {"path": str(folder)}}
    return NotebookClient(read_notebook(folder), km=manager, timeout=DEADLINE, resources=here)


def kill_at_checkpoint(client: NotebookClient, folder: pathlib.Path):
    """Kill the kernel when a run in `folder` has a checkpoint."""
    while not any(path.name.isdigit() for path in folder.glob("drive/*/checkpoints/*")):
        time.sleep(0.1)
    client.km.provisioner.process.kill()


def read_outputs(notebook: nbformat.NotebookNode) -> str:
    """Return what all cells have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def main():
    """Execute the notebook twice and check what it did."""
    python = os.path.abspath(sys.argv[1])
    folder = pathlib.Path(tempfile.mkdtemp())
    before = list_versions(python)

    client = make_client(python, folder)
    threading.Thread(target=kill_at_checkpoint, args=[client, folder], daemon=True).start()
    try:
        client.execute()
    except DeadKernelError:
        print("the kernel was killed at its first checkpoint")
    else:
        sys.exit("the notebook ended before the kernel was killed")

    client = make_client(python, folder)
    client.execute()
    text = read_outputs(client.nb)
    print(text)
    resumed = [int(step) for step in re.findall(r"resuming from step (\d+)", text)]
    assert [step for step in resumed if step < 60], "the run began anew"
    assert "60 steps done" in text
    assert list(folder.glob("drive/*_transformers.zip")), "no model was exported"
    images = [o for c in client.nb.cells for o in c.get("outputs", []) if "image/png" in str(o)]
    assert len(images) == 2, "the curve and the attention weights are not shown"

    after = list_versions(python)
    changed = {name: after.get(name) for name in before if after.get(name) != before[name]}
    assert not changed, f"the notebook has changed {changed}"
    added = [f"{name} {version}" for name, version in after.items() if name not in before]
    print(f"{len(before)} packages unchanged; added: {', '.join(added)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
