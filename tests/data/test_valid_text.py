"""Text that is not valid Unicode becomes valid, and names stay readable on one line."""

import os
from pathlib import Path

import pytest

from clip_jax.data.valid_text import shown, valid


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("caf\u00e9 \U0001f600", "caf\u00e9 \U0001f600"),
        ("a \ud83d\ude00", "a \U0001f600"),
        ("a \ud83d", "a \ufffd"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        (os.fsdecode(b"caf\xe9"), "caf\ufffd"),
    ],
)
def test_surrogates_are_joined_or_replaced(text, expected):
    assert valid(text) == expected
    valid(text).encode()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("10.15\u202fPM \u732b \U0001f468\u200d\U0001f469.png", "10.15\u202fPM \u732b \U0001f468\u200d\U0001f469.png"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\xe9.jpg"),
        (b"caf\xe9.jpg", "caf\\xe9.jpg"),
        ("two\nlines\x1b[31m", "two\\nlines\\x1b[31m"),
        (Path("a/b"), "a/b"),
    ],
)
def test_names_are_shown_in_full_on_one_line(name, expected):
    assert shown(name) == expected
