"""The families beside CLIP's ViT: sizes as published, and properties that hold without a peer.

That their numbers equal OpenCLIP's is in ``tests/parity/test_architectures.py``.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import presets
from clip_jax.devices import sharding
from clip_jax.errors import UserError
from clip_jax.models import flops
from clip_jax.models.clip import CLIP, Architecture, parameter_counts
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.transformer import rotate
from clip_jax.models.vit import ImageTower, rotary_angles
from tests.models.test_clip import batch_of, computed, params_of

TEXT = TextTower(12, 100, 48, 2, 2, 192)
IMAGE = ImageTower(32, 8, 64, 3, 2, 256)
RESNET = Architecture(ResNetTower(64, (2, 1, 3, 1), 16, 8), TEXT, 40)

# Parameters of the image tower and in all: counted by OpenCLIP 3.3 and timm 1.0.31 for their models of these names.
PARAMETERS = {
    "RN50": (38_316_896, 102_007_137),
    "RN101": (56_259_936, 119_688_033),
    "RN50x4": (87_137_080, 178_300_601),
    "RN50x16": (167_328_912, 290_979_217),
    "RN50x64": (420_380_352, 623_258_305),
    "ViT-S/32": (22_641_792, 63_085_825),
    "ViT-S/16": (21_813_504, 62_257_537),
    "ViT-M/32": (39_691_776, 103_119_873),
    "ViT-M/16": (38_587_392, 102_015_489),
    "ViT-B/16-plus-240": (117_213_824, 208_377_345),
    "ViT-L/16": (304_089_088, 427_739_393),
    "ViT-L/14-336": (304_293_888, 427_944_193),
    "ViT-H/14": (632_076_800, 986_109_441),
    "ViT-g/14": (1_012_645_632, 1_366_678_273),
    "ViT-bigG/14": (1_844_907_264, 2_539_567_105),
    "ViT-e/14": (3_807_716_864, 4_581_086_465),
    "ViT-L/14-CLIPA": (303_964_160, 414_210_561),
    "ViT-H/14-CLIPA-336": (632_483_840, 968_644_609),
    "ViT-B/16-SigLIP": (92_884_224, 203_155_970),
    "ViT-L/16-SigLIP-384": (316_283_904, 652_478_466),
    "ViT-SO400M/14-SigLIP": (427_680_704, 877_360_306),
    "ViT-SO400M/16-SigLIP-i18n-256": (427_888_064, 1_127_430_706),
    "ViT-B/32-SigLIP2-256": (94_552_320, 376_856_066),
    "ViT-gopt/16-SigLIP2-384": (1_163_659_776, 1_871_885_426),
    "EVA02-B/16": (86_263_040, 149_691_137),
    "EVA02-L/14-336": (304_432_832, 428_083_137),
    "EVA02-E/14": (4_350_556_928, 4_704_589_569),
    "EVA02-E/14-plus": (4_350_556_928, 5_044_889_089),
}

# Forward GFLOPs of the image tower: OpenCLIP's model profile. For the ResNets it counts the attention pooling of all
# tokens, though one is used: 3 to 5 % of RN50 and RN50x4.
GFLOPS = {"RN50": 12.2, "RN50x4": 42.6, "RN50x64": 529.1, "ViT-H/14": 334.6, "ViT-g/14": 534.1, "ViT-bigG/14": 967.5}


def inputs(batch=4, size=32):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    return jnp.asarray(image), jnp.asarray(rng.integers(0, 100, (batch, 12)), jnp.int32)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_the_peers(name):
    architecture = presets.preset(name).architecture
    counts = parameter_counts(jax.eval_shape(CLIP(architecture).init, jax.random.key(0)))
    assert (counts["image"], counts["total"]) == PARAMETERS[name]


@pytest.mark.parametrize("name", GFLOPS)
def test_flops_are_the_published_ones(name):
    assert flops.forward(presets.preset(name).architecture)["image"] / 1e9 == pytest.approx(GFLOPS[name], rel=0.055)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_survives_json(name):
    preset = presets.preset(name)
    assert presets.from_json(json.loads(json.dumps(presets.to_json(preset)))) == preset


def test_a_run_folder_from_before_these_families_still_loads():
    tower = {"width": 64, "layers": 3, "heads": 2, "mlp_width": 256, "activation": "gelu"}
    image, text = {"image_size": 32, "patch_size": 8, **tower}, {"context_length": 12, "vocab_size": 100, **tower}
    architecture = {"image": image, "text": text, "embed_dim": 40, "init_logit_scale": 2.0}
    values = {"architecture": architecture, "preprocess": presets.HALF._asdict(), "tokenizer": "clip"}
    assert presets.from_json(values).architecture.image == IMAGE


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_run_folder_from_before_the_init_of_a_tower_was_saved_keeps_it(name):
    preset = presets.preset(name)
    values = json.loads(json.dumps(presets.to_json(preset)))
    values["architecture"]["image"].pop("init", None)
    assert presets.from_json(values) == preset


def test_initial_values_are_those_of_the_named_family():
    images = {name: presets.preset(name).architecture.image for name in presets.PRESETS if not name.startswith("RN")}
    families = {name: "timm" if "SigLIP" in name else "eva" if name.startswith("EVA") else "clip" for name in images}
    assert {name: image.init for name, image in images.items()} == families


def test_names_are_accepted_as_openai_and_openclip_write_them():
    assert presets.preset("ViT-L/14@336px") == presets.preset("ViT-L-14-336") == presets.preset("ViT-L/14-336")
    assert presets.preset("RN50-quickgelu").architecture.text.activation == "quick_gelu"
    with pytest.raises(UserError, match=r"nearest: ViT-H/14"):
        presets.preset("ViT-H/15")


def test_logit_bias_is_a_parameter_only_where_there_is_one():
    params = params_of(CLIP(Architecture(IMAGE, TEXT, 40, init_logit_bias=-10.0)))
    assert float(params["logit_bias"]) == -10
    assert "logit_bias" not in params_of(CLIP(Architecture(IMAGE, TEXT, 40)))


def test_patch_dropout_leaves_patches_out_in_training_only():
    architecture, (image, text) = Architecture(IMAGE, TEXT, 40), inputs()
    clip, keys = CLIP(architecture), jax.random.split(jax.random.key(0), 4)
    params = params_of(clip)

    def outputs(train, patch_dropout, keys=keys):
        options = {"train": train, "keys": keys, "patch_dropout": patch_dropout}
        return jax.tree.map(np.asarray, clip.forward(params, {}, batch_of(image, text), **options))

    whole = outputs(True, 0.0).image
    np.testing.assert_array_equal(outputs(False, 0.5).image, whole)
    dropped = outputs(True, 0.5)
    np.testing.assert_array_equal(outputs(True, 0.5).image, dropped.image)
    assert not np.allclose(dropped.image, whole, atol=1e-3)
    assert not np.allclose(dropped.image, outputs(True, 0.5, jax.random.split(jax.random.key(1), 4)).image, atol=1e-3)
    assert dropped.patches.shape == (4, 1 + 8, 64)  # the class token and half of 16 patches


@pytest.mark.slow
def test_patch_dropout_keeps_tokens_with_their_positions_and_angles():
    """Kept patches are tokens of the whole image: without blocks, each dropped set is a subset of all tokens."""
    eva = dataclasses.replace(presets.eva_image(32, 8, 64, 1, 2, 96), norm_pre=False)
    clip = CLIP(Architecture(eva, TEXT, 40))
    params, (image, _) = params_of(clip), inputs(2)
    blocks = params["image"]["transformer"]["blocks"]
    blocks["attention"]["out"] *= 0  # the residual stream alone is left
    blocks["mlp"]["down"] *= 0
    _, every = clip.image_tower.apply({"params": params["image"]}, image)
    keys = jax.random.split(jax.random.key(0), len(image))
    _, kept = clip.image_tower.apply({"params": params["image"]}, image, train=True, keys=keys, patch_dropout=0.75)
    assert kept.shape[1] == 1 + 4
    np.testing.assert_array_equal(kept[:, 0], every[:, 0])
    for whole, few in zip(np.asarray(every), np.asarray(kept), strict=True):
        matches = (np.abs(whole[:, None] - few[None]).max(axis=-1) < 1e-6).sum(axis=0)
        np.testing.assert_array_equal(matches, 1)


def test_rotary_attention_depends_on_distances_alone():
    """Turned queries and keys at (row, column) have products that depend on the difference of their places."""
    rng = np.random.default_rng(0)
    query, key = (jnp.broadcast_to(jnp.asarray(rng.normal(size=8), jnp.float32), (1, 16, 1, 8)) for _ in range(2))
    rotary = rotary_angles(4, 4, 8, reference=4, class_token=False)
    products = np.einsum("bqhd,bkhd->qk", rotate(query, rotary), rotate(key, rotary)).reshape(4, 4, 4, 4)
    assert products[1, 2, 2, 0] == pytest.approx(products[0, 3, 1, 1], abs=1e-5)
    assert products[0, 0, 3, 1] != pytest.approx(products[0, 0, 1, 3], abs=1e-3)


@pytest.mark.slow
@pytest.mark.every_jax
def test_batch_norm_sees_the_global_batch_on_any_mesh():
    clip, (image, text) = CLIP(RESNET), inputs(8, 64)
    params, stats = params_of(clip), clip.init_batch_stats()
    params["image"]["stage_3_rest"]["norm_3"]["scale"] += 1  # blocks start as their shortcuts: let them do something

    def forward(devices):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        run = jax.jit(
            lambda params, stats, image, text: clip.forward(params, stats, batch_of(image, text), train=True),
            in_shardings=(whole, whole, rows, rows),
        )
        return run(params, stats, image, text)

    one, eight = forward(1), forward(8)
    np.testing.assert_allclose(one[0], eight[0], atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.batch_stats, eight.batch_stats
    )
    assert not np.allclose(one.batch_stats["image"]["norm_1"]["mean"], stats["image"]["norm_1"]["mean"])


@pytest.mark.slow
def test_a_resnet_computes_the_same_scanned_unrolled_and_recomputed():
    (image, text), params = inputs(2, 64), params_of(CLIP(RESNET))
    stats = CLIP(RESNET).init_batch_stats()
    expected = CLIP(RESNET).forward(params, stats, batch_of(image, text), train=True)
    for other in (computed(RESNET, scan=False), computed(RESNET, remat="full")):
        found = other.forward(params, stats, batch_of(image, text), train=True)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.slow
def test_a_resnet_starts_as_openclip_does():
    image = params_of(CLIP(Architecture(ResNetTower(64, (1, 3, 1, 1), 32, 16), TEXT, 64)))["image"]
    rest = image["stage_2_rest"]
    assert not np.any(rest["norm_3"]["scale"]) and np.all(np.asarray(rest["norm_1"]["scale"]) == 1)
    bound = (3 * 3 * 64) ** -0.5
    assert 0.98 * bound < np.max(np.abs(rest["conv_2"]["kernel"])) <= bound
    assert np.std(image["attention_pooling"]["query"]) == pytest.approx(1024**-0.5, rel=0.02)
    assert np.std(image["attention_pooling"]["spatial_embedding"]) == pytest.approx(1024**-0.5, rel=0.1)
    assert np.max(np.abs(image["attention_pooling"]["key_bias"])) <= 1024**-0.5


def test_siglip_starts_as_timm_does():
    image = params_of(CLIP(Architecture(presets.siglip_image(32, 8, 128, 2, 2, 512, "gelu"), TEXT, 128)))["image"]
    blocks, pooling = image["transformer"]["blocks"], image["attention_pooling"]
    for kernel in (blocks["attention"]["qkv"], blocks["mlp"]["down"], pooling["key_value"], pooling["mlp"]["up"]):
        assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
    assert not np.any(blocks["mlp"]["up_bias"])
    assert np.max(np.abs(pooling["probe"])) <= 2 * 128**-0.5


@pytest.mark.slow
def test_eva_starts_smaller_the_deeper_a_block_is():
    image = params_of(CLIP(Architecture(presets.eva_image(32, 8, 128, 3, 2, 341), TEXT, 128)))["image"]
    blocks = image["transformer"]["blocks"]
    for layer in range(3):
        expected = 0.02 / (2 * (layer + 1)) ** 0.5
        assert np.std(blocks["attention"]["out"][layer]) == pytest.approx(expected, rel=0.05)
        assert np.std(blocks["mlp"]["down"][layer]) == pytest.approx(expected, rel=0.05)
        assert np.std(blocks["mlp"]["gate"][layer]) == pytest.approx(0.02, rel=0.05)
    assert np.std(image["projection"]) == pytest.approx(2e-5, rel=0.05)


def test_tokens_behind_the_last_block_are_what_is_pooled():
    clip, (image, text) = CLIP(Architecture(IMAGE, TEXT, 40)), inputs()
    params = params_of(clip)
    normed = clip.image_tokens(params, image, normalize=True)
    np.testing.assert_allclose(
        normed[:, 0] @ params["image"]["projection"], clip.encode_image(params, image), atol=1e-5
    )
    assert clip.image_tokens(params, image, 1).shape == (4, 17, 64)
    np.testing.assert_array_equal(clip.text_tokens(params, text, -2), clip.text_tokens(params, text, 1))
    for layer in (0, 4, -4):
        with pytest.raises(UserError, match="the tower has 3"):
            clip.image_tokens(params, image, layer)
