"""Flags of XLA for each platform that let communication run beside computation; put into the environment before JAX
starts a platform.

Short lists, on purpose: what a compiler has by default is not repeated (libtpu: the latency-hiding scheduler and
asynchronous, fused all-gathers; openxla.org/xla/flags_guidance), and what is not documented is not here. A compiler
stops the process at a flag that it does not know, so tests start both with every flag. What the user has set wins.
"""

import importlib.util
import os
from collections.abc import MutableMapping
from typing import NamedTuple


class Preset(NamedTuple):
    """What a platform is given, and why."""

    variable: str
    """The environment variable that its compiler reads."""
    packages: tuple[str, ...]
    """Any of these brings the platform to JAX."""
    flags: dict[str, str]
    why: str


PRESETS = {
    "tpu": Preset(
        "LIBTPU_INIT_ARGS",
        ("libtpu",),
        {
            # docs.jax.dev, "List of XLA compiler flags": gradients cross the data-centre network while others are still
            # computed, those of scanned layers too. They are about several slices.
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
        "all-reduces between slices beside computation",
    ),
    "gpu": Preset(
        "XLA_FLAGS",
        ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        {
            # What XLA's optimization level O1 adds (openxla.org/xla/gpu_optimization_levels) but for unrolled loops;
            # the first is also what NVIDIA's JAX images set. By default they are off: compiling takes longer.
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
        },
        "collectives beside computation",
    ),
}


def apply(environ: MutableMapping[str, str] = os.environ) -> None:
    """Adds the presets of the platforms that are installed; to be called before JAX looks for devices.

    Each variable is read by its platform alone, but ``XLA_FLAGS``, which all read: the CPU's compiler knows the GPU's
    flags. Where ``JAX_PLATFORMS`` names platforms, others get nothing.
    """
    wanted = environ.get("JAX_PLATFORMS", "").replace("cuda", "gpu").split(",")
    for platform, preset in PRESETS.items():
        is_installed = any(importlib.util.find_spec(package) for package in preset.packages)
        if is_installed and (wanted == [""] or platform in wanted):
            environ[preset.variable] = joined(platform, environ.get(preset.variable, ""))


def joined(platform: str, given: str) -> str:
    """The variable's value: what is given, and the preset's flags of other names."""
    names = set(parsed(given))
    ours = [f"--{name}={value}" for name, value in PRESETS[platform].flags.items() if name not in names]
    return " ".join([*given.split(), *ours])


def parsed(given: str) -> dict[str, str]:
    """{name: value} of a variable's flags; the last of a name wins, as for the compilers."""
    pairs = (flag.lstrip("-").partition("=") for flag in given.split())
    return {name: value for name, _, value in pairs}


def told(platform: str, environ: MutableMapping[str, str] = os.environ) -> str:
    """The line of a run's header: what of the preset is in force and why, and how much the user set."""
    if platform not in PRESETS:
        return f"none of ours on {platform}"
    preset = PRESETS[platform]
    found = parsed(environ.get(preset.variable, ""))
    ours = [name for name, value in preset.flags.items() if found.get(name) == value]
    others = len(found) - len(ours)
    return "; ".join(
        [f"{', '.join(ours)}: {preset.why}"] * bool(ours)
        + [f"{others} of your own in {preset.variable}"] * bool(others)
        or ["none"]
    )
