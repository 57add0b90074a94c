"""Several devices on one CPU, so that a mesh can be tried without accelerators."""

import os
from collections.abc import MutableMapping

import jax

THREADS_PER_DEVICE = 4


def use_cpus(count: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Splits the CPU into ``count`` devices; call it before JAX looks for devices.

    A launch occupies a thread of XLA's pool until it ends, also while a collective waits for the other devices. With
    about as many threads as devices, work that was dispatched early holds the threads that earlier work needs, and all
    wait forever (seen with eight devices on two cores). Two devices are left with XLA's own number: more threads made
    them 5 % slower.
    """
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)
    if count > 2:
        environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, THREADS_PER_DEVICE * count)))
