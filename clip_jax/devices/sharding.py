"""Devices -> mesh, logical axes -> mesh axes, and which rows of the global batch this process needs.

The mesh has the axes ``data``, ``fsdp`` and ``tensor``, any of them 1. The batch is split over data and fsdp;
parameters over fsdp (by their ``embed`` axis) and tensor. Nothing else in the project names a mesh axis.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES = (
    ("layers", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("joint", None),
)


def mesh_shape(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """The sizes of the three axes for ``devices`` devices; ``-1`` (at most once) takes what the others leave."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    automatic = [axis for axis, size in sizes.items() if size == -1]
    if len(automatic) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"config.mesh: {sizes}: sizes are positive, one of them may be -1 (what the others leave)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not automatic and devices != fixed):
        raise UserError(f"config.mesh: {sizes} does not divide over {devices} devices; set one axis to -1")
    for axis in automatic:
        sizes[axis] = devices // fixed
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = -1, devices: list[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices (or those given) with the axes ``data``, ``fsdp``, ``tensor``.

    Over several slices the data axis is the outermost and alone crosses from one to another, so that parameters and
    activations never cross the slow network between them. ``slices`` of -1 takes the number that the devices report;
    devices that report none (CPUs, GPUs) are divided into ``slices`` equal parts.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, tensor, len(devices))
    parts = _by_slice(devices, slices)
    if len(parts) == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    if shape[0] % len(parts):
        raise UserError(
            f"config.mesh.data={shape[0]} does not divide over {len(parts)} slices; fsdp and tensor lie inside a slice "
            f"of {len(parts[0])} devices, and data is a multiple of {len(parts)}"
        )
    inside = (shape[0] // len(parts), *shape[1:])
    meshes = [jax.make_mesh(inside, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=part) for part in parts]
    return Mesh(np.concatenate([m.devices for m in meshes]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _by_slice(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """The devices of each slice. Raises UserError when they are not as many slices as the config says."""
    known: dict[int, list[jax.Device]] = {}
    for device in devices:
        known.setdefault(getattr(device, "slice_index", 0), []).append(device)
    parts = [known[index] for index in sorted(known)]
    if slices in (-1, len(parts)):
        return parts
    if len(parts) > 1 or len(devices) % slices:
        raise UserError(
            f"config.mesh.slices={slices}: the {len(devices)} devices are {len(parts)} slice(s); leave it at -1"
        )
    size = len(devices) // slices
    return [devices[i * size : (i + 1) * size] for i in range(slices)]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a global batch over data x fsdp; replicas along tensor."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """How many devices split a batch among them."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def on_cpu(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether a mesh is of CPUs; False for None and for a mesh without devices."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def on_tpu(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether a mesh is of TPUs; False for None and for a mesh that does not say."""
    return mesh is not None and platform_of(mesh) == "tpu"


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """``cpu``, ``gpu`` or ``tpu``; the empty string for a mesh without devices that says nothing about them."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    return "" if mesh.abstract_device is None else mesh.abstract_device.platform


def split_rows(x: jax.Array, mesh: Mesh | AbstractMesh | None) -> jax.Array:
    """Constrains activations [batch, ...] to the batch's sharding, replicated along all other axes.

    Where parameters are split over fsdp the partitioner must gather them for each layer. Without the constraint it may
    split the features of the activations instead, and exchange activations of the global batch at every layer.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def gather_features(table: jax.Array, mesh: Mesh | AbstractMesh | None) -> jax.Array:
    """Gathers a parameter [rows, features] along fsdp for a lookup, as a layer's weights are gathered for its product.

    Its rows stay split over tensor. Without the constraint the partitioner looks up parts of the features and exchanges
    them as activations; on a mesh of all three axes it reports "involuntary full rematerialization".
    """
    if mesh is None:
        return table
    rows = nn.logical_to_mesh_axes(("vocab",), RULES)[0]
    rows_spec = PartitionSpec(rows if table.shape[0] % mesh.shape[rows] == 0 else None)
    return jax.lax.with_sharding_constraint(table, NamedSharding(mesh, rows_spec))


def copy_for_each_part(kernel: jax.Array, mesh: Mesh | AbstractMesh | None) -> jax.Array:
    """A kernel [features, vocabulary] as [parts of the batch, features, vocabulary], for use in a loop.

    Each device holds one copy, gathered along fsdp and split over tensor. The gradients of all iterations then add up
    where they arise, and are summed over the devices once; those of a replicated kernel would be in each iteration.
    """
    if mesh is None:
        return kernel[None]
    vocabulary = nn.logical_to_mesh_axes(("vocab",), RULES)[0]
    last = vocabulary if kernel.shape[1] % mesh.shape[vocabulary] == 0 else None
    copies = jnp.broadcast_to(kernel, (batch_shards(mesh), *kernel.shape))
    return jax.lax.with_sharding_constraint(copies, NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, last)))


def split_batch(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[batch, ...] -> [parts, batch / parts, ...]: each part takes a share of every device's rows; no row moves."""
    shards = batch_shards(mesh)
    x = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(parts, -1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))


def join_batch(x: jax.Array, mesh: Mesh) -> jax.Array:
    """The inverse of ``split_batch``: the rows in their original order."""
    shards, parts = batch_shards(mesh), x.shape[0]
    x = x.reshape(parts, shards, -1, *x.shape[2:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x.reshape(-1, *x.shape[3:]), batch_sharding(mesh))


def take_rows(x: jax.Array, rows: jax.Array, mesh: Mesh | AbstractMesh) -> jax.Array:
    """``x[rows]`` of an array whose rows are split over the mesh, as an array whose rows are.

    Each device sends every other one a row at a time. The partitioner would gather all of ``x`` on every device: of the
    pixels of 65,536 images, 10 GB.
    """
    shards, count = batch_shards(mesh), len(rows)
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()

    def device(local: jax.Array, rows: jax.Array) -> jax.Array:
        # A sum over the devices of what one of them has; on booleans there is no sum.
        numbers = local.astype(jnp.uint8) if local.dtype == bool else local
        first = jax.lax.axis_index(BATCH_AXES) * len(local)

        def exchange(_: None, wanted: jax.Array) -> tuple[None, jax.Array]:
            """``wanted``: the row that each device is to have next."""
            index = wanted - first
            is_local = (index >= 0) & (index < len(local))
            found = numbers[jnp.clip(index, 0, len(local) - 1)]
            found = jnp.where(is_local.reshape(-1, *(1,) * (local.ndim - 1)), found, 0)
            return None, jax.lax.psum_scatter(found, BATCH_AXES, scatter_dimension=0)

        _, taken = jax.lax.scan(exchange, None, rows.reshape(shards, count // shards).T)
        return taken.astype(local.dtype)

    return jax.shard_map(device, mesh=mesh, in_specs=(split, everywhere), out_specs=split)(x, rows)


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree whose arrays are boxed with logical axes.

    An axis that the mesh does not divide (a vocabulary of 49,408 over 3 devices) is replicated, and so is an array with
    fewer axes than its box names: a factored moment, which an optimizer made from a boxed parameter and is small.
    """

    def one(spec: PartitionSpec, leaf: Any) -> NamedSharding:
        if len(spec) > leaf.ndim:
            return replicated(mesh)
        sharding = nn.logical_to_mesh_sharding(spec, mesh, RULES)
        axes = list(sharding.spec) + [None] * (leaf.ndim - len(sharding.spec))
        sizes = zip(axes, leaf.shape, strict=True)
        return NamedSharding(
            mesh, PartitionSpec(*(a if a is None or n % mesh.shape[a] == 0 else None for a, n in sizes))
        )

    def boxed_one(box: Any) -> Any:
        # A box may be empty: an optimizer that treats some parameters differently leaves them out.
        return jax.tree.map(lambda leaf: one(nn.get_partition_spec(box), leaf), nn.meta.unbox(box))

    return jax.tree.map(boxed_one, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int64[rows]: the rows of the global batch that this process's devices hold, in ascending order."""
    rows: set[int] = set()
    for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values():
        start, stop, _ = index[0].indices(batch_size)
        rows.update(range(start, stop))
    return np.array(sorted(rows), np.int64)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays of ``batch_size`` rows on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


AUTO_COORDINATOR = "auto"


def initialize_processes(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; must be called before any other use of JAX.

    ``"auto"`` asks the cluster (a TPU slice, Slurm, Open MPI); ``processes`` then says how many there must be.
    Elsewhere the three values are needed, all of them. Raises UserError.
    """
    if coordinator == AUTO_COORDINATOR:
        if process_id is not None:
            raise UserError("--coordinator=auto finds the process's number by itself: leave --process_id out")
        jax.distributed.initialize()
        joined = jax.process_count()
        if processes is not None and joined != processes:
            jax.distributed.shutdown()  # all together: the first to leave would stop the others
            raise UserError(
                f"--num_processes={processes}, but {joined} processes are joined: "
                "start main.py on every host of the slice, once"
            )
        return
    given = (coordinator is not None, processes is not None, process_id is not None)
    if not any(given):
        return
    if not all(given):
        raise UserError(
            "--coordinator, --num_processes and --process_id go together: give all three, none, or --coordinator=auto"
        )
    if not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} is not below --num_processes={processes}")
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process_id)
