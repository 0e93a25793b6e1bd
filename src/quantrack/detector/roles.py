"""What part each convolution plays, by the kind of module it lies in, never by its name."""

from __future__ import annotations

from enum import Enum

from torch import nn

from quantrack.detector.blocks import INPUT, network_blocks
from quantrack.detector.heads import head_levels
from quantrack.detector.ultralytics_setup import prepare


class Role(Enum):
    """The roles that quantization treats differently."""

    FIRST = "first"
    DFL = "dfl"
    HEAD_OUTPUT = "head output"
    DEPTHWISE = "depthwise"
    ATTENTION = "attention"
    BODY = "body"


def convolution_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every convolution, quantized or not, by module name in module order.

    Call it after BatchNorm is folded, when only the chosen head is left.
    """
    prepare()
    from ultralytics.nn.modules import DFL, Attention
    from ultralytics.nn.modules.block import AAttn

    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        return {}
    first = _reading_the_picture(model) or {id(convolutions[0][1])}
    in_dfl = _convolutions_inside(model, (DFL,))
    in_attention = _convolutions_inside(model, (Attention, AAttn))
    outputs = {name for level in head_levels(model) for name in (level.boxes, level.classes)}

    def role(name: str, module: nn.Conv2d) -> Role:
        if id(module) in first:
            return Role.FIRST
        if id(module) in in_dfl:
            return Role.DFL
        if name in outputs:
            return Role.HEAD_OUTPUT
        if module.groups == module.in_channels and module.groups > 1:
            return Role.DEPTHWISE
        return Role.ATTENTION if id(module) in in_attention else Role.BODY

    return {name: role(name, module) for name, module in convolutions}


def _reading_the_picture(model: nn.Module) -> set[int]:
    """The first convolution of each block that takes the picture, as it is or through blocks that only pass it on.

    YOLOv9e has two such blocks.
    """
    passed_on, found = {INPUT}, set()
    for block in network_blocks(model):
        module = model.get_submodule(block.name)
        if not passed_on.issuperset(block.sources):
            continue
        if isinstance(module, nn.Identity):
            passed_on.add(block.index)
            continue
        inside = (id(inner) for inner in module.modules() if isinstance(inner, nn.Conv2d))
        found |= set(list(inside)[:1])
    return found


def _convolutions_inside(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    return {
        id(inner)
        for module in model.modules()
        if isinstance(module, kinds)
        for inner in module.modules()
        if isinstance(inner, nn.Conv2d)
    }
