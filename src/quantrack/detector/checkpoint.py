"""Read an Ultralytics checkpoint: a pickle, so with an allow-list, or with the user's trust.

`torch.load(weights_only=True)` resolves only the names on its list, but it *calls* whatever is on the
list with the pickle's arguments, and Ultralytics' constructors evaluate code and download files (a
`DetectionModel` evaluates its `activation` text). So a model class is listed as a stand-in of which
a pickle can make an empty instance and fill its state, and whose constructor it cannot call.
See https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only
"""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import numpy as np
import torch
from torch import nn

from quantrack.detector.ultralytics_setup import prepare
from quantrack.errors import QuantrackError

Load = Callable[[Path], object]
Listed = dict[str, Callable[..., object]]  # what a pickle may name -> what it gets
Grant = Callable[..., object] | tuple[Callable[..., object], str]  # an entry of torch's list

_LAYERS = "ultralytics.nn.modules"
_OLD_NAMES = {  # a name in older checkpoints -> today's
    "ultralytics.nn.tasks.YOLOv10DetectionModel": "ultralytics.nn.tasks.DetectionModel",
    "ultralytics.nn.modules.block.Silence": "torch.nn.modules.linear.Identity",
    "ultralytics.utils.loss.v10DetectLoss": "ultralytics.utils.loss.E2EDetectLoss",
    "ultralytics.yolo.utils.IterableSimpleNamespace": "ultralytics.utils.IterableSimpleNamespace",
    "pathlib.WindowsPath": "pathlib.PosixPath",
    "pathlib._local.PosixPath": "pathlib.PosixPath",
    "pathlib._local.WindowsPath": "pathlib.PosixPath",
    "numpy.core.multiarray.scalar": "numpy._core.multiarray.scalar",
}


def load_safely(path: Path) -> nn.Module:
    """The checkpoint's float32 model, in evaluation mode; nothing in the file is called but data types.

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
    """Classes a checkpoint may hold instances of: layers of torch and Ultralytics, models and losses."""
    prepare()
    import torch.nn.modules as layers
    from ultralytics.nn import tasks
    from ultralytics.nn.modules import activation, block, conv, head, transformer
    from ultralytics.utils import loss, tal

    torch_layers = [module for module in vars(layers).values() if isinstance(module, ModuleType)]
    modules = [tasks, activation, block, conv, head, transformer, *torch_layers]
    classes = [kind for module in modules for kind in _own_classes(module) if issubclass(kind, nn.Module)]
    criteria = [kind for module in (loss, tal) for kind in _own_classes(module)]  # YOLOv10 saves its loss
    return list(dict.fromkeys(classes + criteria))


def _own_classes(module: ModuleType) -> list[type]:
    """The classes that a Python module defines itself, so that none comes in by import."""
    return [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]


class _NeverCalled(type):
    """The type of stand-ins: calling one, as a pickle's REDUCE does, is refused."""

    kind: type

    def __call__(cls, *arguments: object, **named: object) -> object:
        raise pickle.UnpicklingError(f"Unsupported class {cls.__name__} called as a function")


def _stand_in(kind: type) -> type:
    """What a pickle gets for `kind`: it may make an empty instance (NEWOBJ), never construct one."""

    def make_empty(_: type, *arguments: object) -> object:
        empty: object = object.__new__(kind)
        return empty

    return _NeverCalled(f"{kind.__module__}.{kind.__qualname__}", (), {"__new__": make_empty, "kind": kind})


def _listed(classes: list[type]) -> Listed:
    """Stand-ins of the classes, plain data types that are harmless to call, and their older names."""
    from ultralytics.utils import IterableSimpleNamespace

    named: Listed = {f"{kind.__module__}.{kind.__qualname__}": _stand_in(kind) for kind in classes}
    for kind in classes:  # before 8.0.44 all layers lay in one file
        if kind.__module__.startswith(f"{_LAYERS}."):
            named[f"{_LAYERS}.{kind.__name__}"] = named[f"{kind.__module__}.{kind.__name__}"]
    scalar = cast("Callable[..., object]", np.float64(0).__reduce__()[0])
    named |= {
        "builtins.set": set,
        "types.SimpleNamespace": SimpleNamespace,
        "ultralytics.utils.IterableSimpleNamespace": IterableSimpleNamespace,
        "pathlib.PosixPath": pathlib.PosixPath,
        "numpy.dtype": np.dtype,
        "numpy._core.multiarray.scalar": scalar,
    }
    return named | {old: named[new] for old, new in _OLD_NAMES.items()}


def _load_allow_listed(path: Path) -> object:
    classes = allowed_classes()
    with _no_other_grants():
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        listed = _listed(classes)
        for name in needed:
            if name not in listed:
                raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {name}")
        with torch.serialization.safe_globals(_grants({name: listed[name] for name in needed})):
            return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _no_other_grants() -> Iterator[None]:
    """Torch's list is the process's: others, Ultralytics' own loader for one, put real classes there."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(before)


def _grants(listed: Listed) -> list[Grant]:
    """For torch: what the pickle may name, and the real classes, whose instances' state it may fill.

    No pickle can name the latter: what it asks for is always `module.name`, and these have no dot.
    """
    grants: list[Grant] = [(entry, name) for name, entry in listed.items()]
    kinds = [entry.kind for entry in listed.values() if isinstance(entry, _NeverCalled)]
    if "numpy.dtype" in listed:
        kinds += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
    return grants + [(kind, f"{kind.__module__}/{kind.__qualname__}".replace(".", "/")) for kind in kinds]


def _read_model(path: Path, load: Load) -> nn.Module:
    if not path.is_file():
        raise QuantrackError(f"model={path}: no such file; give a checkpoint, a *.yaml architecture, or demo")
    try:
        content = load(path)
    except pickle.UnpicklingError as error:
        raise QuantrackError(_refusal(path, str(error))) from error
    except ModuleNotFoundError as error:
        raise QuantrackError(_of_another_project(path, str(error.name))) from error
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
    named = re.search(r"(?:GLOBAL|Unsupported class|unrecognized function|but got) (?:<\w+ ')?([\w.]+)", message)
    if named is None:
        return f"model={path}: not a readable checkpoint (broken pickle); fetch it again"
    if not _installed(named[1].partition(".")[0]):
        return _of_another_project(path, named[1])
    return (
        f"model={path}: refused, its pickle calls {named[1]}, which no detector's does; "
        "if you trust where the file comes from, set trust_checkpoint=true"
    )


def _installed(package: str) -> bool:
    # what a script defined lies in `__main__`, which is another one here
    return package != "__main__" and importlib.util.find_spec(package) is not None


def _of_another_project(path: Path, name: str) -> str:
    """Such as the first YOLOv5's, whose classes are `models.yolo`, or a newer Ultralytics'."""
    if name.startswith("ultralytics."):
        return f"model={path}: its pickle holds {name}, which this version of Ultralytics does not have; save it anew"
    return (
        f"model={path}: its pickle holds {name} of a project that is not installed here; give a checkpoint saved by "
        "Ultralytics (for YOLOv5 yolov5nu.pt and the like)"
    )
