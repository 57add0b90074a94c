"""Hard negatives of a caption: sentences in almost the same words that are not true of its image.

NegCLIP (Yuksekgonul et al. 2023, section 4) swaps words of the same part of speech, which needs a parser. Here the
words are those of a few short lists, so that what is made is most likely false: a swap of two colors is, a swap of two
nouns in "salt and pepper" is not. A caption without such words has no negative.
"""

import re
from collections.abc import Collection, Iterator

import numpy as np

KINDS: tuple[tuple[str, ...], ...] = (
    ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "grey", "golden"),
    ("small", "tiny", "little", "large", "big", "huge"),
    ("young", "old"),
    ("short", "tall", "long"),
    ("striped", "dotted", "spotted", "plain", "solid"),
    ("wooden", "metal", "plastic", "glass", "stone", "paper"),
    ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart"),
    ("man", "woman", "boy", "girl", "child", "dog", "cat", "horse", "bird"),
)
"""Words by kind: two different words of one kind in a caption may be swapped."""

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Each may be replaced by another. "one" is missing because it is often a pronoun."""

OPPOSITES = (
    *(("left", "right"), ("above", "below"), ("over", "under"), ("top", "bottom"), ("inside", "outside")),
    *(("upper", "lower"), ("open", "closed"), ("empty", "full"), ("day", "night"), ("indoors", "outdoors")),
)

RELATIONS = (
    *("to the left of", "to the right of", "left of", "right of", "above", "below", "over", "under", "behind"),
    *("in front of", "on top of", "inside", "underneath", "chasing", "riding", "holding", "carrying"),
)
"""Relations between two things that are not true the other way around."""

_THING = rf"(?:a|an|the|{'|'.join(NUMBERS)})\b(?:(?!\b(?:a|an|the|and|with)\b)[^,.;])*?"
_RELATED = re.compile(
    rf"\b({_THING}) ({'|'.join(RELATIONS)}) ({_THING})(?=$|[,.;]| (?:and|with|{'|'.join(RELATIONS)})\b)"
)
_TURNED = {word: other for pair in OPPOSITES for word, other in (pair, pair[::-1])}


def hard_negatives(caption: str, number: int, rng: np.random.Generator, avoid: Collection[str] = ()) -> tuple[str, ...]:
    """At most ``number`` different negatives in random order, without the caption itself and those in ``avoid``."""
    found = [text for text in dict.fromkeys(_candidates(caption)) if text != caption and text not in avoid]
    return tuple(found[i] for i in rng.permutation(len(found))[:number])


def _candidates(caption: str) -> Iterator[str]:
    parts = re.findall(r"\w+|\W+", caption)
    lower = [part.lower() for part in parts]

    def replaced(changes: dict[int, str]) -> str:
        return "".join(_like(parts[i], changes[i]) if i in changes else part for i, part in enumerate(parts))

    for kind in KINDS:
        at = [i for i, word in enumerate(lower) if word in kind]
        for n, i in enumerate(at):
            yield from (replaced({i: lower[j], j: lower[i]}) for j in at[n + 1 :] if lower[i] != lower[j])
    for i, word in enumerate(lower):
        if word in NUMBERS:
            yield from (replaced({i: other}) for other in NUMBERS[:5] if other != word)
        if word in _TURNED:
            yield replaced({i: _TURNED[word]})
    for found in _RELATED.finditer(caption):
        one, relation, other = found.groups()
        yield f"{caption[: found.start()]}{other} {relation} {one}{caption[found.end() :]}"


def _like(old: str, new: str) -> str:
    """The new word, capitalized if the old one is."""
    return new.capitalize() if old[:1].isupper() else new
