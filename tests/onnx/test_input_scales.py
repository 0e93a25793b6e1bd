"""The scales of equalized channels, in QuantizeLinear or on the weights."""

import numpy as np
import onnx
import pytest
from command import SMALL_LAYERS
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from quantrack.datasets.pictures import network_input
from quantrack.errors import QuantrackError
from quantrack.onnx.full_placement import place_everywhere
from quantrack.onnx.graph import Graph, read_graph
from quantrack.onnx.input_scales import fold_input_scales, is_input_scale
from quantrack.runtime.parity import measure_parity
from quantrack.runtime.session import REFERENCE, SessionSettings, open_session


def axis_of(node: onnx.NodeProto) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)


@pytest.mark.parametrize("mode", ["w4a8", "w8a8"])
def test_quantizers_take_the_scales(small, mode):
    files = small.files(mode)
    plain, run = read_graph(files.plain), read_graph(files.optimized)
    scalings = [node for node in plain.nodes if is_input_scale(plain, node)]
    inputs = [run.producers[run.producers[node.input[0]].input[0]] for node in run.nodes if _is_quantized(run, node)]
    assert len(scalings) + 1 == len(inputs) == files.optimized_nodes["QuantizeLinear"] == SMALL_LAYERS
    assert not any(is_input_scale(run, node) for node in run.nodes)
    of_results = 0
    for quantize in inputs:
        (dequantize,) = run.consumers[quantize.output[0]]
        assert run.array(dequantize.input[1]).size == 1  # as integer kernels want it
        source = run.producers.get(quantize.input[0])
        scales, zero_points = run.array(quantize.input[1]), run.array(quantize.input[2])
        if source is None:  # the picture, whose values lie on the grid
            assert scales == pytest.approx(1 / 255)
            continue
        if source.op_type == "Conv":  # no activation between: its own weights are multiplied
            of_results += 1
            assert scales.size == zero_points.size == 1
            continue
        assert axis_of(quantize) == 1
        assert scales.ndim == 1
        assert scales.shape == zero_points.shape
        assert np.all(zero_points == run.array(dequantize.input[2]))
    assert 0 < of_results < 10


@pytest.mark.parametrize("mode", ["w4a8", "w8a8"])
@pytest.mark.parametrize("optimization", ["all", "extended"])
def test_the_file_runs_by_onnx_runtimes_own_defaults(small, mode, optimization):
    """With weights not folded, ONNX Runtime makes integer kernels where it can."""
    path = small.files(mode).optimized
    images = [network_input(each, small.SIZE) for each in small.calibration.paths]
    session = open_session(path, "cpu", SessionSettings(optimization=optimization))
    parity = measure_parity(open_session(path, "cpu", REFERENCE).run, session, images, "one2one")
    assert parity.unmatched == 0
    assert parity.mean_abs is not None
    assert parity.mean_abs < 0.02


@pytest.mark.parametrize("bias", [["bias"], ["copy"]])
def test_a_result_that_goes_on_to_a_quantizer_is_multiplied_itself(bias):
    """Of two equal biases the exporter keeps one, and gives the other convolution an Identity of it."""
    random = np.random.default_rng(0)
    model = _model(
        [
            helper.make_node("DequantizeLinear", ["integers", "scales"], ["weights"], axis=0),
            helper.make_node("Identity", ["bias"], ["copy"]),
            helper.make_node("Conv", ["x", "weights", *bias], ["result"], name="first"),
            helper.make_node("Mul", ["result", "factors"], ["scaled"]),
            helper.make_node("QuantizeLinear", ["scaled", "scale", "zero"], ["quantized"], name="quantize"),
            helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["input"]),
            helper.make_node("Conv", ["input", "kernel"], ["y"], name="second"),
        ],
        {
            "integers": random.integers(-8, 8, (4, 4, 1, 1)).astype(np.int8),
            "scales": random.uniform(0.1, 1, 4).astype(np.float32),
            "bias": random.normal(size=4).astype(np.float32),
            "factors": random.uniform(0.5, 2, (1, 4, 1, 1)).astype(np.float32),
            "scale": np.array(0.1, np.float32),
            "zero": np.array(128, np.uint8),
            "kernel": random.normal(size=(4, 4, 1, 1)).astype(np.float32),
        },
        4,
    )
    x = random.normal(size=(1, 4, 8, 8)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    graph = Graph(model)
    assert fold_input_scales(graph) == 1
    onnx.checker.check_model(graph.model, full_check=True)
    assert not {"Mul", "Identity"} & {node.op_type for node in graph.nodes}
    found = ReferenceEvaluator(graph.model).run(None, {"x": x})[0]
    assert np.mean(np.abs(found - expected) < 1e-4) > 0.98  # a value on a rounding edge may fall either way


def test_a_shared_result_keeps_its_mul():
    model = _model(
        [
            helper.make_node("Conv", ["x", "kernel"], ["result"]),
            helper.make_node("Mul", ["result", "factors"], ["scaled"]),
            helper.make_node("QuantizeLinear", ["scaled", "scale", "zero"], ["quantized"]),
            helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["input"]),
            helper.make_node("Conv", ["input", "kernel"], ["second"]),
            helper.make_node("Add", ["second", "result"], ["y"]),
        ],
        {
            "factors": np.full((1, 4, 1, 1), 2, np.float32),
            "scale": np.array(0.1, np.float32),
            "zero": np.array(128, np.uint8),
            "kernel": np.ones((4, 4, 1, 1), np.float32),
        },
        4,
    )
    graph = Graph(model)
    assert fold_input_scales(graph) == 0
    assert [node.op_type for node in graph.nodes][1] == "Mul"


def _is_quantized(graph: Graph, node: onnx.NodeProto) -> bool:
    return node.op_type == "Conv" and graph.producers[node.input[0]].op_type == "DequantizeLinear"


def test_weights_take_the_scales_of_float_inputs(small):
    run = read_graph(small.files("w4a16").optimized)
    weights = [
        run.producers[node.input[1]] for node in run.nodes if node.op_type == "Conv" and node.input[1] in run.producers
    ]
    scaled = [node for node in weights if node.op_type == "Mul"]
    assert len(scaled) == 23  # the layers of 4 bits; those of 8 stay as they are
    assert {node.op_type for node in weights} == {"Mul", "DequantizeLinear"}
    assert not any(is_input_scale(run, node) for node in run.nodes)


@pytest.mark.parametrize("mode", ["w4a8", "w4a16"])
def test_outputs_stay(small, mode):
    files = small.files(mode)
    images = [network_input(path, small.SIZE) for path in small.calibration.paths]
    for settings in ((), (REFERENCE,)):
        session = open_session(files.optimized, "cpu", *settings)
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
