"""Analyzes programs: matmul FLOPs of a jaxpr; collectives and buffers in the HLO text of a compiled program.

XLA's ``cost_analysis`` counts the body of a loop once and knows nothing about links; here a scan over 24 layers counts
24 layers. Nothing in this file compiles or runs a program:

    jax.make_jaxpr(step)(*arguments)                                # -> matmul_flops
    jax.jit(step).lower(*arguments).compile().as_text()             # -> collectives, buffers
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import Mesh


def matmul_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of all matrix products and convolutions, summed over all devices; a multiply-add is two FLOPs.

    Arrays outside ``shard_map`` have global shapes. The body of a ``shard_map`` has the shapes of one device and counts
    once for every device that runs it, replicas included. If a program is evenly sharded, divide by the number of
    devices to get the FLOPs of one device. The program is counted as written: with what ``checkpoint`` recomputes, with
    the most expensive branch of a ``cond``, and with dead code, which XLA will remove. Raises ValueError for a product
    inside a ``while_loop``, whose number of iterations is unknown.
    """
    return sum(_flops(equation) for equation in getattr(program, "jaxpr", program).eqns)


def _flops(equation: JaxprEqn) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left, (out,) = equation.invars[0].aval, equation.outvars
        return 2 * math.prod(out.aval.shape) * math.prod(left.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "cond":
        return max(matmul_flops(branch) for branch in parameters["branches"])
    inside = sum(map(matmul_flops, filter(is_program, jax.tree.leaves(parameters, is_leaf=is_program))))
    if name == "scan":
        return inside * parameters["length"]
    if name == "shard_map":
        return inside * math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])
    if name == "pallas_call":
        return inside * math.prod(parameters["grid_mapping"].grid)
    if name == "while" and inside:
        raise ValueError("a matrix product inside jax.lax.while_loop: the number of iterations is unknown")
    return inside


def is_program(x: object) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


def _convolution(equation: JaxprEqn) -> int:
    """Like XLA, does not count multiplications by padding or by the holes of a dilation."""
    parameters = equation.params
    numbers = parameters["dimension_numbers"]
    image, kernel = (x.aval.shape for x in equation.invars)
    out = equation.outvars[0].aval.shape
    multiply_adds = image[numbers.lhs_spec[0]] // parameters["batch_group_count"]
    multiply_adds *= kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]
    for number, axis in enumerate(numbers.out_spec[2:]):
        multiply_adds *= taps(
            out[axis],
            kernel[numbers.rhs_spec[2 + number]],
            image[numbers.lhs_spec[2 + number]],
            stride=parameters["window_strides"][number],
            padding=parameters["padding"][number][0],
            dilation=parameters["rhs_dilation"][number],
            holes=parameters["lhs_dilation"][number],
        )
    return 2 * multiply_adds


def taps(out: int, kernel: int, image: int, *, stride: int, padding: int, dilation: int, holes: int) -> int:
    """Products of a pixel and a weight along one axis of a convolution, without padding and the holes of a dilation."""
    position = np.arange(out)[:, None] * stride - padding + np.arange(kernel) * dilation
    return int(np.sum((position >= 0) & (position < (image - 1) * holes + 1) & (position % holes == 0)))


class Collective(NamedTuple):
    """A collective of a compiled program, from the perspective of one device."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all, collective-permute, ..."""
    bytes: int
    """Bytes per execution: of the result of an all-gather, of the operand of all others."""
    groups: tuple[tuple[int, ...], ...]
    """The devices that communicate, by their position in the mesh; for a permute, (source, target) pairs."""
    times: int
    """Executions per step: the product of the trip counts of the enclosing loops."""

    @property
    def traffic(self) -> int:
        """Bytes that a device receives per step (and sends as many), with an optimal algorithm."""
        size = 1 if not self.groups else len(self.groups[0])
        if self.kind == "collective-permute":
            return self.times * self.bytes
        passes = 2 if self.kind == "all-reduce" else 1  # an all-reduce is a reduce-scatter and an all-gather
        return self.times * passes * self.bytes * (size - 1) // size


