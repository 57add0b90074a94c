"""``clip-jax pack``: the shards hold what the source held, however often the command was interrupted."""

import contextlib
import io

import numpy as np
from PIL import ExifTags, Image

from clip_jax.commands import main
from clip_jax.data import images, packing
from clip_jax.data.sources import open_source
from tests.data.shards import jpeg, sample, write_shard


def packed(to):
    return {path.name: path.read_bytes() for path in to.glob("*.tar")}


def test_the_shards_hold_images_captions_and_labels_of_the_source(tmp_path):
    samples = [
        {"jpg": jpeg(i), "cls": str(i % 2).encode(), "json": b'{"c": ["one", "zw\xc3\xb6lf"]}'} for i in range(7)
    ]
    samples[2]["jpg"] = b"<html>"
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "0.tar", samples)
    (tmp_path / "in" / "classnames.txt").write_text("cat\ndog\n")
    assert main(["pack", f"tar:{tmp_path}/in", f"--to={tmp_path}/out", "--caption=c", "--per-shard=3"]) == 0
    assert sorted(packed(tmp_path / "out")) == ["00000.tar", "00001.tar", "00002.tar"]
    found = list(open_source(f"tar:{tmp_path}/out", caption="captions"))
    before = [s for i, s in enumerate(open_source(f"tar:{tmp_path}/in", caption="c")) if i != 2]
    assert [(s.image, s.captions, s.label) for s in found] == [(s.image, s.captions, s.label) for s in before]


def test_an_interrupted_call_is_continued_and_gives_the_same_bytes(tmp_path, capsys):
    source = write_shard(tmp_path / "0.tar", [sample(i) for i in range(10)])
    command = ["pack", f"tar:{source}", "--per-shard=4"]
    assert main([*command, f"--to={tmp_path}/whole"]) == 0
    assert main([*command, f"--to={tmp_path}/cut"]) == 0
    (tmp_path / "cut" / "00001.tar").unlink()
    assert main([*command, f"--to={tmp_path}/cut"]) == 0
    assert "3, 2 of them from an earlier call" in capsys.readouterr().out
    assert packed(tmp_path / "cut") == packed(tmp_path / "whole")
    assert main([*command, "--max-size=8", f"--to={tmp_path}/cut"]) == 2
    assert "was packed with another max_size" in capsys.readouterr().err
    assert main([*command, f"--to={tmp_path}"]) == 2
    assert "not packed by this command" in capsys.readouterr().err


def test_large_images_are_resized_and_scenes_become_png(tmp_path):
    source = write_shard(tmp_path / "0.tar", [{"jpg": jpeg(0, (200, 100)), "txt": b"a"}, {"jpg": jpeg(1), "txt": b"b"}])
    assert main(["pack", f"tar:{source}", f"--to={tmp_path}/out", "--max-size=50"]) == 0
    large, small = open_source(f"tar:{tmp_path}/out")
    assert Image.open(io.BytesIO(large.image)).size == (100, 50) and small.image == jpeg(1)
    scenes = open_source("shapes:heldout", image_size=32)
    packing.pack(scenes, tmp_path / "scenes", per_shard=400, max_size=0, workers=1)
    again = open_source(f"tar:{tmp_path}/scenes")
    assert len(again) == 512
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(again[7].image))), scenes[7].image)


def test_a_resized_photo_keeps_its_orientation(tmp_path):
    file, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(io.BytesIO(jpeg(0, (200, 100)))).save(file, "JPEG", exif=exif)
    source = write_shard(tmp_path / "0.tar", [{"jpg": file.getvalue(), "txt": b"a"}])
    assert main(["pack", f"tar:{source}", f"--to={tmp_path}/out", "--max-size=50"]) == 0
    assert images.decode(open_source(f"tar:{tmp_path}/out")[0].image, exif=True).size == (50, 100)


def test_array_record_files_are_a_tfds_dataset_with_the_same_samples(tmp_path, capsys):
    samples = [{"jpg": jpeg(i), "cls": str(i % 2).encode(), "txt": f"zw\u00f6lf {i}".encode()} for i in range(7)]
    samples[2]["jpg"] = b"<html>"
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "0.tar", samples)
    (tmp_path / "in" / "classnames.txt").write_text("cat\ndog\n")
    command = ["pack", f"tar:{tmp_path}/in", "--format=array_record", "--per-shard=3"]
    assert main([*command, f"--to={tmp_path}/out/my_pairs"]) == 0
    assert "tfds:my_pairs" in capsys.readouterr().out
    before = [s for i, s in enumerate(open_source(f"tar:{tmp_path}/in")) if i != 2]
    found = list(open_source("tfds:my_pairs", tfds_dir=str(tmp_path / "out")))
    assert [(s.image, s.captions, s.label) for s in found] == [(s.image, s.captions, s.label) for s in before]
    files = list(open_source(f"array_record:{tmp_path}/out/my_pairs/1.0.0/*.array_record*"))
    assert [(s.image, s.captions) for s in files] == [(s.image, s.captions) for s in before]
    assert main([*command, f"--to={tmp_path}/out/My-Pairs"]) == 2
    assert "name of a TFDS dataset" in capsys.readouterr().err


def test_a_killed_call_leaves_no_half_of_a_shard_and_is_continued(tmp_path, monkeypatch):
    source = open_source(f"tar:{write_shard(tmp_path / '0.tar', [sample(i) for i in range(10)])}")
    options = {"per_shard": 4, "max_size": 0, "workers": 1, "form": "array_record"}
    packing.pack(source, tmp_path / "whole", **options)

    seen = []

    def killed(count):
        seen.append(count)
        if sum(seen) >= 6:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        packing.pack(source, tmp_path / "cut", **options, advance=killed)
    folder = tmp_path / "cut" / "1.0.0"
    assert [path.name for path in folder.glob("*array_record*")] == ["cut-train.array_record-00000-of-00003"]
    assert packing.pack(source, tmp_path / "cut", **options).earlier == 1

    def records(name):
        files = sorted((tmp_path / name / "1.0.0").glob("*.array_record-*"))
        return [file.read_bytes() for file in files]

    assert records("cut") == records("whole") and len(records("cut")) == 3
