"""``clip-jax evaluate``: every protocol of the quick suite, own data, ensembles, and a folder that is continued."""

import csv
import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from clip_jax.commands import main
from clip_jax.evaluation import datasets, runner, suites
from tests.data.shards import jpeg, write_shard

OLD_RUNS = Path(__file__).parents[1] / "data" / "old_runs"


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def read(path):
    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a space in its path."""
    folder = shutil.copytree(OLD_RUNS / "vit", tmp_path_factory.mktemp("old runs") / "vit")
    shutil.copytree(OLD_RUNS / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Two sets in CLIP_benchmark's layout: three classes in two shards, and images with up to three captions."""
    root = tmp_path_factory.mktemp("sets")
    pets, coco = root / "wds_pets", root / "wds_coco"
    for folder in (pets, coco):
        (folder / "test").mkdir(parents=True)
    for shard in range(2):
        samples = [{"jpg": jpeg(10 * shard + i), "cls": str(i % 3).encode()} for i in range(6)]
        write_shard(pets / "test" / f"{shard}.tar", samples)
    (pets / "test" / "nshards.txt").write_text("2")
    (pets / "classnames.txt").write_text("cat\ndog\nbird\n")
    (pets / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}\n")
    samples = [
        {"jpg": jpeg(i), "txt": "\n".join(f"picture {i} {j}" for j in range(1 + i % 3)).encode()} for i in range(9)
    ]
    write_shard(coco / "test" / "0.tar", samples)
    (coco / "test" / "nshards.txt").write_text("1\n")
    (coco / "dataset_type.txt").write_text("retrieval")
    return root


@pytest.fixture
def short(monkeypatch):
    small = functools.partial(runner.quick, classification=48, pairs=24, corrupted=24)
    monkeypatch.setattr(suites.runner, "quick", small)
    monkeypatch.setattr(runner, "SEVERITIES", (1, 5))
    monkeypatch.setattr(runner, "CORRUPTIONS", ("noise", "blur", "jpeg"))


