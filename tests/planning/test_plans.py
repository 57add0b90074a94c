"""docs/plans.md, which ``benchmarks/plans.py`` writes, has every recipe as it is, and every one fits its slice."""

import re
import runpy

import pytest

from clip_jax import config as configs
from clip_jax.devices.hardware import tpu
from clip_jax.devices.sharding import mesh_shape
from tests.test_docs import ROOT

BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "plans.py"))
CASES = BENCHMARK["cases"]()


@pytest.fixture(scope="module")
def rows():
    """{name of a plan: {column: value}}"""
    table = [line for line in (ROOT / "docs" / "plans.md").read_text().splitlines() if line.startswith("| ")]
    header, _, *plans = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table)
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in plans}


def test_every_recipe_and_every_larger_run_is_planned(rows):
    assert rows.keys() == CASES.keys()
    assert {"L/14, 131,072", "L/14, 1,048,576", "L/14, two slices"} < rows.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_of_the_recipe_as_it_is_and_fits(rows, name):
    recipe, machine, slices, overrides = CASES[name]
    given = dict(override.removeprefix("--config.").split("=") for override in overrides)
    config, machines, row = configs.load(str(ROOT / f"configs/{recipe}.py"), given), tpu(machine, slices), rows[name]
    micro_batch = config.batch_size if config.micro_batch == configs.AUTO else config.micro_batch
    data, fsdp, _ = mesh_shape(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, machines.devices)
    assert row["fits"].startswith("yes")
    assert (row["slice"], row["batch"], row["micro-batch"], row["remat"], row["mesh (data x fsdp)"]) == (
        *(machines.name, f"{config.batch_size:,}", f"{micro_batch:,}", config.model.remat),
        f"{data} x {fsdp}",
    )


OFTEN = ("clip_vit_b16", "siglip_b16", "siglip2_b16", "coca_b32", "clip_rn50", "demo")
"""Plans with different towers and objectives, which the slow tests estimate; the exhaustive ones estimate all."""


@pytest.mark.slow
@pytest.mark.parametrize("names", [OFTEN, pytest.param((), id="all", marks=pytest.mark.exhaustive)])
def test_the_estimate_is_todays_and_never_far_below_what_the_compiler_says(rows, names):
    """Above it is a run on too many chips; below it would be one that does not fit."""
    for name, row in ((name, rows[name]) for name in names or rows):
        today, estimate, compiled = (
            float(re.match(r"[\d.]+", gibibytes)[0])
            for gibibytes in (BENCHMARK["estimate"](*CASES[name]), row["estimate"], row["HBM per chip"])
        )
        assert estimate == pytest.approx(today, rel=0.01), name  # versions of JAX save a little more or less
        if row["fits"] == "yes":
            assert estimate > 0.9 * compiled, name
