"""Quantization-aware training: the student of a quantized model, what it learns from, and what it gives back.

Weights, biases and all scales learn together through straight-through estimators, the scales as learned
step sizes (Esser et al., arXiv:1902.08153), from labels and from the float detector (Hinton et al.,
arXiv:1503.02531; Mishra & Marr, arXiv:1711.05852).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantrack.detector.heads import RawOutputs, raw_outputs_in_training
from quantrack.detector.roles import Role, convolution_roles
from quantrack.detector.student import Student
from quantrack.errors import UsageError
from quantrack.quantization.channel_equalization import require_scales_of_tensors
from quantrack.quantization.divergence import divergence
from quantrack.quantization.fit_pair_sums import FitPairSums
from quantrack.quantization.job import QuantizationJob, StepReport
from quantrack.quantization.layers import layer_plans, quantized_layers
from quantrack.quantization.trainable import Rates, parameter_groups, take_over, trainable_layers, trainable_twin
from quantrack.schemes import Variant

FEATURE_WEIGHT = 1.0
BIAS_SHARE = 0.1  # of `lr0`; biases are absolute
AUXILIARY_RATE = 1e-4


@dataclass(frozen=True)
class Qat:
    """`lr0` is Adam's rate for weights, in steps of a 4-bit grid; `lr0_scales` that of scales, relative.

    `distill_weight` is that of the distance to the float detector, per picture, beside the detection loss.
    """

    lr0: float
    lr0_scales: float
    distill_weight: float
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        if min(self.lr0, self.lr0_scales) <= 0 or self.distill_weight < 0:
            raise UsageError("qat: lr0 and lr0_scales must be positive, distill_weight must not be negative")

    def groups(self, student: Student) -> list[dict[str, object]]:
        """The optimizer's groups by name: weights, scales, biases, and the head that is not exported."""
        groups = parameter_groups(student.network, Rates(self.lr0, self.lr0_scales, BIAS_SHARE * self.lr0))
        auxiliary = student.auxiliary_parameters
        if auxiliary:
            groups.append({"params": auxiliary, "lr": AUXILIARY_RATE, "param_group": "auxiliary_head"})
        return groups


class FloatTeacher:
    """Distance of a student's raw outputs and features to a float detector's; shared by copies of the student."""

    def __init__(self, float_model: nn.Module, weight: float) -> None:
        self.model = copy.deepcopy(float_model).eval()
        cast("Any", self.model).model[-1].training = True  # raw outputs, not detections
        self.weight = weight

    def __deepcopy__(self, memo: dict[int, object]) -> FloatTeacher:
        return self

    def __call__(self, pictures: Tensor, outputs: RawOutputs) -> Tensor:
        """The weighted distance per picture."""
        with torch.no_grad():
            taught = raw_outputs_in_training(self.model.to(pictures.device)(pictures))
        return self.weight * divergence(outputs, taught).total(FEATURE_WEIGHT)


def require_suits_variant(model: nn.Module, variant: Variant) -> None:
    """Refuse a start whose activations a variant's runtime cannot take, before it is trained.

    Integer kernels want asymmetric ones, TensorRT symmetric ones, both one scale for a whole tensor.

    Raises:
        UsageError: a convolution has others.
    """
    choice, wanted = variant.one_scale_for, variant.activation
    if not choice:
        return
    require_scales_of_tensors(model, choice)
    for layer, plan in layer_plans(model).items():
        if plan.activation not in (None, wanted):
            raise UsageError(
                f"{choice}: {layer} has {plan.activation} activations, not {wanted}; start from a run with the same "
                f"{choice}"
            )


def leave_dfl_float(job: QuantizationJob) -> None:
    """Give the job's model the float convolution of its DFL back where a recipe has quantized it.

    Its weights are the numbers 0 to 15, which 4 bits cannot hold, and no training learns around that: the
    loss takes them for granted. They are 16 of millions.
    """
    roles = convolution_roles(job.float_model)
    for name in quantized_layers(job.model):
        if roles[name] is Role.DFL:
            job.model.set_submodule(name, copy.deepcopy(job.float_model.get_submodule(name)))


def new_student(job: QuantizationJob, settings: Qat, auxiliary: tuple[nn.Module, nn.Module] | None) -> Student:
    """The job's quantized model with trainable convolutions; `auxiliary` is its other head, which stays float."""
    teacher = FloatTeacher(job.float_model, settings.distill_weight) if settings.distill_weight else None
    return Student(trainable_twin(job.model, job.float_model), auxiliary, teacher, settings.mixed_precision)


def take_over_student(job: QuantizationJob, student: Student) -> None:
    """Give the job's quantized model what the student has learned."""
    take_over(job.model, trainable_layers(student.network))


def refit_pair_sums(job: QuantizationJob) -> StepReport:
    """Raise scales again where training has let weights outgrow what integer kernels add exactly."""
    began = time.perf_counter()
    figures = FitPairSums().apply(job)
    return StepReport(FitPairSums.__name__, time.perf_counter() - began, figures)
