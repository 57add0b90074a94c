"""``clip-jax models`` lists every name with its sizes and where public weights are."""

import json

from clip_jax import presets, published
from clip_jax.commands import main


def test_a_name_is_listed_with_the_published_sizes(capsys):
    assert main(["models", "vit-b-32*", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["ViT-B/32"] == {
        "name": "ViT-B/32",
        "image_parameters": 87_849_216,  # OpenCLIP's profile of ViT-B-32
        "text_parameters": 63_428_096,
        "image_size": 224,
        "context_length": 77,
        "embed_dim": 512,
        "tokenizer": "clip",
        "weights": "hf://laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    }
    assert {"ViT-B/32-quickgelu", "ViT-B/32-SigLIP2-256"} < rows.keys() and "ViT-B/16" not in rows


def test_the_table_has_one_line_per_model_under_a_heading(capsys):
    assert main(["models", "EVA02-B", "RN50-quickgelu"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["name", "image"] and len(lines) == 2
    assert lines[0].split() == [
        "RN50-quickgelu",
        "38.3M",
        "63.7M",
        "224",
        "77",
        "1024",
        "clip",
        "hf://timm/resnet50_clip.openai",
    ]


def test_capital_letters_tell_base_from_big(capsys):
    assert main(["models", "ViT-B*"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert "ViT-B/32" in names and not [name for name in names if "big" in name]


def test_an_unknown_name_is_one_line(capsys):
    assert main(["models", "ViT-B/33"]) == 2
    assert "nearest: ViT-B/32" in capsys.readouterr().err


def test_weights_are_named_for_known_models_only():
    assert published.WEIGHTS.keys() <= set(presets.list_models())
