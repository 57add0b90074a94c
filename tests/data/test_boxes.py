"""Boxes with texts: read from shards and tables, and carried through crop and flip as counting pixels says."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from clip_jax.commands import main
from clip_jax.data import images, packing
from clip_jax.data.augment import Augment
from clip_jax.data.images import Crop
from clip_jax.data.order import Order
from clip_jax.data.sources import boxes, open_source
from clip_jax.data.sources.boxes import Box
from clip_jax.data.sources.sample import BadSampleError
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.data.stream import Faults, TrainingBatches
from clip_jax.data.views import boxes_view, pair_views
from clip_jax.errors import UserError
from tests.data.shards import sample, write_shard
from tests.data.test_stream import Lengths

WIDTH, HEIGHT = 40, 24


def counted(box, crop, flipped):
    """The box in the crop, by painting it and looking at what is left; None if that is less than half.

    The share that is left comes with it: exactly half is a matter of rounding.
    """
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    left = mask[crop[1] : crop[3], crop[0] : crop[2]]
    left = left[:, ::-1] if flipped else left
    share = left.sum() / mask.sum()
    if share < 0.5:
        return None, share
    rows, columns = (np.flatnonzero(left.any(axis)) for axis in (1, 0))
    height, width = left.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height), share


def test_boxes_follow_crop_and_flip_as_painted_pixels_do():
    rng, outcomes = np.random.default_rng(0), set()

    def part():
        (x0, x1), (y0, y1) = (np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in (WIDTH, HEIGHT))
        return x0, y0, x1, y1

    for _ in range(400):
        box, crop, flipped = part(), part(), bool(rng.integers(2))
        given = Box(images.relative(box, WIDTH, HEIGHT), "a kite")
        carried = boxes.carry([given], Crop(np.zeros(0), images.relative(crop, WIDTH, HEIGHT), flipped))
        expected, share = counted(box, crop, flipped)
        if share == 0.5:
            continue
        outcomes.add(expected is None)
        if expected is None:
            assert not carried
        else:
            assert [text for _, text in carried] == ["a kite"]
            np.testing.assert_allclose(carried[0].sides, expected, atol=1e-9)
    assert outcomes == {True, False}


def png(box) -> bytes:
    pixels = np.full((HEIGHT * 8, WIDTH * 8, 3), 255, np.uint8)
    x0, y0, x1, y1 = (8 * side for side in box)
    pixels[y0:y1, x0:x1] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


RECTANGLES = [(4, 4, 20, 12), (22, 10, 38, 22), (1, 2, 12, 23), (15, 1, 39, 9)]


def shard(tmp_path):
    """Pictures with one black rectangle each, and its box."""
    samples = []
    for number, box in enumerate(RECTANGLES * 4):
        entry = {"box": images.relative(box, WIDTH, HEIGHT), "text": f"box number {number}"}
        samples.append({"png": png(box), "txt": b"a rectangle", "json": json.dumps({"boxes": [entry]}).encode()})
    write_shard(tmp_path / "a.tar", samples)
    return open_source(f"tar:{tmp_path}", boxes="boxes")


def batches(source, number=2):
    views = pair_views(
        image_size=32,
        context_length=1,
        tokenizer=Lengths(),
        crop_scale=(0.3, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bilinear",
        augment=Augment(flip=0.5),
    )
    more = {"boxes": boxes_view(number, 1, Lengths())}
    return TrainingBatches(source, Order(len(source), 8, seed=0), views | more, Faults(1.0))


def test_a_batch_has_the_boxes_of_its_own_images(tmp_path):
    """Dark pixels are inside of the box of the batch, and nowhere else."""
    make, shown = batches(shard(tmp_path)), 0
    for step in range(4):
        batch = make(step, np.arange(8))
        assert batch["boxes"].shape == (8, 2, 4) and batch["boxes"].dtype == np.float32
        assert not batch["has_box"][:, 1].any() and not batch["boxes"][:, 1].any() and not batch["box_text"][:, 1].any()
        for image, (box, _), (has_box, _) in zip(batch["image"], batch["boxes"], batch["has_box"], strict=True):
            if not has_box:
                assert not box.any()
                continue
            rows, columns = (np.flatnonzero((image[..., 0] < 128).any(axis)) for axis in (1, 0))
            dark = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 32
            np.testing.assert_allclose(box, dark, atol=1 / 32)
            shown += 1
        hosts = [make(step, rows) for rows in np.split(np.arange(8), 4)]
        for name in ("boxes", "box_text", "has_box"):
            np.testing.assert_array_equal(np.concatenate([host[name] for host in hosts]), batch[name])
    assert shown > 16


def test_boxes_change_no_image_and_no_text(tmp_path):
    source = shard(tmp_path)
    plain, more = open_source(f"tar:{tmp_path}"), batches(source)
    without = TrainingBatches(plain, more.order, {k: more.views[k] for k in ("text", "image")}, Faults(1.0))
    for name in ("image", "text", "index"):
        np.testing.assert_array_equal(without(1, np.arange(8))[name], more(1, np.arange(8))[name])
    assert plain.fingerprint != source.fingerprint


def test_of_too_many_boxes_some_are_taken_in_their_order():
    view, rng = boxes_view(3, 1, Lengths()), np.random.default_rng(0)
    given = tuple(Box((i / 20, 0.0, 1.0, 1.0), "x" * (i + 1)) for i in range(10))
    sample, seen = open_shapes("train")[0]._replace(extras={"boxes": given}), set()
    for _ in range(20):
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in view.arrays.items()}
        view.fill(sample, rng, arrays)
        taken = arrays["box_text"][:, 0].tolist()
        assert taken == sorted(set(taken)) and arrays["has_box"].all()
        np.testing.assert_allclose(arrays["boxes"][:, 0], (np.array(taken) - 1) / 20)
        seen |= set(taken)
    assert seen == set(range(1, 11))


@pytest.mark.parametrize("image_size", [64, 96])
def test_the_bundled_scenes_have_the_boxes_of_their_objects(image_size):
    source = open_shapes("train", image_size=image_size)
    counts = set()
    for index in range(40):
        sample, (scene, _) = source[index], source.describe(index)
        counts.add(len(scene.objects))
        texts = [box.text for box in sample.extras["boxes"]]
        assert texts == [f"a {o.size} {o.texture} {o.color} {o.shape}" for o in scene.objects]
        drawn = np.abs(sample.image.astype(int) - np.array(scene.background)).max(axis=2) > 24
        if len(texts) == 1:
            rows, columns = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
            extent = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / image_size
            np.testing.assert_allclose(sample.extras["boxes"][0].sides, extent, atol=1.6 / image_size)
        for sides, _ in sample.extras["boxes"]:
            x0, y0, x1, y1 = (round(side * image_size) for side in sides)
            drawn[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
        assert not drawn.any()
    assert counts == {1, 2, 3}


TWO = [{"box": [0.1, 0.2, 0.5, 1.0004], "text": " a kite "}, {"box": [0.3, 0.3, 0.3, 0.6], "text": "a line"}]


def test_a_table_has_boxes_in_a_column(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = sample(0)["jpg"]
    columns = {"image": [image] * 3, "caption": ["a", "b", "c"], "regions": [TWO, [], None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}", boxes="regions")
    assert [source[i].extras["boxes"] for i in range(3)] == [(Box((0.1, 0.2, 0.5, 1.0), "a kite"),), (), ()]
    with pytest.raises(UserError, match=r"no column region .nearest: regions"):
        open_source(f"parquet:{tmp_path}", boxes="region")

    (tmp_path / "0.jpg").write_bytes(image)
    (tmp_path / "a.csv").write_text(
        'file,caption,regions\n0.jpg,a,"' + json.dumps(TWO).replace('"', '""') + '"\n0.jpg,b,\n'
    )
    source = open_source(f"csv:{tmp_path}/a.csv", boxes="regions")
    assert [len(source[i].extras["boxes"]) for i in range(2)] == [1, 0]


def test_a_folder_has_boxes_in_its_table_or_in_the_json_beside_an_image(tmp_path):
    kite, image = (Box((0.1, 0.2, 0.5, 1.0), "a kite"),), sample(0)["jpg"]

    def found(name, boxes, files):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        for number in range(2):
            (tmp_path / name / f"{number}.jpg").write_bytes(image)
        source = open_source(f"folder:{tmp_path}/{name}", boxes=boxes)
        assert source.fingerprint != open_source(f"folder:{tmp_path}/{name}").fingerprint
        return [sample.extras["boxes"] for sample in source]

    rows = [{"file_name": "0.jpg", "text": "a", "objects": {"boxes": TWO}}, {"file_name": "1.jpg", "text": "b"}]
    table = {"metadata.jsonl": "\n".join(map(json.dumps, rows))}
    assert found("lines", "objects.boxes", table) == [kite, ()]
    quoted = json.dumps(TWO).replace('"', '""')
    assert found("csv", "regions", {"metadata.csv": f'file_name,text,regions\n0.jpg,a,"{quoted}"\n1.jpg,b,\n'}) == [
        kite,
        (),
    ]
    texts = {"0.txt": "a", "1.txt": "b", "1.json": json.dumps({"boxes": TWO})}
    assert found("beside", "boxes", texts) == [(), kite]
    with pytest.raises(UserError, match=r"data.boxes=box: no row .* no .json .*nearest: boxes.*lists there are boxes"):
        open_source(f"folder:{tmp_path}/beside", boxes="box")
    (tmp_path / "beside" / "1.json").write_text("{")
    (tmp_path / "beside" / "0.json").write_text(json.dumps({"boxes": TWO}))
    with pytest.raises(BadSampleError, match="not JSON"):
        open_source(f"folder:{tmp_path}/beside", boxes="boxes")[1]


def test_packed_examples_have_the_boxes_of_the_source(tmp_path):
    shard(tmp_path)
    expected = [example.extras["boxes"] for example in open_source(f"tar:{tmp_path}/a.tar", boxes="boxes")]
    command = ["pack", f"tar:{tmp_path}/a.tar", "--boxes=boxes", "--per-shard=9"]
    assert main([*command, "--max-size=100", f"--to={tmp_path}/tar"]) == 0
    assert main([*command, "--format=array_record", f"--to={tmp_path}/sets/my_boxes"]) == 0
    options = {"boxes": "boxes", "tfds_dir": str(tmp_path / "sets")}
    records = f"array_record:{tmp_path}/sets/my_boxes/1.0.0/*.array_record*"
    for where in (f"tar:{tmp_path}/tar", records, "tfds:my_boxes"):
        source = open_source(where, **options)
        assert [example.extras["boxes"] for example in source] == expected
        assert source.fingerprint != open_source(where, tfds_dir=str(tmp_path / "sets")).fingerprint
    for where in (records, "tfds:my_boxes"):
        with pytest.raises(UserError, match=r"boxs.*nearest: boxes"):
            open_source(where, **options | {"boxes": "boxs"})
    scenes = open_shapes("train", image_size=32, examples=3)
    packing.pack(scenes, tmp_path / "scenes", per_shard=3, max_size=0, workers=1)
    again = open_source(f"tar:{tmp_path}/scenes", boxes="boxes")
    assert [example.extras["boxes"] for example in again] == [scene.extras["boxes"] for scene in scenes]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "not JSON"),
        ({"box": [0, 0, 1, 1]}, "not a list"),
        ([{"box": [0, 0, 1, 1]}], "without a text"),
        ([{"box": [0, 0, 1, 1], "text": " "}], "without a text"),
        ([{"box": [0, 0, 1], "text": "a"}], "not .x0, y0, x1, y1.$"),
        ([{"box": [0, 0, 1, float("nan")], "text": "a"}], "not .x0, y0, x1, y1.$"),
        ([{"box": [10, 20, 300, 200], "text": "a"}], "in 0..1"),
        ([{"box": [0.6, 0, 0.4, 1], "text": "a"}], "in 0..1"),
    ],
)
def test_what_are_no_boxes_is_a_fault_of_the_sample(value, reason):
    with pytest.raises(BadSampleError, match=reason):
        boxes.parse(value, "key")


def test_a_setting_that_finds_no_boxes_is_one_line(tmp_path):
    shard(tmp_path)
    with pytest.raises(
        UserError, match=r"config.data.boxes=boxs: none of the 16 .json .*nearest: boxes.*lists there are"
    ):
        open_source(f"tar:{tmp_path}", boxes="boxs")
    with pytest.raises(UserError, match=r"config.data.boxes=boxes: tar, tfds, .* folder sources can have boxes"):
        open_source("shapes:train", boxes="boxes")
