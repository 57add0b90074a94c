"""``clip-jax doctor --config=configs/clip_vit_b16.py``: the step on this machine, measured beside the estimate."""

import argparse

HELP = "Measure a training step and its parts on this machine, beside what the plan estimates for them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a recipe; --config.batch_size=... overrides its batch")


def run(arguments: argparse.Namespace) -> None:
    import jax

    from clip_jax import __version__
    from clip_jax import config as configs
    from clip_jax.devices import simulated
    from clip_jax.planning import doctor
    from clip_jax.reports import terminal

    config = configs.load(arguments.config, arguments.overrides)
    simulated.use_cpus(config.mesh.cpu_devices)
    devices, known = jax.devices(), doctor.machines_here()
    rows = [
        ("devices", f"{len(devices)} x {devices[0].device_kind}" + (f", planned as {known.name}" if known else "")),
        ("versions", f"clip_jax {__version__}, jax {jax.__version__}"),
    ]
    if devices[0].platform != "tpu":
        rows.append(("not seen", f"on a {devices[0].platform}: estimates, the TPU kernel, the TPU compiler's program"))
    terminal.results("This machine", rows)
    found = []
    for part in doctor.examine(config):
        compared = part.source
        if part.estimated is not None:
            ratio = part.measured / part.estimated
            compared = f"{part.estimated * 1e3:,.2f} ms by {part.source}: measured / estimated {ratio:.2f}"
        found.append((part.name, f"{part.measured * 1e3:,.2f} ms; {compared}"))
    terminal.results("Measured", found)
