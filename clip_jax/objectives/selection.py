"""Active selection: each step trains on those pairs of a larger batch from which the model has most to learn.

    S_ij = loss_ij(model) - loss_ij(reference)              (learnability: JEST, Evans et al. 2024, arXiv 2406.17711)
    rows = {}
    repeat ``chunks`` times:
        gain_i = S_ii + sum_{j in rows} (S_ij + S_ji)                    for each i not in rows
        rows += batch_size / chunks rows, drawn without replacement with probability softmax(gain)

``loss_ij`` is the sigmoid loss of image i and text j, and ``gain_i`` is what row i adds to the sum of S over the
selected rows. ACID (Udandarao et al. 2024, arXiv 2411.18674) finishes the training of small models in this way, with a
larger model as the reference. The objective has no loss of its own: any ``weight`` above 0 turns it on. S is never
materialized: a device computes the entries of its rows with one chunk at a time. Each draw is a top-k of the gains plus
Gumbel noise, from one random key per row.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices.sharding import batch_shards, join_batch, replicated, split_batch, split_rows
from clip_jax.errors import UserError
from clip_jax.models import flops
from clip_jax.models.clip import CLIP, Batch, Params
from clip_jax.objectives.cost import Cost, Transfer
from clip_jax.objectives.distillation import check_inputs, normalized_as
from clip_jax.objectives.objective import MeshLike, Metrics, Objective, ObjectiveSpec, Settings
from clip_jax.presets import Preprocess, Preset, preset

NAME = "selection"
Scored = tuple[Float[Array, "pairs dim"], Float[Array, "pairs dim"], Float[Array, ""], Float[Array, ""]]
"""A model's embeddings of images and of texts, of unit length; its scale and bias."""


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    name, weights = settings["reference"], settings["reference_weights"]
    if not name or not weights:
        raise UserError(
            f"config.objectives.{NAME}: reference is a model's name, such as ViT-SO400M/16-SigLIP2-256, and "
            "reference_weights its weights: a folder, a file or hf://org/name"
        )
    return from_reference(settings, preset(name), model, preprocess)._replace(teachers=((name, weights),))


def from_reference(settings: Settings, reference: Preset, model: CLIP, preprocess: Preprocess) -> Objective:
    """The objective for a reference's architecture."""
    check_inputs(f"config.objectives.{NAME}.reference", reference, model)
    for whose, architecture in (("model", model.architecture), (f"{NAME}.reference", reference.architecture)):
        if architecture.init_logit_bias is None:
            raise UserError(f"config.objectives.{NAME}: {whose} has no bias: pairs are scored by the sigmoid loss")
    judge = CLIP(reference.architecture, model.compute)

    def choose(
        params: Params, batch_stats: Params, constants: Params, batch: Batch, keys: Key[Array, "pairs"], parts: int
    ) -> tuple[Int[Array, "rows"], Metrics]:
        mesh, ratio, teacher = model.compute.mesh, settings["ratio"], constants["0"]
        inputs = jax.tree.map(lambda x: split_batch(x, parts, mesh), {name: batch[name] for name in ("image", "text")})

        def embed(_: None, part: Batch) -> tuple[None, tuple[Array, ...]]:
            image = preprocess.normalize(part["image"])
            ours = model.forward(params, batch_stats, {"image": image, "text": part["text"]}, train=False)
            pair = {"image": normalized_as(reference, image, preprocess), "text": part["text"]}
            theirs = judge.forward(teacher["params"], teacher["batch_stats"], pair, train=False)
            return None, (ours.image, ours.text, theirs.image, theirs.text)

        _, embedded = jax.lax.scan(embed, None, inputs)
        embedded = jax.tree.map(lambda x: join_batch(x, mesh), embedded)
        scored = [
            (*embedded[start : start + 2], jnp.exp(tree["logit_scale"]), tree["logit_bias"])
            for start, tree in ((0, params), (2, teacher["params"]))
        ]
        return select(*scored, keys, ratio=ratio, chunks=settings["chunks"], mesh=mesh)

    def abstract_constants() -> Params:
        params = jax.eval_shape(judge.init, jax.random.key(0))
        params = {name: params[name] for name in ("image", "text", "logit_scale", "logit_bias")}
        return {"0": {"params": params, "batch_stats": jax.eval_shape(judge.init_batch_stats)}}

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        return _cost(settings, model, judge, batch_size, micro_batches, mesh)

    return Objective(ratio=settings["ratio"], choose=choose, cost=cost, abstract_constants=abstract_constants)


