from dataclasses import replace

from quantrack.comparison.gates import MeasuredRun
from quantrack.comparison.model_card import MAX_DESCRIPTION, Measurement, family_description, model_card

TAGS = {
    "model_name": "yolov10m", "mode": "w4a8", "recipe": "default", "head": "one2one", "imgsz": "640", "provider": "cpu",
    "device_name": "Some Processor, 2 cores", "git_commit": "c0ffee", "evaluation_digest": "e" * 64,
    "calibration_digest": "d" * 64, "model_digest": "b" * 64,
}  # fmt: skip
FLOAT = MeasuredRun("f" * 32, "baseline", "FINISHED", {"mAP50-95": 0.4667, "latency_ms_p50": 30.6}, TAGS)
METRICS = {"mAP50-95": 0.4395, "mAP50-95_drop_ci_high": 4.7, "float32_agreement": 0.9351, "latency_ms_p50": 57.8}
RUN = MeasuredRun("a" * 32, "ptq", "FINISHED", METRICS, TAGS, ("m-1",), FLOAT)
MEASUREMENT = Measurement("coco-val100", "100", 64, 7, {"torch": "2.13.0", "python": "3.11"})


def test_card_says_what_it_is_and_on_what_it_was_measured() -> None:
    card = model_card("night watch", RUN, MEASUREMENT)
    assert card.startswith("# yolov10m W4A8\n")
    for part in (
        "4-bit weights and INT8 activations", "| mAP50-95 | 0.4395 | 0.4667 |",
        "| drop, upper end of its 95 % interval | 4.70 | - |", "| agreement with float32's detections | 0.935 | - |",
        "coco-val100 (digest eeeeeeeeeeee)",
        "head one2one, 640 px",
        "cpu on Some Processor, 2 cores, 100 timed runs", "torch 2.13.0", "commit c0ffee", "Recipe `default`",
        "64 unlabelled pictures (digest dddddddddddd, seed 7)", 'load_model("models:/night watch@champion")',
        'mlflow models serve -m "models:/night watch@champion"', "need not be faster", "stored as INT8", "AGPL-3.0",
    ):  # fmt: skip
        assert part in card, part
    assert "parity" not in card  # what was not measured is absent
    assert "python" not in card.split("versions:")[1].split("\n")[0]


def test_card_of_a_trained_packed_file_of_integer_kernels() -> None:
    own = {"entry_point": "qat", "ptq_run_id": "9" * 32, "placement": "full", "weight_storage": "int4"}
    card = model_card("watch", replace(RUN, tags=TAGS | own), MEASUREMENT)
    assert card.startswith("# yolov10m W4A8 full int4\n")
    for part in (
        "quantization-aware training with 4-bit", "(QuantizeLinear-DequantizeLinear)",
        f"`recipe.yaml` of run {'9' * 32}, then", "without optimization, every quantizer in float",
        "computes this file on integers", "fit into 4 bits are stored as INT4",
    ):  # fmt: skip
        assert part in card, part
    for wrong in ("post-training", "stored as INT8 whose", "need not be faster", "in PyTorch", "Clip"):
        assert wrong not in card, wrong


def test_card_of_eight_bits_and_float_activations() -> None:
    card = model_card("watch", replace(RUN, tags=TAGS | {"mode": "w8a16"}, baseline=None), MEASUREMENT)
    assert "8-bit weights and float activations" in card
    assert "stored as INT8" not in card
    assert "| mAP50-95 | 0.4395 | - |" in card


def test_descriptions_fit_into_mlflow() -> None:
    long = replace(RUN, tags={name: value if name == "mode" else "x" * 900 for name, value in TAGS.items()})
    card = model_card("n" * 200, long, MEASUREMENT)
    assert len(card) <= MAX_DESCRIPTION
    assert card.endswith("\n\n(The rest: the run's description and artifacts.)")
    assert "`champion`" in family_description(RUN)
