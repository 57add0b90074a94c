"""Lets ``import torchvision`` succeed beside a CPU build of torch; import this one first.

torchvision's wheel carries operators compiled for another build of torch, which then fail to load. On import its Python
half registers fake and autocast versions of them, and stops where an operator was never declared. Declaring the names
is enough: OpenCLIP and timm use only the transforms, and a call of one of these operators still fails loudly.
"""

import torch

_ONE_ARGUMENT = (
    "roi_align",
    "roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "deform_conv2d",
)

# A module-level name: the declarations live only as long as this object does.
DECLARATIONS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    DECLARATIONS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
for _name in _ONE_ARGUMENT:
    DECLARATIONS.define(f"{_name}(Tensor input) -> Tensor")
    DECLARATIONS.define(f"_{_name}_backward(Tensor grad) -> Tensor")
DECLARATIONS.define("qroi_align(Tensor input) -> Tensor")
