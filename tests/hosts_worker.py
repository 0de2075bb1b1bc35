"""One of two processes: runs the collectives of `hosts` and prints the results as JSON.

python hosts_worker.py host:port process
"""

import json
import os
import sys

import jax
import numpy as np

from jaxgpt import hosts
from jaxgpt.config import MeshConfig
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh

address, index = sys.argv[1], int(sys.argv[2])
results: dict = {}


def catch_config_error(action) -> str:
    try:
        action()
    except ConfigError as error:
        return str(error)
    return ""


def fail_in(process):
    if index == process:
        raise ConfigError(f"process {process} has no data")
    return index


with hosts.distributed(address, 2, index, timeout=60, end_process=os._exit):
    results["index_and_count"] = [hosts.process_index(), hosts.process_count()]
    results["all_gather_text"] = [hosts.all_gather_text("word", f"{index}{i}") for i in range(3)]
    results["run_on_first"] = hosts.run_on_first(lambda: "written")()
    results["run_on_all"] = hosts.run_on_all(lambda: fail_in(2))
    results["failed"] = [
        catch_config_error(lambda i=i: hosts.run_on_all(lambda: fail_in(i))) for i in range(2)
    ]
    results["equal"] = catch_config_error(
        lambda: hosts.check_equal({"model.width": 3, "seed": [1]})
    )
    results["different"] = catch_config_error(
        lambda: hosts.check_equal({"model.width": 3 + index, "seed": 1})
    )
    broadcast = hosts.Broadcast("word")
    broadcast.send(f"first of {index}")
    broadcast.send("second")
    results["broadcast"] = broadcast.wait()

    whole = {"tokens": np.arange(32).reshape(8, 4), "class": np.arange(8), "none": None}
    for name, cfg in {
        "data": MeshConfig(data=4),
        "context": MeshConfig(data=2, context=2),
        "across": MeshConfig(data=1, tensor=4),
    }.items():
        mesh = make_mesh(cfg)
        rows = hosts.find_local_rows(mesh, 8)
        local = jax.tree.map(lambda x, rows=rows: x[rows], whole)
        for batch in (whole, local):
            placed = hosts.place_batch(batch, mesh, 8)
            results.setdefault(name, []).append(
                {
                    "rows": rows.tolist(),
                    "shards": sorted({s.data.shape for s in placed["tokens"].addressable_shards}),
                    "back": {k: v.tolist() for k, v in hosts.fetch(placed).items() if k != "none"},
                }
            )
print(json.dumps(results))
