"""Self-distillation and masked prediction: the definition, what the student sees, and where the teacher comes from."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.data.sources.sample import Sample
from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.losses import prototypes
from clip_jax.models.clip import CLIP
from clip_jax.objectives import self_distillation
from clip_jax.objectives.self_distillation import NAME
from tests.models.test_clip import SMALL, params_of

ROWS, PATCHES = 3, SMALL.image.grid**2
SIZES = {"local_size": 16, "local_crops": 2, "prototypes": 24, "hidden": 20, "bottleneck": 12}


def case(**settings):
    """(model, settings, parameters with the heads, a batch of normalized crops)"""
    model, settings = CLIP(SMALL), {**self_distillation.SPEC.defaults, **SIZES, **settings}
    made = jax.jit(lambda key: nn.meta.unbox(self_distillation.init_params(model, settings, key)))(jax.random.key(1))
    rng, shapes = np.random.default_rng(0), self_distillation.view_shapes(settings, model)
    batch = {name: rng.normal(size=(ROWS, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return model, settings, params_of(model) | {"objectives": {NAME: made}}, batch | {"weight": np.full(ROWS, 1 / ROWS)}


def centers(settings):
    return {term: jnp.zeros(settings["prototypes"]) for term in self_distillation.terms(settings)}


def definition(student, teacher, ours, theirs, center, weights, temperature, teacher_temperature):
    """DINO's loss, with all logits at once."""
    p = jax.nn.softmax((teacher @ theirs - center) / teacher_temperature, axis=-1)
    log_q = jax.nn.log_softmax(student @ ours / temperature, axis=-1)
    return jnp.einsum("b,btk,btvk->", weights, p, -log_q) / student.shape[1] / student.shape[2]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_the_loss_in_chunks_equals_the_definition(mesh, monkeypatch):
    monkeypatch.setattr(prototypes, "CHUNK_LOGITS", 0)  # 8 targets at a time, and padding in the last chunk
    rng, batch, targets = np.random.default_rng(0), 8, 5
    shapes = ((batch, targets, 3, 6), (batch, targets, 6), (6, 10), (6, 10), (10,), (batch,))
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    student, teacher, ours, theirs, center, weights = arrays
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])

    def loss(student, ours):
        options = dict(temperature=0.5, teacher_temperature=0.3, mesh=mesh)
        found = prototypes.cross_entropy(student, teacher, (ours, theirs), center, weights, **options)
        return found.loss, found.logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(student, ours)
    expected = jax.value_and_grad(lambda s, o: definition(s, teacher, o, theirs, center, weights, 0.5, 0.3), (0, 1))
    wanted, wanted_gradients = expected(student, ours)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, np.einsum("b,btk->k", weights, teacher @ theirs) / targets, rtol=1e-4, atol=1e-5)


def test_a_student_that_equals_its_teacher_has_no_gradient_and_no_other_does():
    """Without a mask, and with one temperature; the local crops, which differ from the teacher's, are left out."""
    model, settings, params, batch = case(local=0.0, targets="all", mask_share=0.0, teacher_temperature=0.1)

    @jax.jit
    def gradient(params, teacher, image):
        crops = batch | {f"{NAME}/global": image}

        def loss(params):
            total, _ = self_distillation.distill(model, settings, params, teacher, centers(settings), crops, None)
            return total

        return jax.grad(loss)(params)

    def size(teacher):
        found = gradient(params, teacher, batch[f"{NAME}/global"])
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found))

    assert size(params) < 1e-3 * size(jax.tree.map(lambda leaf: leaf * 1.1, params))  # rounding


def test_an_empty_mask_and_all_targets_are_distillation_of_the_patches():
    model, settings, params, batch = case(local=0.0, masked=1.0, targets="all", mask_share=0.0)
    teacher = jax.tree.map(lambda leaf: leaf * 1.1, params)

    def patches(params):
        seen = model.image_features(params, batch[f"{NAME}/global"])[1]
        head = self_distillation.PrototypeHead(self_distillation.head_shape("masked", settings, model), model.compute)
        return head.apply({"params": params["objectives"][NAME]["masked_head"]}, seen)

    @jax.jit
    def both(params, teacher):
        (seen, ours), (taught, theirs) = patches(params), patches(teacher)
        expected = definition(seen[:, :, None], taught, ours, theirs, 0.0, batch["weight"], 0.1, 0.04)
        found, _ = self_distillation.distill(model, settings, params, teacher, centers(settings), batch, None)
        return found, expected

    found, expected = both(params, teacher)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("targets", ["masked", "all"])
