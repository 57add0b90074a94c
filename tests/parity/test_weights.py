"""Weights of OpenCLIP and Transformers in all their files: the same embeddings here, and the same bits back there.

Needs the environment of ``tests/peers/make_env.sh``. Its python makes seeded random models and saves them (``MAKE``);
this process loads, compares and exports; its python loads the exports (``READ``).
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import clip_jax
from clip_jax import commands, presets
from clip_jax.interop import open_clip_config
from tests.parity import peers
from tests.parity.peers import ROOT, relative

VOCAB = ROOT.parent / "shared" / "data" / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"

pytestmark = peers.MARKS

COMMON = """
import json, sys
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import torch, open_clip, transformers
from safetensors.torch import save_file

folder = Path(sys.argv[1])
jobs = json.loads((folder / "jobs.json").read_text())

def perturb(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter)
    return model.eval()

def features(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output

def results(model, size, length, vocab):
    torch.manual_seed(2)
    image, text = torch.randn(3, 3, size, size), torch.randint(1, vocab - 1, (3, length))
    text[:, -1] = vocab - 1  # the end token
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            embeddings = model.get_image_features(pixel_values=image), model.get_text_features(input_ids=text)
        else:
            embeddings = model.encode_image(image), model.encode_text(text)
    image_embedding, text_embedding = map(features, embeddings)
    return {
        **hidden_states(model, image, text),
        "image": image.permute(0, 2, 3, 1).contiguous(),
        "text": text,
        "image_embedding": image_embedding,
        "text_embedding": text_embedding,
    }

def hidden_states(model, image, text):
    if not isinstance(model, transformers.PreTrainedModel):
        return {}
    with torch.no_grad():
        towers = {
            "image": model.vision_model(pixel_values=image, output_hidden_states=True),
            "text": model.text_model(input_ids=text, output_hidden_states=True),
        }
    found = {f"{name}_last": tower.last_hidden_state for name, tower in towers.items()}
    for name, tower in towers.items():
        found |= {f"{name}_hidden_{i}": state for i, state in enumerate(tower.hidden_states)}
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in found.items()}

def weights(model):
    return {name: x.clone().contiguous() for name, x in model.state_dict().items() if "position_ids" not in name}
"""

MAKE = (
    COMMON
    + """
for name, job in jobs.items():
    to = folder / name
    to.mkdir()
    torch.manual_seed(0)
    if job["library"] == "open_clip":
        model = dict(job["model"])
        kind = open_clip.model.CustomTextCLIP if model.pop("custom_text", False) else open_clip.model.CLIP
        model = perturb(kind(**model))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
        (to / "open_clip_config.json").write_text(json.dumps({"model_cfg": job["model"], "preprocess_cfg": {}}))
        save_file(weights(model), to / "open_clip_model.safetensors")
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / f"{name}.pt")
        if job["model"].get("quick_gelu"):
            example = torch.zeros(1, 3, job["size"], job["size"]), torch.zeros(1, job["length"], dtype=torch.int64)
            torch.jit.trace(model, example, check_trace=False).save(folder / f"{name}.jit.pt")
    else:
        config = getattr(transformers, job["config"])(**job["model"])
        model = perturb(getattr(transformers, job["class"])(config))
        model.save_pretrained(to, max_shard_size=job.get("shard", "1GB"))
        torch.save(model.state_dict(), folder / f"{name}.bin")
    save_file(results(model, job["size"], job["length"], job["vocab"]), folder / f"{name}.results")
    save_file(weights(model), folder / f"{name}.weights")
"""
)

READ = (
    COMMON
    + """
for name, job in jobs.items():
    if job["format"] == "bigvision":
        model = dict(job["model"])
        model.pop("custom_text")
        model = open_clip.model.CustomTextCLIP(**model).eval()
        sys.modules["open_clip.convert"].load_big_vision_weights(model, job["path"] + "/model.npz")
    elif job["format"] == "openclip":
        model = open_clip.create_model(f"local-dir:{job['path']}").eval()
    else:
        model, report = transformers.AutoModel.from_pretrained(job["path"], output_loading_info=True)
        model.eval()
        assert not any(report.values()), report
    save_file(results(model, job["size"], job["length"], job["vocab"]), folder / f"{name}.results")
    save_file(weights(model), folder / f"{name}.weights")
