"""Prompts for zero-shot classification: published class names and templates, and the form that a model expects.

Results depend on prompts: edits to ImageNet's class names alone are worth 1.5 points for a B/32, and OpenAI's list
merges or omits three of its labels. ``Prompts.fingerprint`` is therefore stored with every result.

SigLIP and SigLIP 2 were evaluated on canonical prompts: lower case, no punctuation, ``_`` read as a space
(big_vision ``evaluators/proj/image_text/prompt_engineering.py``). Without it SigLIP 2 loses about 12 points.
"""

import functools
import hashlib
import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clip_jax.data.templates import check, fill
from clip_jax.errors import UserError, nearest

CANONICAL = ("siglip", "siglip2")
"""The tokenizers whose models expect canonical prompts."""
DOMAINS = {
    "satellite": ("eurosat", "resisc45"),
    "medical": ("pcam", "diabetic_retinopathy"),
    "texture": ("dtd",),
}
"""Templates for other sets of a domain: those published for the named ones, together."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Prompts(NamedTuple):
    """Class names and the templates that they fill."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A hash that changes with any character and with the order."""
        content = json.dumps([self.class_names, self.templates], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def of_class(self, name: str) -> list[str]:
        return [fill(template, name) for template in self.templates]


def read_templates(lines: Sequence[str], where: str) -> tuple[str, ...]:
    """Templates of a file: ``{}`` is the class name, and ``{c}`` as CLIP_benchmark spells it. Raises UserError."""
    found = tuple(line.replace("{c}", "{}") for line in lines)
    check(where, found)
    return found


def for_model(prompts: Prompts, tokenizer: str) -> Prompts:
    """The prompts in the form that a model with this kind of tokenizer expects."""
    if tokenizer not in CANONICAL:
        return prompts
    return Prompts(
        tuple(canonicalize(name).strip() for name in prompts.class_names),
        tuple("{}".join(map(canonicalize, template.split("{}"))).strip() for template in prompts.templates),
    )


def check_different(given: Prompts, wanted: Prompts) -> None:
    """Raises UserError where ``for_model`` left nothing of a class name, or made one name of two."""
    seen: dict[str, str] = {}
    for before, after in zip(given.class_names, wanted.class_names, strict=True):
        if before and not after:
            raise UserError(f"{before!r}: this model reads no punctuation, and nothing is left of it; use words")
        if seen.setdefault(after, before) != before:
            raise UserError(
                f"{seen[after]!r} and {before!r}: this model reads no capitals and no punctuation, and to it both are "
                f"{after!r}; use other words"
            )


def canonicalize(text: str) -> str:
    """Lower case without ASCII punctuation; ``_`` is a space, and spaces are single."""
    return re.sub(r"\s+", " ", text.replace("_", " ").translate(_PUNCTUATION).lower())


def templates(name: str) -> tuple[str, ...]:
    """A published set such as ``imagenet1k`` (80) or ``pets``, those of a domain, or the lines of a text file."""
    if name in DOMAINS:
        return tuple(template for of in DOMAINS[name] for template in templates(of))
    return read_templates(_named(name, "templates"), name)


def class_names(name: str) -> tuple[str, ...]:
    """A published set such as ``imagenet1k`` or ``flowers``, or the lines of a text file."""
    return _named(name, "class_names")


def published(kind: str) -> dict[str, Sequence[str]]:
    """All sets of ``templates`` or ``class_names``, by CLIP_benchmark's names of the datasets."""
    return _read(kind)["sets"]


@functools.cache
def _read(kind: str) -> dict:
    return json.loads((Path(__file__).parent / f"{kind}.json").read_text(encoding="utf-8"))


def _named(name: str, kind: str) -> tuple[str, ...]:
    sets = published(kind)
    if name in sets:
        return tuple(sets[name])
    path = Path(name).expanduser()
    if not path.is_file():
        what = kind.replace("_", " ")
        raise UserError(f"{name}: neither a file nor a published set of {what}{nearest(name, sets)}")
    lines = tuple(filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())))
    if not lines:
        raise UserError(f"{path}: empty; it needs one of the {kind.replace('_', ' ')} per line")
    return lines
