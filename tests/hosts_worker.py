"""One process of two, by itself: what `hosts` does between processes, told as JSON.

python hosts_worker.py host:port process
"""

import json
import sys

import jax
import numpy as np

from jaxgpt import hosts
from jaxgpt.config import MeshConfig
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh

address, me = sys.argv[1], int(sys.argv[2])
told: dict = {}


def refusal(act) -> str:
    try:
        act()
    except ConfigError as error:
        return str(error)
    return ""


def fail_in(process):
    if me == process:
        raise ConfigError(f"process {process} has no data")
    return me


with hosts.joined(address, 2, me, timeout=60):
    told["who"] = [hosts.index(), hosts.count()]
    told["exchange"] = [hosts.exchange("word", f"{me}{i}") for i in range(3)]
    told["once"] = hosts.once(lambda: "written")()
    told["together"] = hosts.together(lambda: fail_in(2))
    told["failed"] = [refusal(lambda i=i: hosts.together(lambda: fail_in(i))) for i in range(2)]
    told["agreed"] = refusal(lambda: hosts.agree({"model.width": 3, "seed": [1]}))
    told["differ"] = refusal(lambda: hosts.agree({"model.width": 3 + me, "seed": 1}))
    call = hosts.Call("word")
    call.say(f"first of {me}")
    call.say("second")
    told["call"] = call.wait()

    whole = {"tokens": np.arange(32).reshape(8, 4), "class": np.arange(8), "none": None}
    for name, cfg in {
        "data": MeshConfig(data=4),
        "context": MeshConfig(data=2, context=2),
        "across": MeshConfig(data=1, tensor=4),
    }.items():
        mesh = make_mesh(cfg)
        rows = hosts.rows(mesh, 8)
        mine = jax.tree.map(lambda x, rows=rows: x[rows], whole)
        for batch in (whole, mine):
            placed = hosts.place(batch, mesh, 8)
            told.setdefault(name, []).append(
                {
                    "rows": rows.tolist(),
                    "shards": sorted({s.data.shape for s in placed["tokens"].addressable_shards}),
                    "back": {k: v.tolist() for k, v in hosts.fetch(placed).items() if k != "none"},
                }
            )
print(json.dumps(told))
