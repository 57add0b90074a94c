"""Small tar shards for tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A smooth random picture: every seed another one."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> Path:
    """One member for each extension of each sample: ``{"jpg": ..., "txt": ...}``."""
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples, first):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def sample(seed: int, caption: str | None = None) -> dict[str, bytes]:
    caption = f"picture number {seed}" if caption is None else caption
    about = json.dumps({"caption": caption, "captions": {"de": f"Bild {seed}"}, "tags": ["a", f"b{seed}"]})
    return {"jpg": jpeg(seed), "txt": caption.encode(), "json": about.encode()}


def write_shards(folder: Path, samples: int, shards: int = 2) -> str:
    """Evenly filled shards in a folder; returns the source's name."""
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = -(-samples // shards)
    for shard in range(shards):
        numbers = range(shard * per_shard, min(samples, (shard + 1) * per_shard))
        write_shard(folder / f"train-{shard:05d}.tar", [sample(n) for n in numbers], first=shard * per_shard)
    return f"tar:{folder}"
