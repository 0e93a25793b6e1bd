"""Draw the embedded demo data set: shapes in clutter, in the official COCO layout.

    python datasets/demo/draw.py OUT --val 100 --train 100 --seed 0

Writes `OUT/{train2017,val2017}/*.jpg` and `OUT/annotations/instances_{train,val}2017.json`.
Six classes (circle, square, triangle, star, ring, cross) of many sizes, colours, rotations and
contrasts overlap each other, among unlabelled look-alikes (ellipses, half discs, thin bars).
The same seed draws the same pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
PICTURE_SIZES = ((640, 480), (480, 640), (640, 427), (640, 640))  # width, height
MIN_VISIBLE = 0.35  # an object hidden further than this has no box, as in COCO practice

Image = NDArray[np.uint8]
Mask = NDArray[np.float32]


class Annotation(TypedDict):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


def polygon(name: str) -> NDArray[np.float64]:
    """Vertices of a class in the unit disc, shape [N, 2]."""
    if name == "square":
        angles = np.pi / 4 + np.arange(4) * np.pi / 2
    elif name == "triangle":
        angles = np.arange(3) * 2 * np.pi / 3
    elif name == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    elif name == "cross":
        a, b = 0.95, 0.30
        points = [(a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b)]
        return np.array(points + [(-x, -y) for x, y in points])
    else:
        angles = np.arange(48) * 2 * np.pi / 48
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def shape_mask(
    name: str, size: tuple[int, int], centre: tuple[float, float], radius: float, rng: np.random.Generator
) -> Mask:
    """Anti-aliased coverage of one shape on a canvas of `size` (width, height), in 0..1."""
    width, height = size
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squash = np.array([1.0, rng.uniform(0.8, 1.0)])
    points = (polygon(name) * squash) @ rotation.T * radius + np.array(centre)
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    if name == "ring":
        inner = (points - np.array(centre)) * rng.uniform(0.45, 0.65) + np.array(centre)
        cv2.fillPoly(canvas, [np.round(inner * 16).astype(np.int32)], 0, cv2.LINE_AA, 4)
    return canvas.astype(np.float32) / 255


def background(size: tuple[int, int], rng: np.random.Generator) -> Image:
    """A smooth two-colour gradient under soft blotches."""
    width, height = size
    corners = rng.integers(30, 226, (2, 2, 3)).astype(np.uint8)
    picture = cv2.resize(corners, size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
    blotches = rng.normal(0, 1, (height // 40 + 2, width // 40 + 2, 3)).astype(np.float32)
    picture += 22 * cv2.resize(blotches, size, interpolation=cv2.INTER_CUBIC)
    return np.clip(picture, 0, 255).astype(np.uint8)


def paint(picture: Image, mask: Mask, colour: NDArray[np.float64], opacity: float) -> None:
    """Blend a colour into the picture where the mask covers it, in place."""
    weight = (mask * opacity)[..., None]
    picture[:] = np.clip(picture * (1 - weight) + weight * colour, 0, 255).astype(np.uint8)


def add_clutter(picture: Image, rng: np.random.Generator) -> None:
    """Unlabelled bars, ellipses and half discs: what a detector must learn to leave alone."""
    height, width = picture.shape[:2]
    for _ in range(rng.integers(6, 16)):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        kind = rng.integers(0, 3)
        if kind == 0:
            end = (int(x + rng.normal(0, 120)), int(y + rng.normal(0, 120)))
            cv2.line(picture, (x, y), end, colour, int(rng.integers(1, 7)), cv2.LINE_AA)
        else:
            long_axis = int(rng.uniform(10, 60))
            axes = (long_axis, max(3, int(long_axis * (0.35 if kind == 1 else 1.0))))
            sweep = 360 if kind == 1 else 180
            angle = float(rng.uniform(0, 360))
            cv2.ellipse(picture, (x, y), axes, angle, 0, sweep, colour, -1, cv2.LINE_AA)


def box_of(mask: Mask) -> list[float] | None:
    """[x, y, width, height] of the covered pixels, or None where nothing is covered."""
    ys, xs = np.nonzero(mask > 0.5)
    if len(xs) == 0:
        return None
    x, y = int(xs.min()), int(ys.min())
    return [float(x), float(y), float(xs.max() + 1 - x), float(ys.max() + 1 - y)]


def draw_scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[Image, list[tuple[int, list[float], float]]]:
    """One picture (BGR) and its (class index, box, area) list."""
    width, height = size
    picture = background(size, rng)
    add_clutter(picture, rng)
    masks: list[tuple[int, Mask]] = []
    for _ in range(rng.integers(2, 10)):
        radius = float(np.exp(rng.uniform(np.log(9), np.log(min(width, height) * 0.24))))
        centre = (rng.uniform(0.02, 0.98) * width, rng.uniform(0.02, 0.98) * height)
        index = int(rng.integers(0, len(CLASSES)))
        mask = shape_mask(CLASSES[index], size, centre, radius, rng)
        under = picture[mask > 0.5].mean(axis=0) if (mask > 0.5).any() else np.zeros(3)
        contrast = rng.choice([-1, 1], 3) * rng.uniform(18, 150, 3)
        paint(picture, mask, np.clip(under + contrast, 0, 255), float(rng.uniform(0.75, 1.0)))
        masks = [(i, m * (1 - mask)) for i, m in masks] + [(index, mask)]
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.5, 1.6))).astype(np.uint8)
    noise = rng.normal(0, rng.uniform(0, 7), picture.shape)
    picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
    return picture, visible_objects(masks)


def visible_objects(masks: list[tuple[int, Mask]]) -> list[tuple[int, list[float], float]]:
    """Objects with enough of their box still covered after later shapes hid parts of them."""
    objects = []
    for index, mask in masks:
        box = box_of(mask)
        if box is None:
            continue
        covered = float((mask > 0.5).sum())
        if covered >= max(60.0, MIN_VISIBLE * 0.4 * box[2] * box[3]) and min(box[2:]) >= 8:
            objects.append((index, box, covered))
    return objects


def draw_split(
    out: Path, split: str, count: int, seed: int, sizes: tuple[tuple[int, int], ...] = PICTURE_SIZES
) -> None:
    """Draw `count` pictures into `out/<split>2017` with their annotation file."""
    folder = out / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[Annotation] = []
    for image_id in range(1, count + 1):
        rng = np.random.default_rng([seed, image_id])
        size = sizes[int(rng.integers(0, len(sizes)))]
        picture, objects = draw_scene(size, rng)
        name = f"{image_id:012d}.jpg"
        cv2.imwrite(str(folder / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 80])
        images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
        for index, box, area in objects:
            annotations.append(
                Annotation(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=index + 1,
                    bbox=box,
                    area=area,
                    iscrowd=0,
                )
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw_split(options.out, "val", options.val, options.seed)
    draw_split(options.out, "train", options.train, options.seed + 1)


if __name__ == "__main__":
    main()
