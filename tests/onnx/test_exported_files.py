"""Exported graphs: structure, parity with PyTorch, facts; on architectures with random weights."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from awake import boxes_and_scores, error_shares, woken
from recipes import DEFAULT_BY_ROLE, with_fewer_trials

from quantrack.datasets.calibration import load_calibration_set
from quantrack.detector.load import Detector, load_detector
from quantrack.errors import QuantrackError
from quantrack.onnx.export import OPSET
from quantrack.onnx.exported_files import ExportedFiles, export_float_files, export_quantized_files
from quantrack.onnx.inspect import FACTS_KEY, ModelFacts, check_onnx, file_facts, read_facts, require_same_qdq
from quantrack.quantization.apply import apply_recipe
from quantrack.quantization.job import QuantizationJob, Step, new_job
from quantrack.quantization.recipe import RECIPES
from quantrack.schemes import parse_mode

SIZE = 64


def facts_of(detector: Detector, mode: str) -> ModelFacts:
    return ModelFacts(detector.name, detector.digest, detector.head, SIZE, mode, "test", detector.class_names, 4.5)


def quantized(detector: Detector, mode: str, steps: tuple[Step, ...], root: Path) -> QuantizationJob:
    calibration = load_calibration_set("random", 2, root, seed=0)
    job = new_job(detector, parse_mode(mode), calibration, SIZE, torch.device("cpu"), seed=0)
    apply_recipe(job, steps)
    return job


def exported(detector: Detector, mode: str, steps: tuple[Step, ...], root: Path, folder: Path) -> ExportedFiles:
    return export_quantized_files(quantized(detector, mode, steps, root).model, facts_of(detector, mode), folder)


def test_naive_yolov10m_has_the_design_documents_graph(coco_root: Path, tmp_path: Path) -> None:
    detector = load_detector("yolov10m.yaml", "one2many", SIZE, 0, False)
    files = exported(detector, "w4a8", RECIPES["naive"], coco_root, tmp_path)
    assert files.plain.name == "yolov10m-w4a8-qcdq-ptq.onnx"
    assert files.optimized.name == "yolov10m-w4a8-qcdq-ptq-opt.onnx"
    counted = {name: files.plain_nodes[name] for name in ("QuantizeLinear", "DequantizeLinear", "Clip", "Conv")}
    assert counted == {"QuantizeLinear": 118, "DequantizeLinear": 236, "Clip": 118, "Conv": 118}
    assert files.optimized_nodes["QuantizeLinear"] == 118
    assert files.optimized_nodes["DequantizeLinear"] == 236


@pytest.mark.parametrize("architecture", ["yolov8n.yaml", "yolo11n.yaml", "yolov9t.yaml", "yolo26n.yaml"])
def test_other_architectures_export_and_run(architecture: str, coco_root: Path, tmp_path: Path) -> None:
    detector = woken(load_detector(architecture, "one2many", SIZE, 0, False), SIZE)
    job = quantized(detector, "w4a8", with_fewer_trials(DEFAULT_BY_ROLE), coco_root)
    files = export_quantized_files(job.model, facts_of(detector, "w4a8"), tmp_path)
    image = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
    outputs = ort.InferenceSession(str(files.optimized)).run(None, {"images": image})
    with torch.no_grad():
        expected = job.model(torch.from_numpy(image)).numpy()
    assert outputs[0].shape == expected.shape
    # one-LSB flips cascade through a deep net: parity is statistical
    shares = error_shares(
        torch.from_numpy(outputs[0]), torch.from_numpy(expected), detector.model, torch.from_numpy(image),
        boxes_and_scores,
    )  # fmt: skip
    assert max(shares) < 0.1


@pytest.mark.parametrize(("mode", "activations"), [("w8a16", 0), ("w4a16", 0), ("w8a8", 82), ("w4a8", 82)])
def test_modes_of_the_one_to_one_head(mode: str, activations: int, coco_root: Path, tmp_path: Path) -> None:
    detector = load_detector("yolov10n.yaml", "one2one", SIZE, 0, False)
    files = exported(detector, mode, RECIPES["fast"], coco_root, tmp_path)
    assert files.plain_nodes.get("QuantizeLinear", 0) == activations
    assert files.plain_nodes["DequantizeLinear"] == 82 + activations
    model = onnx.load(files.optimized)
    assert [value.name for value in model.graph.input] == ["images"]
    shape = [side.dim_value for side in model.graph.output[0].type.tensor_type.shape.dim]
    assert shape == [1, 84, 6]  # all anchors of a 64-pixel input; 300 at 640
    assert {opset.version for opset in model.opset_import if opset.domain == ""} == {OPSET}
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(len(tensor.dims) == 4 for tensor in weights) == 82
    largest = max(np.abs(onnx.numpy_helper.to_array(t)).max() for t in weights if len(t.dims) == 4)
    assert largest <= 127


def test_four_bit_weights_stay_within_seven(coco_root: Path, tmp_path: Path) -> None:
    detector = load_detector("yolov10n.yaml", "one2many", SIZE, 0, False)
    files = exported(detector, "w4a8", RECIPES["naive"], coco_root, tmp_path)
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(files.optimized).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    assert max(int(np.abs(weight).max()) for weight in weights) == 7


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 0.5)])
def test_float_files_agree_with_pytorch(precision: str, tolerance: float, tmp_path: Path) -> None:
    detector = woken(load_detector("yolov10n.yaml", "one2many", SIZE, 0, False), SIZE)
    files = export_float_files(detector.model, facts_of(detector, precision), tmp_path)
    assert files.plain.name == f"yolov10n-baseline-{precision}.onnx"
    image = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)
    output = ort.InferenceSession(str(files.optimized)).run(None, {"images": image})[0]
    with torch.no_grad():  # in float64: of boxes at 500 pixels float32 itself may be off by more than the tolerance
        expected = copy.deepcopy(detector.model).double()(torch.from_numpy(image).double()).numpy()
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, expected, atol=tolerance)
    shares = error_shares(
        torch.from_numpy(output),
        torch.from_numpy(expected).float(),
        detector.model,
        torch.from_numpy(image),
        boxes_and_scores,
    )
    assert max(shares) < (1e-4 if precision == "fp32" else 0.02)


def test_facts_travel_with_the_file(tmp_path: Path) -> None:
    detector = load_detector("yolov10n.yaml", "one2one", SIZE, 0, False)
    files = export_float_files(detector.model, facts_of(detector, "fp32"), tmp_path)
    assert read_facts(files.plain) == read_facts(files.optimized) == facts_of(detector, "fp32")


def test_facts_of_another_version(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Identity", ["images"], ["output0"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("images", "output0")]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", ends[:1], ends[1:]))
    path = tmp_path / "model.onnx"
    facts = ModelFacts("small", "0" * 64, "one2one", SIZE, "w4a8", "default", ("a",))
    onnx.helper.set_model_props(model, {FACTS_KEY: json.dumps(asdict(facts) | {"of a later version": 1})})
    onnx.save(model, str(path))
    assert read_facts(path) == facts
    onnx.helper.set_model_props(model, {FACTS_KEY: json.dumps({"model": "small"})})
    onnx.save(model, str(path))
    with pytest.raises(QuantrackError, match=r"model.onnx: its `quantrack` cannot be read .*export it again"):
        read_facts(path)


def test_a_vanished_quantizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match=r"changed DequantizeLinear from 2 to 1"):
        require_same_qdq({"DequantizeLinear": 2}, {"DequantizeLinear": 1}, tmp_path / "model.onnx")


def test_broken_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(QuantrackError, match="no such file"):
        file_facts(tmp_path / "gone.onnx", "one2one", SIZE)
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(QuantrackError, match=r"not a readable ONNX file|refused by"):
        check_onnx(tmp_path / "text.onnx")
