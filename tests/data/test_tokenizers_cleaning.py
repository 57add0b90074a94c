"""Cleaning of captions: what it does, and the proof that its short cut around ftfy changes nothing."""

import html
import re
import unicodedata

import ftfy
import pytest
from ftfy.badness import BADNESS_RE
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.tokenizers import cleaning

UNTOUCHED = [c for c in map(chr, range(0x110000)) if cleaning.untouched(c)]


def slowly_repaired(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def every_triple(alphabet: list[str]) -> str:
    """The shortest string that holds every three letters in a row (de Bruijn; Fredricksen, Kessler & Maiorana)."""
    size, word, letters = len(alphabet), [0] * 4, []

    def extend(t: int, period: int) -> None:
        if t > 3:
            if 3 % period == 0:
                letters.extend(word[1 : period + 1])
            return
        word[t] = word[t - period]
        extend(t + 1, period)
        for letter in range(word[t - period] + 1, size):
            word[t] = letter
            extend(t + 1, t)

    extend(1, 1)
    return "".join(alphabet[i] for i in letters + letters[:2])


@pytest.mark.slow
def test_no_text_of_untouched_characters_looks_wrongly_decoded_to_ftfy():
    """Its pattern is made of runs of up to three listed characters; longer runs hold one that is not untouched."""
    listed = set(BADNESS_RE.pattern)
    for first, last in re.findall(r"([^\x00-\x7f])-([^\x00-\x7f])", BADNESS_RE.pattern):
        listed.update(map(chr, range(ord(first), ord(last) + 1)))
    # The pattern's other characters stand in classes like \w, \s and [^A-Za-z]: one of each will do.
    others = set("azAZ0_ .,?!'\u05d0漢ı")
    alphabet = {c for c in listed.intersection(UNTOUCHED) if not c.isascii()} | others
    assert not BADNESS_RE.search(every_triple(sorted(alphabet)))
    assert BADNESS_RE.search(every_triple(list("aÃ ")))  # the search does find what is bad
    for run in ("ГўВЂВ", "ØÙ", "&"):
        assert not cleaning.untouched(run)


def test_ftfy_changes_no_untouched_character_but_the_apostrophe():
    changed = [c for c in UNTOUCHED if unicodedata.is_normalized("NFC", c) and ftfy.fix_text(c) != c]
    assert changed == ["’"]
    assert cleaning.repair("l’été") == "l'été"


@given(st.text(st.sampled_from(UNTOUCHED)) | st.text())
def test_the_short_cut_around_ftfy_changes_nothing(text):
    assert cleaning.repair(text) == slowly_repaired(text)


@pytest.mark.parametrize(
    ("text", "clean", "expected"),
    [
        ("  A\tphoto \n of ", "lower", "a photo of"),
        ("R&amp;amp;B &lt;b&gt;", "lower", "r&b <b>"),
        ("schÃ¶n “quoted” ﬁne", "whitespace", 'schön "quoted" fine'),
        ("e\u0301te\u0301", "whitespace", "été"),  # composed
        ("A photo_of a cat, isn't it?", "canonicalize", "a photo of a cat isnt it"),
        ("\x1b[31mred\x1b[0m\x00", "whitespace", "red"),
    ],
)
def test_cleaning(text, clean, expected):
    assert cleaning.CLEANERS[clean](text) == expected
