"""FLOPs, collectives and buffers of programs against counts by hand, and against XLA's where those are correct."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clip_jax.planning import program, work

A, B = jnp.ones((8, 16)), jnp.ones((16, 4))
PRODUCT = 2 * 8 * 16 * 4


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def flops(function, *arguments):
    return program.matmul_flops(jax.make_jaxpr(function)(*arguments))


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_product_counts_a_multiply_and_an_add_per_term():
    assert flops(jnp.dot, A, B) == PRODUCT
    assert (
        flops(lambda x, y: jnp.einsum("bij,bjk->bki", x, y), jnp.ones((3, 8, 16)), jnp.ones((3, 16, 4))) == 3 * PRODUCT
    )
    assert flops(jnp.add, A, A) == 0


def test_a_scan_counts_every_iteration_forward_and_backward():
    def layers(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    x, w = jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    once = 5 * 2 * 4 * 8 * 8
    assert flops(layers, x, w) == once
    assert flops(jax.grad(layers, (0, 1)), x, w) == 3 * once
    assert flops(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ w[0], x), x) == 7 * 2 * 4 * 8 * 8


def test_what_checkpoint_recomputes_is_counted_again():
    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w))

    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    plain, remat = (flops(jax.grad(f, (0, 1)), x, w) for f in (loss, jax.checkpoint(loss)))
    assert (plain, remat) == (3 * 512, 4 * 512)


def test_nested_jits_custom_rules_and_the_most_expensive_branch_are_counted():
    @jax.custom_vjp
    def product(x, y):
        return x @ y

    product.defvjp(lambda x, y: (x @ y, (x, y)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    @jax.custom_jvp
    def squared(x):
        return x @ x

    squared.defjvp(lambda primals, tangents: (squared(*primals), primals[0] @ tangents[0]))
    assert flops(jax.jit(jax.jit(product)), A, B) == PRODUCT
    assert flops(jax.grad(lambda x, y: jnp.sum(product(x, y)), (0, 1)), A, B) == 3 * PRODUCT
    assert flops(squared, jnp.ones((3, 3))) == 54
    assert flops(lambda p: jax.lax.cond(p, lambda: A @ B, lambda: 2 * (A @ B) + A @ B), True) == 2 * PRODUCT


def test_the_body_of_a_shard_map_counts_for_every_device_including_replicas():
    mesh = mesh_of(data=4, tensor=2)
    rows, replicated = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, replicated), out_specs=rows)
    assert flops(sharded, A, B) == 2 * PRODUCT
    only_data = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows, replicated), out_specs=rows, axis_names={"data"})
    assert flops(only_data, A, B) == PRODUCT


def test_a_product_in_a_loop_of_unknown_length_raises():
    with pytest.raises(ValueError, match="while_loop"):
        flops(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ x, x), jnp.ones((2, 2)))


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": "VALID"},
        {"window_strides": (2, 2), "padding": ((3, 1), (0, 2)), "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_a_convolution_counts_what_xla_counts(options):
    image = jnp.ones((2, 6, 12, 11))
    kernel = jnp.ones((4, 6 // options.get("feature_group_count", 1), 3, 5))
    convolve = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, **options))
    assert flops(convolve, image, kernel) == convolve.lower(image, kernel).cost_analysis()["flops"]


def test_the_gradients_of_a_strided_convolution_count_what_xla_counts():
    image, kernel, out = jnp.ones((2, 6, 12, 12)), jnp.ones((4, 6, 3, 3)), jnp.ones((2, 4, 6, 6))
    convolve = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="SAME")
    by_image = jax.jit(jax.linear_transpose(lambda x: convolve(x, kernel), image))
    by_kernel = jax.jit(jax.linear_transpose(lambda w: convolve(image, w), kernel))
    for transposed in (by_image, by_kernel):
        assert flops(transposed, out) == transposed.lower(out).cost_analysis()["flops"]


def test_an_unrolled_program_of_products_counts_what_xla_counts():
    def towers(x, weights):
        for w in weights:
            x = jnp.einsum("btd,de->bte", x, w)
            x = jnp.einsum("bts,bsd->btd", jnp.einsum("btd,bsd->bts", x, x), x)
        return x

    x, weights = jnp.ones((2, 5, 8)), [jnp.ones((8, 8))] * 3
    assert flops(towers, x, weights) == jax.jit(towers).lower(x, weights).cost_analysis()["flops"]


def collectives_of(function, mesh, specs, *shapes):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return program.collectives(compiled(function, *arguments))


def test_collectives_have_their_bytes_groups_and_axes():
    mesh = mesh_of(data=2, fsdp=4)
    spec = PartitionSpec(("data", "fsdp"))

    def exchange(x):  # [2, 16] on each of eight devices
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)  # [8, 16]
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), "data", tiled=True)  # [4, 16]
        moved = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return scattered[:2] * moved + jax.lax.psum(jnp.sum(x), ("data", "fsdp"))

    found = collectives_of(
        jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), mesh, [spec], (16, 16)
    )
    by_kind = {c.kind: c for c in found}
    assert len(found) == 4
    gather, scatter, reduce, permute = (
        by_kind[k] for k in ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")
    )
    assert gather == ("all-gather", 8 * 16 * 4, ((0, 1, 2, 3), (4, 5, 6, 7)), 1)
    assert scatter == ("reduce-scatter", 8 * 16 * 4, ((0, 4), (1, 5), (2, 6), (3, 7)), 1)
    assert (reduce.bytes, reduce.groups) == (4, (tuple(range(8)),))
    assert permute.bytes == 2 * 16 * 4 and (3, 0) in permute.groups and (7, 4) in permute.groups
    assert [program.axes(c, mesh) for c in (gather, scatter, reduce, permute)] == [
        ("fsdp",), ("data",), ("data", "fsdp"), ("fsdp",),
    ]  # fmt: skip
    # Six of the eight gathered rows come from other devices, four of the eight reduced ones, and all permuted ones.
    assert [c.traffic for c in (gather, scatter, permute)] == [6 * 64, 4 * 64, 2 * 64]


def test_a_collective_in_a_loop_counts_every_iteration():
    mesh = mesh_of(data=8)
    spec = PartitionSpec("data")

    def ring(x):
        hop = lambda x, _: (jnp.sin(jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])), None)  # noqa: E731
        twice = lambda x, _: (jax.lax.scan(hop, x, length=7)[0], None)  # noqa: E731
        return jax.lax.scan(twice, x, length=3)[0]

    (permute,) = collectives_of(jax.shard_map(ring, mesh=mesh, in_specs=spec, out_specs=spec), mesh, [spec], (8, 4))
    assert (permute.times, permute.bytes, permute.traffic) == (21, 16, 21 * 16)


def test_collectives_inserted_by_the_partitioner_are_found():
    """If weights and batch are sharded over the same axis, the weights are gathered."""
    specs = [PartitionSpec("fsdp"), PartitionSpec("fsdp")]
    (gather,) = collectives_of(jnp.dot, mesh := mesh_of(fsdp=8), specs, (64, 16), (16, 4))
    assert (gather.kind, gather.bytes, program.axes(gather, mesh)) == ("all-gather", 16 * 4 * 4, ("fsdp",))


GROUPS = {
    "{}": ((0, 1, 2, 3, 4, 5, 6, 7),),
    "{{0,4},{1,5}}": ((0, 4), (1, 5)),
    "[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[4,2]<=[2,4]T(1,0)": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['data'=2,'fsdp'=4] {'fsdp'}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "mesh['data'=2,'fsdp'=4] {'data'}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['data'=2,'fsdp'=4] {'data','fsdp'}": ((0, 1, 2, 3, 4, 5, 6, 7),),
    # The rows of a 4 x 2 grid over a 2 x 4 mesh: data, and the first factor of fsdp, viewed as 2 x 2.
    "mesh['data'=2,'fsdp'=4] {'data','fsdp':(1)2}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['data'=2,'fsdp'=4] {'fsdp':(2)2}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    # The first two axes are swapped: the device at (a, b, c) is number 4 b + 2 a + c.
    "mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(1,0,2)) {'a','c'}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}": ((3, 1), (0, 2)),
}


@pytest.mark.parametrize(("text", "groups"), GROUPS.items())
def test_groups_are_parsed_in_all_notations(text, groups):
    assert program._groups(f"(%x), channel_id=1, replica_groups={text}, dimensions={{0}}", 8) == groups


def test_groups_in_an_unknown_notation_raise():
    with pytest.raises(ValueError, match="cannot read replica_groups=@maximal"):
        program._groups("(%x), replica_groups=@maximal, dimensions={0}", 8)


# Output of the TPU compiler: layouts with tiles, a reduce-scatter as a fusion, a loop without a known trip count.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%all-reduce-scatter.1 (input: bf16[128,256]) -> bf16[32,256] {
  %input = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.2 = bf16[128,256]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}
  ROOT %dynamic-slice.5 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.2, %input)
}

%body (carry: (s32[], f32[128], s32[])) -> (s32[], f32[128], s32[]) {
  %carry = (s32[]{:T(128)}, f32[128]{0:T(128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %x = f32[128]{0:T(128)} get-tuple-element(%carry), index=1
  %start = (f32[128]{0}, f32[128]{0}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[128]{0:T(128)} collective-permute-done(%start)
  ROOT %next = (s32[]{:T(128)}, f32[128]{0:T(128)}, s32[]{:T(128)}) tuple(%x, %done, %x)
}

%condition (carry.1: (s32[], f32[128], s32[])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, f32[128]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %n = s32[]{:T(128)} get-tuple-element(%carry.1), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p0: bf16[128,256], p1: f32[128]) -> bf16[32,256] {
  %p0 = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = f32[128]{0:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %twelve = s32[]{:T(128)} constant(12), metadata={op_name="jit(step)/while (of 12)"}
  %copy = s32[]{:T(128)} copy(%twelve)
  %tuple = (s32[]{:T(128)}, f32[128]{0:T(128)}, s32[]{:T(128)}) tuple(%zero, %p1, %copy)
  %while = (s32[]{:T(128)}, f32[128]{0:T(128)}, s32[]{:T(128)}) while(%tuple), condition=%condition, body=%body
  ROOT %fusion = bf16[32,256]{1,0:T(8,128)(2,1)} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_fused_reduce_scatter_and_the_loop_of_a_tpu_program_are_found():
    permute, scatter = program.collectives(TPU)
    assert permute == ("collective-permute", 512, ((0, 1), (1, 0)), 12)
    assert scatter == ("reduce-scatter", 128 * 256 * 2, ((0, 1, 2, 3),), 1)
    assert scatter.traffic == 128 * 256 * 2 * 3 // 4


FOUR_SLICES = """HloModule jit_step, is_scheduled=true, num_partitions=8, frontend_attributes={xla.sdy.meshes="{}"}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p0: f32[1024,1024]) -> f32[128,1024] {
  %p0 = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.1_0"}
  %scatter = f32[128,1024]{1,0:T(8,128)} reduce-scatter(%p0), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %send = (f32[128,1024]{1,0:T(8,128)}, u32[], token[]) send(%scatter, %after-all), is_host_transfer=true, KIND
  %recv = (f32[128,1024]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), is_host_transfer=true, KIND
  %done = (f32[128,1024]{1,0:T(8,128)}, token[]) recv-done(%recv), is_host_transfer=true
  ROOT %sum = f32[128,1024]{1,0:T(8,128)} get-tuple-element(%done), index=0
}
"""
BETWEEN = 'frontend_attributes={_xla_megascale_target="{1,2,3,4}x{0:7}",_xla_megascale_transfer_type="%s"}'


@pytest.mark.parametrize(
    ("transfer_type", "kind", "size", "received"),
    [
        ("ALL_REDUCE", "all-reduce", 2**19, 2 * 2**19 * 3 // 4),
        ("ALL_GATHER", "all-gather", 4 * 2**19, 3 * 2**19),
        ("REDUCE_SCATTER", "reduce-scatter", 2**19, 2**19 * 3 // 4),
    ],
)
def test_a_transfer_between_slices_is_the_collective_that_it_implements(transfer_type, kind, size, received):
    """Output of libtpu 0.0.42 for four slices of eight chips: only shards are transferred between slices."""
    scatter, between = program.collectives(FOUR_SLICES.replace("KIND", BETWEEN % transfer_type))
    assert scatter == ("reduce-scatter", 2**22, (tuple(range(8)),), 1)
    assert between == (kind, size, ((0, 8, 16, 24),), 1) and between.traffic == received
    coordinates = [(device // 8, device % 8) for device in range(32)]
    moved = {t.what: t for t in work.compiled_transfers([between], coordinates)}
    assert moved[kind] == (kind, 0, received)


def test_buffers_are_the_arrays_written_outside_fusions_largest_first():
    assert program.buffers(TPU)["bf16[128,256]"] == 65536
    assert next(iter(program.buffers(TPU))) == "bf16[128,256]"
    found = program.buffers(compiled(lambda x, y: jnp.sum(jnp.exp(x @ y), axis=1), A, B))
    assert found["f32[8,16]"] == 512 and found["f32[8]"] == 32
    assert list(found.values()) == sorted(found.values(), reverse=True)


SIZES = {"f32[3,5]{1,0}": 60, "pred[7]": 7, "s4[5]": 3, "token[]": 0, "f8e4m3fn[4]": 4, "(bf16[8]{0:T(8)}, c64[2])": 32}


@pytest.mark.parametrize(("shape", "size"), SIZES.items())
def test_bytes_of_a_shape(shape, size):
    assert program.shape_bytes(shape) == size


def test_xla_counts_the_body_of_a_loop_only_once():
    loop = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=10)[0])
    x = jnp.asarray(np.eye(8, dtype=np.float32))
    assert flops(loop, x) == 10 * 1024
    assert loop.lower(x).compile().cost_analysis()["flops"] < 2 * 1024
