"""The patches of its input that a convolution multiplies its weights with, as columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from quantrack.errors import QuantrackError


def input_columns(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """The columns [G, D, B * H * W] of all output positions, for an input [B, I, ...]; D = I/G * kh * kw."""
    patches = unfold(x, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
    return patches.transpose(0, 1).reshape(layer.groups, -1, patches.shape[0] * patches.shape[2])


def drawn_columns(x: Tensor, layer: nn.Conv2d, drawn: Tensor) -> Tensor:
    """The columns [G, D, P] of the drawn output positions: `input_columns(x, layer)[:, :, drawn]` and no others.

    Of a large input all columns would take a hundred times the memory of those few.
    """
    padded = _padded(x, layer)
    rows, height, width = padded.permute(0, 2, 3, 1).contiguous(), *padded.shape[2:]
    out_height, out_width = output_size(x, layer)
    batch, place = drawn // (out_height * out_width), drawn % (out_height * out_width)
    top, left = place // out_width * layer.stride[0], place % out_width * layer.stride[1]
    first = (batch * height + top) * width + left
    offsets = torch.tensor([row * width + column for row, column in _offsets(layer)], device=first.device)
    patches = rows.flatten(0, 2)[(first[:, None] + offsets).flatten()].reshape(len(drawn), len(offsets), -1)
    return patches.permute(2, 1, 0).reshape(layer.groups, -1, len(drawn))


def mean_column(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """The mean [G, D] of all columns."""
    padded = _padded(x.mean(dim=0, keepdim=True), layer)  # pictures first, so that offsets go over one of them
    height, width = output_size(x, layer)
    means = []
    for row, column in _offsets(layer):
        rows = slice(row, row + layer.stride[0] * (height - 1) + 1, layer.stride[0])
        columns = slice(column, column + layer.stride[1] * (width - 1) + 1, layer.stride[1])
        means.append(padded[:, :, rows, columns].mean(dim=(0, 2, 3)))
    return torch.stack(means, dim=1).reshape(layer.groups, -1)


def output_size(x: Tensor, layer: nn.Conv2d) -> tuple[int, int]:
    """Height and width of what the convolution gives for an input."""
    padding = _padding(layer)
    height, width = (
        (side + 2 * padding[i] - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1) // layer.stride[i] + 1
        for i, side in enumerate(x.shape[2:])
    )
    return height, width


def _offsets(layer: nn.Conv2d) -> Iterator[tuple[int, int]]:
    """Row and column of each weight of the kernel, from the patch's corner."""
    for row in range(layer.kernel_size[0]):
        for column in range(layer.kernel_size[1]):
            yield row * layer.dilation[0], column * layer.dilation[1]


def _padded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    rows, columns = _padding(layer)
    return pad(x, (columns, columns, rows, rows)) if rows or columns else x


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer.padding, str):
        raise QuantrackError(f"gptq: a convolution pads {layer.padding!r}; only numeric padding is supported")
    return layer.padding
