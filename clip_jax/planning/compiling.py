"""Compiles the training step for a TPU slice ahead of time, on any Linux machine, to measure its memory and transfers.

The compiler (``libtpu``) runs in a separate process (``compiler.py``): it reads its settings from the environment only
once, prints a lot, and makes the process unusable for other work.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import NamedTuple

from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax.devices import xla_flags
from clip_jax.devices.hardware import Machines
from clip_jax.errors import UserError
from clip_jax.objectives.cost import Transfer
from clip_jax.planning.profile import Share, with_kernels

PROFILE = "--xla_jf_dump_static_llo_profile_to"
INSTALL = "pip install 'clip-jax-tpu[plan]'"


class Compiled(NamedTuple):
    """The compiler's figures for a step; bytes are per JAX device."""

    fits: bool
    hbm_bytes: int
    """Peak memory, including arguments and results; if the step does not fit, what it would need."""
    free_hbm_bytes: int
    """The memory that a program can use."""
    seconds: float
    """Compilation time."""
    transfers: tuple[Transfer, ...] = ()
    evaluation_hbm_bytes: int | None = None
    """The same for the encoders of the evaluations, with the training state beside them; None: not compiled."""
    cycles: int | None = None
    """The compiler's estimate of a step on one core, without transfers between devices; None: it made none."""
    profile: tuple[Share, ...] = ()
    """Where these cycles go, the slowest first."""
    kernels: dict[str, int] | None = None
    """Cycles of one execution of each Pallas kernel, by shapes; None: the step has none."""


def is_installed() -> bool:
    found = importlib.util.find_spec("libtpu")
    return found is not None and found.origin is not None  # None for a plain folder of that name


def version() -> str:
    return importlib.metadata.version("libtpu")


def compile_step(config: ConfigDict, machines: Machines) -> Compiled:
    """Compiles the training step of a config for the slices. Raises UserError with the compiler's message."""
    request = {
        "config": configs.to_json(config),
        "topology": topology(machines),
        "free_hbm_bytes": machines.chip.free_hbm_per_device,
        "only_kernels": False,
    }
    variables = os.environ | environment(machines)
    if config.mesh.xla_flags:
        variables["LIBTPU_INIT_ARGS"] = xla_flags.merge("tpu", os.environ.get("LIBTPU_INIT_ARGS", ""))
    done = _run_compiler(request, variables)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"the TPU compiler failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    answer = json.loads(done.stdout.splitlines()[-1])
    kernels, shares = answer.pop("kernels", {}), [Share(*share) for share in answer.pop("profile", ())]
    if kernels:
        each = _kernel_cycles(kernels, request, variables)
        if each is None:
            answer["cycles"], shares = None, []
        else:
            answer["cycles"] += sum(times * each[shapes] for shapes, times in kernels.items())
            shares, answer["kernels"] = with_kernels(shares, each), {shapes: each[shapes] for shapes in kernels}
    transfers = tuple(Transfer(**t) for t in answer["transfers"])
    return Compiled(**answer | {"transfers": transfers, "profile": tuple(shares)})


def _kernel_cycles(
    kernels: dict[str, int], request: dict[str, object], variables: dict[str, str]
) -> dict[str, int] | None:
    """The cycles of each Pallas kernel of a program, which a second process estimates; None if it cannot."""
    with tempfile.TemporaryDirectory() as profile:  # its files are not read: the compiler estimates kernels with it
        flags = f"{variables.get('LIBTPU_INIT_ARGS', '')} {PROFILE}={profile}".strip()
        done = _run_compiler(request | {"only_kernels": True}, variables | {"LIBTPU_INIT_ARGS": flags})
    if done.returncode:
        return None
    each = json.loads(done.stdout.splitlines()[-1])
    return each if kernels.keys() <= each.keys() else None


def _run_compiler(request: dict[str, object], variables: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "clip_jax.planning.compiler"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=variables,
    )


def environment(machines: Machines) -> dict[str, str]:
    """Variables without which libtpu searches for chips, queries a metadata server and locks out other processes."""
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
    """The slices as arguments of ``jax.experimental.topologies.get_topology_desc``."""
    chip, shape = machines.chip, machines.topology
    arguments: dict[str, object] = {
        "topology_name": f"{'tpu7x' if chip.name == '7x' else chip.name}:{'x'.join(map(str, shape))}",
        "num_slices": machines.slices,
    }
    if machines.chips_per_slice <= chip.single_host_chips:
        arguments["chips_per_host_bounds"] = [*shape, *[1] * (3 - len(shape))]
    elif machines.chips_per_slice < chip.chips_per_host:
        arguments["chips_per_host_bounds"] = list(shape)
    if chip.name == "v4":  # both cores of a chip are one device, as on real slices
        arguments["chip_config_name"] = "megacore"
    return arguments
