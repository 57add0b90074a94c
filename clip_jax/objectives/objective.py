"""What an objective is: a term of the training loss, with its views, parameters and state.

A term is either *across* the batch, a function of a few cached numbers of every row of the global batch (contrastive
losses), or *local*, a plain sum over rows (captioning, masked prediction, distillation by patches). The gradient code
knows only that split, and the split is all that exact micro-batches need: cached rows are computed in a first pass and
their gradients are pulled back in a second one; local terms are computed in the second pass alone.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int, Key

from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.views import View
from clip_jax.models.clip import CLIP, Architecture, Batch, Outputs, Params
from clip_jax.objectives.cost import Cost
from clip_jax.presets import Preprocess

Metrics = dict[str, Float[Array, ""]]
Sums = dict[str, Array]
"""Sums over rows; they add up over micro-batches."""
Embeddings = dict[str, Float[Array, "batch ..."]]
Settings = Mapping[str, Any]


Choose = Callable[[Params, Params, Any, Batch, Key[Array, "pairs"], int], tuple[Int[Array, "rows"], Metrics]]


class Rows(NamedTuple):
    """A micro-batch, as an objective's functions see it."""

    params: Params
    """All parameters, the objective's own under ``params["objectives"][name]``."""
    batch_stats: Params
    ema: Mapping[str, Params]
    aux: Any
    """The objective's auxiliary state, as it was before this step."""
    constants: Any
    """The objective's constants: a teacher's weights."""
    outputs: Outputs
    batch: Batch
    """The views, ``image`` normalized; what ``prepare`` added; ``row``, the number of each row in the global batch."""
    keys: Key[Array, "batch"]
    """One per row: a function of the seed, the step, the row and the objective's name."""


class Ema(NamedTuple):
    """An exponential moving average of parameters."""

    decay: float
    of: tuple[str, ...] = ("*",)
    """Patterns of the paths of the parameters that it has: ``image/*``."""


class Objective(NamedTuple):
    """One term of the loss, or a choice of the rows. Everything but one of ``across``, ``local`` and ``choose`` may be
    left out."""

    views: Mapping[str, View] = {}
    """Arrays of the batch besides the pair's."""
    init: Callable[[Key[Array, ""]], Params] = lambda key: {}
    """The objective's parameters, boxed with their logical axes."""
    init_aux: Callable[[], Any] = dict
    """The objective's auxiliary state: a running center, a queue."""
    prepare: Callable[[Batch], Batch] = lambda batch: {}
    """Rows to add to the global batch, made of inputs alone: weights that turn a mean into a sum."""
    embed: Callable[[Rows], Embeddings] = lambda rows: {}
    """The cached rows."""
    across: Callable[[Params, Embeddings, Batch, Mesh], tuple[Float[Array, ""], Metrics]] | None = None
    """The loss of the global batch from its cached rows, and metrics under the names that they are logged with."""
    local: Callable[[Rows], tuple[Float[Array, ""], Sums]] | None = None
    """A sum over rows. Scalars among the sums are logged as ``<objective>/<name>``."""
    update: Callable[[Any, Sums, Embeddings], Any] = lambda aux, sums, embeddings: aux
    """The auxiliary state after the step, from the sums and cached rows of the global batch."""
    ratio: int = 1
    """The stream's batch is this many times as large as the one that is trained on, which ``choose`` takes from it."""
    choose: Choose | None = None
    """(parameters, batch_stats, constants, larger batch, a key per pair, parts in which it is encoded) -> (rows of the
    larger batch to train on, metrics). At most one objective of a run has it."""
    constrain: Callable[[Params], Params] = lambda params: params
    """Projects the parameters after each update: a clamp."""
    cost: Callable[..., Cost] = lambda *, batch_size, micro_batches, mesh, slices: Cost()
    """The cost that a plan adds for the objective; see ``objectives/cost.py``."""
    emas: Mapping[str, Ema] = {}
    """EMAs of parameters that it reads, by name."""
    abstract_constants: Callable[[], Params] = dict
    """Shapes of the constants, boxed with their logical axes."""
    load_constants: Callable[[Any], Params] = lambda shardings: {}
    """The constants on the devices, given the sharding of each."""
    teachers: tuple[tuple[str, str], ...] = ()
    """(name, weights) of models whose parameters are the constants; ``training/teacher.py`` loads them."""
    constants_fingerprint: str = ""
    """Identifies stored embeddings, which take the place of constants; recorded in ``run.json``."""
    source_fingerprint: str = ""
    """That of the only training data that its views know."""


Make = Callable[[Settings, CLIP, Preprocess, Tokenizer | None], Objective]
"""Takes the full model, so that an objective can run a tower on its own views. The tokenizer is None in a plan."""


class ObjectiveSpec(NamedTuple):
    """An entry of ``OBJECTIVES``: the settings of an objective and the function that builds it from them."""

    make: Make
    defaults: Settings = MappingProxyType({})
    """The objective's settings besides ``weight``, each with its default."""
    weight: float = 0.0
    """The default of ``weight``; an objective of weight 0 is not part of a run."""
    choices: Mapping[str, tuple] = {}
    ranges: Mapping[str, tuple[float, float]] = {}
    adapt: Callable[[Settings, Architecture], Architecture] = lambda settings, architecture: architecture
    """Changes to the architecture that the objective needs: a bias, other initial values."""
    compares: bool = False
    """Contrasts the pairs of a batch, which must then have at least two."""
    needs_images: bool = True
    """Not trainable on stored embeddings of images."""
    needs_full_texts: bool = True
    """Not trainable on texts that are cut to a shorter length."""
    kind: str = ""
    """The kind of work under which a plan's profile counts its loss; empty: each operation by what it is."""


def row_weights(count: int) -> Float[Array, "batch"]:
    """Weights under which a sum over the rows of the global batch is their mean."""
    return jnp.full((count,), 1.0 / count, jnp.float32)


MeshLike = Mesh | AbstractMesh
