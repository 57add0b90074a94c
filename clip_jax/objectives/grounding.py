"""Grounded captions: the captioning decoder names the region in a box, and finds the box that a text refers to.

    refer:    "ARef: {text} : {box}"      the box from the text (Wan et al. 2024, LocCa, section 3.2; SigLIP 2)
    describe: "GCap: {box} : {text}"      the text from the box
    loss = mean over both tasks and all regions of the mean over a text's tokens of
           -log p(token t | tokens before t, image), without the tokens of the task's name

A box is written as four integers in 0..500: left, top, right and bottom in the image of the pair, after its crop. Each
image takes part with one of its boxes, chosen at random; those without boxes, and texts that are too long, have no
weight. The decoder and its vocabulary are those of captioning, which must be on.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clip_jax.data.sources.boxes import Sides
from clip_jax.data.sources.sample import Sample
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.views import Arrays, View
from clip_jax.errors import UserError
from clip_jax.losses.vocabulary import cross_entropy
from clip_jax.models.clip import CLIP, Batch
from clip_jax.objectives import captioning
from clip_jax.objectives.cost import Cost
from clip_jax.objectives.objective import MeshLike, Objective, ObjectiveSpec, Rows, Settings, Sums
from clip_jax.presets import Preprocess

NAME = "grounding"
SCALE = 500
TASKS = {"refer": "ARef:", "describe": "GCap:"}


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    decoder, length = model.architecture.decoder, model.architecture.text.context_length
    if decoder is None or decoder.form != "cappa":
        raise UserError(
            f"config.objectives.{NAME}: needs a decoder with a token embedding of its own: give "
            "objectives.captioning a weight, and a model whose text tower is not causal (SigLIP)"
        )
    named = {} if tokenizer is None else {task: name_length(name, tokenizer) for task, name in TASKS.items()}

    def fill(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        boxes = sample.extras.get("boxes", ())
        arrays["region"][:] = arrays["region_name"][:] = arrays["has_region"][:] = 0
        if not boxes:
            return
        region = boxes[int(rng.integers(len(boxes)))]
        arrays["region"][:] = tokenizer([write(task, region.sides, region.text) for task in TASKS])
        arrays["region_name"][:] = [named[task] for task in TASKS]
        # A text that fills its row may have lost the end of its box.
        arrays["has_region"][:] = np.all(np.argmax(arrays["region"] == tokenizer.end_id, axis=1) < length - 1)

    def prepare(batch: Batch) -> Batch:
        text, named = batch["region"], batch["region_name"][..., None]
        within = captioning.caption_mask(text.reshape(-1, length), model.architecture.text).reshape(text.shape)
        counted = within & (jnp.arange(length) >= named) & batch["has_region"][..., None]
        regions = len(TASKS) * jnp.maximum(jnp.sum(batch["has_region"]), 1)
        tokens = jnp.maximum(jnp.sum(counted, axis=2, keepdims=True), 1)
        return {f"{NAME}/weight": counted.astype(jnp.float32) / tokens / regions}

    def local(rows: Rows) -> tuple[Float[Array, ""], Sums]:
        total, sums = jnp.zeros(()), {}
        for number, task in enumerate(TASKS):
            text, weights = rows.batch["region"][:, number], rows.batch[f"{NAME}/weight"][:, number]
            none = jnp.zeros(len(text), bool) if decoder.parallel else None
            hidden, head, bias = model.decode(rows.params, rows.outputs.tokens, rows.outputs.patches, text, none)
            loss, right = cross_entropy(hidden, head, text, weights, model.compute.mesh, bias)
            total, sums = total + loss, sums | {task: len(TASKS) * loss, f"{task}_accuracy": len(TASKS) * right}
        return total, sums

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        """Two captions per image."""
        one = captioning.make({"parallel": 0.0}, model, preprocess, None)
        cost = one.cost(batch_size=batch_size, micro_batches=micro_batches, mesh=mesh, slices=slices)
        return cost._replace(flops=len(TASKS) * cost.flops, activations=len(TASKS) * cost.activations)

    arrays = {
        "region": ((len(TASKS), length), np.dtype(np.int32)),
        "region_name": ((len(TASKS),), np.dtype(np.int32)),
        "has_region": ((1,), np.dtype(bool)),
    }
    return Objective(views={NAME: View(arrays, fill)}, prepare=prepare, local=local, cost=cost)


def write(task: str, sides: Sides, text: str) -> str:
    """The text of a task."""
    box = " ".join(str(round(SCALE * side)) for side in sides)
    return f"{prompt(text)} {box}" if task == "refer" else f"{TASKS[task]} {box} : {text}"


def prompt(text: str) -> str:
    """The beginning of a text of the task ``refer``, which its box completes."""
    return f"{TASKS['refer']} {text} :"


def read_box(text: str) -> Sides | None:
    """The box at the end of a text of the task ``refer``; None where there is none."""
    words = text.rpartition(":")[2].split()
    if len(words) != 4 or not all(word.isdigit() for word in words):
        return None
    return tuple(min(int(word) / SCALE, 1.0) for word in words)


def name_length(name: str, tokenizer: Tokenizer) -> int:
    """The number of tokens of a task's name, those that do not depend on what follows."""
    one, other = tokenizer([f"{name} a", f"{name} 7"])
    return int(np.argmax(one != other))


SPEC = ObjectiveSpec(make=make)
