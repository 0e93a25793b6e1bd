"""What a run says of itself in a line."""

import pytest

from quantrack.tracking.summary import headline, summary_text

WHOLE = {
    "mAP50-95": 0.45998, "mAP50-95_drop": 0.677, "mAP50-95_drop_ci_low": -0.05, "mAP50-95_drop_ci_high": 2.05,
    "latency_ms_p50": 26.9, "latency_ratio": 1.363, "onnx_mb": 2.7718, "mAP50": 0.62,
}  # fmt: skip


@pytest.mark.parametrize(
    ("left_out", "line"),
    [
        ((), "mAP50-95 0.4600, 0.68 points below float32 (-0.05 to 2.05), 26.9 ms (1.36 x float32), 2.77 MB"),
        (("mAP50-95_drop_ci_low",), "mAP50-95 0.4600, 0.68 points below float32, 26.9 ms (1.36 x float32), 2.77 MB"),
        (("mAP50-95", "mAP50-95_drop"), "26.9 ms (1.36 x float32), 2.77 MB"),
        (("mAP50-95_drop", "latency_ratio", "onnx_mb"), "mAP50-95 0.4600, 26.9 ms"),
    ],
)
def test_what_was_not_measured_is_left_out(left_out: tuple[str, ...], line: str) -> None:
    metrics = {name: value for name, value in WHOLE.items() if name not in left_out}
    assert headline("a file", metrics) == f"a file: {line}"


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((-0.7, 0.5), "0.11 points above float32 (drop -0.70 to 0.50)"),
        ((), "0.11 points above float32"),
    ],
)
def test_what_is_above_float32_says_so(ends: tuple[float, ...], words: str) -> None:
    metrics = {"mAP50-95": 0.4678, "mAP50-95_drop": -0.11}
    metrics |= dict(zip(("mAP50-95_drop_ci_low", "mAP50-95_drop_ci_high"), ends, strict=False))
    assert headline("a file", metrics) == f"a file: mAP50-95 0.4678, {words}"


def test_float32_is_not_held_against_itself() -> None:
    itself = {"mAP50-95": 0.4667, "mAP50-95_drop": 0.0, "latency_ms_p50": 19.4, "latency_ratio": 1.0, "onnx_mb": 9.41}
    assert headline("fp32", itself) == "fp32: mAP50-95 0.4667, 19.4 ms, 9.41 MB"
    assert "float32" not in summary_text("fp32", {}, itself | {"float32_agreement": 1.0})
    other = summary_text("fp16", {}, itself | {"latency_ratio": 1.04, "float32_agreement": 0.99})
    assert "times float32" in other
    assert "| agreement with float32's detections | 0.990 |" in other
