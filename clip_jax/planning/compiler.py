"""The process that has the TPU compiler: reads a request from standard input, answers with one line of JSON.

``python -m clip_jax.planning.compiler``, started by ``compiling.py`` with the environment that libtpu needs.
"""

import json
import re
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies

from clip_jax import config as configs
from clip_jax.planning.parts import make_parts
from clip_jax.planning.program import collectives
from clip_jax.planning.work import compiled_transfers
from clip_jax.sharding import make_mesh

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``Compiled`` as a dictionary."""
    config = configs.from_json(request["config"], "the config")
    described = topologies.get_topology_desc(platform="tpu", **request["topology"])
    mesh = make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices, list(described.devices)
    )
    parts = make_parts(config, mesh)
    started = time.perf_counter()
    lowered = parts.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted, free = too_much(str(error))
        return {"fits": False, "hbm_bytes": wanted, "free_hbm_bytes": free, "transfers": []} | _seconds(started)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    moved = compiled_transfers(collectives(compiled.as_text()), [_place(d) for d in mesh.devices.flat])
    return {
        "fits": peak <= request["free_hbm_bytes"],
        "hbm_bytes": peak,
        "free_hbm_bytes": request["free_hbm_bytes"],
        "transfers": [t._asdict() for t in moved],
    } | _seconds(started)


def too_much(message: str) -> tuple[int, int]:
    """(bytes wanted, bytes there are) of the compiler's RESOURCE_EXHAUSTED; raises RuntimeError for any other error."""
    amount = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"Used {amount} of {amount} hbm",
        rf"total memory required[^(]*\({amount}\) exceeds available HBM \({amount}\)",
    ):
        if found := re.search(pattern, message):
            return tuple(int(float(found[n]) * UNITS[found[n + 1]]) for n in (1, 3))
    raise RuntimeError(re.sub(r"\s+", " ", message)[:500])


def _place(device: jax.Device) -> tuple[int, ...]:
    return (getattr(device, "slice_index", 0) or 0, *device.coords)


def _seconds(started: float) -> dict[str, float]:
    return {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
