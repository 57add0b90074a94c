"""Small runs over the bundled scenes; python main.py --config=recipe.py:NAME."""

from clip_jax.config import defaults


def get_config(name):
    config = defaults()
    config.steps = 6
    config.batch_size = 16
    config.data.train = "shapes:train"
    config.data.workers = 1
    config.eval.heldout = "shapes:heldout"
    config.eval.zero_shot = "shapes:zero_shot"
    config.eval.batch_size = 128
    config.eval.every_steps = 5
    config.checkpoint.every_steps = 3
    config.log.every_steps = 1
    config.log.tensorboard = False
    config.model.name = "RN50" if name == "resnet" else "ViT-Shapes/16"
    config.tokenizer.kind = "sentencepiece"
    config.tokenizer.train_captions = 2000
    for tower in (config.model.image, config.model.text):
        tower.width, tower.heads = 16, 2
    config.model.text.layers, config.model.text.mlp_width = 1, 32
    config.model.text.context_length = 16
    if name == "resnet":
        config.model.image.width = 2
    else:
        config.model.image.layers, config.model.image.mlp_width = 2, 32
    config.model.image.image_size = 32
    config.model.text.vocab_size = 288
    config.model.embed_dim = 16
    config.optimizer.warmup_steps = 2
    if name == "vit":
        config.ema_decay = 0.9
        config.micro_batch = 8
        config.model.patch_dropout = 0.25
    if name == "sigmoid":
        config.loss.name = "sigmoid"
        config.optimizer.name = "adafactor"
        config.optimizer.decay = "kernels"
        config.optimizer.clip_norm = 1.0
    return config