def axes(collective: Collective, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes over which a collective communicates: those along which the devices of its groups differ."""
    coordinates = np.array(np.unravel_index(np.array(collective.groups), mesh.devices.shape))
    differ = np.any(coordinates != coordinates[..., :1], axis=(1, 2))
    return tuple(name for name, along in zip(mesh.axis_names, differ, strict=True) if along)


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


Computations = dict[str, dict[str, Instruction]]
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program, in textual order; all branches of a conditional count.

    The TPU compiler writes a large reduce-scatter as a fusion named ``all-reduce-scatter`` around an all-reduce of the
    full array, and may merge two gathers. Its program covers one slice: transfers to other slices go through the host,
    after a reduction inside the slice or before a gather. A loop of unknown trip count counts once.
    """
    found = []
    computations, entry = parse(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo[: hlo.find("\n")])
    for instruction, computation, times, _ in executed(computations, entry):
        if instruction.opcode == "send" and "megascale_transfer_type" in instruction.rest:
            size = shape_bytes(computations[computation][instruction.operands[0]].shape)
            found.append(_between_slices(instruction.rest, size, int(partitions[1]) if partitions else 1, times))
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        groups = _groups(instruction.rest, int(partitions[1]) if partitions else 1)
        defined = computations[computation]
        size = sum(shape_bytes(defined[operand].shape) for operand in instruction.operands)
        size *= len(groups[0]) if kind == "all-gather" else 1
        found.append(Collective(kind, size, groups, times))
    return found


def _between_slices(attributes: str, size: int, devices: int, times: int) -> Collective:
    """A transfer of ``size`` bytes between the same devices of different slices, which are consecutive in the mesh:

    _xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"    for 2 slices of 8 devices each
    """
    kind = re.search(r'megascale_transfer_type="(\w+)"', attributes)[1].lower().replace("_", "-")
    target = re.search(r'megascale_target="\{([\d,]+)\}x', attributes)
    slices = target[1].count(",") + 1 if target else 2
    kind = "collective-permute" if kind == "one-to-one" else kind
    group = tuple(range(0, slices * devices, devices))
    return Collective(kind, size * (slices if kind == "all-gather" else 1), (group,), times)


def buffers(hlo: str) -> dict[str, int]:
    """{shape: bytes} of all arrays that a program writes to memory, such as ``f32[8,32]``, largest first.

    Includes arguments and results; excludes arrays inside a fusion, which are never written.
    """
    computations, entry = parse(hlo)
    shapes: dict[str, int] = {}
    for instruction, _, _, fused in executed(computations, entry):
        if not fused:
            shapes |= {
                match[0]: shape_bytes(match[0]) for match in _ARRAY.finditer(_without_layouts(instruction.shape))
            }
    return dict(sorted(shapes.items(), key=lambda item: -item[1]))


def parse(hlo: str) -> tuple[Computations, str]:
    """({computation: {name: instruction}}, name of the entry computation)."""
    computations: Computations = {}
    entry = current = ""
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and (start := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            shape, rest = _split(line[start.end() :])
            opcode, rest = rest.strip().split("(", 1)
            operands, rest = _split("(" + rest)
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            computations[current][start[1]] = Instruction(start[1], shape, opcode, names, operands + rest)
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """Splits after the first word, or after the parenthesized expression that ``text`` begins with."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and (character == " " or (character == ")" and text[0] == "(")):
            return text[: position + 1], text[position + 1 :]
    return text, ""


def executed(
    computations: Computations, name: str, times: int = 1, fused: bool = False
) -> Iterator[tuple[Instruction, str, int, bool]]:
    """(instruction, its computation, executions, whether inside a fusion) of all instructions called from ``name``."""
    for instruction in computations[name].values():
        yield instruction, name, times, fused
        repeat = _trip_count(instruction, computations, name) if instruction.opcode == "while" else 1
        called = re.findall(r"\b(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)", instruction.rest)
        for several in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
            called += re.findall(r"[\w.\-]+", several)
        if instruction.opcode == "call":
            called += re.findall(r"\bto_apply=%?([\w.\-]+)", instruction.rest)
        for inner in called:
            yield from executed(computations, inner, times * repeat, fused or instruction.opcode == "fusion")


def _trip_count(loop: Instruction, computations: Computations, outside: str) -> int:
    """The trip count that XLA states, or, in TPU programs, which omit it, the limit that the counter is compared with.

    The counter of a JAX scan starts at 0 and increases by 1. The result is 1 if the limit is not a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations[re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)[1]]
    compare = list(condition.values())[-1]
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return 1
    limit, defined = condition[compare.operands[1]], condition
    if limit.opcode == "get-tuple-element":  # carried through the loop, defined outside
        carried = computations[outside][loop.operands[0]].operands
        limit = computations[outside][carried[int(re.search(r"index=(\d+)", limit.rest)[1])]]
        defined = computations[outside]
    while limit.opcode == "copy":
        limit = defined[limit.operands[0]]
    return int(limit.rest.split(")")[0].strip("(")) if limit.opcode == "constant" else 1


def _groups(attributes: str, partitions: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices, in any notation of XLA:

    {{0,1},{2,3}}                        a list; {} means all devices
    [2,4]<=[4,2]T(1,0)                   an iota, reshaped, transposed and split into rows
    mesh['a'=2,'b'=4] {'a','b':(1)2}     axes of a mesh; the middle part of b, viewed as 1 x 2 x 2
    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}    the same, with devices in the order of an iota or a list
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}", attributes):
        groups = re.findall(r"\{([\d, ]+)\}", listed[1] or "")
        return tuple(tuple(map(int, group.split(","))) for group in groups) or (tuple(range(partitions)),)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        devices = _order(iota[2]).reshape(_numbers(iota[1]))
        return tuple(map(tuple, devices.tolist()))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", attributes):
        shape, along, size = [], [], 1
        parts = {name: part for name, *part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3])}
        for name, length in re.findall(r"'([^']+)'=(\d+)", mesh[1]):
            before, inner = (int(n) if n else None for n in parts.get(name, (None, None)))
            before, inner = before or 1, inner or int(length)
            if name in parts:
                along.append(len(shape) + 1)
                size *= inner
            shape += [before, inner, int(length) // before // inner]
        devices = (np.arange(math.prod(shape)) if mesh[2] is None else _order(mesh[2])).reshape(shape)
        devices = np.moveaxis(devices, along, range(-len(along), 0)).reshape(-1, size)
        return tuple(map(tuple, devices.tolist()))
    if "replica_groups=" in attributes:
        raise ValueError(f"cannot read {attributes[attributes.index('replica_groups=') :][:80]}")
    return (tuple(range(partitions)),)


def _order(text: str) -> np.ndarray:
    """int[devices] for ``[4,2]T(1,0)``, a 4 x 2 iota transposed, or for a list, ``3,0,2,1``."""
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = _numbers(iota[1])
        return np.arange(math.prod(shape)).reshape(shape).transpose(iota[2] and _numbers(iota[2])).reshape(-1)
    return np.array(_numbers(text))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _without_layouts(shape: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", shape)


def shape_bytes(shape: str) -> int:
    """The size of an array, or of all arrays of a tuple."""
    total = 0
    for kind, bits, dims in _ARRAY.findall(_without_layouts(shape)):
        width = int(bits) if bits else 8 * (kind == "pred")  # pred takes one byte; tokens take none
        total += -(-width * math.prod(map(int, filter(None, dims.split(",")))) // 8)
    return total
