"""A detector in training: Ultralytics' detection loss on its heads, and what else is to be learned.

BatchNorm is folded by now, so that training mode only changes what the head gives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantrack.detector.heads import RawOutputs, raw_outputs_in_training
from quantrack.detector.ultralytics_setup import prepare

# Pictures [B, 3, S, S] and the student's raw outputs, to a loss per picture.
FurtherLoss = Callable[[Tensor, RawOutputs], Tensor]
LossAndParts = tuple[Tensor, dict[str, Tensor]]


class Student(nn.Module):
    """A network, as Ultralytics' trainer, its EMA and DDP wrap it; a batch in, its loss and the loss's parts out.

    `auxiliary` are the branches of the one-to-many head, which the network gets for the time of training;
    `mixed_precision` computes convolutions in bfloat16, losses stay in float32.
    """

    def __init__(
        self,
        network: nn.Module,
        auxiliary: tuple[nn.Module, nn.Module] | None,
        further_loss: FurtherLoss | None,
        mixed_precision: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self.further_loss = further_loss
        self.mixed_precision = mixed_precision
        head: Any = self.model[-1]
        if auxiliary:
            head.cv2, head.cv3 = auxiliary
        if getattr(head, "one2one_cv2", None) is not None:
            kind: Any = type(head)
            head.__class__ = _with_both_heads(kind)
        # what the trainer reads and sets
        self.stride, self.names, self.nc = network.stride, network.names, head.nc
        self.yaml = getattr(network, "yaml", {})
        self.args: Any = None
        self.criterion: Any = None

    @property
    def model(self) -> Any:  # noqa: ANN401 - Ultralytics is untyped
        """The network's blocks, the last of which is the head."""
        return self.network.model

    @property
    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """The weights of the head that is there for training only."""
        head = self.model[-1]
        if getattr(head, "one2one_cv2", None) is None or head.cv2 is None:
            return []
        return [*head.cv2.parameters(), *head.cv3.parameters()]

    def forward(self, batch: dict[str, Any]) -> LossAndParts:
        """The sum of the losses over the batch (Ultralytics' convention), and its parts per picture."""
        pictures: Tensor = batch["img"]
        # Ultralytics' own bfloat16 is for CUDA only
        with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.mixed_precision):
            outputs = _in_float32(self.network(pictures))
        self.criterion = self.criterion or self.new_criterion()
        losses, parts = self.criterion(outputs, batch)
        total, parts = losses.sum(), dict(parts)
        if self.further_loss is not None:
            with torch.autocast(pictures.device.type, torch.bfloat16, enabled=self.mixed_precision):
                further = self.further_loss(pictures, raw_outputs_in_training(outputs))
            total, parts["distill_loss"] = total + len(pictures) * further, further.detach()
        return total, parts | {"total_loss": total.detach() / len(pictures)}

    def new_criterion(self) -> Any:  # noqa: ANN401
        """The detection loss: of both heads, or of the only one."""
        prepare()
        from ultralytics.utils.loss import v8DetectionLoss

        head = self.model[-1]
        if getattr(head, "one2one_cv2", None) is None:
            return v8DetectionLoss(self)
        return _BothHeadsLoss(self) if head.cv2 is not None else _OneToOneLoss(self)

    def set_head_attr(self, **attributes: object) -> None:
        """The trainer would set the limit of detections to its own; the exported one stays."""


def _in_float32(outputs: Any) -> Any:  # noqa: ANN401
    """The same dictionaries and lists, every tensor in float32."""
    if isinstance(outputs, dict):
        return {name: _in_float32(value) for name, value in outputs.items()}
    if isinstance(outputs, list):
        return [_in_float32(value) for value in outputs]
    return outputs.float()


class _BothHeadsLoss:
    """The loss of both heads, weighed as it is at the end of a detector's training.

    From scratch the one-to-many head weighs 0.8 at first and 0.1 at last, so that features are there when the other one
    needs them. They are there: beginning again would pull them from the head that is exported.
    """

    def __init__(self, student: Student) -> None:
        from ultralytics.utils.loss import E2ELoss

        self.loss = E2ELoss(student)
        self.one2many_share = self.loss.final_o2m
        self.one2one_share = self.loss.total - self.one2many_share

    def __call__(self, outputs: dict[str, Any], batch: dict[str, Any]) -> LossAndParts:
        """The weighed sum; as parts those of the one-to-one head, and the share of the other one."""
        one2many = self.one2many_share * self.loss.one2many.loss(outputs["one2many"], batch)[0]
        one2one, parts = self.loss.one2one.loss(outputs["one2one"], batch)
        share = one2many.sum().detach() / len(batch["img"])
        return one2many + self.one2one_share * one2one, {**parts, "one2many_loss": share}


class _OneToOneLoss:
    """The loss of a one-to-one head alone, of a checkpoint that has lost its other one."""

    def __init__(self, student: Student) -> None:
        from ultralytics.utils.loss import v8DetectionLoss

        self.loss = v8DetectionLoss(student, tal_topk=7, tal_topk2=1)

    def __call__(self, outputs: dict[str, Any], batch: dict[str, Any]) -> LossAndParts:
        found: LossAndParts = self.loss.loss(outputs["one2one"], batch)
        return found


@cache
def _with_both_heads(head_type: Any) -> Any:  # noqa: ANN401 - Ultralytics is untyped
    """A head of the same kind whose one-to-one branch passes its gradient on; copies of the model keep it."""
    return type(f"Training{head_type.__name__}", (head_type,), {"forward": _forward})


def _forward(head: Any, features: list[Tensor]) -> Any:  # noqa: ANN401
    """As Ultralytics' own, which keeps the one-to-one branch's gradient from the backbone.

    There the one-to-many branch makes the features; here they are made, and rounding has changed them, so
    they must suit the branch that is exported.
    """
    if not head.training:
        return super(type(head), head).forward(features)
    return {
        "one2many": head.forward_head(features, **head.one2many),
        "one2one": head.forward_head(features, **head.one2one),
    }