def select(
    learner: Scored, reference: Scored, keys: Key[Array, "pairs"], *, ratio: int, chunks: int, mesh: Mesh
) -> tuple[Int[Array, "rows"], Metrics]:
    """Selects ``pairs / ratio`` rows (see the module docstring); returns them and the mean S_ii of all and of these."""
    pairs = len(keys)
    size, left = divmod(pairs // ratio, chunks)
    if left:
        raise UserError(
            f"config.objectives.{NAME}.chunks={chunks} does not divide config.batch_size={pairs // ratio}; "
            "choose one that does"
        )
    models = (learner, reference)
    everywhere = replicated(mesh)

    def negatives(of: Scored, rows: Array, columns: Array) -> Array:
        """The sum over the columns of each row's loss with them as negatives."""
        return jnp.sum(jax.nn.softplus(of[2] * rows @ columns.T + of[3]), axis=1)

    def own(of: Scored) -> Array:
        logits = of[2] * jnp.sum(of[0] * of[1], axis=-1) + of[3]
        return jax.nn.softplus(-logits)

    scores = split_rows(own(learner) - own(reference), mesh)

    def draw(carry: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], Array]:
        gains, taken = carry
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, chunk)))(keys)
        chosen = jax.lax.top_k(jnp.where(taken, -jnp.inf, gains + noise), size)[1]
        chosen = jax.lax.with_sharding_constraint(chosen, everywhere)
        for of, sign in zip(models, (1.0, -1.0), strict=True):
            image, text = (jax.lax.with_sharding_constraint(x[chosen], everywhere) for x in of[:2])
            gains = gains + sign * (negatives(of, of[0], text) + negatives(of, of[1], image))  # S_ij + S_ji
        return (split_rows(gains, mesh), split_rows(taken.at[chosen].set(True), mesh)), chosen

    nothing = split_rows(jnp.zeros(pairs, bool), mesh)
    _, rows = jax.lax.scan(draw, (scores, nothing), jnp.arange(chunks))
    rows = rows.reshape(-1)
    return rows, {f"{NAME}/all": jnp.mean(scores), f"{NAME}/selected": jnp.mean(scores[rows])}


def _cost(settings: Settings, model: CLIP, judge: CLIP, batch_size: int, micro_batches: int, mesh: MeshLike) -> Cost:
    """Both models' forward passes over the larger batch; four products of its embeddings with those of the rows; the
    rows' pixels and tokens, which come from other devices; weights gathered along fsdp for each part."""
    shards, tensor, fsdp = batch_shards(mesh), mesh.shape["tensor"], mesh.shape["fsdp"]
    pairs, parts = settings["ratio"] * batch_size // shards, settings["ratio"] * micro_batches
    models = [each.architecture for each in (model, judge)]
    forward = sum(sum(flops.forward(each).values()) for each in models)
    products = sum(2 * flops.product(each.embed_dim, batch_size) for each in models)
    image, text = model.architecture.image, model.architecture.text
    row = image.image_size**2 * 3 + 4 * text.context_length
    weights = sum(
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(each.init, jax.random.key(0))))
        for each in (model, judge)
    )
    gathered = parts * weights * jnp.dtype(model.compute.dtype).itemsize // tensor * (fsdp - 1) // fsdp
    transfers = (
        Transfer("selected pairs", batch_size * row * (shards - 1) // shards),
        Transfer("weights for the scores", gathered),
    )
    return Cost(
        flops=pairs * (forward // tensor + products),
        working=4 * 3 * pairs * (batch_size // settings["chunks"]),
        transfers=tuple(transfer for transfer in transfers if transfer.ici_bytes),
    )


SPEC = ObjectiveSpec(
    make=make,
    defaults={
        "ratio": 2,  # the larger batch is this many times the batch (SigLIP 2: 2 for B/16, 4 for B/32)
        "chunks": 16,  # parts in which the batch is drawn
        "reference": "",  # the name of the reference's model: ViT-SO400M/16-SigLIP2-256
        "reference_weights": "",  # a run folder, a weights file or hf://org/name, like model.init_from
    },
    ranges={"ratio": (2, 1000), "chunks": (1, 100_000)},
)
