"""``clip-jax embed``, ``search``, ``compare`` and ``fewshot`` on a small run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from clip_jax import load
from clip_jax.commands import main
from tests.data.shards import jpeg, sample, write_shard

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run, and thirteen pairs of which one has a broken image and another no caption."""
    folder = tmp_path_factory.mktemp("an index")
    shutil.copytree(OLD_RUNS / "vit", folder / "run")
    shutil.copytree(OLD_RUNS / "tokenizer", folder / "run" / "tokenizer")
    samples = [sample(i) for i in range(13)]
    samples[4]["jpg"], samples[7]["txt"] = jpeg(4)[:150], b""
    write_shard(folder / "0.tar", samples)
    return folder


def embed(root, output, *more):
    model, data = f"--model={root / 'run'}", f"--data=tar:{root / '0.tar'}"
    return main(["embed", model, data, f"--output={output}", "--shard-size=5", "--dtype=float32", *more])


@pytest.fixture(scope="module")
def index(root):
    assert embed(root, root / "index") == 0
    return root / "index"


def rows(index):
    return [row for i in range(3) for row in parquet.read_table(index / f"metadata/metadata_{i}.parquet").to_pylist()]


def test_the_layout_is_clip_retrievals_with_a_row_for_every_usable_example(root, index):
    shards = [np.load(index / f"img_emb/img_emb_{i}.npy") for i in range(3)]
    assert [len(s) for s in shards] == [4, 4, 3]
    assert [row["index"] for row in rows(index)] == [i for i in range(13) if i not in (4, 7)]
    assert rows(index)[5]["caption"] == "picture number 6" and rows(index)[5]["image_path"].startswith("0.tar/")
    (root / "6.jpg").write_bytes(jpeg(6))
    expected = load(root / "run").encode_image(str(root / "6.jpg"))[0]
    np.testing.assert_allclose(np.concatenate(shards)[5], expected, atol=1e-5)
    texts = np.concatenate([np.load(index / f"text_emb/text_emb_{i}.npy") for i in range(3)])
    np.testing.assert_allclose(texts[5], load(root / "run").encode_text("picture number 6")[0], atol=1e-5)


def test_shards_are_written_in_any_order_once_and_of_one_model(root, index, tmp_path, capsys):
    for shards in ("2", "0-1"):
        assert embed(root, tmp_path, f"--shards={shards}") == 0
    for file in index.rglob("*.npy"):
        assert np.array_equal(np.load(file), np.load(tmp_path / file.relative_to(index)))
    capsys.readouterr()
    assert embed(root, tmp_path) == 0
    assert capsys.readouterr().out.count("done before") == 3
    assert embed(root, tmp_path, "--shards=3") == 2 and "one of 0 to 2" in capsys.readouterr().err
    assert embed(root, tmp_path, "--dtype=float16") == 2 and "begun with another dtype" in capsys.readouterr().err


