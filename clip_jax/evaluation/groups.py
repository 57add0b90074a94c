"""The accuracy of the worst group of images: by region, country or income, on sets that give them for each image.

For each column of groups, top-1 (and top-5) over the images of each group; ``worst_region_top1`` is the lowest of them.
A group without images does not count. The main metrics of DataComp (Gadre et al. 2023, table 20):

- FMoW (Koh et al. 2021, WILDS): the worst region's top-1, without the images whose region is "Other".
- Dollar Street (Rojas et al. 2022): the worst income group's top-5; GeoDE (Ramaswamy et al. 2023): the worst region's
  top-1.

Trap: the minimum over small groups is low by chance alone; the table of a report has the number of images of each.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from clip_jax.evaluation.zero_shot import Judged


class Grouping(NamedTuple):
    """The meaning of the columns of an image's array."""

    columns: tuple[str, ...]
    """Those of the first columns; further ones are not used."""
    left_out: Mapping[str, int] = {}
    """Column -> a group that is none."""


SETS = {
    "wilds-fmow": Grouping(("region", "year"), {"region": 5}),
    "dollar_street": Grouping(("income", "income_of_the_metadata", "region")),
    "geode": Grouping(("region", "country")),
}
"""Sets in DataComp's layout: https://huggingface.co/datasets/djghosh/wds_geode_test, for example."""


def worst(
    judged: Judged, groups: Int[np.ndarray, "images columns"], grouping: Grouping
) -> tuple[dict[str, float | None], list[tuple[str, float, int]]]:
    """(``worst_COLUMN_top1`` and ``_top5``, [(``COLUMN GROUP``, top-1, images), ...]).

    Top-5 is None below five classes, and both are None where no image is in a group.
    """
    metrics: dict[str, float | None] = {}
    by_group = []
    for column, name in enumerate(grouping.columns):
        values = groups[:, column]
        present = [int(g) for g in np.unique(values) if g != grouping.left_out.get(name)]
        for k in (1, 5):
            hits = judged.hits(k)
            found = [float(hits[values == group].mean()) for group in present]
            metrics[f"worst_{name}_top{k}"] = min(found) if found and k <= judged.classes else None
            if k == 1:
                counts = [int((values == group).sum()) for group in present]
                by_group += [(f"{name} {g}", hit, n) for g, hit, n in zip(present, found, counts, strict=True)]
    return metrics, by_group
