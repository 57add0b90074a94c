"""Asks the TPU compiler, which runs on any Linux machine, what the training step needs on a slice that is not there.

The compiler (``libtpu``) is loaded in a process of its own: it reads its settings from the environment once, prints
much, and a process that has it has no other use. ``compiler.py`` is what that process runs.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from typing import NamedTuple

from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax import xla_flags
from clip_jax.errors import UserError
from clip_jax.hardware import Machines
from clip_jax.planning.work import Transfer

INSTALL = "pip install 'clip-jax-tpu[plan]'"


class Compiled(NamedTuple):
    """What the compiler says of a step; bytes are of one JAX device."""

    fits: bool
    hbm_bytes: int
    """The most that is in use at one time, arguments and results included; what it wanted where it does not fit."""
    free_hbm_bytes: int
    """What a program may use."""
    seconds: float
    """To compile."""
    transfers: tuple[Transfer, ...] = ()


def is_installed() -> bool:
    found = importlib.util.find_spec("libtpu")
    return found is not None and found.origin is not None  # a folder of that name is none


def version() -> str:
    return importlib.metadata.version("libtpu")


def compile_step(config: ConfigDict, machines: Machines) -> Compiled:
    """Compiles the config's training step for the slices. Raises UserError with the compiler's words."""
    request = {
        "config": configs.to_json(config),
        "topology": topology(machines),
        "free_hbm_bytes": machines.chip.free_hbm_per_device,
    }
    variables = os.environ | environment(machines)
    if config.mesh.xla_flags:
        variables["LIBTPU_INIT_ARGS"] = xla_flags.joined("tpu", os.environ.get("LIBTPU_INIT_ARGS", ""))
    done = subprocess.run(
        [sys.executable, "-m", "clip_jax.planning.compiler"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=variables,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"the TPU compiler stopped: {lines[-1] if lines else f'exit code {done.returncode}'}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Compiled(**answer | {"transfers": tuple(Transfer(**t) for t in answer["transfers"])})


def environment(machines: Machines) -> dict[str, str]:
    """Without these libtpu looks for chips, asks a metadata server for a slice, and locks others out."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": machines.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }


def topology(machines: Machines) -> dict[str, object]:
    """What ``jax.experimental.topologies`` calls the slices."""
    chip, shape = machines.chip, machines.topology
    arguments: dict[str, object] = {
        "topology_name": f"{'tpu7x' if chip.name == '7x' else chip.name}:{'x'.join(map(str, shape))}",
        "num_slices": machines.slices,
    }
    if machines.chips_per_slice <= chip.one_host_up_to:
        arguments["chips_per_host_bounds"] = [*shape, *[1] * (3 - len(shape))]
    elif machines.chips_per_slice < chip.chips_per_host:
        arguments["chips_per_host_bounds"] = list(shape)
    if chip.name == "v4":  # both cores of a chip are one device, as on a real one
        arguments["chip_config_name"] = "megacore"
    return arguments
