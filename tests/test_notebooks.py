"""The notebooks run from the first cell to the last, on a CPU, with a few steps and a small model made here."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from clip_jax.data.sources import open_source
from clip_jax.reports import notebook
from tests.training import runs

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))


def execute(path: Path, **parameters: object) -> str:
    """Everything that the executed notebook shows, with other values for the names in its cell of parameters."""
    read = nbformat.read(path, as_version=4)
    [number] = [i for i, cell in enumerate(read.cells) if "parameters" in cell.metadata.get("tags", ())]
    names = set(re.findall(r"^(\w+)(?:, (\w+))? =", read.cells[number].source, re.MULTILINE))
    assert parameters.keys() <= {name for pair in names for name in pair}
    values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    read.cells.insert(number + 1, nbformat.v4.new_code_cell(values))
    NotebookClient(read, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    if folder := os.environ.get("CLIP_JAX_EXECUTED"):  # to look at
        nbformat.write(read, Path(folder) / path.name)
    outputs = [output for cell in read.cells for output in cell.get("outputs", ())]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)


@pytest.mark.slow
def test_the_pretraining_notebook_trains_and_shows_what_it_learned(tmp_path):
    pytest.importorskip("ipykernel")
    shown = execute(ROOT / "launch/colab_pretrain.ipynb", STEPS=4, BATCH=16, WORKDIR=str(tmp_path / "run"))
    assert "1 x cpu (cpu), 16 of 16 pairs per device" in shown and "step 4/4" in shown
    assert "chance: ln 16" in shown and "zero-shot top-1" in shown  # the curves
    assert "captions rank their image first" in shown  # the similarity matrix
    assert "Where a caption&amp;#x27;s own image ranks lowest" in shown or "ranks lowest" in shown  # the gallery
    assert [line["step"] for line in runs.metrics(tmp_path / "run") if "train/loss" in line] == [1, 4]


@pytest.mark.slow
def test_the_zero_shot_notebook_loads_by_name_classifies_and_searches(small_run, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    # A model on the hub, as the hub's client keeps it once it is downloaded.
    cache = tmp_path / "hub" / "models--somebody--a-model"
    shutil.copytree(small_run, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(9):
        Image.fromarray(np.full((50, 70, 3), 25 * i, np.uint8)).save(photos / f"{i}.png")
    parameters = {"MODEL": "hf://somebody/a-model", "PHOTOS": str(photos), "LABELS": ["grey", "black", "a white cat"]}
    shown = execute(ROOT / "launch/colab_zero_shot.ipynb", **parameters)
    assert "9 images, 24 numbers each" in shown
    assert len(re.findall(r"\d+% a white cat", shown)) == 9
    assert shown.count("&lt;figure&gt;") == 9 + 7  # classified, and found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs_and_need_neither_torch_nor_tensorflow(path):
    read = nbformat.read(path, as_version=4)
    nbformat.validate(read)
    code = [cell for cell in read.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not re.search(r"(import|from) (torch|tensorflow)", "".join(cell.source for cell in code))
    assert max(len(cell.source.splitlines()) for cell in code) <= 14


def test_readme_and_notebooks_name_one_repository_and_the_notebooks_that_are_there():
    texts = [ROOT / "README.md", *NOTEBOOKS]
    badges = [
        re.findall(r"colab.research.google.com/github/([\w/-]+)/blob/main/([\w/.]+)", t.read_text()) for t in texts
    ]
    assert sorted(name for _, name in badges[0]) == [f"launch/{path.name}" for path in NOTEBOOKS]
    assert [found[0][1] for found in badges[1:]] == [f"launch/{path.name}" for path in NOTEBOOKS]
    cloned = [re.findall(r"git clone --quiet https://github.com/([\w/-]+)", path.read_text()) for path in NOTEBOOKS]
    assert (
        len({repository for found in badges for repository, _ in found} | {r for found in cloned for r in found}) == 1
    )


def test_what_a_cell_shows_is_a_frame_of_its_own_with_every_image_and_text():
    shapes = open_source("shapes:heldout", image_size=64)
    images, captions = [shapes[i].image for i in range(5)], [shapes[i].captions[0] for i in range(5)]
    similarity = np.eye(5, dtype=np.float32)
    for shown in (
        notebook.pictures(images, captions),
        notebook.matrix(images, captions, similarity),
        notebook.pairs(images, captions, similarity),
        notebook.retrieval(images, captions, similarity),
    ):
        assert shown._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html')
        assert shown.html.count("data:image/png") == 5 and all(caption in shown.html for caption in captions)


def test_the_best_text_of_each_image_is_framed():
    similarity = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    images = [np.zeros((40, 60, 3), np.uint8)] * 3
    html = notebook.matrix(images, ["one", "two"], similarity).html
    framed = re.findall(r'<td class="right[^>]*>([\d.]+)<', html)
    assert framed == [".80", ".90", ".40"]  # a row for each text


def test_images_of_any_kind_and_size_become_squares_of_one_size(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.jpg")
    given = [str(tmp_path / "a.jpg"), tmp_path / "a.jpg", Image.new("L", (20, 30)), np.zeros((9, 9, 3), np.uint8)]
    assert notebook._pixels(given).shape == (4, 160, 160, 3)
    assert notebook._pixels([np.zeros((64, 64, 3), np.uint8)]).shape == (1, 64, 64, 3)


def test_curves_are_those_of_the_report(small_run):
    html = notebook.curves(small_run).html
    assert "chance: ln 16" in html and "held-out loss" in html and html.count("<svg") == 3
