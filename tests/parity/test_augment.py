"""Each change of colors equals torchvision's, on Pillow's images, to the bit."""

import numpy as np
import pytest

from clip_jax.data import images
from clip_jax.data.augment import gray, jitter
from tests.data.test_augment import Given
from tests.parity import peers

pytestmark = peers.MARKS

CASES = {
    "brightness": (0.55, 1.4),
    "contrast": (0.55, 1.4),
    "saturation": (0.55, 1.4),
    "hue": (-0.31, 0.08, 0.5),
}

PEER = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before torchvision
import numpy as np
from PIL import Image
from torchvision.transforms import functional

folder = Path(sys.argv[1])
image = Image.fromarray(np.load(folder / "image.npy"))
cases = json.loads((folder / "jobs.json").read_text())
found = {
    f"{name} {factor}": np.asarray(getattr(functional, f"adjust_{name}")(image, factor))
    for name, factors in cases.items() for factor in factors
}
found["gray"] = np.asarray(functional.rgb_to_grayscale(image, num_output_channels=3))
np.savez(folder / "found.npz", **found)
"""


@pytest.mark.slow
def test_colors_change_as_in_torchvision(shared_data, tmp_path):
    photo = sorted((shared_data / "photos").glob("*.jpg"))[0]
    pixels = images.resize_and_crop(photo.read_bytes(), 96)
    np.save(tmp_path / "image.npy", pixels)
    theirs = np.load(peers.run(PEER, tmp_path, CASES) / "found.npz")
    np.testing.assert_array_equal(gray(pixels), theirs["gray"])
    for number, (name, factors) in enumerate(CASES.items()):
        for factor in factors:
            strength, given = [0.0] * 4, [1.0, 1.0, 1.0, 0.0]
            strength[number], given[number] = 0.5, factor
            found = jitter(pixels, Given(*given), tuple(strength))
            np.testing.assert_array_equal(found, theirs[f"{name} {factor}"], err_msg=f"{name} {factor}")
