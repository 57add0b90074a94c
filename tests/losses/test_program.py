"""Memory, traffic and FLOPs of the losses, read from the jaxpr and from the program that XLA compiles for 8 devices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax.devices.sharding import batch_sharding, make_mesh, replicated
from clip_jax.losses.mesh_grid import COLUMNS, DEFAULT_TILING, ROWS, make_grid
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from clip_jax.planning import program

BATCH, DIM, DEVICES = 32_768, 64, 8
PAIRS = BATCH // DEVICES
LOSSES = {"softmax": (softmax, 3), "sigmoid": (sigmoid, 4)}


@functools.lru_cache
def traced(name):
    """The loss with all its gradients at a batch of 32,768, from shapes alone."""
    loss, arguments = LOSSES[name]
    mesh = make_mesh()
    rows = jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    gradient = jax.value_and_grad(lambda *x: loss(*x, mesh=mesh)[0], tuple(range(arguments)))
    return jax.jit(gradient).trace(rows, rows, *[scalar] * (arguments - 2))


@functools.lru_cache
def compiled(name):
    return traced(name).lower().compile().as_text()


@pytest.mark.parametrize(("name", "bound"), [("softmax", 8.4), ("sigmoid", 6.3)])
def test_matmul_flops_of_a_device(name, bound):
    assert program.matmul_flops(traced(name).jaxpr) / DEVICES <= bound * PAIRS * BATCH * DIM


@pytest.mark.parametrize("name", LOSSES)
def test_no_array_is_as_large_as_the_rows_of_logits_of_a_device(name):
    """On the 2 x 4 grid a device has 4,096 pairs and gathers 8,192 texts; logits exist in blocks."""
    shapes = [tuple(map(int, re.findall(r"\d+", shape.split("[")[1]))) for shape in program.buffers(compiled(name))]
    assert max(map(math.prod, shapes)) == DEFAULT_TILING.block_logits < PAIRS * BATCH / 50
    assert (1024, 2048) in shapes and (2 * PAIRS, DIM) in shapes
    assert not any(sum(side >= 2 * PAIRS for side in shape) > 1 or BATCH in shape for shape in shapes)


@pytest.mark.parametrize(("name", "rounds"), [("softmax", 3), ("sigmoid", 2)])
def test_embeddings_and_gradients_are_sent_once_along_each_axis_of_the_grid(name, rounds):
    """Texts are gathered and their gradients scattered over the two rows; images travel around a row of four, and so do
    their gradients, softmax's images twice. Everything else is vectors."""
    grid = make_grid(make_mesh(), jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32), DEFAULT_TILING)
    mesh = Mesh(np.asarray(jax.devices()).reshape(grid.axis_sizes), grid.axis_names)
    wide = [c for c in program.collectives(compiled(name)) if c.bytes >= PAIRS * DIM * 4]
    text_bytes = 2 * PAIRS * DIM * 4
    columns = [(c.kind, c.bytes, c.times) for c in wide if program.axes(c, mesh) == (ROWS,)]
    assert sorted(columns) == [("all-gather", text_bytes, 1), ("reduce-scatter", text_bytes, 1)]
    ring = [c for c in wide if program.axes(c, mesh) == (COLUMNS,)]
    assert {(c.kind, c.bytes) for c in ring} == {("collective-permute", PAIRS * DIM * 4)}
    # XLA may issue the first hop once for both passes.
    assert rounds * 4 - 1 <= sum(c.times for c in ring) <= rounds * 4
    assert len(wide) == len(columns) + len(ring)
    narrow = sum(c.traffic for c in program.collectives(compiled(name)) if c not in wide)
    assert narrow < 0.1 * sum(c.traffic for c in wide)


def test_a_hop_is_issued_before_the_scan_that_it_overlaps_with():
    """In the program's order, the images' ppermute comes before the loop over blocks of the same hop."""
    hops = [e for e in _all_equations(traced("softmax").jaxpr.jaxpr) if e.primitive.name == "scan"]
    bodies = [[e.primitive.name for e in hop.params["jaxpr"].jaxpr.eqns] for hop in hops]
    rings = [names for names in bodies if "ppermute" in names]
    assert len(rings) == 2
    assert all(max(i for i, n in enumerate(names) if n == "ppermute") < names.index("scan") for names in rings)


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, jax.lax.Precision.HIGHEST), (jnp.bfloat16, None)])
@pytest.mark.parametrize("name", LOSSES)
def test_embeddings_are_multiplied_in_their_own_type(name, dtype, precision):
    """float32 as float32: by default, TPUs and GPUs round it to bfloat16 and to TF32 first."""
    loss, arguments = LOSSES[name]
    values = [jnp.ones((8, 4), dtype)] * 2 + [jnp.float32(1)] * (arguments - 2)
    gradient = jax.grad(lambda *x: loss(*x, mesh=make_mesh())[0], tuple(range(arguments)))
    equations = _all_equations(jax.make_jaxpr(gradient)(*values).jaxpr)
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(products) >= 3 and {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(dtype)}
    assert {e.params["precision"] for e in products} == {precision and (precision, precision)}


def _all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=program.is_program):
            if program.is_program(inner):
                yield from _all_equations(getattr(inner, "jaxpr", inner))