"""
)

SIZES = {"size": 32, "length": 16, "vocab": 300}


def open_clip_job(**more):
    vision = {"image_size": 32, "patch_size": 8, "width": 128, "head_width": 64, "layers": 3}
    text = {"context_length": 16, "vocab_size": 300, "width": 64, "heads": 1, "layers": 2}
    return {"library": "open_clip", **SIZES, "model": {"embed_dim": 40, "vision_cfg": vision, "text_cfg": text, **more}}


RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 16}
CLIPA_IMAGE = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
SIGLIP_TEXT = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
SIGLIP_TOWER = {"timm_model_name": "vit_base_patch32_siglip_256", "timm_pool": "map", "timm_proj": "none"}


def with_image(job, vision, text=None, **more):
    """An OpenCLIP job with another image tower."""
    model = {**job["model"], "vision_cfg": vision, "text_cfg": {**job["model"]["text_cfg"], **(text or {})}, **more}
    return {**job, "size": vision["image_size"], "model": model}


def siglip_job():
    tower = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160}
    text = {**tower, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 16}
    vision = {**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = {"text_config": text, "vision_config": vision}
    return {"library": "transformers", "class": "SiglipModel", "config": "SiglipConfig", **SIZES, "model": model}


def hugging_face_job(activation, **more):
    tower = {"hidden_act": activation, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160}
    text = {**tower, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 299}
    vision = {**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = {"text_config": text, "vision_config": vision, "projection_dim": 24}
    return {
        "library": "transformers", "class": "CLIPModel", "config": "CLIPConfig", **SIZES, "model": model, **more
    }  # fmt: skip


JOBS = {
    "open_clip_gelu": open_clip_job(),
    "open_clip_quick_gelu": open_clip_job(quick_gelu=True),
    "open_clip_resnet": with_image(open_clip_job(), RESNET),
    "open_clip_clipa": with_image(
        open_clip_job(),
        {**open_clip_job()["model"]["vision_cfg"], **CLIPA_IMAGE},
        {"no_causal_mask": True, "pool_type": "last"},
    ),
    "open_clip_siglip": with_image(
        open_clip_job(),
        {"image_size": 256, **SIGLIP_TOWER},
        SIGLIP_TEXT,
        embed_dim=768,
        custom_text=True,
        init_logit_bias=-10,
    ),
    "hf_siglip": siglip_job(),
    "hf_quick_gelu": hugging_face_job("quick_gelu"),
    "hf_gelu_in_shards": hugging_face_job("gelu", shard="100KB"),
}
FORMATS = {"open_clip": "openclip", "transformers": "huggingface"}
CONVERSIONS = [(name, FORMATS[job["library"]]) for name, job in JOBS.items()]
CONVERSIONS += [("open_clip_quick_gelu", "huggingface"), ("hf_quick_gelu", "openclip")]
CONVERSIONS += [("open_clip_siglip", "bigvision")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The peers' models, each saved in every way they know."""
    folder = tmp_path_factory.mktemp("made")
    peers.run(MAKE, folder, JOBS)
    return folder


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory) -> Path:
    """What the peers read from our exports of their models."""
    folder = tmp_path_factory.mktemp("exported")
    jobs = {}
    for name, layout in CONVERSIONS:
        path = folder / f"{name}_as_{layout}_model"
        assert commands.main(["export", f"--model={made / name}", f"--format={layout}", f"--to={path}"]) == 0
        jobs[f"{name}_as_{layout}"] = {"format": layout, "path": str(path), **JOBS[name]}
    peers.run(READ, folder, jobs)
    return folder


def same_embeddings(model, given) -> None:
    with jax.default_matmul_precision("highest"):
        image = model.encode_pixels(given["image"], normalize=False)
        text = model.encode_tokens(given["text"].astype(np.int32), normalize=False)
    assert relative(image, given["image_embedding"]) < 1e-5
    assert relative(text, given["text_embedding"]) < 1e-5


@pytest.mark.parametrize("name", JOBS)
def test_a_folder_of_the_peer_gives_the_peers_embeddings(name, made):
    same_embeddings(clip_jax.load(made / name), load_file(made / f"{name}.results"))


@pytest.mark.parametrize("name", ["hf_quick_gelu", "hf_siglip"])
def test_tokens_of_every_block_are_transformers_hidden_states(name, made):
    """``return_tokens=N`` is ``hidden_states[N]``, -2 is ``hidden_states[-2]``; with the final norm the last one is
    ``last_hidden_state``."""
    model, given = clip_jax.load(made / name), load_file(made / f"{name}.results")
    text = given["text"].astype(np.int32)
    with jax.default_matmul_precision("highest"):
        for layer in (1, 2, -1, -2):
            hidden = layer if layer > 0 else 3 + layer  # hidden_states[0] is what goes into the first of two blocks
            image_tokens = model.encode_pixels(given["image"], return_tokens=layer)
            text_tokens = model.encode_tokens(text, return_tokens=layer)
            assert relative(image_tokens, given[f"image_hidden_{hidden}"]) < 1e-5
            assert relative(text_tokens, given[f"text_hidden_{hidden}"]) < 1e-5
        last = model.clip.text_tokens(model.params, text, -1, normalize=True)
        assert relative(last, given["text_last"]) < 1e-5


