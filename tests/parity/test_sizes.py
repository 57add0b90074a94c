"""The same files at other sizes, and every configuration of OpenCLIP: equal to OpenCLIP's own loading of them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import clip_jax
from clip_jax.errors import UserError
from clip_jax.interop import open_clip_config
from clip_jax.models.clip import CLIP, parameter_counts
from tests.parity import peers
from tests.parity.peers import relative
from tests.parity.test_weights import CLIPA_IMAGE, COMMON, SIGLIP_TEXT, SIGLIP_TOWER, open_clip_job, with_image

pytestmark = peers.MARKS

PEER = (
    COMMON
    + """
import functools, timm

create = timm.create_model
for name, job in jobs.items():
    timm.create_model = functools.partial(create, **job.get("timm", {}))  # OpenCLIP passes no sizes on
    to = folder / name
    to.mkdir()
    torch.manual_seed(0)
    (to / "open_clip_config.json").write_text(json.dumps({"model_cfg": job["model"], "preprocess_cfg": {}}))
    model = dict(job["model"])
    kind = open_clip.model.CustomTextCLIP if model.pop("custom_text", False) else open_clip.model.CLIP
    save_file(weights(perturb(kind(**model))), to / "open_clip_model.safetensors")
    size, length = job["other"]
    sizes = {"force_image_size": size, "force_context_length": length}
    model = open_clip.create_model(f"local-dir:{to}", **sizes).eval()
    save_file(results(model, size, length, job["vocab"]), folder / f"{name}.results")
"""
)

VISION = open_clip_job()["model"]["vision_cfg"]
EVA = "eva02_base_patch16_clip_224"
SIGLIP = {"embed_dim": 768, "custom_text": True, "init_logit_bias": -10}
TIMM = {"timm": {"depth": 2}}
JOBS = {
    "vit": {**open_clip_job(), "other": (56, 24)},
    "vit_smaller": {**open_clip_job(quick_gelu=True), "other": (24, 7)},
    "clipa": {
        **with_image(open_clip_job(), {**VISION, **CLIPA_IMAGE}, {"no_causal_mask": True, "pool_type": "last"}),
        "other": (48, 16),
    },
    "siglip": {
        **with_image(open_clip_job(), {"image_size": 256, **SIGLIP_TOWER}, SIGLIP_TEXT, **SIGLIP),
        **TIMM,
        "other": (320, 16),
    },
    "eva": {
        **with_image(
            open_clip_job(),
            {"image_size": 224, "timm_model_name": EVA, "timm_pool": "token", "timm_proj": None},
            custom_text=True,
        ),
        **TIMM,
        "other": (336, 16),
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return peers.run(PEER, tmp_path_factory.mktemp("sizes"), JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_file_at_another_size_gives_the_embeddings_of_open_clip_at_that_size(name, made, monkeypatch, caplog):
    """Position embeddings are resized; EVA-02's rotary grid is stretched."""
    for tower in (EVA, SIGLIP_TOWER["timm_model_name"]):  # as shallow here as in the peer
        shallow = dataclasses.replace(open_clip_config.TIMM[tower], layers=2)
        monkeypatch.setitem(open_clip_config.TIMM, tower, shallow)
    size, length = JOBS[name]["other"]
    model, given = (
        clip_jax.load(made / name, image_size=size, context_length=length),
        load_file(made / f"{name}.results"),
    )
    assert "image/position_embedding: resized from" in caplog.text
    with jax.default_matmul_precision("highest"):
        image = model.encode_pixels(given["image"], normalize=False)
        text = model.encode_tokens(given["text"].astype(np.int32), normalize=False)
    assert relative(image, given["image_embedding"]) < 1e-5
    assert relative(text, given["text_embedding"]) < 1e-5


COUNT = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import open_clip, torch

folder = Path(sys.argv[1])
counts = {}
for name in json.loads((folder / "jobs.json").read_text()):
    config = json.loads((Path(open_clip.__file__).parent / f"model_configs/{name}.json").read_text())
    custom = config.pop("custom_text", False)
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    kind = open_clip.coca_model.CoCa if "multimodal_cfg" in config else kind
    with torch.device("meta"):
        model = kind(**config)
    counts[name] = [sum(p.numel() for p in module.parameters()) for module in (model.visual, model)]
(folder / "counts.json").write_text(json.dumps(counts))
"""

REFUSED = (
    *("EVA01", "MobileCLIP", "PE-Core", "ViTamin", "coca_roberta", "convnext"),
    *("mt5", "nllb", "roberta", "swin", "xlm"),
)
"""Prefixes of families that clip_jax does not implement."""
REFUSED_ALONE = ("vit_medium_patch16_gap_256", "vit_relpos_medium_patch16_cls_224")


@pytest.mark.exhaustive
def test_every_configuration_of_our_families_is_read_without_a_name_and_has_as_many_parameters(tmp_path):
    folder = next((peers.PEERS / "lib").glob("python3*/site-packages/open_clip/model_configs"))
    read = {}
    for file in sorted(folder.glob("*.json")):
        config = {"model_cfg": json.loads(file.read_text())}
        if file.stem.startswith(REFUSED) or file.stem in REFUSED_ALONE:
            with pytest.raises(UserError, match=r"is not supported") as refused:
                open_clip_config.to_preset(config, str(file))
            assert "\n" not in str(refused.value)
        else:
            read[file.stem] = open_clip_config.to_preset(config, str(file)).architecture
    assert len(read) > 85
    theirs = json.loads((peers.run(COUNT, tmp_path, list(read)) / "counts.json").read_text())
    for name, architecture in read.items():
        ours = parameter_counts(jax.eval_shape(CLIP(architecture).init, jax.random.key(0)))
        assert [ours["image"], ours["total"]] == theirs[name], name
