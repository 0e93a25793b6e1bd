"""The raw outputs of the detection head: what its last convolutions give, level by level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantrack.detector.ultralytics_setup import prepare

Branches = Sequence[nn.Sequential]  # one a level, its last module the output convolution


@dataclass(frozen=True)
class HeadLevel:
    """Module names of one level's output convolutions: boxes [B, 4 * bins, H, W], classes [B, C, H, W]."""

    boxes: str
    classes: str


def head_levels(model: nn.Module) -> tuple[HeadLevel, ...]:
    """The levels of the active head, finest first; none where the model has no Ultralytics head.

    Call it after BatchNorm is folded, when only the chosen head is left.
    """
    prepare()
    from ultralytics.nn.modules import Detect

    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or not isinstance(layers[-1], Detect):
        return ()
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(
        HeadLevel(names[id(box[-1])], names[id(classes[-1])])
        for box, classes in zip(*_active_branches(layers[-1]), strict=True)
    )


def _active_branches(head: nn.Module) -> tuple[Branches, Branches]:
    """Box and class branches that fusion left; which pair it is depends on the head chosen."""
    pairs = (("one2one_cv2", "one2one_cv3"), ("cv2", "cv3"))
    left = [(getattr(head, box, None), getattr(head, classes, None)) for box, classes in pairs]
    return next((boxes, classes) for boxes, classes in left if boxes is not None and classes is not None)


@dataclass(frozen=True)
class RawOutputs:
    """Of one batch: box and class outputs of each level, and the feature maps that the head takes."""

    boxes: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]
    features: tuple[Tensor, ...]


def raw_outputs_in_training(outputs: Mapping[str, Any]) -> RawOutputs:
    """The raw outputs in what a model gives in training mode, where levels lie one after the other.

    Of two heads, those of the one-to-one head.
    """
    chosen = outputs.get("one2one", outputs)
    return RawOutputs((chosen["boxes"][..., None],), (chosen["scores"][..., None],), tuple(chosen["feats"]))


class RawOutputTap:
    """Catches a model's raw outputs as it runs; `taken` gives the last batch's."""

    def __init__(self, model: nn.Module) -> None:
        self.levels = head_levels(model)
        self.caught: dict[str, Tensor] = {}
        self.features: tuple[Tensor, ...] = ()

    def taken(self) -> RawOutputs:
        """The raw outputs of the last run."""
        return RawOutputs(
            tuple(self.caught[level.boxes] for level in self.levels),
            tuple(self.caught[level.classes] for level in self.levels),
            self.features,
        )


@contextmanager
def raw_outputs(model: nn.Module) -> Iterator[RawOutputTap]:
    """Watch a model's raw outputs; while this lasts, it decodes no boxes and returns nothing useful."""
    tap = RawOutputTap(model)

    def catch(name: str) -> Any:  # noqa: ANN401 - a hook of torch's own loose type
        return lambda module, inputs, output: tap.caught.__setitem__(name, output)

    def catch_features(module: nn.Module, inputs: tuple[list[Tensor]]) -> None:
        tap.features = tuple(inputs[0])

    head = cast("nn.Sequential", model.model)[-1]
    with ExitStack() as hooks, _without_decoding(head):
        for level in tap.levels:
            for name in (level.boxes, level.classes):
                hooks.enter_context(model.get_submodule(name).register_forward_hook(catch(name)))
        hooks.enter_context(head.register_forward_pre_hook(catch_features))
        yield tap


@contextmanager
def _without_decoding(head: nn.Module) -> Iterator[None]:
    """Decoding and top-k selection need no gradient, and their time would be lost."""
    replaced: Mapping[str, Any] = {
        "_inference": lambda *args, **kwargs: torch.zeros(1, 1, 1),
        "postprocess": lambda predictions: predictions,
    }
    try:
        for name, function in replaced.items():
            object.__setattr__(head, name, function)
        yield
    finally:
        for name in replaced:
            object.__delattr__(head, name)
