"""Quantization modes: how many bits weights and activations get.

`A8` means INT8 activations through Q/DQ, never FP8. `A16` means float activations: only weights
are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from quantrack.errors import UsageError

HEADS = ONE2ONE, ONE2MANY = "one2one", "one2many"
"""Which predictions of a detector are exported: one for each object, or many, which NMS then thins out."""

ACTIVATION_LEVELS = 255
"""Steps of an 8-bit grid, from its lowest to its highest value."""

MAX_DETECTIONS = 300
"""Of a picture, as Ultralytics' heads and its validation have it."""

MAX_PAIR_SUM = 128
"""Two neighbouring weights of one sign may sum up to this: times 255 is the most that 16 bits hold."""


@dataclass(frozen=True)
class Scheme:
    """Bit widths of one mode; `activation_bits` is None where activations stay float."""

    name: str
    weight_bits: int
    activation_bits: int | None


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a16", 8, None),
        Scheme("w8a8", 8, 8),
        Scheme("w4a16", 4, None),
        Scheme("w4a8", 4, 8),
    )
}


def parse_mode(mode: str) -> Scheme:
    """The scheme of a mode name, in any case.

    Raises:
        UsageError: the mode is not one of the four.

    >>> parse_mode("W4A8")
    Scheme(name='w4a8', weight_bits=4, activation_bits=8)
    """
    scheme = SCHEMES.get(mode.strip().lower())
    if scheme is None:
        raise UsageError(f"mode={mode}: unknown mode; use one of {', '.join(SCHEMES)}")
    return scheme


# What a quantized file may be besides its mode, and first what it usually is.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "placement": ("inputs", "full"),
    "weight_storage": ("int8", "int4"),
    "precision": ("fp32", "fp16"),
    "target": ("onnxruntime", "tensorrt"),
}


@dataclass(frozen=True)
class Variant:
    """One choice of each of `VARIANTS`; as it is made, the usual file of a mode."""

    placement: str = "inputs"
    weight_storage: str = "int8"
    precision: str = "fp32"
    target: str = "onnxruntime"

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Variant:
        """That of settings or tags among others; those that are not there are the usual ones."""
        return cls(**{name: values[name] for name in VARIANTS if name in values})

    @property
    def words(self) -> tuple[str, ...]:
        """What sets a file apart from the usual one of its mode.

        >>> Variant(placement="full").words
        ('full',)
        """
        chosen = asdict(self)
        return tuple(chosen[name] for name, (usual, _) in VARIANTS.items() if chosen[name] != usual)

    @property
    def one_scale_for(self) -> str:
        """The choice, if any, whose kernels want one scale for all channels of an activation; empty if there is none.

        >>> Variant(placement="full").one_scale_for
        'placement=full'
        """
        if self.placement == "full":
            return "placement=full"
        return "target=tensorrt" if self.target == "tensorrt" else ""

    @property
    def activation(self) -> str:
        """What its kernels want activations to be; empty where they take both.

        >>> Variant(target="tensorrt").activation
        'symmetric'
        """
        return {"placement=full": "asymmetric", "target=tensorrt": "symmetric"}.get(self.one_scale_for, "")
