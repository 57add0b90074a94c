"""The emoji recipe's data is made from a font and Unicode's annotations."""

import io
from types import SimpleNamespace

import pytest
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from PIL import Image

from clip_jax.data import emoji
from clip_jax.data.sources import open_source

BEAR, COLD, JOINER, HAND, DARK = "\U0001f43b", "❄", "\u200d", "\U0001f44b", "\U0001f3ff"
ANNOTATIONS = f"""<ldml><annotations>
<annotation cp="{BEAR}">animal | bear</annotation><annotation cp="{BEAR}" type="tts">bear</annotation>
<annotation cp="{HAND}" type="tts">waving hand</annotation><annotation cp="©" type="tts">copyright</annotation>
<annotation cp="\U0001f480" type="tts">skull</annotation></annotations></ldml>"""
DERIVED = f"""<ldml><annotations>
<annotation cp="{BEAR}{JOINER}{COLD}\ufe0f" type="tts">polar bear</annotation>
<annotation cp="{HAND}{DARK}" type="tts">waving hand: dark skin tone</annotation></annotations></ldml>"""


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (136, 128), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """(font, annotations): a font with two ligatures whose bitmaps stand in for CBDT's, and CLDR's two files."""
    characters = {ord(text): name for text, name in zip((BEAR, COLD, JOINER, HAND, DARK, "©"), "bcjhdk", strict=True)}
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *characters.values(), "polar", "dark"])
    builder.setupCharacterMap(characters)
    addOpenTypeFeaturesFromString(builder.font, "feature ccmp { sub b j c by polar; sub h d by dark; } ccmp;")
    bitmaps = {name: SimpleNamespace(imageData=png("red")) for name in ("b", "h", "k", "polar", "dark")}
    tables = {"CBDT": SimpleNamespace(strikeData=[bitmaps]), "GSUB": builder.font["GSUB"]}

    class Font(dict):
        def getBestCmap(self):
            return characters

    monkeypatch.setattr(emoji, "TTFont", lambda path: Font(tables))
    (tmp_path / "font.ttf").touch()
    for folder, text in (("annotations", ANNOTATIONS), ("annotationsDerived", DERIVED)):
        (tmp_path / "common" / folder).mkdir(parents=True)
        (tmp_path / "common" / folder / "en.xml").write_text(text, encoding="utf-8")
    korean = f'<ldml><annotations><annotation cp="{BEAR}" type="tts">곰</annotation></annotations></ldml>'
    (tmp_path / "common/annotations/ko.xml").write_text(korean, encoding="utf-8")
    return tmp_path / "font.ttf", tmp_path / "common"


def test_every_emoji_of_the_font_that_has_a_name_is_found_and_sequences_are_ligatures(sources):
    found = {one.text: one.name for one in emoji.read_emoji(*sources)}
    assert found == {
        BEAR: "bear",
        f"{BEAR}{JOINER}{COLD}": "polar bear",
        HAND: "waving hand",
        f"{HAND}{DARK}": "waving hand: dark skin tone",
    }  # the skull is not in the font, and the sign of copyright is a letter


def test_the_shards_are_read_by_the_trainer(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(emoji, "is_held_out", lambda one: DARK in one.text)
    font, annotations = sources
    assert emoji.main([f"--to={tmp_path}/out", f"--font={font}", f"--annotations={annotations}"]) == 0
    assert "3 emoji" in capsys.readouterr().out
    samples = list(open_source(f"tar:{tmp_path}/out/train-*.tar", image_size=128))
    assert sorted(sample.captions[0] for sample in samples) == ["bear", "polar bear", "waving hand"]
    picture = Image.open(io.BytesIO(samples[0].image))
    assert picture.size == (136, 136) and picture.getpixel((0, 0))[1] > 240 and picture.getpixel((68, 68))[1] < 30
    korean = open_source(f"tar:{tmp_path}/out/train-*.tar", caption="captions.en,captions.ko")
    assert {frozenset(sample.captions) for sample in korean} == {
        frozenset(names) for names in (["bear", "곰"], ["polar bear"], ["waving hand"])
    }
    (held_out,) = open_source(f"tar:{tmp_path}/out/heldout-*.tar", image_size=128)
    assert held_out.captions == ("waving hand: dark skin tone",)


def test_a_tenth_of_the_emoji_with_a_tone_is_held_out():
    def held_out(text):
        return emoji.is_held_out(emoji.Emoji(text, "", (), b"", {}))

    toned = [f"{chr(code)}{tone}" for code in range(0x1F400, 0x1F600) for tone in sorted(emoji.TONES)]
    assert 0.08 < sum(map(held_out, toned)) / len(toned) < 0.12
    assert not any(held_out(chr(code)) for code in range(0x1F400, 0x1F600))


def test_a_missing_package_is_named(tmp_path, capsys):
    assert emoji.main([f"--to={tmp_path}", f"--font={tmp_path}/none.ttf"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "apt-get install fonts-noto-color-emoji unicode-cldr-core" in said
