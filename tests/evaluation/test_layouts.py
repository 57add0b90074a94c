"""Sets in their published layouts, of a few made images, evaluated by the command: the numbers of brute force."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from clip_jax import load
from clip_jax.commands import main
from clip_jax.evaluation import aro, composition, label_maps, multi_label, ranking
from tests.data.shards import jpeg, write_shard

WORDS = ("red circle", "blue star", "green heart", "pink ring", "a black cross", "yellow square")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_winoground(folder):
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(4):
        for k in (0, 1):
            broken = (i, k) == (3, 1)
            (folder / f"images/ex_{i}_img_{k}.png").write_bytes(b"x" if broken else jpeg(2 * i + k))
        images = {f"image_{k}": f"ex_{i}_img_{k}" for k in (0, 1)}
        texts = {"caption_0": WORDS[i], "caption_1": WORDS[i + 1]}
        lines.append(json.dumps({"id": i} | images | texts | {"collapsed_tag": "Object" if i else "Both"}))
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


def write_sugar_crepe(folder):
    (folder / "val2017").mkdir(parents=True)
    for i in range(3):
        (folder / f"val2017/00{i}.jpg").write_bytes(jpeg(i))
    for number, task in enumerate(("swap_att", "add_obj")):
        rows = {
            str(i): {"filename": f"00{i}.jpg", "caption": WORDS[i], "negative_caption": WORDS[i + 1 + number]}
            for i in range(3)
        }
        (folder / f"{task}.json").write_text(json.dumps(rows))


def write_aro(folder):
    (folder / "images").mkdir(parents=True)
    for i in range(2):
        (folder / f"images/{i}.jpg").write_bytes(jpeg(i, (64, 48)))

    def row(i, false, **more):
        box = {"bbox_x": 8, "bbox_y": 4, "bbox_w": 30 + 20 * i, "bbox_h": 20}
        return {"image_path": f"{i}.jpg", "true_caption": WORDS[i], "false_caption": WORDS[false], **box, **more}

    relations = [row(i, 2 + k, relation_name=("on", "near")[k % 2]) for i in (0, 1) for k in range(3)]
    few, many = [row(0, 5, attributes=["a", "b"])], [row(i % 2, 2, attributes=["c", "d"]) for i in range(25)]
    (folder / "visual_genome_relation.json").write_text(json.dumps(relations))
    (folder / "visual_genome_attribution.json").write_text(json.dumps(few + many))


CAPTIONS = (["A red circle, a blue star and a green heart.", "a circle"], ["Pink ring left of a black cross"])


def write_captions(folder):
    (folder / "val2014").mkdir(parents=True)
    for i in range(2):
        (folder / f"val2014/{i}.jpg").write_bytes(jpeg(i))
    rows = [{"image": f"val2014/{i}.jpg", "caption": texts} for i, texts in enumerate(CAPTIONS)]
    (folder / "coco_karpathy_test.json").write_text(json.dumps(rows))


def write_multi_label(folder):
    (folder / "test").mkdir(parents=True)
    samples = []
    for i in range(8):
        file = io.BytesIO()
        np.save(file, np.array([i % 2, i % 3 == 0, 0], np.int64))
        samples.append({"jpg": jpeg(i), "npy": file.getvalue()})
    write_shard(folder / "test" / "0.tar", samples)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("multilabel")
    (folder / "classnames.txt").write_text("\n".join(WORDS[:3]))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")


def write_masks(folder):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(2):
        (folder / f"images/{i}.jpg").write_bytes(jpeg(i))
        mask = np.zeros((32, 40), np.uint8)
        mask[:, 20:], mask[:4] = i + 1, 255
        (folder / f"masks/{i}.png").write_bytes(png(mask))
    (folder / "classnames.txt").write_text("\n".join(WORDS[:3]))


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_winoground(root / "winoground")
    write_sugar_crepe(root / "sugar_crepe")
    write_aro(root / "aro")
    write_captions(root / "coco_order")
    write_multi_label(root / "wds_voc2007_multilabel")
    write_masks(root / "pascal")
    assert main(["evaluate", f"--model={run}", f"--data={root}", f"--output={root / 'out'}"]) == 0
    records = {path.stem: json.loads(path.read_text()) for path in (root / "out").glob("*/*.json")}
    return root, records


@pytest.fixture(scope="module")
def model(run):
    return load(run)


def test_winograds_scores_are_those_of_its_whole_examples(found, model):
    root, records = found
    record = records["winoground"]
    images = model.encode_image([str(root / f"winoground/images/ex_{i}_img_{k}.png") for i in range(3) for k in (0, 1)])
    texts = model.encode_text([WORDS[i + k] for i in range(3) for k in (0, 1)])
    similarity = np.stack([texts[2 * i : 2 * i + 2] @ images[2 * i : 2 * i + 2].T for i in range(3)])
    expected = composition.winoground(similarity)
    assert {name: record["metrics"][name] for name in expected} == pytest.approx(expected)
    assert record["examples"] == 3 and record["skipped"] == 1 and record["main_metric"] == "group"
    assert {"group Both", "group Object"} <= record["metrics"].keys()


def test_sugar_crepe_is_a_mean_over_its_tasks(found, model):
    root, records = found
    images = model.encode_image([str(root / f"sugar_crepe/val2017/00{i}.jpg") for i in range(3)])
    for number, task in enumerate(("swap_att", "add_obj")):
        true = np.sum(images * model.encode_text(WORDS[:3]), axis=1)
        false = np.sum(images * model.encode_text(WORDS[1 + number : 4 + number]), axis=1)
        assert records["sugar_crepe"]["metrics"][task] == pytest.approx(np.mean(true > false))
    metrics = records["sugar_crepe"]["metrics"]
    assert metrics["mean"] == pytest.approx((metrics["swap_att"] + metrics["add_obj"]) / 2)


def test_aro_is_a_mean_over_relations_and_over_frequent_attributes_of_cropped_images(found, model):
    root, records = found
    crops = [Image.open(root / f"aro/images/{i}.jpg").crop((8, 4, 38 + 20 * i, 24)) for i in (0, 1)]
    similarity = model.encode_image([np.asarray(crop) for crop in crops]) @ model.encode_text(WORDS).T
    metrics = records["aro"]["metrics"]

    def wins(i, false):
        return float(similarity[i, i] > similarity[i, false])

    on, near = np.mean([wins(i, k) for i in (0, 1) for k in (2, 4)]), np.mean([wins(i, 3) for i in (0, 1)])
    assert metrics["relation"] == pytest.approx((on + near) / 2)
    assert metrics["relation_pairs"] == pytest.approx((4 * on + 2 * near) / 6)
    frequent = (13 * wins(0, 2) + 12 * wins(1, 2)) / 25
    assert metrics["attribution"] == pytest.approx(frequent)
    assert metrics["attribution_pairs"] == pytest.approx((25 * frequent + wins(0, 5)) / 26)
    assert metrics["mean"] == pytest.approx((metrics["relation"] + frequent) / 2)


def test_a_shuffle_has_the_words_of_its_caption_and_loses_or_wins_on_its_own(found, model):
    root, records = found
    plain = [aro.plain(text) for text in (CAPTIONS[0][0], CAPTIONS[1][0])]
    assert plain[0] == "a red circle, a blue star and a green heart"
    made = [dict(aro.shuffles(text)) for text in plain]
    for kinds, text in zip(made, plain, strict=True):
        assert kinds == dict(aro.shuffles(text)) and kinds.pop("true") == text
        assert all(sorted(other.split()) == sorted(text.split()) and other != text for other in kinds.values())
        trigrams = [text.split()[i : i + 3] for i in range(0, len(text.split()), 3)]
        inner = kinds["within_trigrams"].split()
        assert [sorted(inner[i : i + 3]) for i in range(0, len(inner), 3)] == [sorted(part) for part in trigrams]
        assert all(" ".join(part) in kinds["trigrams"] for part in trigrams)
    assert not list(aro.shuffles("circle"))
    images = model.encode_image([str(root / f"coco_order/val2014/{i}.jpg") for i in (0, 1)])
    short = dict(aro.shuffles("a circle"))
    pairs = {"trigrams": [(0, plain[0], made[0]["trigrams"]), (1, plain[1], made[1]["trigrams"])]}
    pairs["within_trigrams"] = [(i, plain[i], made[i]["within_trigrams"]) for i in (0, 1)]
    pairs["within_trigrams"] += [(0, "a circle", short[k]) for k in short if k == "within_trigrams"]
    for kind, cases in pairs.items():
        number, true, false = zip(*cases, strict=True)
        chosen = images[list(number)]
        true, false = (np.sum(chosen * model.encode_text(texts), axis=1) for texts in (true, false))
        assert records["coco_order"]["metrics"][kind] == pytest.approx(np.mean(true > false + ranking.TIE))


def test_a_multi_label_set_has_average_precision_without_the_class_that_never_occurs(found, model):
    metrics = found[1]["voc2007_multilabel"]["metrics"]
    images = model.encode_image([jpeg(i) for i in range(8)])
    classes = model.encode_text([f"a photo of a {name}." for name in WORDS[:3]])
    positive = np.array([[i % 2, i % 3 == 0, 0] for i in range(8)], bool)
    expected = multi_label.multi_label(multi_label.class_scores(images, classes), positive)
    assert metrics["mAP"] == pytest.approx(expected["mAP"]) and metrics["classes_left_out"] == 1
    assert metrics["roc_auc"] == pytest.approx(expected["roc_auc"]) and metrics["mAP_11"] >= metrics["mAP"] - 0.2


def test_a_folder_of_masks_has_an_intersection_over_union(found):
    record = found[1]["pascal"]
    assert 0 <= record["metrics"]["mean_iou"] <= 1 and 0 <= record["metrics"]["pixel_accuracy"] <= 1
    assert record["examples"] == 2 and {name for name, _ in record["details"]["iou"]} <= set(WORDS[:3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of three images, without their own captions."""
    root = tmp_path_factory.mktemp("classes")
    for c, name in enumerate(("bird", "ship")):
        (root / name).mkdir()
        for i in range(3):
            (root / name / f"{i}.jpg").write_bytes(jpeg(3 * c + i))
    return root


