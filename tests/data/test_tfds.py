"""TFDS datasets by random access and without TensorFlow: what is read, what a split means, what is refused how."""

import io
import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clip_jax.data.sources import BadSampleError, open_source
from clip_jax.data.sources.tfds import open_split
from clip_jax.errors import UserError
from tests.data.shards import jpeg
from tests.data.tfds_fixture import write_coco_captions, write_tfds

IMAGE = tfds.features.Image(encoding_format="jpeg")
TEXT = tfds.features.Text()


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A data_dir with coco_captions of two shards a split, and what was written into it."""
    data_dir = tmp_path_factory.mktemp("tfds")
    return data_dir, write_coco_captions(data_dir, shards=2)


@pytest.fixture
def coco_copy(coco, tmp_path):
    """A data_dir to spoil, and the folder of the dataset's files in it."""
    shutil.copytree(coco[0], tmp_path / "tfds")
    return tmp_path / "tfds", tmp_path / "tfds/coco_captions/2014/1.1.0"


def write(data_dir: Path, features: dict, *examples: dict, **settings) -> Path:
    return write_tfds(data_dir, "mine", features, {"train": list(examples)}, **settings)


def pairs(source) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(sample.image, sample.captions) for sample in source]


def expected(examples: list[dict]) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(e["image"], tuple(caption["text"] for caption in e["captions"])) for e in examples]


def refusal(where: str, split: str, data_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_split(where, split, data_dir=str(data_dir))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"tfds:{where}")
    return message


def test_coco_captions_are_read_in_order_with_encoded_images_and_all_captions(coco):
    data_dir, written = coco
    for split, examples in written.items():
        source = open_split("coco_captions", split, data_dir=str(data_dir))
        assert len(source) == len(examples)
        assert pairs(source) == expected(examples)
    assert source[0].label == -1 and source.class_names == ()