def test_the_quick_suite_has_every_protocol_and_a_page_without_links(run, tmp_path, short, capsys):
    assert main(["evaluate", f"--model={run}", f"--output={tmp_path}"]) == 0
    first = capsys.readouterr().out
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {line["dataset"]: line["metrics"] for line in lines}
    assert set(found) == {f"shapes_{p}" for p in ("zero_shot", "retrieval", "composition", "corruptions", "probe")}
    assert 0 <= found["shapes_zero_shot"]["top1"] <= found["shapes_zero_shot"]["top5"] <= 1
    assert {"i2t_R@1", "t2i_mAP", "image_retrieval_recall@5"} <= found["shapes_retrieval"].keys()
    assert {"binding", "relation", "negation", "order"} <= found["shapes_composition"].keys()
    assert {"noise", "blur", "jpeg", "clean"} <= found["shapes_corruptions"].keys()
    assert {"lp_acc1", "1_shot", "all_shot", "shots_equal_zero_shot"} <= found["shapes_probe"].keys()
    assert all(line["metrics"]["main_metric"] is not None for line in lines)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 5 and {row["task"] for row in rows} >= {"zeroshot_classification", "zeroshot_retrieval"}
    page = (tmp_path / "report.html").read_text()
    assert "Confusion matrix" in page and page.count("<svg") == 9 and "its image ranks" in page
    assert not re.search(r"(src|href)=.http|url\(http|<script", page)

    # Nothing is computed twice, and a result of another model is not taken for this one's.
    assert main(["evaluate", f"--model={run}", f"--output={tmp_path}"]) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == 5 and first.count("done before") == 0
    record = next(tmp_path.glob("*/shapes_zero_shot.json"))
    changed = read(record)
    changed["identity"]["model"] = "another"
    record.write_text(json.dumps(changed))
    assert main(["evaluate", f"--model={run}", f"--output={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("done before") == 4
    assert read(record)["metrics"] | {"main_metric": read(record)["metrics"]["top1"]} == found["shapes_zero_shot"]


def test_folders_in_clip_benchmarks_layout_are_read_as_they_are(run, benchmarks, tmp_path, capsys):
    assert main(["evaluate", f"--model={run}", f"--data={benchmarks}", f"--output={tmp_path}"]) == 0
    pets, coco = (read(next(tmp_path.glob(f"*/{name}.json"))) for name in ("pets", "coco"))
    assert pets["task"] == "zeroshot_classification" and pets["examples"] == 12
    assert pets["metrics"]["acc5"] is None and 0 <= pets["metrics"]["acc1"] <= 1
    assert coco["task"] == "zeroshot_retrieval" and coco["metrics"]["captions_per_image"] == pytest.approx(18 / 9)
    assert "text_retrieval_recall@5" in coco["metrics"] and "i2t_R@10" in coco["metrics"]
    assert "t2i_R@10" not in coco["metrics"]  # of nine images

    others = tmp_path / "others"
    assert main(["evaluate", f"--model={run}", f"--data={benchmarks}", f"--output={others}", "--templates=pets"]) == 0
    assert read(next(others.glob("*/pets.json")))["prompts"] != pets["prompts"]


def test_a_label_without_a_class_name_is_refused_in_clip_benchmarks_layout(run, benchmarks, tmp_path, capsys):
    folder = shutil.copytree(benchmarks / "wds_pets", tmp_path / "wds_pets")
    (folder / "classnames.txt").write_text("cat\ndog\n")
    assert main(["evaluate", f"--model={run}", f"--data={folder}", f"--output={tmp_path}/out"]) == 2
    assert "is 2; labels are 0..1" in capsys.readouterr().err


@pytest.mark.slow
def test_several_models_are_an_ensemble_and_of_one_model_twice_it_is_that_model(run, benchmarks, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    models = [f"--model={run}", f"--model={copy}", f"--model={OLD_RUNS / 'sigmoid'}"]
    shutil.copytree(OLD_RUNS / "tokenizer", tmp_path / "s" / "tokenizer")
    shutil.copytree(OLD_RUNS / "sigmoid", tmp_path / "s", dirs_exist_ok=True)
    models[2] = f"--model={tmp_path / 's'}"
    same, mixed = tmp_path / "same", tmp_path / "mixed"
    assert main(["evaluate", *models[:2], f"--data={benchmarks}", f"--output={same}"]) == 0
    for name in ("pets", "coco"):
        alone, ensemble = (read(next(same.glob(f"{m}/{name}.json")))["metrics"] for m in ("*vit", "ensemble"))
        assert ensemble == pytest.approx(alone, abs=1e-5)
    weights = "--weights=0,0,1"
    assert main(["evaluate", *models, weights, f"--data={benchmarks / 'wds_pets'}", f"--output={mixed}"]) == 0
    sigmoid, ensemble = (read(next(mixed.glob(f"{m}/pets.json")))["metrics"] for m in ("*-s", "ensemble"))
    assert ensemble == pytest.approx(sigmoid, abs=1e-5)
    assert (mixed / "results.md").read_text().count("|") == 3 * 7


def test_a_suite_lists_what_is_missing_and_has_no_average_then(run, benchmarks, tmp_path, capsys):
    folder = shutil.copytree(benchmarks / "wds_pets", tmp_path / "data" / "wds_vtab-pets")
    command = [
        "evaluate",
        f"--model={run}",
        "--suite=paper27",
        f"--data={folder.parent}",
        f"--output={tmp_path / 'out'}",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "ImageNet: missing; https://huggingface.co/datasets/clip-benchmark/wds_imagenet1k" in said
    assert "paper27 average  null: 26 of 27 sets are missing" in said and "vtab-pets  mean_per_class" in said
    assert (len(suites.PAPER27), len(suites.DATACOMP38)) == (27, 38)
    assert suites.average([0.5, None], 2) is None and suites.average([0.5, 1.0], 2) == 0.75
    assert "UCF101: missing; https://www.crcv.ucf.edu" in said and "folder ucf101 in CLIP_benchmark's layout" in said
    assert main(["evaluate", f"--model={run}", "--suite=imagenet", f"--output={tmp_path / 'out'}"]) == 2
    capsys.readouterr()
    assert main([word.replace("paper27", "datacomp38") for word in command]) == 0
    said = capsys.readouterr().out
    assert "GeoDE: missing; https://huggingface.co/datasets/djghosh/wds_geode_test; a folder geode in" in said
    [line] = next((tmp_path / "out").glob("*/eval_results.jsonl")).read_text().splitlines()
    assert json.loads(line)["dataset"] == "Oxford-IIIT Pet"
    assert main([word.replace("paper27", "full") for word in command]) == 0
    assert "Winoground: missing; https://huggingface.co/datasets/facebook/winoground" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data={root}/none"], "no such|not a source"),
        (["--data={root}"], "test/nshards.txt"),
        (["--weights=1,2"], "--weights=1,2: 1 numbers"),
        (["--suite=data"], "name the data"),
        (["--batch-size=0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run, tmp_path, capsys):
    given = [argument.format(root=tmp_path) for argument in arguments]
    assert main(["evaluate", f"--model={run}", f"--output={tmp_path / 'out'}", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


def test_a_shard_that_is_missing_is_said(run, benchmarks, tmp_path, capsys):
    folder = shutil.copytree(benchmarks / "wds_pets", tmp_path / "pets")
    (folder / "test" / "1.tar").unlink()
    assert main(["evaluate", f"--model={run}", f"--data={folder}", f"--output={tmp_path / 'out'}"]) == 2
    assert "1 of 2 shards are missing" in capsys.readouterr().err


def test_a_model_that_gives_nan_is_refused(run, tmp_path, monkeypatch, short, capsys):
    from clip_jax.evaluation import embed

    real = embed.make_encoders

    def broken(*arguments):
        encoders = real(*arguments)
        return encoders._replace(text=lambda weights, tokens: np.nan * encoders.text(weights, tokens))

    monkeypatch.setattr(embed, "make_encoders", broken)
    assert main(["evaluate", f"--model={run}", f"--output={tmp_path}"]) == 2
    assert "not finite" in capsys.readouterr().err


def test_a_whole_suite_has_an_average_and_no_given_set_is_ignored(run, benchmarks, tmp_path, monkeypatch, capsys):
    """Two classes in the layout of Hateful Memes, ImageNet-A's without templates, and a set of no suite."""
    for name, count in (("hateful_memes", 2), ("wds_imagenet-a", 3), ("wds_mine", 3)):
        folder = shutil.copytree(benchmarks / "wds_pets", tmp_path / "data" / name)
        (folder / "zeroshot_classification_templates.txt").unlink()
        for number in range(2):
            samples = [{"jpg": jpeg(10 * number + i), "cls": str(i % count).encode()} for i in range(6)]
            write_shard(folder / "test" / f"{number}.tar", samples)
        (folder / "classnames.txt").write_text("\n".join(("cat", "dog", "bird")[:count]))
    entries = (suites.Entry("Memes", "hateful_memes", "roc_auc"), suites.Entry("A", "imagenet-a", "f1_macro"))
    for suite in ("imagenet", "full"):
        monkeypatch.setitem(suites.SUITES, suite, entries)
        out = tmp_path / suite
        command = ["evaluate", f"--model={run}", f"--suite={suite}", f"--data={tmp_path / 'data'}", f"--output={out}"]
        assert main(command) == 0
        said = capsys.readouterr().out
        found = [read(next(out.glob(f"*/{e.folder}.json")))["metrics"][e.metric] for e in entries]
        average = f"{suite} average  {np.mean(found):.4f}"
        assert average in said and average in (out / "results.md").read_text()
        assert average in (out / "report.html").read_text()
        assert ("mine: no set of imagenet, so not evaluated" in said) == (suite == "imagenet")
        assert bool(list(out.glob("*/mine.json"))) == (suite == "full")
    assert len(datasets.open_benchmark(tmp_path / "data" / "wds_imagenet-a").prompts.templates) == 80


def test_a_linear_probe_is_added_to_a_suite_without_changing_its_average(
    run, benchmarks, tmp_path, monkeypatch, capsys
):
    pets = shutil.copytree(benchmarks / "wds_pets", tmp_path / "wds_pets")
    samples = [{"jpg": jpeg(50 + i), "cls": str(i % 3).encode()} for i in range(9)]
    (pets / "train").mkdir()
    write_shard(pets / "train" / "0.tar", samples)
    (pets / "train" / "nshards.txt").write_text("1")
    monkeypatch.setitem(suites.SUITES, "imagenet", (suites.Entry("Pets", "pets", suites.TOP1),))
    command = ["evaluate", f"--model={run}", "--suite=imagenet", f"--data={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert main([*command, "--probe"]) == 0
    found = {kind: read(next((tmp_path / "out").glob(f"*/{kind}.json"))) for kind in ("pets", "pets_probe")}
    assert found["pets_probe"]["task"] == "linear_probe" and found["pets_probe"]["examples"] == 12
    assert 0 <= found["pets_probe"]["metrics"]["lp_acc1"] <= 1
    assert f"imagenet average  {found['pets']['metrics']['top1']:.4f}" in capsys.readouterr().out
