"""Pixels equal OpenCLIP's transforms by preset, and those of Transformers' image processor from an exported folder.

Real photographs and scans of several sizes and modes; within 1/255 everywhere, before the division by the deviation.
"""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from clip_jax.data import images
from clip_jax.interop import huggingface_config
from clip_jax.interop.export import write_json
from clip_jax.presets import PREPROCESS, Preset
from tests.interop import folders_of
from tests.parity import peers

pytestmark = peers.MARKS

SIZES = {"openai": 224, "siglip": 256, "siglip2": 384, "clipa": 336}

PEER = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import numpy as np, open_clip, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor

folder = Path(sys.argv[1])
job = json.loads((folder / "jobs.json").read_text())
presets = {
    "openai": open_clip.pretrained._pcfg(),
    "siglip": open_clip.pretrained._slpcfg(),
    "siglip2": open_clip.pretrained._slpcfg(),
    "clipa": open_clip.pretrained._apcfg(),
}
for name, size in job["sizes"].items():
    settings = {k: presets[name][k] for k in ("mean", "std", "interpolation", "resize_mode")}
    transform = open_clip.image_transform(size, is_train=False, **settings)
    pixels = [transform(Image.open(photo)) for photo in job["photos"]]
    save_file({"pixels": torch.stack(pixels).permute(0, 2, 3, 1).contiguous()}, folder / f"{name}.openclip")
    processor = AutoImageProcessor.from_pretrained(folder / name, backend="pil")  # its other one resizes without Pillow
    opened = [Image.open(photo) for photo in job["photos"]]
    pixels = [processor(image, return_tensors="pt")["pixel_values"][0] for image in opened]
    save_file({"pixels": torch.stack(pixels).permute(0, 2, 3, 1).contiguous()}, folder / f"{name}.transformers")
    print(name, type(processor).__name__)
"""


@pytest.fixture(scope="module")
def photos(shared_data):
    return sorted((shared_data / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def theirs(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    for name, size in SIZES.items():
        (folder / name).mkdir()
        write_json(folder / name / "preprocessor_config.json", huggingface_config.from_preset(preset(name, size))[1])
    return peers.run(PEER, folder, {"sizes": SIZES, "photos": [str(photo) for photo in photos]})


def preset(name: str, size: int) -> Preset:
    architecture = folders_of.PRESET.architecture
    return Preset(replace(architecture, image=replace(architecture.image, image_size=size)), PREPROCESS[name], "clip")


@pytest.mark.parametrize("peer", ["openclip", "transformers"])
@pytest.mark.parametrize("name", SIZES)
def test_pixels_equal_the_peers_within_a_255th(name, peer, photos, theirs):
    settings = PREPROCESS[name]
    given = [photo.read_bytes() for photo in photos]
    assert len({Image.open(photo).mode for photo in photos}) > 1 and len({Image.open(p).size for p in photos}) > 5
    ours = np.stack(
        [
            images.resize_and_crop(x, SIZES[name], resize=settings.resize, interpolation=settings.interpolation)
            for x in given
        ]
    )
    expected = load_file(theirs / f"{name}.{peer}")["pixels"]
    if (name, peer) == ("openai", "transformers"):
        # Half a pixel of the crop's offset is cut off there, and rounded to even by torchvision and so by us.
        sizes = [sorted(Image.open(photo).size) for photo in photos]
        same = [(int(SIZES[name] * long / short) - SIZES[name]) % 4 != 3 for short, long in sizes]
        assert 0 < sum(same) < len(same)
        expected, ours = expected[same], ours[same]
    difference = np.abs(np.asarray(settings.normalize(ours)) - expected) * np.array(settings.std) * 255
    print(f"\n{name}, {peer}: at most {difference.max():.3f} of 255, {np.mean(difference > 0.01):.1e} of all differ")
    assert difference.max() < 1.001
