"""The process that runs the TPU compiler: reads a request from standard input, prints one line of JSON.

``python -m clip_jax.planning.compiler``, started by ``compiling.py`` with the environment that libtpu needs.
"""

import json
import re
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.devices.sharding import batch_sharding, batch_shards, make_mesh
from clip_jax.evaluation.embed import Variables, make_encoders
from clip_jax.planning.cycles import estimate, kernel_cycles
from clip_jax.planning.memory import bytes_per_device
from clip_jax.planning.program import collectives
from clip_jax.planning.search import STEPS
from clip_jax.planning.work import compiled_transfers
from clip_jax.training.learner import Learner
from clip_jax.training.setup import make_learner

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles the step of a request; returns the fields of ``Compiled``, or the cycles of its Pallas kernels alone."""
    config = configs.from_json(request["config"], "the config")
    described = topologies.get_topology_desc(platform="tpu", **request["topology"])
    mesh = make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slices, list(described.devices)
    )
    learner = make_learner(config, mesh, steps=STEPS, examples=STEPS)
    if request["only_kernels"]:
        step = jax.make_jaxpr(learner.step())
        arguments = learner.abstract_state(), learner.batch_spec(config.batch_size), learner.abstract_constants()
        return kernel_cycles(step(*arguments), described.devices[0])
    started = time.perf_counter()
    lowered = learner.lower(config.batch_size)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, free = parse_out_of_memory(str(error))
        return {"fits": False, "hbm_bytes": needed, "free_hbm_bytes": free, "transfers": []} | _seconds(started)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    hlo = compiled.as_text()
    moved = compiled_transfers(collectives(hlo), [_coordinates(d) for d in mesh.devices.flat])
    return {
        "fits": peak <= request["free_hbm_bytes"],
        "hbm_bytes": peak,
        "free_hbm_bytes": request["free_hbm_bytes"],
        "transfers": [t._asdict() for t in moved],
        "evaluation_hbm_bytes": evaluation_bytes(config, learner),
        "text_buckets": bucket_bytes(config, learner),
        **estimate(hlo)._asdict(),
    } | _seconds(started)


def bucket_bytes(config: ConfigDict, learner: Learner) -> dict[int, int]:
    """The peak memory of the step for each bucket of text lengths but the last one, which is the full length."""
    peaks = {}
    for length in config.data.text_buckets[:-1]:
        compiled = learner.lower(config.batch_size, length).compile()
        peaks[length] = compiled.memory_analysis().peak_memory_in_bytes
    return peaks


def evaluation_bytes(config: ConfigDict, learner: Learner) -> int | None:
    """The peak memory of one device while the largest batch of an evaluation is encoded, the state included."""
    sizes = [
        config.batch_size if evaluation.batch_size == configs.AUTO else evaluation.batch_size
        for evaluation in config.eval.values()
        if evaluation.source
    ]
    if not sizes:
        return None
    shards = batch_shards(learner.mesh)
    size = -(-max(sizes) // shards) * shards
    encoders = make_encoders(learner.model, learner.preprocess, learner.mesh)
    state, architecture = learner.abstract_state(), learner.model.architecture
    weights = Variables(state.evaluation_params, state.batch_stats)
    # Not the training batch, which may have more rows (selection) or stored embeddings instead of images.
    pixels, tokens, valid = (
        jax.ShapeDtypeStruct((size, *shape), dtype, sharding=batch_sharding(learner.mesh))
        for shape, dtype in (
            ((architecture.image.image_size,) * 2 + (3,), np.uint8),
            ((architecture.text.context_length,), np.int32),
            ((), bool),
        )
    )
    peaks = []
    for lowered in (encoders.image.lower(weights, pixels, valid), encoders.text.lower(weights, tokens)):
        try:
            peaks.append(lowered.compile().memory_analysis().peak_memory_in_bytes)
        except jax.errors.JaxRuntimeError as error:
            peaks.append(parse_out_of_memory(str(error))[0])
    # The encoders' own peak counts their weights, which are part of the state.
    return max(peaks) + bytes_per_device(state) - bytes_per_device(weights)


def parse_out_of_memory(message: str) -> tuple[int, int]:
    """(bytes needed, bytes available) of a RESOURCE_EXHAUSTED message. Raises RuntimeError for any other message."""
    amount = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"Used {amount} of {amount} hbm",
        rf"total memory required[^(]*\({amount}\) exceeds available HBM \({amount}\)",
    ):
        if found := re.search(pattern, message):
            return tuple(int(float(found[n]) * UNITS[found[n + 1]]) for n in (1, 3))
    raise RuntimeError(re.sub(r"\s+", " ", message)[:500])


def _coordinates(device: jax.Device) -> tuple[int, ...]:
    return (getattr(device, "slice_index", 0) or 0, *device.coords)


def _seconds(started: float) -> dict[str, float]:
    return {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
