"""Measure the recipe as it grows, one step at a time, on labelled train pictures: docs/accuracy.md's ablation.

    python benchmarks/ablation.py MODEL DATA_ROOT --name yolov10n-train243

DATA_ROOT needs `annotations/instances_train2017.json`; the development pictures are those in it that
are not calibration pictures, so no evaluation picture is looked at. All rungs of the ladder share one
bit plan. Writes `benchmarks/results/ablation-NAME.json` and `.md`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import mlflow
import typer
from accuracy_table import ROOT, add_result

from quantrack.quantization.activation_range_search import ActivationRangeSearch
from quantrack.quantization.bias_correction import BiasCorrection
from quantrack.quantization.channel_equalization import ChannelEqualization
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.recipe import CALIBRATED, RECIPES, Recipe

CALIBRATION = ROOT / "datasets/quantize-calib/quant100.txt"
PLAIN = Gptq(importance_share=0.0, centred=False, scale_factors=(1.0,), sweeps=0, output_sweeps=0, unshrunken=False)
WEIGHED = replace(PLAIN, importance_share=Gptq.importance_share)
CENTRED = replace(WEIGHED, centred=True)
SCALED = replace(CENTRED, scale_factors=Gptq.scale_factors)
SWEPT = replace(SCALED, sweeps=Gptq.sweeps)
OWN_CHANNELS = tuple(step for step in CALIBRATED if not isinstance(step, ChannelEqualization))
# Each rung keeps what the one before it has.
LADDER = (
    Recipe("1-nearest", OWN_CHANNELS),
    Recipe("2-bias-correction", (*OWN_CHANNELS, BiasCorrection())),
    Recipe("3-gptq", (*OWN_CHANNELS, PLAIN, BiasCorrection())),
    Recipe("4-importance", (*OWN_CHANNELS, WEIGHED, BiasCorrection())),
    Recipe("5-centred", (*OWN_CHANNELS, CENTRED, BiasCorrection())),
    Recipe("6-scale-factors", (*OWN_CHANNELS, SCALED, BiasCorrection())),
    Recipe("7-sweeps", (*OWN_CHANNELS, SWEPT, BiasCorrection())),
    Recipe("8-unshrunken", (*OWN_CHANNELS, Gptq(), BiasCorrection())),
    Recipe("9-range-search", (*OWN_CHANNELS, ActivationRangeSearch(), Gptq(), BiasCorrection())),
    Recipe("10-equalized-channels", RECIPES["default"]),
    Recipe("11-across-channels", RECIPES["best"]),
)
LATENCY_RUNS = 10


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint, as for the entry points.")],
    data_root: Annotated[Path, typer.Argument(help="Data root with annotated train2017 pictures.")],
    name: Annotated[str, typer.Option(help="Name of the result files.")],
    avg_bits: Annotated[float, typer.Option(help="Budget of the bit plan.")] = 4.5,
    only: Annotated[str, typer.Option(help="Names of rungs to measure anew, as 1-nearest,3-gptq; others stay.")] = "",
) -> None:
    """Measure the ladder, or some of its rungs, and write the table."""
    rungs = [rung for rung in LADDER if not only or rung.name in only.split(",")]
    if unknown := set(only.split(",")) - {"", *(rung.name for rung in LADDER)}:
        raise typer.BadParameter(f"only={only}: no rung {', '.join(sorted(unknown))}; give names as in LADDER")
    with tempfile.TemporaryDirectory() as folder:
        development = development_root(data_root.resolve(), Path(folder))
        shared = {
            "model": model, "data_root": str(development), "mode": "w4a8", "avg_bits": str(avg_bits),
            "eval_images": "0", "latency_runs": str(LATENCY_RUNS),
        }  # fmt: skip
        for number, rung in enumerate(rungs):
            recipe = Path(folder) / f"{rung.name}.yaml"
            recipe.write_text(rung.text())
            submitted = mlflow.projects.run(
                str(ROOT), "ptq", parameters=shared | {"recipe": str(recipe)}, env_manager="local",
                experiment_name=f"ablation-{name}",
            )  # fmt: skip
            run = mlflow.get_run(submitted.run_id)
            text = add_result(run, f"ablation-{name}", LATENCY_RUNS, anew=not only and number == 0)
    print(text)


def development_root(data_root: Path, folder: Path) -> Path:
    """A data root in `folder` whose evaluation pictures are the annotated train pictures not calibrated on."""
    calibrated = {Path(line.strip()).name for line in CALIBRATION.read_text().splitlines()}
    annotations = data_root / "annotations/instances_train2017.json"
    if not annotations.is_file():
        raise typer.BadParameter(f"{annotations} does not exist; DATA_ROOT needs annotated train2017 pictures")
    content = json.loads(annotations.read_text())
    content["images"] = [image for image in content["images"] if image["file_name"] not in calibrated]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] in kept]
    (folder / "annotations").mkdir()
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    for part in ("train2017", "val2017"):
        (folder / part).symlink_to(data_root / "train2017")
    return folder


if __name__ == "__main__":
    typer.run(main)
