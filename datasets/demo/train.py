"""Train the embedded demo detector on drawn shapes; reproduces `datasets/demo/yolov10n-demo.pt`.

    python datasets/demo/train.py WORK_DIR

Draws 1,600 training scenes of 320 x 320 pixels (the detector is translation equivariant, so small
crops of the 640-pixel scenes train it at a quarter of the cost), trains from scratch with
Ultralytics on the CPU, then tunes for a few epochs at full size. The committed `train2017` and
`val2017` pictures are drawn from other seeds and are never seen here. About an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
SMALL = ((320, 320),)
TRAIN_SEED = 1000
HELD_BACK = 100  # the last pictures validate; they are not the committed val2017


def write_yolo_layout(root: Path, count: int, sizes: tuple[tuple[int, int], ...], seed: int) -> Path:
    """Draw `count` scenes under `root` with YOLO labels beside them; returns the data yaml."""
    from draw import CLASSES, draw_split

    draw_split(root, "train", count, seed, sizes)
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    shutil.move(root / "train2017", root / "images/all")
    labels = root / "labels/all"
    labels.mkdir(parents=True, exist_ok=True)
    lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    extent = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for note in content["annotations"]:
        (x, y, w, h), (width, height) = note["bbox"], extent[note["image_id"]]
        centre = f"{(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f}"
        row = f"{note['category_id'] - 1} {centre} {w / width:.6f} {h / height:.6f}"
        lines[note["image_id"]].append(row)
    for image_id, rows in lines.items():
        (labels / f"{image_id:012d}.txt").write_text("\n".join(rows))
    names = sorted(str(path) for path in (root / "images/all").iterdir())
    (root / "train.txt").write_text("\n".join(names[:-HELD_BACK]))
    (root / "val.txt").write_text("\n".join(names[-HELD_BACK:]))
    classes = "\n".join(f"  {index}: {name}" for index, name in enumerate(CLASSES))
    data = root / "data.yaml"
    data.write_text(f"path: {root}\ntrain: train.txt\nval: val.txt\nnames:\n{classes}\n")
    return data


def without_folders(checkpoint: Path) -> None:
    """Save `checkpoint` anew with the names alone of the files and folders it was trained from, without the repository.

    What is committed tells nothing of the machine that trained it. The weights stay as they are.
    """
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    content.pop("git", None)
    model = content["model"]
    model.pt_path = Path(model.pt_path).name
    for settings in (content["train_args"], model.args, model.yaml):
        settings.update({key: Path(value).name for key, value in settings.items() if _is_path(value)})
    torch.save(content, checkpoint)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "/" in value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pictures", type=int, default=1600)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--tune-epochs", type=int, default=9)
    parser.add_argument("--tune-size", type=int, default=640, help="what the full scenes are scaled to")
    parser.add_argument("--architecture", type=Path, default=HERE / "yolov10n-demo.yaml")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_CONFIG_DIR"] = str(work / "settings")  # leaves the user's settings alone
    from ultralytics import YOLO, settings

    settings.update({"mlflow": False})  # its callback would make runs of its own
    small = write_yolo_layout(work / "scenes-small", options.pictures, SMALL, TRAIN_SEED)
    large = write_yolo_layout(work / "scenes-large", options.pictures // 3, ((640, 640), (640, 480)), TRAIN_SEED + 1)
    common = {"device": "cpu", "workers": 0, "amp": False, "seed": 0, "plots": False, "project": str(work)}
    still = {"mosaic": 0.0, "translate": 0.05, "scale": 0.25, "degrees": 0.0, "erasing": 0.0, "cache": "ram"}
    model = YOLO(options.architecture)
    model.train(
        data=small, imgsz=320, epochs=options.epochs, batch=16, optimizer="AdamW", lr0=0.002, cos_lr=True,
        warmup_epochs=1, val=False, name="small", **common, **still,
    )  # fmt: skip
    model = YOLO(model.trainer.last)
    model.train(
        data=large, imgsz=options.tune_size, epochs=options.tune_epochs, batch=8, optimizer="AdamW", lr0=0.001,
        cos_lr=True, warmup_epochs=0.2, val=False, name="large", **common, **still,
    )  # fmt: skip
    trained = work / f"{options.architecture.stem}.pt"
    shutil.copy(model.trainer.last, trained)
    without_folders(trained)
    print(f"trained: {trained}")


if __name__ == "__main__":
    main()
