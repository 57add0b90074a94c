"""Where the time of a compiled TPU step goes: by part of the model and by kind of work, each with its own bound.

The compiler's cycles of each instruction (``cycles.py``) are sorted by the names that JAX gave the operations. A fusion
has one name although it may hold several operations: norms and biases that the compiler merged into a product count as
part of that product.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from clip_jax.objectives import OBJECTIVES
from clip_jax.planning.program import Computations, Instruction, shape_bytes, taps

PRODUCTS, KERNEL, SCORES, NORMS = "matrix products", "attention kernel", "attention scores", "norms"
COPIES, OPTIMIZER, ELEMENTS, COLLECTIVES = "saves and copies", "optimizer", "element-wise", "collectives"

_PARTS = {
    "ViT": "image tower",
    "ModifiedResNet": "image tower",
    "TextTransformer": "text tower",
    "Decoder": "decoder",
    "optimizer": "optimizer",
}
_OBJECTIVE = re.compile(r"objective\.(\w+)")
_LOSSES = {name: spec.kind for name, spec in OBJECTIVES.items() if spec.kind}
_MOVES = {
    "copy", "pad", "slice", "transpose", "reshape", "squeeze", "concatenate", "broadcast", "broadcast_in_dim",
    "dynamic_slice", "dynamic_update_slice",
}  # fmt: skip
_ARRAY = re.compile(r"\b[a-z]+\d+[a-z0-9]*\[([\d,]*)\](\{[^{}]*\})?")


class Share(NamedTuple):
    """The work of one part and kind in one execution of the program on one device."""

    part: str
    kind: str
    cycles: int
    flops: int
    """Matrix products only."""
    hbm_bytes: int
    """Read and written; arrays in the chip's fast memory do not count."""
    kernels: dict[str, int]
    """Executions of Pallas kernels by shapes, whose cycles are included once they are known (``with_kernels``)."""

    def bound(self, flops: float, bandwidth: float) -> float:
        """Seconds that the work needs at least, at a peak of FLOP/s and of bytes/s."""
        return max(self.flops / flops, self.hbm_bytes / bandwidth)


def merge(shares: Iterable[Share]) -> tuple[Share, ...]:
    """One share for each part and kind, the slowest first."""
    found: dict[tuple[str, str], Share] = {}
    for share in shares:
        key = share.part, share.kind
        if key not in found:
            found[key] = share
            continue
        old, kernels = found[key], dict(found[key].kernels)
        for shapes, times in share.kernels.items():
            kernels[shapes] = kernels.get(shapes, 0) + times
        sums = (getattr(old, name) + getattr(share, name) for name in ("cycles", "flops", "hbm_bytes"))
        found[key] = Share(*key, *sums, kernels)
    return tuple(sorted(found.values(), key=lambda share: -share.cycles))


def without_scores(shares: Sequence[Share]) -> list[Share]:
    """What is left of the attention outside its kernel is element-wise work: no scores are there."""
    fused = {share.part for share in shares if share.kind == KERNEL}
    return [s._replace(kind=ELEMENTS) if s.kind == SCORES and s.part in fused else s for s in shares]


def with_kernels(shares: Iterable[Share], each: dict[str, int]) -> tuple[Share, ...]:
    """The shares with the cycles of their kernels; ``each``: cycles of one execution, by shapes."""
    return merge(
        share._replace(cycles=share.cycles + sum(times * each[shapes] for shapes, times in share.kernels.items()))
        for share in shares
    )


def share(
    instruction: Instruction, computation: str, computations: Computations, times: int, cycles: int, kernel: str
) -> Share:
    """The share of one instruction outside fusions; ``kernel`` is the signature of a Pallas kernel or empty."""
    named = re.search(r'op_name="([^"]*)"', instruction.rest)
    name = named[1] if named else ""
    fused = re.search(r"\bcalls=%?([\w.\-]+)", instruction.rest)
    inside = computations[fused[1]] if fused else {instruction.name: instruction}
    defined = inside if fused else computations[computation]
    flops = _kernel_flops(kernel) if kernel else sum(_flops(each, defined) for each in inside.values())
    moved = _hbm_bytes(instruction, computations[computation], inside if fused else {})
    part = _part(name)
    kind = KERNEL if kernel else _kind(name, part, instruction.opcode, flops > 0)
    return Share(part, kind, cycles * times, flops * times, moved * times, {kernel: times} if kernel else {})


