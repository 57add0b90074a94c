"""Maps of labels over a picture: the nearest label of every pixel in a color, and the strength of each label."""

import colorsys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

FONT = 14
MARGIN = 6
HUE_STEP = 0.618034  # the golden ratio: neighbors are far apart, however many there are


def draw(
    picture: UInt8[np.ndarray, "height width 3"],
    cosines: Float[np.ndarray, "height width labels"],
    labels: Sequence[str],
) -> Image.Image:
    """The picture, the nearest labels over it, and for each label a map from its lowest to its highest cosine."""
    gray = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
    colors = np.array([_color(i) for i in range(len(labels))])
    panels = [("picture", picture), ("nearest label", 0.45 * gray + 0.55 * colors[cosines.argmax(axis=2)])]
    for i, label in enumerate(labels):
        values = cosines[..., i]
        strength = ((values - values.min()) / max(np.ptp(values), 1e-9))[..., None]
        text = f"{label}  {values.min():.2f} to {values.max():.2f}"
        panels.append((text, (1 - 0.8 * strength) * 0.6 * gray + 0.8 * strength * colors[i]))
    height, width = picture.shape[:2]
    columns = min(len(panels), 4)
    cell = (width + MARGIN, height + FONT + 2 * MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, -(-len(panels) // columns) * cell[1]), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for i, (text, pixels) in enumerate(panels):
        x, y = MARGIN + i % columns * cell[0], i // columns * cell[1]
        while pen.textlength(text, font=font) > width and len(text) > 4:
            text = text[:-4] + "..."
        color = "black" if i < 2 else tuple(int(0.75 * c) for c in colors[i - 2])
        pen.text((x, y + MARGIN // 2), text, fill=color, font=font)
        panel = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        sheet.paste(panel, (x, y + FONT + MARGIN))
    return sheet


def _color(i: int) -> tuple[float, float, float]:
    return tuple(255 * c for c in colorsys.hsv_to_rgb(i * HUE_STEP % 1, 0.85, 0.95))
