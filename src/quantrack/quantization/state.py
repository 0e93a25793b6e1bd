"""A quantized model as plain tensors: how each convolution is quantized, and every weight and scale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import brevitas.config
import torch
from torch import Tensor, nn

from quantrack.errors import QuantrackError, memory_problem
from quantrack.files import atomic_path
from quantrack.quantization.layers import LayerPlan, insert_quantizers, layer_plans

DAMAGED = (
    OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, AssertionError, EOFError,
    pickle.UnpicklingError,
)  # fmt: skip


def model_state(model: nn.Module) -> dict[str, Any]:
    """What `torch.save` takes and the safe loader reads again."""
    plans = {name: astuple(plan) for name, plan in layer_plans(model).items()}
    return {"plans": plans, "weights": model.state_dict()}


def model_of_state(state: Mapping[str, Any], float_model: nn.Module) -> nn.Module:
    """The quantized model that the state was taken of; `float_model` is left as it is."""
    model = copy.deepcopy(float_model)
    insert_quantizers(model, {name: LayerPlan(*plan) for name, plan in state["plans"].items()})
    load_weights(model, state["weights"])
    return model.requires_grad_(False)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dictionary; steps may have given convolutions a bias, or scales of their input's channels."""
    for name in weights.keys() - model.state_dict().keys():
        parent, _, parameter = name.rpartition(".")
        if parameter == "bias":
            model.get_submodule(parent).bias = nn.Parameter(weights[name], requires_grad=False)
        elif parameter == "input_scale":
            model.get_submodule(parent).input_scale = torch.empty_like(weights[name])
    with _quantizers_kept():
        model.load_state_dict(weights)


@contextmanager
def _quantizers_kept() -> Iterator[None]:
    """Brevitas would make all quantizers anew before it loads them: on the CPU, wherever the model is."""
    before, brevitas.config.REINIT_ON_STATE_DICT_LOAD = brevitas.config.REINIT_ON_STATE_DICT_LOAD, False
    try:
        yield
    finally:
        brevitas.config.REINIT_ON_STATE_DICT_LOAD = before


def save_quantized(path: Path, model: nn.Module) -> None:
    """Write a quantized model's state."""
    with atomic_path(path) as temporary:
        torch.save(model_state(model), temporary)


def read_quantized(path: Path, float_model: nn.Module) -> nn.Module:
    """The quantized model of a file that `save_quantized` wrote, for the same float model.

    Raises:
        QuantrackError: the file cannot be read, or is of another model.
    """
    device = next(float_model.parameters()).device
    try:
        return model_of_state(torch.load(path, map_location=device, weights_only=True), float_model)
    except DAMAGED as error:
        if memory_problem(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise QuantrackError(f"{path}: not a quantized state of this model ({reason})") from error
