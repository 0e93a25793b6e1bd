"""Better integers for weights that are on their grid already: one coordinate after the other.

Each sweep goes through all weights once and moves each to where the error, all others as they are, is
least. The error is quadratic: of each output channel alone (Behdin et al., "QuantEase",
arXiv:2309.01885), or of all of them together, where an error in one channel can make up for another's.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantrack.quantization.layers import Bits, weight_range

BLOCK = 64  # columns
MOST_MOVED = 8  # one in so many weights of a column may move a sweep, which bounds its time
LEAST_KEPT = 0.5  # of a channel's answer to the signal, for a gain to make sense
LEAST_GAIN = 1e-6  # of what moving by one step would cost a weight that has no error


def refined(weight: Tensor, rounded: Tensor, scale: Tensor, hessian: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Rounded weights [G, O/G, D] and scales [G, O/G] of less error, each output channel for itself.

    Each channel's scale becomes the best for its integers, then each integer in turn the best for all
    others. No step makes the error larger. `hessian` has shape [G, D, D].
    """
    integers = torch.round(rounded / scale[:, :, None])
    weighted = integers @ hessian
    power = (weighted * integers).sum(dim=2)
    best = (weighted * weight).sum(dim=2) / power.clamp_min(1e-30)
    scale = torch.where((power > 0) & (best > 0), best, scale)
    gradient = (integers * scale[:, :, None] - weight) @ hessian
    for start in range(0, integers.shape[2], BLOCK):
        columns, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        moved = _sweep(integers[:, :, columns], gradient[:, :, columns], scale, hessian[:, columns, columns], bits)
        gradient[:, :, later] += moved @ hessian[:, columns, later]
    return integers * scale[:, :, None], scale


def _sweep(integers: Tensor, gradient: Tensor, scale: Tensor, hessian: Tensor, bits: Bits) -> Tensor:
    """Move the integers [G, O/G, B] of a few columns in place, one column after the other; by how much [G, O/G, B].

    The gradient of later columns is brought up to date once for all of these, which is many times faster.
    """
    # columns in the middle, and in NumPy: as below, many steps on small vectors
    values, slope = (np.ascontiguousarray(_array(tensor).transpose(0, 2, 1)) for tensor in (integers, gradient))
    grid, curvature = _array(scale), _array(hessian)
    allowed = tuple(_array(torch.as_tensor(end)) for end in weight_range(bits))
    moved = np.zeros_like(values)
    for i in range(values.shape[1]):
        so_far = slope[:, i] + (curvature[:, i, None, :i] @ moved[:, :i]).squeeze(1)
        wanted = np.rint(values[:, i] - so_far / (curvature[:, i, i, None] * grid)).clip(*allowed)
        moved[:, i] = (wanted - values[:, i]) * grid
        values[:, i] = wanted
    integers.copy_(torch.from_numpy(values.transpose(0, 2, 1)))
    return torch.from_numpy(moved.transpose(0, 2, 1)).to(gradient)


def refined_jointly(
    weight: Tensor, rounded: Tensor, scale: Tensor, inputs: Tensor, outputs: Tensor, bits: Bits
) -> Tensor:
    """Rounded weights [O, D] of less error over all output channels together, their scales [O] as they are.

    The error of a change E is trace(outputs E inputs E^T), with `inputs` [D, D] and `outputs` [O, O], both
    positive definite: Kronecker factors of the curvature (Grosse & Martens, arXiv:1602.01407).
    """
    # many steps on small vectors, for which NumPy is several times faster than torch, and a GPU no help
    grid, curvature, across = (_array(tensor) for tensor in (scale, inputs, outputs))
    allowed = tuple(_array(torch.as_tensor(end)) for end in weight_range(bits))
    integers = np.rint(_array(rounded) / grid[:, None])
    gradient = across @ (integers * grid[:, None] - _array(weight)) @ curvature
    for i in range(integers.shape[1]):
        moved = _moved(integers[:, i], gradient[:, i], grid, curvature[i, i] * across, allowed)
        change = (moved - integers[:, i]) * grid
        if change.any():
            integers[:, i] = moved
            gradient += np.outer(across @ change, curvature[i])
    return torch.from_numpy(integers).to(scale) * scale[:, None]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()


def _moved(
    integers: NDArray[np.float32],
    gradient: NDArray[np.float32],
    scale: NDArray[np.float32],
    curvature: NDArray[np.float32],
    allowed: tuple[NDArray[np.float32], ...],
) -> NDArray[np.float32]:
    """One column's integers [O], moved one at a time, whichever gains most first, until none gains or enough are."""
    integers, gradient = integers.copy(), gradient.copy()
    own = curvature.diagonal()
    slope, least = own * scale, LEAST_GAIN * own * scale**2
    for _ in range(1 + len(integers) // MOST_MOVED):
        wanted = np.rint(integers - gradient / slope).clip(*allowed)
        moves = (wanted - integers) * scale
        gains = -(2 * gradient + own * moves) * moves - least
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        gradient += moves[best] * curvature[:, best]
        integers[best] = wanted[best]
    return integers


def channel_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """Mean squared change of each output channel, [G, O/G], for a change of weight [G, O/G, D]."""
    return channel_products(difference, difference, hessian)


def restoring_gain(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """What to multiply rounded weights [G, O/G, D] by, so that they answer the signal as the float ones do, [G, O/G].

    The scale of least error shrinks each output channel by its share of rounding noise, as any least-squares fit
    to noisy values does. Noise of many layers adds up by its variance, but shrinking by its amount.
    """
    whole = channel_products(weight, weight, hessian)
    kept = channel_products(weight, rounded, hessian)
    # not a channel whose weights were rounded away, or that nothing but float32's rounding answers to
    sound = (whole > 0) & (kept > LEAST_KEPT * whole)
    return torch.where(sound, whole / torch.where(sound, kept, 1), 1)


def channel_products(first: Tensor, second: Tensor, hessian: Tensor) -> Tensor:
    """Mean product of what two weights [G, O/G, D] give, of each output channel, [G, O/G]."""
    return torch.einsum("god,god->go", first @ hessian, second)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Hessians [G, D, D] with a share of their mean diagonal added to the diagonal."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    # inputs that are always zero get a unit diagonal: their weights then round to nearest
    ridge = damping * diagonal.mean(dim=1, keepdim=True) + (diagonal.mean(dim=1, keepdim=True) == 0)
    return hessian + torch.diag_embed(ridge.expand_as(diagonal))


def towards_diagonal(matrix: Tensor, share: float) -> Tensor:
    """A covariance [O, O] with a share of what lies off its diagonal, and no zero on it."""
    diagonal = matrix.diagonal()
    ridge = 1e-6 * diagonal.mean() + (diagonal.mean() == 0)
    return share * matrix + torch.diag((1 - share) * diagonal + ridge)