def test_search_finds_an_image_and_a_caption_by_themselves(root, index, capsys):
    (root / "9.jpg").write_bytes(jpeg(9))
    assert main(["search", f"--index={index}", f"--image={root / '9.jpg'}", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hits"]
    assert found[0]["caption"] == "picture number 9" and found[0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert main(["search", f"--index={index}", "--text=picture number 3", "--among=text", "-k", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert any(line.split()[0] == "1.000" and line.endswith("picture number 3") for line in lines[1:])


def test_mistakes_are_one_line(root, tmp_path, capsys):
    assert main(["search", f"--index={tmp_path}", "--text=a"]) == 2
    assert "no embeddings" in capsys.readouterr().err
    assert main(["search", f"--index={tmp_path}"]) == 2
    assert "nothing to search for" in capsys.readouterr().err


def test_captions_of_a_field_and_folders_in_the_users_home(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pairs = [{"jpg": jpeg(i), "json": json.dumps({"texts": {"de": f"Bild {i}"}}).encode()} for i in range(3)]
    write_shard(tmp_path / "0.tar", pairs)
    data = (f"--model={root / 'run'}", "--data=tar:~/0.tar", "--caption=texts.de")
    assert main(["embed", *data, "--output=~/index"]) == 0
    captions = parquet.read_table(tmp_path / "index/metadata/metadata_0.parquet")["caption"].to_pylist()
    assert captions == ["Bild 0", "Bild 1", "Bild 2"]
    assert main(["search", "--index=~/index", "--text=Bild 1", "--among=text", "-k1"]) == 0
    assert main(["evaluate", *data, "--output=~/out"]) == 0
    results = next(path.parent.name for path in (tmp_path / "out").glob("*/*.json"))
    assert main(["compare", f"~/out/{results}", f"~/out/{results}"]) == 0
    assert not (tmp_path / "~").exists()
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert main(["embed", *data, f"--output={tmp_path}/file"]) == 2
    assert capsys.readouterr().err.startswith("clip-jax embed: ")
    assert main(["evaluate", *data, f"--output={tmp_path}/file"]) == 2
    assert capsys.readouterr().err == f"clip-jax evaluate: {tmp_path}/file: File exists\n"


def test_compare_pairs_the_examples_of_two_models(root, tmp_path, capsys):
    shutil.copytree(OLD_RUNS / "sigmoid", tmp_path / "b")
    shutil.copytree(OLD_RUNS / "tokenizer", tmp_path / "b" / "tokenizer")
    data, output = f"--data=tar:{root / '0.tar'}", tmp_path / "out"
    assert main(["evaluate", f"--model={root / 'run'}", f"--model={tmp_path / 'b'}", data, f"--output={output}"]) == 0
    a, b = (next(output.glob(name)) for name in ("*index*", "*-b"))
    capsys.readouterr()
    assert main(["compare", str(a), str(a)]) == 0
    assert capsys.readouterr().out.count("+0.0000  [+0.0000, +0.0000]  0 better, 0 worse") == 2
    assert main(["compare", str(a), str(b), "--changed=3"]) == 0
    said = capsys.readouterr().out
    records = [json.loads(next(folder.glob("*.json")).read_text())["metrics"]["t2i_R@1"] for folder in (a, b)]
    assert f"t2i_R@1  {records[1] - records[0]:+.4f}" in said
    assert main(["compare", str(a), str(tmp_path)]) == 2


@pytest.mark.slow
def test_fewshot_fits_a_head_that_reproduces_its_accuracy(root, tmp_path, capsys):
    for label in ("one", "two"):
        (tmp_path / "parts" / label).mkdir(parents=True)
        for i in range(10):
            color = 40 * i if label == "one" else 255 - 3 * i
            picture = np.full((32, 32, 3), (min(color, 90), 120, 200 if label == "one" else 10), np.uint8)
            Image.fromarray(picture).save(tmp_path / "parts" / label / f"{i}.png")
    head, data = tmp_path / "head.npz", f"--data=folder:{tmp_path / 'parts'}"
    command = ["fewshot", f"--model={root / 'run'}", data, f"--head={head}"]
    assert main([*command, "--shots=1,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("zero-shot") and "(4 test images, 2 classes)" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "8"] and lines[3].startswith("all 16 images")
    stored = np.load(head)
    assert stored["class_names"].tolist() == ["one", "two"] and stored["weights"].shape == (16, 2)
    paths = [str(tmp_path / "parts" / label / f"{i}.png") for label in ("one", "two") for i in range(10)]
    predicted = (load(root / "run").encode_image(paths) @ stored["weights"] + stored["bias"]).argmax(axis=1)
    assert np.mean(predicted == np.repeat([0, 1], 10)) >= 0.9
    capsys.readouterr()
    classify = ["classify", f"--model={root / 'run'}", *(f"--image={path}" for path in paths), "--top=1"]
    assert main([*classify, f"--head={head}"]) == 0
    said = capsys.readouterr()
    names = [line.split()[-1] for line in said.out.splitlines() if line.startswith("  ")]
    assert names == [("one", "two")[i] for i in predicted] and said.err == ""
    assert main([*classify, f"--head={head}", "--labels=a"]) == 2 and "its own labels" in capsys.readouterr().err
    np.savez(tmp_path / "narrow.npz", **(dict(stored) | {"weights": stored["weights"][1:]}))
    for wrong, message in (("narrow.npz", "of 15 features, but this model has 16"), ("parts", "fewshot --head")):
        assert main([*classify, f"--head={tmp_path / wrong}"]) == 2 and message in capsys.readouterr().err
    assert main([*command, "--shots=9"]) == 2 and "has only 8 examples" in capsys.readouterr().err
    assert main([*command, "--shots=x"]) == 2 and "--shots=x" in capsys.readouterr().err
