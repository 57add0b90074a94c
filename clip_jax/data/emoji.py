"""The data of ``configs/emoji.py``: emoji with their names, from a font and Unicode's annotations, as tar shards.

    sudo apt-get install fonts-noto-color-emoji unicode-cldr-core       # Debian, Ubuntu
    python -m clip_jax.data.emoji --to=data/emoji

The font is Noto Color Emoji (SIL Open Font License 1.1), with bitmaps (its CBDT edition); the names are Unicode CLDR's
annotations (Unicode License). On other systems, pass ``--font=NotoColorEmoji.ttf`` and ``--annotations=cldr/common``.
A tenth of the emoji with a skin tone is held out: new combinations of persons, activities and tones seen in training.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from fontTools.ttLib import TTFont, TTLibError
from PIL import Image

from clip_jax.errors import EXIT_USER_ERROR, UserError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")
PACKAGES = "apt-get install fonts-noto-color-emoji unicode-cldr-core"

SIDE = 136  # the bitmaps' width; they are 128 high
PER_SHARD = 600
TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
HELD_OUT_SHARE = 10  # one in ten
LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "ja", "ko", "pt", "ru", "tr", "zh")
"""The languages of the names in ``captions``; an emoji without a name in one of them lacks that one."""
VARIATION = "\ufe0f"  # asks for the emoji rather than the text form; fonts and CLDR disagree on where it stands


class Emoji(NamedTuple):
    text: str
    name: str
    keywords: tuple[str, ...]
    png: bytes
    captions: Mapping[str, str]
    """Language -> name."""


def read_emoji(font: Path, annotations: Path) -> list[Emoji]:
    """The named emoji of the font in code point order. Raises UserError for a missing file or one of another kind."""
    for path in (font, annotations / "annotations/en.xml", annotations / "annotationsDerived/en.xml"):
        if not path.is_file():
            raise UserError(f"{path}: not found; {PACKAGES}, or give --font and --annotations")
    try:
        loaded = TTFont(font)
    except TTLibError as error:
        raise UserError(f"{font}: not a font ({error})") from error
    if "CBDT" not in loaded:
        raise UserError(f"{font}: has no bitmaps (CBDT); take the edition of Noto Color Emoji that has them")
    bitmaps, characters, ligatures = loaded["CBDT"].strikeData[0], loaded.getBestCmap(), _ligatures(loaded)
    found = {}
    others = {language: _names(annotations, language) for language in LANGUAGES}
    for text, (name, keywords) in sorted(others["en"].items()):
        glyph = _glyph(text.replace(VARIATION, ""), characters, ligatures)
        if name and glyph in bitmaps and hasattr(bitmaps[glyph], "imageData"):
            captions = {language: names[text][0] for language, names in others.items() if names.get(text, ("",))[0]}
            found[text.replace(VARIATION, "")] = (name, keywords, bitmaps[glyph].imageData, captions)
    latin = [text for text in found if len(text) == 1 and ord(text) < 0x100]  # digits, #, *, (c) and (r)
    return [Emoji(text, *rest) for text, rest in sorted(found.items()) if text not in latin]


def _names(annotations: Path, language: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Emoji -> (name, keywords). The derived file has sequences: tones, flags, keycaps. Only English must be there."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for folder in ("annotations", "annotationsDerived"):
        file = annotations / folder / f"{language}.xml"
        if not file.is_file():
            continue
        for element in ElementTree.parse(file).iter("annotation"):
            text, value = element.get("cp", ""), element.text or ""
            if element.get("type") == "tts":
                names[text] = value
            else:
                keywords[text] = tuple(sorted(word.strip() for word in value.split("|")))
    return {text: (name, keywords.get(text, ())) for text, name in names.items()}


def _ligatures(font: TTFont) -> dict[tuple[str, ...], str]:
    """Sequence of glyphs -> the glyph that replaces it."""
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, options in getattr(table, "ligatures", {}).items():
                for option in options:
                    found.setdefault((first, *option.Component), option.LigGlyph)
    return found


def _glyph(text: str, characters: Mapping[int, str], ligatures: Mapping[tuple[str, ...], str]) -> str | None:
    """The one glyph that shows the whole text, or None."""
    glyphs = tuple(characters.get(ord(character), "") for character in text)
    return glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)


def is_held_out(emoji: Emoji) -> bool:
    """A tenth of those with a skin tone, whatever else the font has."""
    digest = hashlib.sha256(emoji.text.encode()).digest()
    return bool(TONES & set(emoji.text)) and digest[0] % HELD_OUT_SHARE == 0


def jpeg(png: bytes) -> bytes:
    """A bitmap in the middle of a white square."""
    bitmap = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(bitmap, ((SIDE - bitmap.width) // 2, (SIDE - bitmap.height) // 2))
    buffer = io.BytesIO()
    square.convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_shards(emoji: Sequence[Emoji], folder: Path) -> Iterator[str]:
    """Writes ``train-*.tar`` and ``heldout-*.tar`` in img2dataset's form, and yields a line for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        chosen = [one for one in emoji if is_held_out(one) == (split == "heldout")]
        # Neighbors look alike, and a shard is read in order: shuffle by a hash, so that the result is always the same.
        chosen.sort(key=lambda one: hashlib.sha256(one.text.encode()).digest()[1:])
        for number, start in enumerate(range(0, len(chosen), PER_SHARD)):
            with tarfile.open(folder / f"{split}-{number:05}.tar", "w") as tar:
                for index, one in enumerate(chosen[start : start + PER_SHARD], start=start):
                    codes = "-".join(f"{ord(character):x}" for character in one.text)
                    record = {
                        "caption": one.name,
                        "captions": one.captions,
                        "codepoints": codes,
                        "keywords": one.keywords,
                    }
                    for suffix, data in (
                        ("jpg", jpeg(one.png)),
                        ("txt", one.name.encode()),
                        ("json", json.dumps(record).encode()),
                    ):
                        member = tarfile.TarInfo(f"{index:09}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        yield f"{folder}/{split}-*.tar: {len(chosen):,} emoji"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="a folder for the shards")
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--annotations", type=Path, default=ANNOTATIONS, help="CLDR's folder `common`")
    arguments = parser.parse_args(argv)
    try:
        for line in write_shards(read_emoji(arguments.font, arguments.annotations), arguments.to.expanduser()):
            print(line)
    except UserError as error:
        print(f"clip_jax.data.emoji: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
