"""An objective of thirty lines: a second crop's embedding is pulled to a linear map of the image's, away from a center.

It has a parameter, a running center and a view on which it runs the image tower.
"""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.data import images
from clip_jax.data.views import View
from clip_jax.devices.sharding import batch_shards
from clip_jax.models.clip import unit
from clip_jax.objectives.cost import Cost
from clip_jax.objectives.objective import Objective, ObjectiveSpec, row_weights


def make(settings, model, preprocess, tokenizer):
    architecture, size, dim = model.architecture, model.architecture.image.image_size, model.architecture.embed_dim

    def fill(sample, rng, arrays):
        arrays["crop"][:] = images.random_resized_crop(sample.image, size, rng, scale=(0.3, 0.6)).pixels

    def init(key):
        return {"kernel": nn.LogicallyPartitioned(0.1 * jax.random.normal(key, (dim, dim)), ("embed", "joint"))}

    def local(rows):
        crop = unit(model.encode_image(rows.params, preprocess.normalize(rows.batch["crop"]), rows.batch_stats))
        noise = jax.vmap(lambda key: jax.random.normal(key, (dim,)))(rows.keys)
        target = rows.outputs.image @ rows.params["objectives"]["dummy"]["kernel"] - rows.aux["center"]
        distances = jnp.sum((crop + 0.01 * noise - target) ** 2, axis=-1)
        sums = {"center": jnp.sum(crop, axis=0), "rows": jnp.float32(len(crop))}
        return jnp.sum(rows.batch["dummy/weight"] * distances), sums

    def cost(*, batch_size, micro_batches, mesh, slices):
        pairs, passes = batch_size // batch_shards(mesh), 3  # forward and backward; pass 1 of micro-batches has no part
        flops = pairs * passes * (architecture.image.forward_flops(dim) + 2 * dim * dim)
        return Cost(flops=flops, activations=image_tower_bytes(model, pairs // micro_batches))

    return Objective(
        views={"crop": View({"crop": ((size, size, 3), np.dtype(np.uint8))}, fill)},
        init=init,
        init_aux=lambda: {"center": jnp.zeros(dim)},
        prepare=lambda batch: {"dummy/weight": row_weights(len(batch["crop"]))},
        local=local,
        update=lambda aux, sums, cached: {"center": 0.9 * aux["center"] + 0.1 * sums["center"] / sums["rows"]},
        cost=cost,
    )


def image_tower_bytes(model, pairs):
    """Saved for the backward pass of the image tower: the difference between twice as many images and as many."""
    model = replace(model, compute=model.compute._replace(mesh=None))
    side = model.architecture.image.image_size
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))

    def residuals(images):
        pixels = jax.ShapeDtypeStruct((images, side, side, 3), jnp.float32)
        backward = jax.eval_shape(lambda p, x: jax.vjp(lambda p: model.encode_image(p, x), p)[1], params, pixels)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    return residuals(2 * pairs) - residuals(pairs)


SPEC = ObjectiveSpec(make, weight=0.5, defaults={"unused": 1})