def test_reading_needs_no_tensorflow_no_network_and_prints_nothing(coco, tmp_path):
    program = f"""
import socket, sys
from absl import logging
logging.set_verbosity(logging.INFO)  # As programs do that want to hear of themselves.
def no_network(*args, **kwargs):
    raise AssertionError("network")
socket.getaddrinfo = socket.socket.connect = no_network
from clip_jax.data.sources.tfds import open_split
source = open_split("coco_captions", "test", data_dir={str(coco[0])!r})
assert source[2].image.startswith(b"\\xff\\xd8")
assert "tensorflow" not in sys.modules
assert not [m for m in sys.modules if m.startswith("tensorflow_datasets.object_detection")], "dataset code ran"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tensorflow_was_not_imported_to_write_and_read_the_datasets_of_this_file(coco):
    open_split("coco_captions", "train", data_dir=str(coco[0]))[0]
    assert "tensorflow" not in sys.modules


def test_the_name_in_a_config_ends_in_the_split(coco):
    data_dir, written = coco
    source = open_source("tfds:coco_captions/2014:1.1.0/test", image_size=32, tfds_dir=str(data_dir))
    assert source.name == "tfds:coco_captions/2014:1.1.0/test"
    assert pairs(source) == expected(written["test"])


@pytest.mark.parametrize("where", ["coco_captions/2014", "coco_captions:1.1.0", "coco_captions/2014:1.1.0"])
def test_config_and_version_may_be_named(coco, where):
    data_dir, written = coco
    assert pairs(open_split(where, "val", data_dir=str(data_dir))) == expected(written["val"])


def test_data_dir_defaults_to_the_one_of_tfds(coco, monkeypatch):
    data_dir, written = coco
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert pairs(open_split("coco_captions", "val")) == expected(written["val"])
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(data_dir / "home"))
    with pytest.raises(UserError, match=f"coco_captions is not in {data_dir}/home/tensorflow_datasets"):
        open_split("coco_captions", "val")


def test_parts_and_sums_of_splits_are_those_of_tfds(coco):
    data_dir, written = coco
    train, restval = expected(written["train"]), expected(written["restval"])
    assert pairs(open_split("coco_captions", "train[3:6]", data_dir=str(data_dir))) == train[3:6]
    assert pairs(open_split("coco_captions", "train[75%:]+restval", data_dir=str(data_dir))) == train[6:] + restval


def test_samples_are_named_after_dataset_and_place_and_end_at_the_end(coco):
    source = open_split("coco_captions", "val[1:]", data_dir=str(coco[0]))
    assert source[2].key == "coco_captions/2014/1.1.0 val[1:][2]"
    for outside in (3, -1):
        with pytest.raises(IndexError):
            source[outside]


def test_threads_read_what_one_thread_reads(coco):
    data_dir, written = coco
    source = open_split("coco_captions", "train", data_dir=str(data_dir))
    indices = np.random.default_rng(0).integers(0, len(source), 2000).tolist()
    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(source.__getitem__, indices))
    known = expected(written["train"])
    assert [(sample.image, sample.captions) for sample in read] == [known[i] for i in indices]


def test_image_bytes_are_those_of_the_file_to_the_last_zero(tmp_path):
    image = jpeg(1) + b"\0\0\0"
    write(tmp_path, {"image": IMAGE, "caption": TEXT}, {"image": io.BytesIO(image), "caption": "a"})
    assert open_split("mine", "train", data_dir=str(tmp_path))[0].image == image


@pytest.mark.parametrize(
    ("feature", "value", "captions"),
    [
        ({"captions": tfds.features.Sequence(TEXT)}, ["a dog", " ein Hund\n"], ("a dog", "ein Hund")),
        ({"captions": tfds.features.Sequence({"caption": TEXT, "score": np.float32})}, None, ("a dog",)),
        ({"caption": TEXT}, "a dög", ("a dög",)),
        ({"text": np.str_}, "a dog", ("a dog",)),
        ({"captions": tfds.features.Sequence(np.str_, length=2)}, ["a dog", "a hound"], ("a dog", "a hound")),
    ],
)
def test_captions_stand_where_catalog_datasets_put_them(tmp_path, feature, value, captions):
    ((name, _),) = feature.items()
    value = [{"caption": "a dog", "score": 0.5}] if value is None else value
    write(tmp_path, {"image": IMAGE, **feature}, {"image": io.BytesIO(jpeg(1)), name: value})
    assert open_split("mine", "train", data_dir=str(tmp_path))[0].captions == captions


def test_labels_index_the_class_names_and_the_class_name_is_the_caption(tmp_path):
    features = {"image": IMAGE, "label": tfds.features.ClassLabel(names=["dog", "tabby cat"]), "id": TEXT}
    image = io.BytesIO(jpeg(1)).getvalue()
    rows = [{"image": io.BytesIO(image), "label": label, "id": "x"} for label in ("tabby cat", "dog", -1)]
    write(tmp_path, features, *rows)
    source = open_split("mine", "train", data_dir=str(tmp_path))
    assert source.class_names == ("dog", "tabby cat")
    assert [(source[i].label, source[i].captions) for i in range(2)] == [(1, ("tabby cat",)), (0, ("dog",))]
    with pytest.raises(BadSampleError, match=r"mine/1\.0\.0 train\[2\]: no label"):  # As in ImageNet's test split.
        source[2]


def test_a_caption_is_preferred_to_the_class_name_and_the_label_kept(tmp_path):
    features = {"image": IMAGE, "caption": TEXT, "label": tfds.features.ClassLabel(names=["dog", "cat"])}
    write(tmp_path, features, {"image": io.BytesIO(jpeg(1)), "caption": "a wet cat", "label": "cat"})
    sample = open_split("mine", "train", data_dir=str(tmp_path))[0]
    assert (sample.captions, sample.label) == (("a wet cat",), 1)


def test_other_features_are_not_decoded(tmp_path):
    mask = tfds.features.LabeledImage(labels=3, shape=(None, None, 1), encoding_format="png")
    features = {"photo": IMAGE, "mask": mask, "caption": TEXT}
    example = {"photo": io.BytesIO(jpeg(1)), "mask": io.BytesIO(b"not a PNG at all"), "caption": "a dog"}
    write(tmp_path, features, example)
    assert open_split("mine", "train", data_dir=str(tmp_path))[0].image == jpeg(1), (
        "the only photograph, by another name"
    )


def test_pixels_that_were_stored_without_a_file_come_as_an_array(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    features = {"image": tfds.features.Tensor(shape=(5, 7, 3), dtype=np.uint8), "caption": TEXT}
    write(tmp_path, features, {"image": pixels, "caption": "noise"})
    image = open_split("mine", "train", data_dir=str(tmp_path))[0].image
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)


def test_pixels_that_tfds_encoded_come_as_a_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    features = {"image": tfds.features.Image(shape=(5, 7, 3), encoding_format="png"), "caption": TEXT}
    write(tmp_path, features, {"image": io.BytesIO(png.getvalue()), "caption": "noise"})
    assert open_split("mine", "train", data_dir=str(tmp_path))[0].image == png.getvalue()


@pytest.mark.parametrize("captions", [[], ["", " \n"]])
def test_an_empty_caption_is_a_fault_of_its_sample_alone(tmp_path, captions):
    features = {"image": IMAGE, "captions": tfds.features.Sequence(TEXT)}
    rows = [{"image": io.BytesIO(jpeg(i)), "captions": texts} for i, texts in enumerate((captions, ["", "a dog"]))]
    write(tmp_path, features, *rows)
    source = open_split("mine", "train", data_dir=str(tmp_path))
    with pytest.raises(BadSampleError, match=r"train\[0\]: empty caption"):
        source[0]
    assert source[1].captions == ("a dog",)


def test_a_caption_that_is_not_utf8_is_a_fault_of_its_sample_alone(tmp_path):
    rows = [{"image": io.BytesIO(jpeg(1)), "caption": text} for text in (b"caf\xe9", "café".encode())]
    write(tmp_path, {"image": IMAGE, "caption": TEXT}, *rows)
    source = open_split("mine", "train", data_dir=str(tmp_path))
    with pytest.raises(BadSampleError, match="caption is not UTF-8"):
        source[0]
    assert source[1].captions == ("café",)


def test_a_damaged_record_is_a_fault_of_its_sample_alone(coco_copy, coco):
    data_dir, folder = coco_copy
    shard = folder / "coco_captions-test.array_record-00000-of-00002"
    data = bytearray(shard.read_bytes())
    image = coco[1]["test"][1]["image"]
    at = data.index(image[-64:])
    data[at : at + 8] = b"\xff" * 8
    shard.write_bytes(data)
    source = open_split("coco_captions", "test", data_dir=str(data_dir))
    with pytest.raises(BadSampleError, match=r"test\[1\]: corrupted record"):
        source[1]
    assert source[0].image == coco[1]["test"][0]["image"]
    assert source[2].image == coco[1]["test"][2]["image"]


def test_a_shard_that_ends_early_is_an_os_error(coco_copy):
    data_dir, folder = coco_copy
    (folder / "coco_captions-test.array_record-00001-of-00002").write_bytes(b"")
    source = open_split("coco_captions", "test", data_dir=str(data_dir))
    assert source[0].captions
    with pytest.raises(OSError, match=r"coco_captions/2014/1\.1\.0 test\[3\]"):
        source[3]


def test_the_newest_version_is_read_unless_another_is_named(tmp_path):
    for version in ("1.2.0", "1.10.0"):
        example = {"image": io.BytesIO(jpeg(1)), "caption": f"of {version}"}
        write(tmp_path, {"image": IMAGE, "caption": TEXT}, example, version=version)
    (tmp_path / "mine/incomplete.AB12CD_1.11.0").mkdir()
    assert open_split("mine", "train", data_dir=str(tmp_path))[0].captions == ("of 1.10.0",)
    assert open_split("mine:1.2.0", "train", data_dir=str(tmp_path))[0].captions == ("of 1.2.0",)
    assert "version 1.3.0 is not in" in (said := refusal("mine:1.3.0", "train", tmp_path))
    assert "there is 1.10.0, 1.2.0" in said


def test_of_several_configs_the_default_is_read_unless_another_is_named(tmp_path):
    for config in ("large", "small"):  # TFDS notes the config that was written last.
        example = {"image": io.BytesIO(jpeg(1)), "caption": f"of {config}"}
        write(tmp_path, {"image": IMAGE, "caption": TEXT}, example, config=config)
    assert open_split("mine/large", "train", data_dir=str(tmp_path))[0].captions == ("of large",)
    assert open_split("mine", "train", data_dir=str(tmp_path))[0].captions == ("of small",)
    shutil.rmtree(tmp_path / "mine/.config")
    assert "has several configs; name one: tfds:mine/large, tfds:mine/small" in refusal("mine", "train", tmp_path)
    assert "config big is not in" in (said := refusal("mine/big", "train", tmp_path))
    assert "there is large, small" in said


def test_a_converted_dataset_that_kept_its_tfrecord_files_is_read(coco_copy, coco):
    data_dir, folder = coco_copy
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert pairs(open_split("coco_captions", "test", data_dir=str(data_dir))) == expected(coco[1]["test"])


def test_the_fingerprint_follows_dataset_split_and_shards_and_not_the_place(coco, tmp_path):
    def fingerprint(split="test", where="coco_captions", data_dir=coco[0]):
        return open_split(where, split, data_dir=str(data_dir)).fingerprint

    known = fingerprint()
    assert fingerprint() == known
    assert fingerprint(where="coco_captions/2014:1.1.0") == known
    shutil.copytree(coco[0], tmp_path / "elsewhere")
    assert fingerprint(data_dir=tmp_path / "elsewhere") == known
    others = [fingerprint("val"), fingerprint("test[:3]"), fingerprint("test[1:]")]
    for name, settings in {
        "one shard": {},
        "more": {"splits": {"test": 5}, "shards": 2},
        "other pictures": {"splits": {"train": 90, "test": 4}, "shards": 2},
    }.items():
        write_coco_captions(tmp_path / name, **settings)
        others.append(fingerprint(data_dir=tmp_path / name))
    assert len({known, *others}) == 1 + len(others)


def test_a_dataset_that_is_not_prepared_is_refused_with_the_command_that_prepares_it(tmp_path):
    said = refusal("coco_captions", "train", tmp_path)
    assert f"coco_captions is not in {tmp_path}; prepare it once" in said
    assert "pip install 'clip-jax-tpu[tfds-build]'" in said
    call = f"tfds.builder('coco_captions', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()"
    assert f'python -c "import tensorflow_datasets as tfds; {call}"' in said
    assert list(tmp_path.iterdir()) == [], "nothing was downloaded"


@pytest.mark.parametrize("folder", ["coco_captions/2014", "cifar10"])
def test_an_interrupted_preparation_is_no_dataset(tmp_path, folder):
    (tmp_path / folder / "incomplete.AB12CD_1.1.0").mkdir(parents=True)
    said = refusal(folder.split("/")[0], "train", tmp_path)
    assert f"{tmp_path / folder} has no finished version; prepare it once" in said


def test_an_unknown_name_is_refused_with_the_nearest_known_one(coco):
    said = refusal("coco_caption", "train", coco[0])
    assert f"coco_caption is neither in {coco[0]} nor in the TFDS catalog (nearest: coco_captions)" in said


@pytest.mark.parametrize("where", ["", "coco captions", "huggingface:coco", "coco/2014/1.1.0/x", "../coco"])
def test_what_is_no_name_is_refused(coco, where):
    assert "write name, name/config or name/config:1.2.3" in refusal(where, "train", coco[0])


@pytest.mark.parametrize(("split", "hint"), [("tests", " (nearest: test)"), ("", ""), ("train[", " (nearest: train)")])
def test_an_unknown_split_is_refused_with_those_there_are(coco, split, hint):
    said = refusal("coco_captions", split, coco[0])
    assert f"{split!r} is not a split of {coco[0]}/coco_captions/2014/1.1.0{hint}" in said
    assert "there are restval, test, train, val" in said


def test_an_empty_part_of_a_split_is_refused(coco):
    assert "split 'train[:0]' of" in (said := refusal("coco_captions", "train[:0]", coco[0]))
    assert "is empty" in said


def test_tfrecord_files_are_refused_with_a_way_to_array_record(coco_copy):
    data_dir, folder = coco_copy
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
    said = refusal("coco_captions", "train", data_dir)
    assert f"{folder} has tfrecord files, which have no random access; move that folder away" in said
    assert "file_format='array_record').download_and_prepare()" in said


def test_missing_shards_are_refused_before_the_run_starts(coco_copy):
    data_dir, folder = coco_copy
    (folder / "coco_captions-train.array_record-00001-of-00002").unlink()
    said = refusal("coco_captions", "train", data_dir)
    assert "1 of 2 shards of split 'train' are not in" in said
    assert "the first is coco_captions-train.array_record-00001-of-00002" in said
    open_split("coco_captions", "val", data_dir=str(data_dir))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_broken_metadata_is_refused(coco_copy, name):
    data_dir, folder = coco_copy
    (folder / name).write_text("{")
    assert f"cannot read {folder}" in refusal("coco_captions", "train", data_dir)


def test_features_without_an_image_or_without_words_are_refused_with_what_is_there(tmp_path):
    write_tfds(tmp_path, "no_image", {"caption": TEXT, "id": np.int64}, {"train": [{"caption": "a", "id": 1}]})
    said = refusal("no_image", "train", tmp_path)
    assert "no image among its features (caption: Text, id: Tensor)" in said
    example = {"image": io.BytesIO(jpeg(1)), "id": 1}
    write_tfds(tmp_path, "no_words", {"image": IMAGE, "id": np.int64}, {"train": [example]})
    said = refusal("no_words", "train", tmp_path)
    assert "no class label among its features (id: Tensor, image: Image)" in said
    two = {"left": IMAGE, "right": IMAGE, "caption": TEXT}
    example = {"left": io.BytesIO(jpeg(1)), "right": io.BytesIO(jpeg(2)), "caption": "a"}
    write_tfds(tmp_path, "two_images", two, {"train": [example]})
    assert "no image among its features (caption: Text, left: Image, right: Image)" in refusal(
        "two_images", "train", tmp_path
    )


def test_messages_of_others_and_errors_of_tfds_are_still_logged(coco, caplog):
    open_split("coco_captions", "val", data_dir=str(coco[0]))
    logger = logging.getLogger("absl")
    logger.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": "ours", "pathname": "clip_jax/x.py"}))
    for level, text in ((logging.WARNING, "chatter"), (logging.ERROR, "trouble")):
        path = "site-packages/tensorflow_datasets/x.py"
        logger.handle(logging.makeLogRecord({"levelno": level, "msg": text, "pathname": path}))
    assert [record.msg for record in caplog.records] == ["ours", "trouble"]
