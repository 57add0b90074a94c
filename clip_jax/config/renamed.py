"""Renamed settings: runs of earlier versions resume and load, and ``loss.*`` overrides still work."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "loss.name": "objectives.contrastive.loss",
    "loss.max_logit_scale": "objectives.contrastive.max_logit_scale",
}

EVERY = ("every_steps", "every_examples", "every_epochs")


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested settings of a ``run.json`` of any version under today's names."""
    values = dict(values)
    loss = values.pop("loss", None)
    if loss is not None:
        contrastive = {RENAMED[f"loss.{name}"].rpartition(".")[2]: value for name, value in loss.items()}
        values["objectives"] = {"contrastive": {"weight": 1.0, **contrastive}}
    if "heldout" in values.get("eval", {}) and not isinstance(values["eval"]["heldout"], Mapping):
        values["eval"] = _named_evaluations(values["eval"])
    objectives = dict(values.get("objectives", {}))
    if "captioning" in objectives:  # the pooling became a part of the image tower
        objectives["captioning"] = {k: v for k, v in objectives["captioning"].items() if k != "queries"}
        values["objectives"] = objectives
    values["eval"] = {name: dict(fields) for name, fields in values.get("eval", {}).items()}
    return values


def _named_evaluations(old: Mapping[str, Any]) -> dict[str, Any]:
    """There were two: held-out loss with retrieval, and zero-shot classification, on one schedule."""
    shared = {name: old[name] for name in ("batch_size", *EVERY) if name in old}
    named = {}
    if old["heldout"]:
        named[old.get("heldout_name", "heldout")] = shared | {"protocol": "retrieval", "source": old["heldout"]}
    if old.get("zero_shot"):
        zero_shot = {"protocol": "zero_shot", "source": old["zero_shot"], "templates": old["templates"]}
        named[old.get("zero_shot_name", "zero_shot")] = shared | zero_shot
    return named
