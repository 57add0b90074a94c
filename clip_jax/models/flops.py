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


def repeated(tower: Transformer, remat: str, *, fused: bool) -> int:
    """FLOPs that rematerialization repeats in the backward pass of all blocks of a tower for one example.

    ``full`` repeats a block except its last product, which no gradient needs; ``dots`` saves the products with weights
    and repeats the attention's own two products; ``named`` and ``offload`` save the attention's inputs and output, and
    repeat its logits and the layers after it. A ``fused`` kernel computes its logits once more than XLA.
    """
    tokens, width = tower.tokens, tower.width
    logits = product(tokens, width, times=tokens)
    after = product(width, width + (2 if tower.block.swiglu else 1) * tower.mlp_width, times=tokens)
    queries_keys_values = product(width, 3 * width, times=tokens)
    once = {
        "none": 0,
        "dots": 2 * logits,
        "named": logits + after,
        "offload": logits + after,
        "full": 2 * logits + queries_keys_values + after,
    }[remat]
    return tower.layers * (once + logits * fused)


def forward(architecture) -> dict[str, int]:
    """FLOPs of one forward pass for one pair, by tower, without the loss."""
    image, text, embed_dim = architecture.image, architecture.text, architecture.embed_dim
    return {"image": image.forward_flops(embed_dim), "text": text.forward_flops(embed_dim)}


def training(architecture, frozen: Collection[str] = ()) -> int:
    """FLOPs of one training pair, forward and backward (three forward passes), without recomputation.

    ``frozen`` towers have no backward pass.
    """
    return sum((1 if tower in frozen else 3) * count for tower, count in forward(architecture).items())
