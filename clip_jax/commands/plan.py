"""``clip-jax plan --config=configs/clip_vit_l14.py --tpu=v5e-256``: memory, speed and cost of a run in advance."""

import argparse
import json
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Print whether a run fits a TPU slice or GPUs, how fast it can be, how long it takes and what it costs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a recipe; --config.some.key=value overrides a setting")
    parser.add_argument("--tpu", help="an accelerator type: v5e-256, v6e-64, v4-512, v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices, joined by the data-center network")
    parser.add_argument("--gpu", help="h100:8, a100:64, h200; estimated, not compiled")
    parser.add_argument("--samples", type=int, help="pairs in the dataset, for a run measured in epochs")
    parser.add_argument("--price", type=float, help="price of a chip-hour")
    parser.add_argument("--mfu", type=float, help="estimate times from this MFU, such as 0.4, instead of lower bounds")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="profile.html",
        metavar="FILE",
        help="print where the compiler expects the time to go, and write a page with a picture (profile.html)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--estimate", action="store_true", help="do not compile, even where libtpu is installed")
    parser.add_argument(
        "--compilations",
        type=int,
        default=6,
        help="maximum number of compilations if the run does not fit; at most three that fit are compared",
    )
    parser.add_argument(
        "--compare",
        type=int,
        help="compare this many settings that fit by the compiler's time, also if the run fits as it is",
    )


def run(arguments: argparse.Namespace) -> None:
    # After parsing: JAX takes a second to import.
    import jax

    from clip_jax import config as configs
    from clip_jax.devices import hardware
    from clip_jax.planning import compiling, profile_report, report
    from clip_jax.planning import plan as planning
    from clip_jax.reports import terminal

    if bool(arguments.tpu) == bool(arguments.gpu):
        raise UserError("give either --tpu or --gpu, as in --tpu=v5e-256 or --gpu=h100:8")
    if arguments.gpu and arguments.slices != 1:
        raise UserError("--slices is for TPUs; give the total number of GPUs, as in --gpu=h100:64")
    for name, lowest, highest in (
        ("samples", 1, None),
        ("price", 0, None),
        ("mfu", 0.001, 1),
        ("compilations", 1, None),
        ("compare", 1, None),
    ):
        value = getattr(arguments, name)
        if value is not None and (value < lowest or (highest is not None and value > highest)):
            raise UserError(f"--{name}={value:g} must be at least {lowest}" + f" and at most {highest}" * bool(highest))
    if arguments.profile and (arguments.gpu or arguments.estimate or not compiling.is_installed()):
        raise UserError(
            f"--profile reads the TPU compiler's program: give --tpu, leave out --estimate, and {compiling.INSTALL}"
        )
    if arguments.compare and (arguments.gpu or arguments.estimate or not compiling.is_installed()):
        raise UserError(
            f"--compare compares the TPU compiler's times: give --tpu, leave out --estimate, and {compiling.INSTALL}"
        )
    machines = hardware.tpu(arguments.tpu, arguments.slices) if arguments.tpu else hardware.gpu(arguments.gpu)
    # A plan uses no device: another process may be using it, and libtpu without a TPU prints warnings.
    jax.config.update("jax_platforms", "cpu")
    plans = planning.make_plans(
        planning.Request(
            config=configs.load(arguments.config, arguments.overrides),
            machines=machines,
            samples=arguments.samples,
            price=arguments.price,
            mfu=arguments.mfu,
            compile=not arguments.estimate,
            compilations=arguments.compilations,
            compare=arguments.compare,
        )
    )
    if arguments.profile:
        Path(arguments.profile).write_text(profile_report.page(plans))
    if arguments.json:
        first, *later = [planning.to_json(plan) | {"profile": profile_report.to_json(plan)} for plan in plans]
        phases = {"later_phases": later} if later else {}
        print(json.dumps({"config": arguments.config} | first | phases, indent=2))
        return
    for plan in plans:
        for title, rows in report.sections(plan):
            terminal.results(title, rows)
        if arguments.profile:
            terminal.results("Where the time goes", profile_report.lines(plan))
