"""``clip-jax inspect`` counts what is in a source, and shows it."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from clip_jax.commands import main
from clip_jax.data.sources import open_source
from clip_jax.data.statistics import script
from clip_jax.data.tokenizers import train_sentencepiece
from tests.data.shards import jpeg, sample, write_shard


def test_it_counts_sizes_captions_duplicates_and_faults(tmp_path, capsys):
    samples = [sample(i) for i in range(8)]
    samples[3] |= {"jpg": jpeg(3)[:200]}
    samples[4] |= {"txt": b" "}
    samples[5] |= {"jpg": jpeg(0, size=(100, 20)), "txt": b"<b>wide</b>"}
    samples[6] |= {"jpg": jpeg(1), "txt": b"picture number 2"}
    path, html = write_shard(tmp_path / "0.tar", samples), tmp_path / "page.html"
    assert main(["inspect", f"tar:{path}", f"--html={html}"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines)}
    assert shown["examples"] == "8, of which 8 were read"
    assert "1 undecodable image" in shown["unusable"] and "1 empty caption" in shown["unusable"]
    assert shown["captions"] == "6; 1 repeat another example's"
    assert shown["images"].startswith("1 repeat")
    assert shown["width (px)"].startswith("40 / 40 / 40 /") and shown["width (px)"].endswith("/ 100")
    assert shown["width / height"].endswith("/ 5")
    assert shown["formats"] == "JPEG 100.0%" and shown["scripts"] == "Latin 100.0%"
    page = html.read_text()
    assert page.count("data:image/jpeg") == 6 and "&lt;b&gt;wide&lt;/b&gt;" in page and "0.tar/000000005" in page


def test_a_source_is_opened_with_the_settings_of_a_run_and_says_what_is_in_no_example(tmp_path, capsys):
    orphans = [{"jpg": jpeg(8)}, {"txt": b"alone"}] * 30
    path = write_shard(tmp_path / "0.tar", [sample(i) for i in range(8)] + orphans)
    cut = write_shard(tmp_path / "1.tar", [sample(i) for i in range(8)])
    cut.write_bytes(cut.read_bytes()[:-11_000])  # in the middle of a member
    for file, option, message in ((path, "--max-bad-share=1", "without"), (cut, "--truncated=keep", "truncated")):
        for command in (["inspect", f"tar:{file}"], ["pack", f"tar:{file}", f"--to={tmp_path / file.stem}"]):
            assert main(command) == 2 and message in capsys.readouterr().err
            assert main([*command, option]) == 0
            shown = capsys.readouterr().out
            assert "not read" in shown if command[0] == "inspect" else "written" in shown
    assert main(["inspect", f"tar:{path}", "--max-bad-share=2"]) == 2
    assert capsys.readouterr().err == "clip-jax inspect: --max-bad-share=2 must be at least 0 and at most 1\n"


def test_a_source_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["inspect", f"tar:{tmp_path}/none.tar"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["inspect", "shapes:train", "--examples=0"]) == 2
    assert main(["inspect", "shapes:heldout", "--examples=3", f"--html={tmp_path}/no/such/page.html"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def table(text):
    lines = [line.strip() for line in text.splitlines()]
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines)}


def test_tokens_are_counted_against_the_context_length(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\nx\n")
    captions = ["cat", "cat cat", "cat cat cat", "x"]  # 1, 2, 3 and 1 tokens, and two around them
    path = write_shard(tmp_path / "0.tar", [sample(i, caption) for i, caption in enumerate(captions)])
    command = ["inspect", f"tar:{path}", "--tokenizer=clipa", f"--vocab={tmp_path}/vocab.txt", "--context-length=4"]
    assert main(command) == 0
    shown = table(capsys.readouterr().out)
    assert shown["cut captions"] == "1 (25.0%) have more than 4 tokens"
    assert shown["caption (tokens)"].startswith("3 / ") and shown["caption (tokens)"].endswith(" / 5")
    assert main(["inspect", f"tar:{path}", "--vocab=x"]) == 2 and main(["inspect"]) == 2
    assert main(["inspect", f"tar:{path}", "--config=demo"]) == 2


def test_a_recipe_is_shown_with_the_batch_that_a_run_trains_on_first(tmp_path, capsys):
    html = tmp_path / "page.html"
    captions = [caption for scene in open_source("shapes:heldout", image_size=32) for caption in scene.captions]
    train_sentencepiece(captions, 300, tmp_path / "words.model")
    small = ["--config.batch_size=8", "--config.model.image.image_size=32", "--examples=5"]
    small += [f"--config.tokenizer.vocab={tmp_path}/words.model"]
    assert main(["inspect", "--config=demo", *small, f"--html={html}"]) == 0
    shown = table(capsys.readouterr().out)
    assert shown["pairs"] == "8, of which 8 were made" and shown["images"] == "32x32 pixels"
    page = html.read_text().partition("The first batch")[2]
    found = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)]
    assert [image.size for image in found] == [(32, 32)] * 8 and np.std([np.asarray(image) for image in found]) > 5
    words = re.findall(r"<figcaption>([^<]+)<br>", page)
    assert len(words) == 8 and all(" " in text for text in words) and len(set(words)) > 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a cat", "Latin"),
        ("кот на столе", "Cyrillic"),
        ("猫", "Han (Chinese)"),
        ("机の上の猫", "Japanese"),
        ("고양이 cat", "Hangul (Korean)"),
        ("12 🙂", "no letters"),
        ("ᠮᠣᠩ", "other"),
    ],
)
def test_captions_are_counted_by_their_script(text, name):
    assert script(text) == name
