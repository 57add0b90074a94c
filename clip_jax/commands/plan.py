"""``clip-jax plan --config=configs/clip_vit_l14.py --tpu=v5e-256``: what a run needs, before anything is rented."""

import argparse
import json

from clip_jax.errors import UserError

HELP = "Say whether a run fits a TPU slice or GPUs, how fast it can be, how long it takes and what it costs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a recipe; --config.some.key=value overrides a setting")
    parser.add_argument("--tpu", help="an accelerator type: v5e-256, v6e-64, v4-512, v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="so many of them, joined by the data-centre network")
    parser.add_argument("--gpu", help="h100:8, a100:64, h200: reckoned, not compiled")
    parser.add_argument("--samples", type=int, help="pairs in the dataset, for a run that lasts epochs")
    parser.add_argument("--price", type=float, help="of one chip for one hour")
    parser.add_argument("--mfu", type=float, help="reckon times with this MFU, as 0.4, instead of the bound")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--estimate", action="store_true", help="do not compile, even where libtpu is installed")
    parser.add_argument("--compilations", type=int, default=4, help="at most so many, where a run does not fit")


def run(arguments: argparse.Namespace) -> None:
    # JAX takes a second to import: not before the arguments are right.
    import jax

    from clip_jax import config as configs
    from clip_jax import hardware
    from clip_jax.planning import plan as planning
    from clip_jax.planning import report
    from clip_jax.reports import terminal

    if bool(arguments.tpu) == bool(arguments.gpu):
        raise UserError("give one of --tpu=v5e-256 and --gpu=h100:8")
    if arguments.gpu and arguments.slices != 1:
        raise UserError("--slices is of TPUs; GPUs are counted together: --gpu=h100:64")
    for name, lowest, highest in (
        ("samples", 1, None),
        ("price", 0, None),
        ("mfu", 0.001, 1),
        ("compilations", 1, None),
    ):
        value = getattr(arguments, name)
        if value is not None and (value < lowest or (highest is not None and value > highest)):
            raise UserError(f"--{name}={value:g} must be at least {lowest}" + f" and at most {highest}" * bool(highest))
    machines = hardware.tpu(arguments.tpu, arguments.slices) if arguments.tpu else hardware.gpu(arguments.gpu)
    # A plan uses no device: one that is here may be another's, and a TPU compiler without a TPU is noisy.
    jax.config.update("jax_platforms", "cpu")
    plan = planning.make_plan(
        planning.Request(
            config=configs.load(arguments.config, arguments.overrides),
            machines=machines,
            samples=arguments.samples,
            price=arguments.price,
            mfu=arguments.mfu,
            compile=not arguments.estimate,
            compilations=arguments.compilations,
        )
    )
    if arguments.json:
        print(json.dumps({"config": arguments.config} | planning.to_json(plan), indent=2))
        return
    for title, rows in report.sections(plan):
        terminal.results(title, rows)
