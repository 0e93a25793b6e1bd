"""Other views of a calibration picture: mirrored, and at another size within the same input."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn.functional import interpolate

PAD = 114 / 255  # the letterbox's grey


def resized(picture: Tensor, zoom: float, draw: random.Random) -> Tensor:
    """A picture [3, S, S] made larger or smaller, and cropped or padded to S at random.

    >>> grey = torch.full((3, 4, 4), 0.25)
    >>> resized(grey, 0.5, random.Random(0)).eq(0.25).sum().item()
    12
    >>> resized(grey, 2.0, random.Random(0)).eq(0.25).all().item()
    True
    """
    side = picture.shape[-1]
    size = max(1, round(side * zoom))
    other = interpolate(picture[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = draw.randint(0, abs(size - side)), draw.randint(0, abs(size - side))
    if size >= side:
        return other[:, top : top + side, left : left + side]
    padded = picture.new_full(picture.shape, PAD)
    padded[:, top : top + size, left : left + size] = other
    return padded


def mirrored_views(pictures: Tensor, zooms: tuple[float, float], draw: random.Random) -> Tensor:
    """Pictures [B, 3, S, S] mirrored, each made larger or smaller by a factor between these two, even in logarithms."""
    mirrored = pictures.flip(-1)
    if zooms == (1.0, 1.0):
        return mirrored
    least, most = (math.log(zoom) for zoom in zooms)
    views = [resized(picture, math.exp(draw.uniform(least, most)), draw) for picture in mirrored]
    return torch.stack(views).contiguous(memory_format=memory_format_of(pictures))


def memory_format_of(pictures: Tensor) -> torch.memory_format:
    """How these pictures lie in memory."""
    last = pictures.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
