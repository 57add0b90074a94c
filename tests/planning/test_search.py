"""The search asks the compiler little and finds the fastest settings that fit; the compiler is a fake."""

import pytest

from clip_jax import config as configs
from clip_jax.devices.hardware import gpu, tpu
from clip_jax.errors import UserError
from clip_jax.planning.compiling import Compiled
from clip_jax.planning.plan import estimated
from clip_jax.planning.search import FITTING, candidates, corrected, estimate, search

V5E = tpu("v5e-16")
FREE = V5E.chip.free_hbm_per_device
RECIPE = "configs/clip_vit_b16.py"


def given_of(**overrides):
    overrides = {"batch_size": "4096", "model.remat": "none"} | {k.replace("__", "."): v for k, v in overrides.items()}
    return estimate(configs.load(RECIPE, overrides), V5E)


def compiler(factor=1.0, **of_policy):
    """A compiler that needs so much of what is estimated, of each policy; and what it was asked."""
    asked = []

    def compile(candidate):
        asked.append(candidate.changes)
        wanted = int(candidate.memory.total * of_policy.get(candidate.config.model.remat, factor))
        return Compiled(wanted <= FREE, wanted, FREE, 1.0)

    return compile, asked


def test_what_fits_is_compiled_once_and_left_as_it_is():
    compile, asked = compiler()
    found = search(given_of(model__remat="full"), V5E, compile, compilations=4)
    assert found.candidate.changes == {} and asked == [{}]


@pytest.mark.slow
def test_what_does_not_fit_becomes_the_fastest_that_does():
    compile, asked = compiler()
    given = given_of(batch_size="16384")
    found = search(given, V5E, compile, compilations=4)
    assert not found.tried[0][1].fits and found.compiled.fits
    assert len(asked) == 2  # the config and what was found: the estimate was right
    faster = [c for c in candidates(given.config, V5E) if corrected(c.roofline) < corrected(found.candidate.roofline)]
    assert faster and all(c.memory.total > FREE for c in faster)


@pytest.mark.slow
def test_a_compiler_that_needs_more_than_estimated_is_believed_at_its_next_turn():
    compile, asked = compiler(factor=1.6)
    found = search(given_of(), V5E, compile, compilations=6)
    assert found.compiled.fits and len(asked) <= 4


def test_the_search_stops_after_so_many_compilations():
    compile, asked = compiler(factor=1000)
    found = search(given_of(), V5E, compile, compilations=3)
    assert found.candidate is None and len(asked) <= 3


def test_of_three_that_fit_the_one_with_the_fewest_cycles_is_taken():
    asked = []

    def compile(candidate):
        asked.append(candidate)
        fits = bool(candidate.changes) and candidate.memory.total <= FREE
        # The compiler disagrees with the order of the roofline: the second is the fastest.
        cycles = {1: 900, 2: 300, 3: 600}.get(len(asked) - 1)
        return Compiled(fits, candidate.memory.total, FREE, 1.0, cycles=cycles and cycles * 10**6)

    found = search(given_of(batch_size="16384"), V5E, compile, compilations=10)
    assert len(asked) == 1 + FITTING and found.candidate is asked[2]


def test_more_settings_are_compared_on_request_also_with_a_config_that_fits():
    asked = []

    def compile(candidate):
        asked.append(candidate)
        cycles = {1: 900, 2: 950, 3: 300, 4: 600}[len(asked)]
        return Compiled(candidate.memory.total <= FREE, candidate.memory.total, FREE, 1.0, cycles=cycles * 10**6)

    found = search(given_of(model__remat="full"), V5E, compile, compilations=8, compare=4)
    assert asked[0].changes == {} and len(asked) == 4 and found.candidate is asked[2]


def test_candidates_change_how_a_run_is_computed_and_nothing_else():
    found = candidates(given_of().config, V5E)
    assert {key for c in found for key in c.changes} == {"micro_batch", "model.remat", "mesh.fsdp"}
    assert all(c.config.batch_size % (c.learner.micro_batches * 16) == 0 for c in found)
    times = [corrected(c.roofline) for c in found]
    assert times == sorted(times)


def test_a_batch_that_does_not_divide_is_one_line():
    with pytest.raises(UserError, match=r"batch_size=1000 does not divide over 16 devices .* nearest that does is 992"):
        given_of(batch_size="1000")


@pytest.mark.slow
def test_gpus_are_searched_with_the_estimate():
    machines = gpu("h100:8")
    given = estimate(configs.load(RECIPE, {"model.remat": "none"}), machines)
    found = search(given, machines, lambda c: estimated(c, machines), compilations=2)
    assert not found.tried[0][1].fits and found.candidate.memory.total <= machines.chip.free_hbm
