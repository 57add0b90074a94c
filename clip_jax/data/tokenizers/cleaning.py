"""Repairing a caption before it is split into tokens, character for character as OpenCLIP's tokenizers do.

Everything about Unicode happens here, in Python: Rust's lower-casing, white space and letter classes follow
another version of Unicode, and one caption in ten thousand would get other tokens than those the model was trained on.
"""

import html
import re
import string
import unicodedata

import ftfy

# Captions made only of these characters need no ftfy, which costs several times all the rest: it can
# only compose them (NFC, checked apart) and straighten the one curly quote. Excluded, and why: "&" may start an
# HTML entity; control characters are removed; accented capitals, symbols and the other quotes may be the remains of a
# wrongly decoded UTF-8; ligatures and full-width forms are replaced. The proof: tests/data/test_tokenizers_cleaning.py.
untouched = re.compile(
    "["
    " -%'-~"  # printable ASCII except "&"
    "\u00a0\u202f’–—…"  # French spaces, the apostrophe that ftfy straightens, dashes, ellipsis
    "ßà-öø-ü"
    "ăāąćčďđēęěėğģīįıķĺľłļńňņőōŕřśşšťţűůūųźżž"
    "Έ-ώЁЃ-џ"  # Greek and Cyrillic, except Ђ, which occurs in mis-decoded text such as vЂ”
    "\u0530-\u1fff"  # Armenian, Hebrew, Arabic, the scripts of India, Thai, Georgian, ..., Vietnamese
    "\u3001-\ud7ff"  # kana, Chinese characters, Hangul
    "\u200d\ufe0f\u2600-\u27bf\U0001f000-\U0001faff"  # emoji and what joins them
    "]*"
).fullmatch

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def repair(text: str) -> str:
    """``ftfy.fix_text``, then HTML entities resolved twice (``&amp;lt;`` is common in alt texts)."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    if untouched(text) and unicodedata.is_normalized("NFC", text):
        return text.replace("’", "'")
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def whitespace(text: str) -> str:
    """Repaired, each run of white space replaced by one space, none at the ends."""
    return " ".join(repair(text).split())


def lower(text: str) -> str:
    """CLIP's cleaning: ``whitespace``, then lower case."""
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """OpenCLIP's cleaning for SigLIP: lower case, ASCII punctuation removed, "_" read as a space.

    big_vision (``evaluators/proj/image_text/prompt_engineering.py``) does this to the prompts of zero-shot
    classification only; see ``siglip``.
    """
    return " ".join(repair(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


CLEANERS = {"none": str, "whitespace": whitespace, "lower": lower, "canonicalize": canonicalize}


def versions() -> dict[str, str]:
    """The versions of everything that can change a cleaned caption, for fingerprints."""
    return {"ftfy": ftfy.__version__, "unicode": unicodedata.unidata_version}
