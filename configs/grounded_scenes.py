"""A small SigLIP 2 on the bundled scenes: sigmoid loss, captions, boxes from texts, texts from boxes.

python main.py --config=configs/grounded_scenes.py --workdir=runs/grounded
The towers are as large as the demo's, and the decoder has the text tower's two layers. After 80 % of the run the image
tower also learns from its own crops, as SigLIP 2's (configs/siglip2_b16.py).
Planned for v5e-1 (docs/plans.md).
Expect: eval/boxes/box_error is 0.33 for the whole image, and 0.205 for the best box that is the same for all texts.
"""

from clip_jax.config import defaults, evaluation
from clip_jax.data.sources.shapes import TEMPLATES


def get_config():
    config = defaults()
    config.steps = 2000
    config.batch_size = 128
    config.data.train = "shapes:train"
    config.data.crop_scale = (1.0, 1.0)
    config.data.crop_ratio = (1.0, 1.0)

    config.eval.held_out = evaluation(source="shapes:heldout", every_steps=500)
    config.eval.boxes = evaluation(protocol="grounding", source="shapes:heldout", every_steps=500)
    config.eval.zero_shot = evaluation(protocol="zero_shot", source="shapes:zero_shot", templates=TEMPLATES)
    config.checkpoint.every_steps = 500

    config.model.name = "ViT-B/16-SigLIP"
    config.tokenizer.kind = "sentencepiece"
    config.model.embed_dim = 192
    config.model.scan = False  # a tenth faster on a CPU
    for tower, width, layers in ((config.model.image, 192, 4), (config.model.text, 128, 2)):
        tower.width, tower.layers, tower.heads, tower.mlp_width = width, layers, width // 32, 4 * width
    config.model.image.image_size = 64
    config.model.text.context_length = 40  # of a text with its box and the name of the task: 28 tokens at most
    config.model.text.vocab_size = 1024

    config.objectives.contrastive.loss = "sigmoid"
    config.objectives.captioning.weight = 1.0
    config.objectives.grounding.weight = 1.0
    heads = config.objectives.self_distillation
    heads.local_size, heads.prototypes, heads.hidden, heads.bottleneck = 32, 1024, 256, 64

    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.phases = ({"start": 1600, "objectives.self_distillation.weight": 0.25},)

    config.mesh.cpu_devices = 2
    return config