def test_the_student_sees_no_masked_patch_whichever_patches_count(targets):
    model, settings, params, batch = case(local=0.0, masked=1.0, targets=targets)
    masked = np.stack([np.random.default_rng(row).permutation(PATCHES)[: PATCHES // 2] for row in range(ROWS)])

    @jax.jit
    def student(params, teacher, image):
        """The student's loss where the teacher sees the plain crop, or what reaches the student of its own."""
        original = model.image_features

        def features(self, given, pixels, *mask):
            return original(given, image if mask else pixels, *mask)

        patched = type("Patched", (CLIP,), {"image_features": features})(model.architecture, model.compute)
        crops = batch | {f"{NAME}/global": batch[f"{NAME}/global"]}
        return self_distillation.distill(patched, settings, params, teacher, centers(settings), crops, masked)[0]

    image, side, patch = batch[f"{NAME}/global"], SMALL.image.grid, SMALL.image.patch_size
    hidden = np.zeros((ROWS, PATCHES), bool)
    np.put_along_axis(hidden, masked, True, axis=1)
    pixels = np.kron(hidden.reshape(ROWS, side, side), np.ones((patch, patch))).astype(bool)[..., None]
    plain = student(params, params, image)
    assert float(student(params, params, np.where(pixels, 9.0, image))) == float(plain)
    assert abs(float(student(params, params, np.where(pixels, image, 9.0))) - float(plain)) > 1e-3


def test_the_mask_is_half_of_the_patches_and_differs_by_key():
    model, settings, _, _ = case()
    masked = np.asarray(self_distillation.mask_patches(jax.random.split(jax.random.key(0), 64), settings, model))
    assert masked.shape == (64, PATCHES // 2) and all(len(set(row)) == PATCHES // 2 for row in masked.tolist())
    counts = np.bincount(masked.ravel(), minlength=PATCHES)
    assert counts.min() > 16 and counts.max() < 48  # 32 expected


def test_the_teacher_is_an_average_of_the_tower_or_of_the_heads_alone_and_the_center_follows_it():
    model, settings, _, _ = case()
    whole = self_distillation.make(settings, model, presets.HALF, None)
    heads = self_distillation.make(settings | {"teacher": "head"}, model, presets.HALF, None)
    assert "image/*" in whole.emas[NAME].of and "image/*" not in heads.emas[NAME].of
    assert whole.emas[NAME].decay == 0.996
    aux = whole.update({"local": np.ones(2)}, {"local_center": np.asarray([3.0, 1.0])}, {})
    np.testing.assert_allclose(aux["local"], [0.9 + 0.3, 1.0])


def test_crops_of_the_view_are_parts_of_the_image():
    model, settings, _, _ = case(jitter=(), gray=0.0)
    image = np.zeros((80, 60, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(80)[:, None] * 3, np.arange(60) * 4
    view = self_distillation.view(settings, model, presets.HALF)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in view.arrays.items()}
    view.fill(Sample(image, ("a",), "key"), np.random.default_rng(0), arrays)
    spans = [np.ptp(crop[..., 0].astype(int)) for crop in arrays[f"{NAME}/local"]]
    assert max(spans) < np.ptp(arrays[f"{NAME}/global"][..., 0].astype(int)) and len(set(spans)) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"local": 0.0, "masked": 0.0}, "both 0"),
        ({"local_size": 7}, "smaller than a patch"),
        ({"mask_share": 0.0}, "masks no patch"),
        ({"local_scale": (0.5, 0.4)}, "two areas"),
        ({"jitter": (0.4, 0.4)}, "brightness, contrast"),
    ],
)
def test_settings_that_make_no_sense_are_reported(settings, said):
    with pytest.raises(UserError, match=said):
        self_distillation.make(
            {**self_distillation.SPEC.defaults, **SIZES, **settings}, CLIP(SMALL), presets.HALF, None
        )