def evaluate(run, folder, output, *more):
    code = main(["evaluate", f"--model={run}", f"--data=folder:{folder}", f"--output={output}", *more])
    records = list(output.glob("*/*.json"))
    return code, json.loads(records[0].read_text()) if records else None


def test_right_classes_by_example_and_by_class_and_a_restriction(run, folder, model, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(WORDS[:4]))
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[0], [1, 2], [], [3], [0, 1, 2, 3], ["red circle"]]))
    given = [f"--class-names={names}", f"--templates={tmp_path / 'templates.txt'}"]
    (tmp_path / "templates.txt").write_text("a {}\n")
    images = [str(folder / name / f"{i}.jpg") for name in ("bird", "ship") for i in range(3)]
    predicted = (model.encode_image(images) @ model.encode_text([f"a {w}" for w in WORDS[:4]]).T).argmax(axis=1)

    code, record = evaluate(run, folder, tmp_path / "real", *given, f"--labels={real}")
    right = [{0}, {1, 2}, set(), {3}, {0, 1, 2, 3}, {0}]
    used = [p in r for p, r in zip(predicted.tolist(), right, strict=True) if r]
    assert code == 0 and record["metrics"]["top1"] == pytest.approx(np.mean(used)) and record["examples"] == 5
    assert record["metrics"]["left_out"] == 1 and record["metrics"]["top5"] is None

    objects = tmp_path / "objects.json"
    objects.write_text(json.dumps({"ship": "red circle; pink ring", "plane": [1]}))
    code, record = evaluate(run, folder, tmp_path / "objects", *given, f"--labels={objects}")
    assert code == 0 and record["metrics"]["top1"] == 1.0  # of the two classes that occur, both are right
    assert record["examples"] == 3 and record["metrics"]["classes"] == 2

    only = tmp_path / "only.txt"
    only.write_text("bird\n")
    code, record = evaluate(run, folder, tmp_path / "only", f"--only={only}")
    assert code == 0 and record["metrics"]["top1"] == 1.0 and record["metrics"]["left_out"] == 3
    code, other = evaluate(run, folder, tmp_path / "all")
    assert other["task"] == "zeroshot_classification" and other["identity"] != record["identity"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0]]", "1 lists of classes for 6 examples"),
        ('{"plane": 0}', "none of its classes is one of the data, such as 'bird'"),
        ('{"bird": "blue sta"}', "'blue sta' is none of the 2 classes"),
        ('{"bird": 2}', "2 is none of the 2 classes"),
        ("3", "neither a list"),
        ("[", "not JSON"),
    ],
)
def test_a_map_that_does_not_fit_is_one_line(content, message, tmp_path):
    from clip_jax.errors import UserError

    (tmp_path / "map.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        label_maps.read(str(tmp_path / "map.json"), None, ("bird", "ship"), ("red circle", "blue star"), 6)
    assert "\n" not in str(error.value)


def test_every_language_of_a_source_is_searched_on_its_own(run, tmp_path, model):
    texts = {"de": WORDS, "ko": WORDS[::-1]}
    samples = [
        {"jpg": jpeg(i), "json": json.dumps({"captions": {k: v[i] for k, v in texts.items()}}).encode()}
        for i in range(6)
    ]
    write_shard(tmp_path / "0.tar", samples)
    data = [f"--data=tar:{tmp_path / '0.tar'}", "--caption=captions.de,captions.ko"]
    assert main(["evaluate", f"--model={run}", *data, f"--output={tmp_path / 'out'}"]) == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/*.json")]
    images = model.encode_image([jpeg(i) for i in range(6)])
    by_language = {record["language"]: record["metrics"] for record in records}
    for language, captions in texts.items():
        best = (model.encode_text(captions) @ images.T).argmax(axis=1)
        assert by_language[language]["t2i_R@1"] == pytest.approx(np.mean(best == np.arange(6)))
        assert by_language[language]["captions_per_image"] == 1


@pytest.mark.parametrize(
    ("write", "spoil", "message"),
    [
        (write_winoground, lambda f: (f / "examples.jsonl").write_text('{"image_0": "a"}'), "no text in the field"),
        (write_winoground, lambda f: shutil.rmtree(f / "images"), "none of its 8 images is there"),
        (write_sugar_crepe, lambda f: (f / "add_obj.json").write_text("[]"), "not an object with fields"),
        (
            write_aro,
            lambda f: (f / "visual_genome_relation.json").write_text('[{"image_path": "0.jpg"}]'),
            "true_caption",
        ),
        (write_captions, lambda f: (f / "coco_karpathy_test.json").write_text("{}"), "not a list of objects"),
        (write_multi_label, lambda f: (f / "classnames.txt").write_text("a\nb"), "a 0 or 1 for each of 2 classes"),
        (write_masks, lambda f: (f / "masks/1.png").unlink(), "1.png: missing"),
    ],
)
def test_a_set_that_is_not_whole_is_one_line(write, spoil, message, run, tmp_path, capsys):
    write(tmp_path / "set")
    spoil(tmp_path / "set")
    assert main(["evaluate", f"--model={run}", f"--data={tmp_path / 'set'}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_segment_draws_a_sheet_per_image_and_shares_that_sum_to_1(run, tmp_path, capsys):
    for name in ("a/x.jpg", "b/x.jpg", "b/y.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(len(name)))
    command = ["segment", f"--model={run}", "--labels=a red circle,a blue star", f"--output={tmp_path / 'out'}"]
    assert main([*command, f"--image={tmp_path / 'b'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and sum(float(line.split("%")[0]) for line in lines[1:3]) == pytest.approx(100, abs=0.2)
    assert Image.open(tmp_path / "out/y.png").width > 4 * 320
    assert main([*command, f"--image={tmp_path / 'a'}", f"--image={tmp_path / 'b'}"]) == 2
    assert "two files have the same name" in capsys.readouterr().err
