"""The bundled dataset: rendered scenes with captions, on which a laptop pretrains a small CLIP in minutes.

    open_shapes("train")[6].captions[0]  ->  "a drawing of a little spotted red heart right of a big dotted green heart"

A scene has one to three objects, each with a color, a shape, a size, a texture and a position. Of the 64 combinations
of color and shape, 24 never appear in training, not even as a bystander, while each of their colors and shapes appears
with five others: accuracy on them measures composition, not memory.

Nothing is downloaded or stored. A scene follows from its split and index alone: ``scenes.py`` draws what is in it,
``captions.py`` describes it, ``rendering.py`` makes the picture.
"""

import functools
import hashlib
import itertools
from dataclasses import dataclass

from clip_jax.data.sources.boxes import Box
from clip_jax.data.sources.sample import Sample
from clip_jax.data.sources.shapes.captions import TEMPLATES, write_caption, write_name
from clip_jax.data.sources.shapes.rendering import Scene, box, render
from clip_jax.data.sources.shapes.scenes import HELD_OUT, SEEN, draw_scene, generator, held_out_scenes
from clip_jax.errors import UserError, nearest

__all__ = ["CLASS_NAMES", "HELD_OUT", "SEEN", "TEMPLATES", "Shapes", "open_shapes"]

SPLITS = {"train": 200_000, "heldout": 512, "zero_shot": 480}
"""Each split with its default number of examples."""

CLASS_NAMES: tuple[str, ...] = tuple(f"{color} {shape}" for color, shape in HELD_OUT)


def open_shapes(split: str, *, image_size: int = 64, examples: int | None = None) -> "Shapes":
    """The split as a source; ``examples`` lengthens or shortens it without changing the scenes in common.

    - ``train``: seen combinations only, three captions per scene: every detail, some, the bare objects.
    - ``heldout``: a held-out combination in each scene and one full caption, true of no other scene of the split.
    - ``zero_shot``: a single object of a held-out combination; ``label`` indexes ``class_names``; balanced.

    Raises UserError for an unknown split, and for a size or a number of examples that is too small.
    """
    if split not in SPLITS:
        raise UserError(f"shapes:{split}: no such split{nearest(split, SPLITS)}; there are {', '.join(SPLITS)}")
    if image_size < 32:
        raise UserError(f"shapes:{split}: image_size {image_size} is too small to tell shapes apart; take 32 or more")
    if examples is None:
        examples = SPLITS[split]
    if examples < 1:
        raise UserError(f"shapes:{split}: examples is {examples}; take 1 or more")
    scenes = tuple(itertools.islice(held_out_scenes(), examples)) if split == "heldout" else ()
    return Shapes(split, image_size, examples, scenes)


@dataclass(frozen=True, repr=False)
class Shapes:
    """A ``Source`` of rendered scenes; made by ``open_shapes``."""

    split: str
    image_size: int
    examples: int
    held_out: tuple[Scene, ...]
    """The scenes of the held-out split, which are chosen to differ from each other; empty for other splits."""

    @property
    def name(self) -> str:
        return f"shapes:{self.split}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES if self.split == "zero_shot" else ()

    former_fingerprint = ""
    boxes = "objects"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Covers pixels and captions of the first samples, so that an edited dataset cannot pass for the old one."""
        digest = hashlib.sha256(f"{self.name} {self.image_size} {len(self)}".encode())
        for index in range(min(len(self), 64)):
            sample = self[index]
            digest.update(sample.image.tobytes())
            digest.update("\n".join(sample.captions).encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> Sample:
        scene, captions = self.describe(index)
        label = index % len(CLASS_NAMES) if self.split == "zero_shot" else -1
        boxes = tuple(Box(box(each, self.image_size), write_name(each)) for each in scene.objects)
        return Sample(render(scene, self.image_size), captions, f"{self.name}/{index}", label, {"boxes": boxes})

    def describe(self, index: int) -> tuple[Scene, tuple[str, ...]]:
        """The scene of sample ``index`` and its captions, without rendering it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples; there is no number {index}")
        rng = generator(self.split, index)
        if self.split == "train":
            scene = draw_scene(rng)
            return scene, tuple(write_caption(rng, scene, detail) for detail in (1.0, 0.5, 0.0))
        if self.split == "heldout":
            scene = self.held_out[index]
        else:
            scene = draw_scene(rng, HELD_OUT[index % len(HELD_OUT)], alone=True)
        return scene, (write_caption(rng, scene, 1.0),)
