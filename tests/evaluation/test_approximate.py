"""Approximate search by faiss: with all lists it is exact; its recall is measured, reached, stored and printed."""

import argparse
import json
import re
import shutil

import numpy as np
import pytest
from starlette.testclient import TestClient

from clip_jax.commands import main, serve, serve_app
from clip_jax.commands import search as searching
from clip_jax.commands.finder import open_finder
from clip_jax.errors import UserError
from clip_jax.evaluation import approximate
from clip_jax.evaluation.search import search
from tests.evaluation.test_search import unit

faiss = pytest.importorskip("faiss")


def test_recall_is_the_share_of_exact_hits_in_any_order():
    exact = np.array([[1, 2, 3], [4, -1, -1]])
    assert approximate.recall_of(np.array([[3, 9, 1], [-1, -1, -1]]), exact) == 2 / 4
    assert approximate.recall_of(exact[:, ::-1], exact) == 1.0


def test_with_all_lists_and_whole_vectors_it_is_exact_search():
    vectors = [unit(300, 1, 16), unit(500, 2, 16).astype(np.float16)]
    queries = unit(9, 3, 16)
    index = approximate.build(vectors, "IVF8,Flat")
    found = approximate.nearest(approximate.Approximate(index, "", 8, 1.0), vectors, queries, 12)
    exact = search(queries, vectors, 12)
    assert found.number.tolist() == exact.number.tolist()
    np.testing.assert_allclose(found.similarity, exact.similarity, atol=1e-6)


def test_the_fewest_lists_that_reach_the_recall_are_searched_and_similarities_are_exact():
    vectors, queries = [unit(2000, 1, 16)], unit(40, 2, 16)
    index = approximate.build(vectors, "IVF32,SQ8")
    found = approximate.measure(index, "IVF32,SQ8", vectors, queries, 0.9)
    assert 1 < found.probes < 32 and 0.9 <= found.recall <= 1
    fewer = found._replace(probes=found.probes // 2)
    exact = search(queries, vectors, 10).number
    assert approximate.recall_of(approximate.nearest(fewer, vectors, queries, 10).number, exact) < 0.9
    hits = approximate.nearest(found, vectors, queries, 10)
    expected = np.einsum("qd,qkd->qk", queries, vectors[0][hits.number])
    np.testing.assert_allclose(hits.similarity, expected, atol=1e-6)
    assert (np.diff(hits.similarity, axis=1) <= 0).all()


def test_few_vectors_and_ones_that_are_not_finite():
    vectors, queries = [unit(50, 0, 8)], unit(2, 1, 8)
    vectors[0][7] = np.nan
    built = approximate.measure(approximate.build(vectors, "IVF1,SQ8"), "", vectors, queries, 0.95)
    hits = approximate.nearest(built, vectors, queries, 60)
    assert 7 not in hits.number and (hits.number[:, 49:] == -1).all() and np.isneginf(hits.similarity[:, 49:]).all()
    with pytest.raises(UserError, match="IVFx: not an index of faiss"):
        approximate.build(vectors, "IVFx")
    with pytest.raises(UserError, match="with inverted lists"):
        approximate.build(vectors, "Flat")


def test_an_index_is_built_once_and_again_after_a_change(tmp_path, monkeypatch):
    vectors, queries, path = [unit(200, 0, 8)], unit(5, 1, 8), tmp_path / "a.faiss"
    given = (vectors, queries, "", 0.9)
    built = approximate.open_index(path, *given)
    monkeypatch.setattr(approximate, "build", lambda *_: pytest.fail("built again"))
    again = approximate.open_index(path, *given)
    assert (again.probes, again.recall, again.factory) == (built.probes, built.recall, "IVF5,SQ8")
    hits = [approximate.nearest(each, vectors, queries, 3).number.tolist() for each in (built, again)]
    assert hits[0] == hits[1]
    with pytest.raises(pytest.fail.Exception, match="built again"):
        approximate.open_index(path, [unit(201, 0, 8)], *given[1:])


@pytest.mark.slow
def test_the_command_prints_the_recall(tmp_path, capsys):
    from tests.commands.test_serve import make_index

    root = make_index(tmp_path)
    capsys.readouterr()
    command = ["search", f"--index={root / 'index'}", "--text=a", "-k3", "--json"]
    assert main([*command, "--approximate"]) == 0
    found, exact = capsys.readouterr(), main(command)
    assert "recall@10 1.000 of the exact answer" in found.err and exact == 0
    hits = [[hit["index"] for hit in json.loads(out)["hits"]] for out in (found.out, capsys.readouterr().out)]
    assert hits[0] == hits[1] and (root / "index/approximate_image.faiss").is_file()
    assert main([*command, "--approximate", "--recall=2"]) == 2 and "--recall=2.0" in capsys.readouterr().err
    arguments = argparse.Namespace(approximate="", recall=0.95)
    finder = open_finder(root / "index", None)
    for served in (finder, searching.approximately(finder, arguments, serve.filled(root / "index"))):
        app = serve_app.make_app(served, None, 3, serve.LOOPBACK)
        for among in ("image", "text"):
            page = TestClient(app, base_url="http://localhost").get("/", params={"q": "a", "among": among})
            hits.append(re.findall(r"like=(\d+)", page.text))
    assert capsys.readouterr().err.count("recall@10 1.000 of the exact answer") == 2
    assert hits[2] == hits[4] and set(served.approximate) == {"image", "text"}
    assert [len(found) for found in hits[2:]] == [3] * 4  # the captions are one to the tokenizer: any three are nearest
    shutil.rmtree(root / "index" / "text_emb")  # without captions, images are the queries that measure it
    assert main([*command, "--approximate=IVF1,Flat"]) == 0
