"""OpenCLIP's CoCa: embeddings, the captions' logits, greedy captions and training; its weights, in and out."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import clip_jax
from clip_jax import commands
from clip_jax.devices.sharding import make_mesh, to_devices
from clip_jax.interop import open_clip, open_clip_config
from clip_jax.models.clip import CLIP
from clip_jax.models.generate import Decoding, generate
from clip_jax.objectives import OBJECTIVES, captioning, contrastive
from clip_jax.presets import OPENAI
from clip_jax.training import optimizer as optimizers
from tests.parity import peers
from tests.parity.peers import relative
from tests.training.steps import learner_of

pytestmark = peers.MARKS

LENGTH, VOCAB = 12, 300
VISION = {"image_size": 32, "patch_size": 8, "width": 128, "head_width": 64, "layers": 2, "output_tokens": True}
POOLED = {**VISION, "attentional_pool": True, "attn_pooler_queries": 9, "attn_pooler_heads": 4}
TEXT = {"context_length": LENGTH, "vocab_size": VOCAB, "width": 64, "heads": 2, "layers": 2}
TEXT |= {"embed_cls": True, "output_tokens": True}
DECODER = {"context_length": LENGTH, "vocab_size": VOCAB, "width": 64, "heads": 2, "layers": 3}


def config(vision=POOLED, embed_dim=64, text=None, decoder=None) -> dict:
    towers = {"vision_cfg": vision, "text_cfg": TEXT | (text or {}), "multimodal_cfg": DECODER | (decoder or {})}
    return {"embed_dim": embed_dim, "custom_text": True, **towers}


WIDE = {"width": 128, "heads": 4}
MODELS = {
    "published": config(),  # as coca_ViT-B-32: the pooling's keys are wider than its queries
    "correct_mask": config(text={"correct_cls_mask": True}),
    "one_width": config(embed_dim=128, text=WIDE, decoder=WIDE),
    "no_pooling": config(VISION, 40, WIDE, WIDE),  # as coca_base
}

COMMON = """
import json, sys, math
from pathlib import Path
import torchvision_ops_stub  # before open_clip
import numpy as np, torch, open_clip
from open_clip.coca_model import CoCa
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
jobs = json.loads((folder / "jobs.json").read_text())

def weights(model):
    return {name: x.clone().contiguous() for name, x in model.state_dict().items()}

def build(name):
    torch.manual_seed(0)
    settings = {k: v for k, v in jobs[name].items() if k != "custom_text"}
    text = dict(settings["text_cfg"])
    correct = text.pop("correct_cls_mask", False)  # an attribute, and no setting
    model = CoCa(**settings | {"text_cfg": text})
    model.text.correct_cls_mask = correct
    torch.manual_seed(1)
    with torch.no_grad():
        model.text_decoder.text_projection.normal_(std=model.text_decoder.text_projection.shape[0] ** -0.5)
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter)
    return model

def results(model):
    torch.manual_seed(2)
    length, vocab = model.text.context_length, model.text.vocab_size
    image, text = torch.randn(3, 3, 32, 32), torch.randint(1, vocab - 2, (3, length))
    text[:, 0] = vocab - 2
    for row, end in enumerate((4, length - 1, 7)):
        text[row, end], text[row, end + 1:] = vocab - 1, 0
    with torch.no_grad():
        out = model.eval()(image, text)
        found = {
            "image_embedding": model.encode_image(image, normalize=False),
            "text_embedding": model.encode_text(text, normalize=False),
            "logits": out["logits"],
        }
        greedy = torch.full((3, 1), vocab - 2)  # its generate() needs an older transformers
        for _ in range(length - 1):
            logits = model(image, greedy, output_labels=False)["logits"][:, -1]
            greedy = torch.cat([greedy, logits.argmax(1, keepdim=True)], 1)
    return {**found, "image": image.permute(0, 2, 3, 1).contiguous(), "text": text, "greedy": greedy}
"""
MAKE = (
    COMMON
    + """
for name in jobs:
    to = folder / name
    to.mkdir()
    model = build(name)
    (to / "open_clip_config.json").write_text(json.dumps({"model_cfg": jobs[name], "preprocess_cfg": {}}))
    save_file(weights(model), to / "open_clip_model.safetensors")
    save_file(results(model), folder / f"{name}.results")
"""
)
READ = (
    COMMON
    + """
