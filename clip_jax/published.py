"""Where the public weights of each model are: repositories on the Hugging Face hub, as OpenCLIP 3.3 lists them.

``clip_jax.load("hf://...")`` reads each in OpenCLIP's format; ``clip-jax models`` shows this table. Each
repository's card states its license. A model that is not here has no public weights that its name describes.
"""

OPENAI = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14-336": "timm/vit_large_patch14_clip_336.openai",
}
"""Radford et al. 2021, trained with QuickGELU."""

LAION = {
    "ViT-B/32": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "ViT-B/32-256": "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
    "ViT-B/16": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "ViT-B/16-plus-240": "timm/vit_base_patch16_plus_clip_240.laion400m_e31",
    "ViT-L/14": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "ViT-H/14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g/14": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "ViT-bigG/14": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
"""Cherti et al. 2023 and DataComp, trained with exact GELU."""

QUICKGELU = {
    **OPENAI,
    "ViT-H/14": "apple/DFN5B-CLIP-ViT-H-14",
    "ViT-H/14-378": "apple/DFN5B-CLIP-ViT-H-14-378",
    "ViT-bigG/14": "timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b",
}

CLIPA = {
    f"{name}-CLIPA{size}": f"UCSC-VLAA/{name.replace('/', '-')}-CLIPA{size}-datacomp1B"
    for name in ("ViT-L/14", "ViT-H/14", "ViT-bigG/14")
    for size in ("", "-336")
}

# The repository has the model's name.
SIGLIP = {
    name: f"timm/{name.replace('/', '-')}"
    for name in (
        *("ViT-B/16-SigLIP", "ViT-B/16-SigLIP-256", "ViT-B/16-SigLIP-384", "ViT-B/16-SigLIP-512"),
        *("ViT-B/16-SigLIP-i18n-256", "ViT-L/16-SigLIP-256", "ViT-L/16-SigLIP-384"),
        *("ViT-SO400M/14-SigLIP", "ViT-SO400M/14-SigLIP-384", "ViT-SO400M/16-SigLIP-i18n-256"),
        *("ViT-B/32-SigLIP2-256", "ViT-B/16-SigLIP2", "ViT-B/16-SigLIP2-256"),
        *("ViT-B/16-SigLIP2-384", "ViT-B/16-SigLIP2-512"),
        *("ViT-L/16-SigLIP2-256", "ViT-L/16-SigLIP2-384", "ViT-L/16-SigLIP2-512"),
        *("ViT-SO400M/14-SigLIP2", "ViT-SO400M/14-SigLIP2-378"),
        *("ViT-SO400M/16-SigLIP2-256", "ViT-SO400M/16-SigLIP2-384", "ViT-SO400M/16-SigLIP2-512"),
        *("ViT-gopt/16-SigLIP2-256", "ViT-gopt/16-SigLIP2-384"),
    )
}

EVA = {
    "EVA02-B/16": "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",
    "EVA02-L/14": "timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k",
    "EVA02-L/14-336": "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k",
    "EVA02-E/14": "timm/eva02_enormous_patch14_clip_224.laion2b_s4b_b115k",
    "EVA02-E/14-plus": "timm/eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k",
}

COCA = {
    "coca_ViT-B/32": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    "coca_ViT-L/14": "laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
}
"""With a decoder; those of mscoco_finetuned_CoCa-... write captions as COCO's."""

_REPOSITORIES = {
    **LAION,
    **{f"{name}-quickgelu": repository for name, repository in QUICKGELU.items()},
    **CLIPA,
    **SIGLIP,
    "ViT-SO400M/14-SigLIP-378": "timm/ViT-SO400M-14-SigLIP-384",  # the weights of 384, at the size that 14 divides
    **EVA,
    **COCA,
}

WEIGHTS = {name: f"hf://{repository}" for name, repository in _REPOSITORIES.items()}
"""A model's name -> what ``clip_jax.load`` takes."""
