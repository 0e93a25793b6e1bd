"""The scales of equalized channels, in QuantizeLinear or on the weights."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from quantrack.datasets.pictures import network_input
from quantrack.errors import QuantrackError
from quantrack.onnx.full_placement import place_everywhere
from quantrack.onnx.graph import Graph, read_graph
from quantrack.onnx.input_scales import fold_input_scales, is_input_scale
from quantrack.runtime.parity import measure_parity
from quantrack.runtime.session import REFERENCE, open_session


def axis_of(node: onnx.NodeProto) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)


@pytest.mark.parametrize("mode", ["w4a8", "w8a8"])
def test_quantizers_take_the_scales(small, mode):
    files = small.files(mode)
    plain, run = read_graph(files.plain), read_graph(files.optimized)
    scalings = [node for node in plain.nodes if is_input_scale(plain, node)]
    inputs = [run.producers[run.producers[node.input[0]].input[0]] for node in run.nodes if _is_quantized(run, node)]
    assert len(scalings) == len(inputs) == files.optimized_nodes["QuantizeLinear"] > 50
    assert not any(is_input_scale(run, node) for node in run.nodes)
    for quantize in inputs:
        assert axis_of(quantize) == 1
        scales, zero_points = run.array(quantize.input[1]), run.array(quantize.input[2])
        assert scales.ndim == 1
        assert scales.shape == zero_points.shape
        (dequantize,) = run.consumers[quantize.output[0]]
        assert run.array(dequantize.input[1]).size == 1  # as integer kernels want it
        assert np.all(zero_points == run.array(dequantize.input[2]))


def _is_quantized(graph: Graph, node: onnx.NodeProto) -> bool:
    return node.op_type == "Conv" and graph.producers[node.input[0]].op_type == "DequantizeLinear"


def test_weights_take_the_scales_of_float_inputs(small):
    run = read_graph(small.files("w4a16").optimized)
    weights = [
        run.producers[node.input[1]] for node in run.nodes if node.op_type == "Conv" and node.input[1] in run.producers
    ]
    scaled = [node for node in weights if node.op_type == "Mul"]
    assert len(scaled) > 30  # the layers of 4 bits; those of 8 stay as they are
    assert {node.op_type for node in weights} == {"Mul", "DequantizeLinear"}
    assert not any(is_input_scale(run, node) for node in run.nodes)


@pytest.mark.parametrize("mode", ["w4a8", "w4a16"])
def test_outputs_stay(small, mode):
    files = small.files(mode)
    images = [network_input(path, small.SIZE) for path in small.calibration.paths]
    for optimization in ((), (REFERENCE,)):
        session = open_session(files.optimized, "cpu", *optimization)
        parity = measure_parity(open_session(files.plain, "cpu", REFERENCE).run, session, images, "one2one")
        assert parity.mean_abs is not None
        assert parity.mean_abs < 0.02


@pytest.mark.parametrize(("groups", "channels", "outputs"), [(1, 4, 6), (2, 4, 6), (4, 4, 8)])
def test_float_inputs_of_any_grouping(groups, channels, outputs):
    """Checked against the network with its Mul, by ONNX's own reference."""
    random = np.random.default_rng(0)
    integers = random.integers(-8, 8, (outputs, channels // groups, 3, 3)).astype(np.int8)
    model = _model(
        [
            helper.make_node("Mul", ["x", "factors"], ["scaled"]),
            helper.make_node("DequantizeLinear", ["integers", "scales", "zeros"], ["weights"], axis=0),
            helper.make_node("Conv", ["scaled", "weights"], ["y"], group=groups, name="conv"),
        ],
        {
            "factors": random.uniform(0.5, 2, (1, channels, 1, 1)).astype(np.float32),
            "integers": integers,
            "scales": random.uniform(0.1, 1, outputs).astype(np.float32),
            "zeros": np.zeros(outputs, np.int8),
        },
        channels,
    )
    x = random.normal(size=(1, channels, 8, 8)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    graph = Graph(model)
    assert fold_input_scales(graph) == 1
    onnx.checker.check_model(graph.model, full_check=True)
    assert [node.op_type for node in graph.nodes] == ["DequantizeLinear", "Mul", "Conv"]
    found = ReferenceEvaluator(graph.model).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_other_products_stay():
    """One that two convolutions share, and one that has a factor for all channels."""
    model = _model(
        [
            helper.make_node("Mul", ["x", "factors"], ["shared"]),
            helper.make_node("Conv", ["shared", "kernel"], ["first"]),
            helper.make_node("Conv", ["shared", "kernel"], ["second"]),
            helper.make_node("Add", ["first", "second"], ["sum"]),
            helper.make_node("Mul", ["sum", "half"], ["halved"]),
            helper.make_node("Conv", ["halved", "kernel"], ["y"]),
        ],
        {
            "factors": np.ones((1, 4, 1, 1), np.float32),
            "half": np.array(0.5, np.float32),
            "kernel": np.ones((4, 4, 1, 1), np.float32),
        },
        4,
    )
    graph = Graph(model)
    assert fold_input_scales(graph) == 0
    assert [node.op_type for node in graph.nodes] == ["Mul", "Conv", "Conv", "Add", "Mul", "Conv"]


def _model(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], channels: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "outputs", "height", "width"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_full_placement_wants_one_scale(small, tmp_path):
    with pytest.raises(QuantrackError, match="one scale a channel; full placement needs a recipe without"):
        place_everywhere(small.files("w8a8").optimized, tmp_path / "full.onnx", {})
