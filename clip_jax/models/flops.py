"""Floating-point operations of a model: matrix products only, a multiply-add counted as two.

Each tower's config counts its own (``forward_flops``); this module has the parts that they share.
"""

from collections.abc import Collection
from typing import Protocol


class Transformer(Protocol):
    """What ``blocks`` reads of a tower."""

    tokens: int
    width: int
    layers: int
    mlp_width: int
    block: "object"


def product(rows: int, columns: int, times: int = 1) -> int:
    """FLOPs of ``times`` vectors multiplied by a matrix."""
    return 2 * times * rows * columns


def blocks(tower: Transformer) -> int:
    """Forward FLOPs of all blocks of a tower for one example."""
    tokens, width = tower.tokens, tower.width
    mlp_matrices = 3 if tower.block.swiglu else 2
    projections = product(width, 4 * width + mlp_matrices * tower.mlp_width, times=tokens)
    attention = 2 * product(tokens, width, times=tokens)  # logits and values, without the causal mask: all are computed
    return tower.layers * (projections + attention)


def forward(architecture) -> dict[str, int]:
    """FLOPs of one forward pass for one pair, by tower, without the loss."""
    image, text, embed_dim = architecture.image, architecture.text, architecture.embed_dim
    return {"image": image.forward_flops(embed_dim), "text": text.forward_flops(embed_dim)}


def training(architecture, frozen: Collection[str] = ()) -> int:
    """FLOPs of one training pair, forward and backward (three forward passes), without recomputation.

    ``frozen`` towers have no backward pass.
    """
    return sum((1 if tower in frozen else 3) * count for tower, count in forward(architecture).items())