for name in jobs:
    config = folder / name / "open_clip_config.json"
    values = json.loads(config.read_text())
    correct = values["model_cfg"]["text_cfg"].pop("correct_cls_mask", False)  # as the export says
    config.write_text(json.dumps(values))
    model = open_clip.create_model(f"local-dir:{folder / name}").eval()
    assert isinstance(model, CoCa)
    model.text.correct_cls_mask = correct
    save_file(results(model), folder / f"{name}.results")
    save_file(weights(model), folder / f"{name}.weights")
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """OpenCLIP's models, and what they compute."""
    return peers.run(MAKE, tmp_path_factory.mktemp("coca"), MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_the_logits_of_captions_are_open_clips(name, made):
    model, given = clip_jax.load(made / name), load_file(made / f"{name}.results")
    assert model.preset.architecture.text.shifted_mask == (name != "correct_mask")
    text = given["text"].astype(np.int32)

    @jax.jit
    def logits(params, image, text):
        outputs = model.clip.forward(params, {}, {"image": image, "text": text}, train=False)
        hidden, head, _ = model.clip.decode(params, outputs.tokens, outputs.patches, text)
        return hidden @ head

    with jax.default_matmul_precision("highest"):
        assert relative(model.encode_pixels(given["image"], normalize=False), given["image_embedding"]) < 1e-5
        assert relative(model.encode_tokens(text, normalize=False), given["text_embedding"]) < 1e-5
        assert relative(logits(model.params, given["image"], text), given["logits"]) < 1e-5


@pytest.mark.parametrize("name", ["published", "correct_mask"])
def test_greedy_captions_are_open_clips(name, made):
    model, given = clip_jax.load(made / name), load_file(made / f"{name}.results")
    ids = dict(start_id=VOCAB - 2, end_id=VOCAB, vocab_size=VOCAB, key=jax.random.key(0))  # no end, as in the peer
    decoding = Decoding("greedy", LENGTH - 1)

    @jax.jit
    def greedy(params, image):
        return generate(model.clip, params, model.clip.patches(params, image), decoding, **ids)

    with jax.default_matmul_precision("highest"):
        assert np.array_equal(greedy(model.params, given["image"]), given["greedy"])


def test_open_clip_reads_our_export_and_no_bit_has_changed(made, tmp_path):
    for name in MODELS:
        assert commands.main(["export", f"--model={made / name}", "--format=openclip", f"--to={tmp_path / name}"]) == 0
    peers.run(READ, tmp_path, MODELS)
    for name in MODELS:
        back, expected = load_file(tmp_path / f"{name}.weights"), load_file(made / name / "open_clip_model.safetensors")
        assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in expected.items()}
        ours, theirs = (load_file(folder / f"{name}.results")["logits"] for folder in (tmp_path, made))
        assert ours.tobytes() == theirs.tobytes()


STEPS, BATCH = 30, 16
ADAMW = {"weight_decay": 0.2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
RATE = 1e-3
TRAINED = {name: MODELS[name] for name in ("published", "correct_mask")}

TRAIN = (
    COMMON
    + """
from open_clip.loss import CoCaLoss
torch.set_num_threads(1)
batches = load_file(folder / "batches")

def undecayed(name, parameter):  # as open_clip_train.main groups them
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

def train(model):
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if undecayed(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not undecayed(n, p)], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    loss_of, losses = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0), []
    for pixels, text in zip(batches["pixels"], batches["text"]):
        optimizer.zero_grad()
        loss = sum(loss_of(**model(pixels.permute(0, 3, 1, 2).contiguous(), text.long())))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    return losses

found = {}
for name in jobs:
    model = build(name).train()
    save_file(weights(model), folder / f"{name}.safetensors")
    found[name] = train(model)
    model = build(name).train()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nextafter(p, torch.where(torch.rand_like(p) < 0.5, -math.inf, math.inf)))
    found[f"{name}_moved"] = train(model)
(folder / "losses.json").write_text(json.dumps(found))
"""
)


def training_batches() -> dict[str, np.ndarray]:
    """Random pixels, and captions of random lengths that use a few tokens often, but not 0 within them."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (STEPS, BATCH, 32, 32, 3), np.uint8)
    text = (1 + (VOCAB - 4) * rng.random((STEPS, BATCH, LENGTH)) ** 3).astype(np.int32)
    ends = rng.integers(2, LENGTH, (STEPS, BATCH, 1))
    text = np.where(np.arange(LENGTH) < ends, text, np.where(np.arange(LENGTH) == ends, VOCAB - 1, 0))
    text[..., 0] = VOCAB - 2
    return {"image": image, "text": text.astype(np.int32)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder, batches = tmp_path_factory.mktemp("trained"), training_batches()
    save_file({"pixels": np.asarray(OPENAI.normalize(batches["image"])), "text": batches["text"]}, folder / "batches")
    return peers.run(TRAIN, folder, TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_of_every_step_equals_open_clips(name, trained):
    theirs = {key: np.array(losses) for key, losses in json.loads((trained / "losses.json").read_text()).items()}
    preset, mesh = (
        open_clip_config.to_preset({"model_cfg": TRAINED[name]}, name),
        make_mesh(1, devices=jax.devices()[:1]),
    )
    model = CLIP(preset.architecture)
    settings = {"contrastive": contrastive.SPEC.defaults, "captioning": captioning.SPEC.defaults}
    learner = learner_of(
        mesh,
        model=model,
        optimizer=optimizers.adamw(lambda _: RATE, **ADAMW, decay="matrices_and_positions", clip_norm=0.0),
        preprocess=OPENAI,
        objectives={name: OBJECTIVES[name].make(given, model, OPENAI, None) for name, given in settings.items()},
        weights={"contrastive": 1.0, "captioning": 2.0},
    )
    weights = open_clip.to_params(load_file(trained / f"{name}.safetensors"), preset.architecture)
    state = learner.create_state()._replace(params=jax.device_put(weights, learner.shardings().params))
    step, ours = learner.step(), []
    for image, text in zip(*training_batches().values(), strict=True):
        state, metrics = step(state, to_devices({"image": image, "text": text}, mesh, BATCH), {})
        ours.append(float(metrics["loss"]))
    from_peer = np.max(np.abs(np.array(ours) / theirs[name] - 1))
    from_itself = np.max(np.abs(theirs[f"{name}_moved"] / theirs[name] - 1))
    print(f"\n{name}: {ours[0]:.4f} to {ours[-1]:.4f}; from OpenCLIP {from_peer:.1e}, it from itself {from_itself:.1e}")
    assert from_peer < 1e-4
    assert theirs[name][-1] < theirs[name][0] - 0.3
