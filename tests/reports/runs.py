"""Run folders and galleries like those of a run on rendered shapes, without training."""

import json
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.reports.gallery import Gallery

STEPS, BATCH = 2400, 256
COLORS = {"red": "#d22f27", "green": "#4f9d3a", "blue": "#3f6fd1", "yellow": "#f2c230"}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"above": ((32, 18), (32, 46)), "left of": ((18, 32), (46, 32))}


def metrics(rng: np.random.Generator) -> list[dict]:
    """A healthy run: the loss falls from ln(batch), the held-out loss rises slightly at the end."""
    rows = []
    for step in range(0, STEPS + 1, 10):
        rate = 5e-4 * min(step / 200, 0.5 * (1 + np.cos(np.pi * max(step - 200, 0) / (STEPS - 200))))
        learned = 1 - np.exp(-step / 420)
        row = {
            "step": step,
            "train/loss": np.log(BATCH) * (1 - learned) + 0.35 + 0.06 * rng.standard_normal(),
            "train/accuracy": np.clip(0.92 * learned + 0.02 * rng.standard_normal(), 0, 1),
            "train/learning_rate": rate,
            "train/logit_scale": 14.3 + 32 * learned**2,
            "train/grad_norm": 0.4 + 2.5 * np.exp(-step / 150) + 0.1 * abs(rng.standard_normal()),
            "train/param_norm": 91 + 9 * learned,
            "train/update_norm": 60 * rate * (1 + 0.05 * rng.standard_normal()),
            "train/pairs": (step + 1) * BATCH,
            "train/flops": (step + 1) * BATCH * 5.2e9,
            "train/pairs_per_second": 840 + 15 * rng.standard_normal() - 500 * (step == 0),
            "train/data_wait_share": 0.02 + 0.01 * rng.random(),
            "train/mfu": 0.41 + 0.01 * rng.standard_normal(),
        }
        rows.append({name: round(float(value), 6) for name, value in row.items()} | {"step": step})
        if step % 200 == 0:
            recall = 0.86 * learned**2
            row = {"loss": 5.1 * (1 - learned) + 0.62 + 0.35 * learned**40, "zero_shot_top1": 0.02 + 0.89 * learned}
            row |= {"i2t_R@1": recall, "i2t_R@5": recall**0.4, "i2t_R@10": recall**0.2}
            row |= {"images": 2000, "skipped": 0}
            row |= {"t2i_R@1": 0.95 * recall, "t2i_R@5": recall**0.45, "t2i_R@10": recall**0.25}
            rows.append({"step": step} | {f"eval/shapes/{name}": float(value) for name, value in row.items()})
    return rows


RUN = {
    "clip_jax_version": "0.1.0",
    "config": {
        "seed": 0,
        "steps": STEPS,
        "batch_size": BATCH,
        "micro_batch": None,
        "data": {"source": "shapes", "image_size": 64, "workers": 2, "augment": {"crop": [0.9, 1.0], "flip": False}},
        "model": {"name": "ViT-Ti/8", "embedding": 128, "pooling": "cls", "compute_dtype": "float32", "remat": False},
        "loss": {"name": "softmax", "scale_init": 14.2857, "scale_max": 100.0},
        "optimizer": {"name": "adamw", "learning_rate": 5e-4, "warmup": "200 steps", "b2": 0.98, "weight_decay": 0.2},
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "eval": {"every": 200, "datasets": ["shapes"]},
    },
    "model": {"name": "ViT-Ti/8", "parameters": {"image": 5_480_192, "text": 3_213_440, "total": 8_693_633}},
    "versions": {"python": "3.11.2", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.6", "numpy": "2.4.6"},
    "devices": "4 x TPU v5 lite",
}


ROWS = metrics(np.random.default_rng(0))


def shapes_gallery(n: int = 64) -> Gallery:
    """Rendered pairs; the cosine similarity of two grows with the number of words that their captions share."""
    rng = np.random.default_rng(1)
    objects = list(product(COLORS, SHAPES))
    images, captions, words = [], [], []
    for _ in range(n):
        first, second = rng.choice(len(objects), 2, replace=False)
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        image = Image.new("RGB", (64, 64), "#f4f1ea")
        draw = ImageDraw.Draw(image)
        for (color, shape), (x, y) in zip((objects[first], objects[second]), RELATIONS[relation], strict=True):
            box = (x - 11, y - 11, x + 11, y + 11)
            if shape == "circle":
                draw.ellipse(box, COLORS[color])
            elif shape == "square":
                draw.rectangle(box, COLORS[color])
            else:
                draw.polygon([(x, y - 12), (x - 12, y + 11), (x + 12, y + 11)], COLORS[color])
        images.append(np.asarray(image))
        captions.append(f"a {' '.join(objects[first])} {relation} a {' '.join(objects[second])}")
        words.append([*objects[first], relation, *objects[second]])
    shared = np.array([[sum(a == b for a, b in zip(x, y, strict=True)) for y in words] for x in words])
    similarity = 0.05 + 0.055 * shared + 0.04 * rng.standard_normal((n, n))
    return Gallery(np.stack(images), tuple(captions), similarity.astype(np.float32), "shapes")


def write_run(folder: Path, rows: list[dict], run: dict | None = RUN) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    return folder