def _part(name: str) -> str:
    words = re.findall(r"[\w.]+", name)
    if "Decoder" in words:
        return _PARTS["Decoder"]
    for word in words:
        if word in _PARTS:
            return _PARTS[word]
        if objective := _OBJECTIVE.fullmatch(word):
            return objective[1]
    return "rest of the step"


def _kind(name: str, part: str, opcode: str, is_product: bool) -> str:
    words = name.split("/")
    if part == "optimizer":
        return OPTIMIZER
    if part in _LOSSES:
        return _LOSSES[part]
    if "bhqk" in name or ("attention" in words and "softmax" in name):
        return SCORES
    if is_product:
        return PRODUCTS
    if any(word.startswith("norm") for word in words):
        return NORMS
    if opcode.removesuffix("-start").removesuffix("-done") in _MOVES or words[-1] in _MOVES:
        return COPIES
    # What is left of the attention, but for its projections and their biases, works on scores.
    return SCORES if "attention" in words and "attention._project" not in words else ELEMENTS


def _kernel_flops(kernel: str) -> int:
    """2 products of queries x keys x width forward, 5 backward, by the number of arrays that the kernel writes."""
    arguments, results = (
        [[int(n) for n in dims.split(",")] for dims, _ in _ARRAY.findall(side)] for side in kernel.split("->")
    )
    if len(arguments) < 3 or any(len(dims) != 3 for dims in arguments[:2]):
        return 0
    batch, queries, width = arguments[0]
    return (4 if len(results) == 1 else 10) * batch * queries * arguments[1][1] * width


def _flops(instruction: Instruction, defined: dict[str, Instruction]) -> int:
    """FLOPs of a convolution, which is what the TPU compiler makes of every matrix product; 0 for all else."""
    if instruction.opcode != "convolution":
        return 0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    image, kernel = (_dims(defined[name].shape) for name in instruction.operands[:2])
    out = _dims(instruction.shape)
    sizes = {
        side: dict(zip(names, dims, strict=True))
        for side, names, dims in zip("ikw", labels.groups(), (image, kernel, out), strict=True)
    }
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or ("", ""))[1]))
    multiply_adds = sizes["w"]["b"] * sizes["w"]["f"] * sizes["k"]["i"]
    if grouped := re.search(r"batch_group_count=(\d+)", instruction.rest):
        multiply_adds //= int(grouped[1])
    for number, axis in enumerate(sorted(name for name in labels[3] if name.isdigit())):
        multiply_adds *= taps(
            sizes["w"][axis],
            sizes["k"][axis],
            sizes["i"][axis],
            stride=_axis(window, "stride", number, 1),
            padding=_axis(window, "pad", number, 0),
            dilation=_axis(window, "rhs_dilate", number, 1),
            holes=_axis(window, "lhs_dilate", number, 1),
        )
    return 2 * multiply_adds


def _axis(window: dict[str, str], name: str, number: int, default: int) -> int:
    return int(window[name].split("x")[number].split("_")[0]) if name in window else default


def _hbm_bytes(instruction: Instruction, defined: dict[str, Instruction], inside: dict[str, Instruction]) -> int:
    """Bytes of the operands and results in HBM; of an array that is updated or read in part, only that part."""
    shapes = [defined[name].shape for name in instruction.operands if name in defined]
    total = sum(_in_hbm(shape) for shape in (*shapes, instruction.shape))
    for each in inside.values():
        if each.opcode == "dynamic-update-slice":
            total += shape_bytes(inside[each.operands[1]].shape) - 2 * shape_bytes(each.shape)
        elif each.opcode in ("dynamic-slice", "gather") and inside[each.operands[0]].opcode == "parameter":
            total += shape_bytes(each.shape) - shape_bytes(inside[each.operands[0]].shape)
    return max(0, total)


def _in_hbm(shape: str) -> int:
    """``S(1)`` in a layout is the chip's fast memory."""
    return sum(shape_bytes(match[0]) for match in _ARRAY.finditer(shape) if "S(1)" not in (match[2] or ""))


def _dims(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(n) for n in found[1].split(",") if n]