@pytest.mark.parametrize(
    "file", ["open_clip_gelu.pt", "open_clip_quick_gelu.pt", "open_clip_quick_gelu.jit.pt", "hf_quick_gelu.bin"]
)
def test_a_file_of_torch_is_imported_bit_for_bit(file, made, tmp_path):
    name = file.split(".")[0]
    to = tmp_path / "out"
    if file.endswith(".jit.pt"):  # OpenAI's archives say which model they are by their shapes.
        source = made / file
    else:
        source = tmp_path / "theirs" / file
        source.parent.mkdir()
        source.write_bytes((made / file).read_bytes())
        for config in (made / name).glob("*config.json"):
            (source.parent / config.name).write_bytes(config.read_bytes())
    assert commands.main(["import", str(source), f"--to={to}"]) == 0
    read, expected = load_file(next(to.glob("*.safetensors"))), load_file(made / f"{name}.weights")
    assert {k: v.tobytes() for k, v in read.items()} == {k: v.tobytes() for k, v in expected.items()}
    same_embeddings(clip_jax.load(to), load_file(made / f"{name}.results"))


@pytest.mark.parametrize(("name", "layout"), CONVERSIONS)
def test_an_export_loaded_by_the_peer_gives_the_same_embeddings(name, layout, made, exported):
    ours, theirs = load_file(exported / f"{name}_as_{layout}.results"), load_file(made / f"{name}.results")
    for embedding in ("image_embedding", "text_embedding"):
        assert relative(ours[embedding], theirs[embedding]) < 1e-5
    same_embeddings(clip_jax.load(made / name), ours)


@pytest.mark.parametrize(("name", "layout"), [*CONVERSIONS[: len(JOBS)], ("open_clip_siglip", "bigvision")])
def test_peer_to_clip_jax_to_peer_changes_no_bit(name, layout, made, exported):
    back = load_file(exported / f"{name}_as_{layout}.weights")
    expected = load_file(made / f"{name}.weights")
    assert back.keys() == expected.keys()
    for tensor, value in expected.items():
        assert back[tensor].shape == value.shape and back[tensor].tobytes() == value.tobytes(), tensor


def test_every_configuration_of_open_clip_is_the_preset_of_its_name():
    folder = next((peers.PEERS / "lib").glob("python3*/site-packages/open_clip/model_configs"))
    known = {name.replace("/", "-"): name for name in presets.PRESETS}
    found = [file for file in folder.glob("*.json") if file.stem in known]
    assert len(found) > 70
    for file in found:
        preset = open_clip_config.to_preset({"model_cfg": json.loads(file.read_text())}, str(file))
        expected = presets.preset(known[file.stem])
        assert (preset.architecture, preset.tokenizer) == (expected.architecture, expected.tokenizer), file.stem


TOKENIZE = """
import json, sys
from transformers import AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = json.loads(open(folder + "/texts.json").read())
json.dump([tokenizer(text)["input_ids"] for text in texts], open(folder + "/ids.json", "w"))
"""


@pytest.mark.skipif(not VOCAB.exists(), reason=f"no test data at {VOCAB}")
def test_transformers_reads_the_exported_tokenizer_as_we_do(tmp_path):
    from clip_jax.data import tokenizers
    from clip_jax.interop import export
    from tests.interop import folders_of

    tokenizer = tokenizers.clip(VOCAB, 77)
    export.export(
        tmp_path / "out",
        "huggingface",
        name="test",
        preset=folders_of.PRESET,
        params=folders_of.parameters(),
        batch_stats={},
        tokenizer=tokenizer,
        source=tmp_path,
    )
    texts = ["a cat", "Two DOGS, on the beach! 1234", "eine schöne Straße", "猫と犬 🐱", ""]
    (tmp_path / "out" / "texts.json").write_text(json.dumps(texts))
    command = [peers.PEERS / "bin" / "python", "-c", TOKENIZE, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for row, ids in zip(tokenizer(texts), json.loads((tmp_path / "out" / "ids.json").read_text()), strict=True):
        assert row[: len(ids)].tolist() == ids
