"""Statistics of a source, from evenly spaced examples: sizes, captions, scripts, duplicates and unusable examples.

Captions are counted by script, not by language: a script follows from Unicode's tables alone, while a detector of
languages is unreliable for captions of three words, and would be one more library.
"""

import collections
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import regex

from clip_jax.data import images
from clip_jax.data.sources.sample import BadSampleError, Sample, Source, notes
from clip_jax.data.stream import read
from clip_jax.data.tokenizers import Tokenizer

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
NAMED = 20
"""Unusable examples that are named."""
SCRIPTS = {
    # Japanese is written with Han too, so its own letters come first; the rest by number of letters.
    "Japanese": r"[\p{Hiragana}\p{Katakana}]",
    "Han (Chinese)": r"\p{Han}",
    "Hangul (Korean)": r"\p{Hangul}",
    **{name: rf"\p{{{name}}}" for name in ("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali")},
    **{name: rf"\p{{{name}}}" for name in ("Tamil", "Telugu", "Thai", "Georgian", "Armenian", "Ethiopic")},
}
_SCRIPTS = {name: regex.compile(pattern) for name, pattern in SCRIPTS.items()}
_LETTER = regex.compile(r"\p{L}")


class Statistics(NamedTuple):
    examples: int
    """The number of examples in the source."""
    inspected: int
    quantiles: dict[str, tuple[float, ...]]
    """Name of a measure -> its values at QUANTILES."""
    captions: int
    same_captions: int
    """Captions that another inspected example has too."""
    same_images: int
    notes: tuple[str, ...]
    """What the files hold that is in no example: members without a partner, links, other kinds."""
    faults: collections.Counter
    """Unusable examples by reason."""
    bad: tuple[str, ...]
    """The first of the unusable examples: name and reason."""
    formats: collections.Counter
    """Image files by format; pixels where there is no file."""
    scripts: collections.Counter
    """Captions by the script of most of their letters."""
    longest: int | None
    """The context length of the tokenizer; None without one."""
    cut: int
    """Captions with more tokens than that, which lose their end."""
    labels: int
    """Different labels; 0 if there are none."""
    shown: tuple[tuple[np.ndarray, Sample], ...]
    """Pixels uint8[h, w, 3] of some examples, with the examples."""


class _Seen(NamedTuple):
    sample: Sample
    width: int
    height: int
    size: int
    digest: bytes
    format: str
    picture: np.ndarray | None


def inspect(
    source: Source, inspected: int, shown: int, thumbnail: int, workers: int, tokenizer: Tokenizer | None = None
) -> Statistics:
    """Reads and decodes ``inspected`` examples, evenly spaced, and keeps ``shown`` pictures of them.

    ``tokenizer``: also counts tokens, with those of start and end.
    """
    count = min(inspected, len(source))
    indices = [i * len(source) // count for i in range(count)]
    chosen = {indices[i * count // min(shown, count)] for i in range(min(shown, count))}

    def look(index: int) -> _Seen | BadSampleError:
        key = f"example {index}"
        try:
            sample = read(source, index)
            key = sample.key
            image = images.decode(sample.image)
        except images.BadImageError as error:
            return BadSampleError(str(error), key)
        except BadSampleError as error:
            return error
        data = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
        picture = None
        if index in chosen:
            small = image.copy()
            small.thumbnail((thumbnail, thumbnail))
            picture = np.asarray(small)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        form = "pixels" if isinstance(sample.image, np.ndarray) else images.file_format(data)
        return _Seen(sample._replace(image=b""), *image.size, len(data), digest, form, picture)

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(look, indices))
    seen = [entry for entry in found if isinstance(entry, _Seen)]
    bad = [entry for entry in found if isinstance(entry, BadSampleError)]
    texts = [text for entry in seen for text in dict.fromkeys(entry.sample.captions)]
    measures = {
        "width (px)": [entry.width for entry in seen],
        "height (px)": [entry.height for entry in seen],
        "width / height": [entry.width / entry.height for entry in seen],
        "file (kB)": [entry.size / 1000 for entry in seen],
        "captions per example": [len(entry.sample.captions) for entry in seen],
        "caption (characters)": [len(text) for text in texts],
        "caption (words)": [len(text.split()) for text in texts],
        "caption (tokens)": [] if tokenizer is None else [tokenizer.length(text) for text in texts],
    }
    longest = None if tokenizer is None else tokenizer.context_length
    return Statistics(
        examples=len(source),
        inspected=count,
        quantiles={name: tuple(np.quantile(values, QUANTILES)) for name, values in measures.items() if values},
        captions=len(texts),
        same_captions=len(texts) - len(set(texts)),
        same_images=len(seen) - len({entry.digest for entry in seen}),
        notes=notes(source),
        faults=collections.Counter(error.reason for error in bad),
        bad=tuple(str(error) for error in bad[:NAMED]),
        formats=collections.Counter(entry.format for entry in seen),
        scripts=collections.Counter(map(script, texts)),
        longest=longest,
        cut=0 if longest is None else sum(count > longest for count in measures["caption (tokens)"]),
        labels=len({entry.sample.label for entry in seen} - {-1}),
        shown=tuple((entry.picture, entry.sample) for entry in seen if entry.picture is not None),
    )


def script(text: str) -> str:
    """The script of most letters of a caption, by its name in ``SCRIPTS``; ``other``, or ``no letters``.

    A caption with any Hiragana or Katakana counts as Japanese.
    """
    if not _LETTER.search(text):
        return "no letters"
    if _SCRIPTS["Japanese"].search(text):
        return "Japanese"
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    name = max(counts, key=counts.__getitem__)
    return name if counts[name] else "other"
