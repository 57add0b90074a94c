"""XLA flags for each platform that overlap communication with computation, set in the environment before JAX starts.

The lists are short on purpose: they omit the compilers' defaults (libtpu: the latency-hiding scheduler and
asynchronous, fused all-gathers; openxla.org/xla/flags_guidance) and undocumented flags. A compiler aborts the process
at an unknown flag, so the tests start both compilers with every flag. Flags that the user has set win.
"""

import importlib.util
import os
from collections.abc import MutableMapping
from typing import NamedTuple


class FlagSet(NamedTuple):
    """The flags of a platform, and what they are for."""

    variable: str
    """The environment variable that the compiler reads."""
    packages: tuple[str, ...]
    """Any of these packages adds the platform to JAX."""
    flags: dict[str, str]
    purpose: str


PRESETS = {
    "tpu": FlagSet(
        "LIBTPU_INIT_ARGS",
        ("libtpu",),
        {
            # docs.jax.dev, "List of XLA compiler flags": gradients cross the data-center network while others are still
            # being computed, also inside scans over layers. They matter for runs on several slices.
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
        "overlap all-reduces between slices with computation",
    ),
    "gpu": FlagSet(
        "XLA_FLAGS",
        ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        {
            # What XLA's optimization level O1 adds (openxla.org/xla/gpu_optimization_levels), except for unrolled
            # loops; NVIDIA's JAX images set the first one, too. They are off by default because they slow down
            # compilation.
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
        },
        "overlap collectives with computation",
    ),
}


def apply(environ: MutableMapping[str, str] = os.environ) -> None:
    """Adds the presets of the installed platforms; call it before JAX looks for devices.

    Only its own platform reads ``LIBTPU_INIT_ARGS``; all platforms read ``XLA_FLAGS``, and the CPU's compiler accepts
    the GPU flags. If ``JAX_PLATFORMS`` is set, only the platforms that it names get flags.
    """
    wanted = environ.get("JAX_PLATFORMS", "").replace("cuda", "gpu").split(",")
    for platform, preset in PRESETS.items():
        is_installed = any(importlib.util.find_spec(package) for package in preset.packages)
        if is_installed and (wanted == [""] or platform in wanted):
            environ[preset.variable] = merge(platform, environ.get(preset.variable, ""))


def merge(platform: str, given: str) -> str:
    """The flags of the environment variable ``given``, plus those of the preset that it does not set."""
    names = set(parse(given))
    added = [f"--{name}={value}" for name, value in PRESETS[platform].flags.items() if name not in names]
    return " ".join([*given.split(), *added])


def parse(given: str) -> dict[str, str]:
    """{name: value} of the flags in an environment variable; the last value of a name wins, as in the compilers."""
    pairs = (flag.lstrip("-").partition("=") for flag in given.split())
    return {name: value for name, _, value in pairs}


def describe(platform: str, environ: MutableMapping[str, str] = os.environ) -> str:
    """One line for the header of a run: the preset flags in effect and what they do, and the number of user flags."""
    if platform not in PRESETS:
        return f"no preset for {platform}"
    preset = PRESETS[platform]
    found = parse(environ.get(preset.variable, ""))
    active = [name for name, value in preset.flags.items() if found.get(name) == value]
    others = len(found) - len(active)
    return "; ".join(
        [f"{preset.purpose}: {', '.join(active)}"] * bool(active)
        + [f"{others} from your {preset.variable}"] * bool(others)
        or ["none"]
    )
