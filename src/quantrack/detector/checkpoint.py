"""Read an Ultralytics checkpoint: a pickle, so with an allow-list, or with the user's trust.

`torch.load(weights_only=True)` runs no code but what the allow-list names: module classes of torch
and Ultralytics, which do nothing beyond building layers. See
https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only
"""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from quantrack.detector.environment import prepare
from quantrack.errors import QuantrackError

Load = Callable[[Path], object]


def load_safely(path: Path) -> nn.Module:
    """The checkpoint's float32 model, from allow-listed classes only.

    Raises:
        QuantrackError: the file is missing, broken, or names anything that is not on the list.
    """
    return _read_model(path, _load_allow_listed)


def load_trusting(path: Path) -> nn.Module:
    """The checkpoint's float32 model; the file may run any code, so its source must be trusted.

    Raises:
        QuantrackError: the file is missing or broken.
    """
    prepare()
    return _read_model(path, lambda file: torch.load(file, map_location="cpu", weights_only=False))


def allowed_classes() -> list[type]:
    """Every module class of `torch.nn` and of Ultralytics' layers and models, and plain containers."""
    prepare()
    import torch.nn.modules as layers
    from ultralytics.nn import tasks
    from ultralytics.nn.modules import activation, block, conv, head, transformer
    from ultralytics.utils import IterableSimpleNamespace

    modules = [tasks, activation, block, conv, head, transformer]
    classes = [kind for module in modules for kind in _module_classes(module, "ultralytics.")]
    classes += [kind for module in vars(layers).values() if isinstance(module, ModuleType)
                for kind in _module_classes(module, "torch.nn.")]  # fmt: skip
    return [*dict.fromkeys(classes), IterableSimpleNamespace, set]


def _module_classes(module: ModuleType, prefix: str) -> list[type]:
    """The `nn.Module` classes that a Python module defines itself, so that none comes in by import."""
    return [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, nn.Module) and kind.__module__ == module.__name__ and module.__name__.startswith(prefix)
    ]


def _load_allow_listed(path: Path) -> object:
    with torch.serialization.safe_globals([*allowed_classes()]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_model(path: Path, load: Load) -> nn.Module:
    if not path.is_file():
        raise QuantrackError(f"model={path}: no such file; give a checkpoint, a *.yaml architecture, or demo")
    try:
        content = load(path)
    except pickle.UnpicklingError as error:
        raise QuantrackError(_refusal(path, str(error))) from error
    except Exception as error:  # broken archives and pickles raise many kinds
        raise QuantrackError(
            f"model={path}: not a readable checkpoint ({type(error).__name__}); fetch it again"
        ) from error
    model = (content.get("ema") or content.get("model")) if isinstance(content, dict) else content
    if not isinstance(model, nn.Module):
        raise QuantrackError(f"model={path}: holds no model; give a checkpoint saved by Ultralytics")
    return model.float().eval()


def _refusal(path: Path, message: str) -> str:
    """One line out of torch's long advice."""
    named = re.search(r"unsupported (?:global: )?GLOBAL ([\w.]+)", message, re.IGNORECASE)
    if named is None:
        return f"model={path}: not a readable checkpoint (broken pickle); fetch it again"
    return (
        f"model={path}: refused, its pickle calls {named[1]}, which no detector needs; "
        "if you trust where the file comes from, set trust_checkpoint=true"
    )
