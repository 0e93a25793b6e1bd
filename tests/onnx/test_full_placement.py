"""Quantizers everywhere: which tensors, which grids, and that ONNX Runtime makes integer kernels of them."""

import json
import os
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command import SMALL_LAYERS
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from quantrack.datasets.pictures import network_input
from quantrack.errors import QuantrackError
from quantrack.onnx.activation_grid import SCORES_FROM, SILU_FROM, Grid, ObservedRange, covering
from quantrack.onnx.channels_last_head import LAST, keep_channels_last
from quantrack.onnx.float_silu import SILU, silu_in_float, silu_product
from quantrack.onnx.full_placement import (
    observable_tensors,
    place_everywhere,
    strip_activation_quantizers,
    tensors_to_quantize,
)
from quantrack.onnx.graph import Graph, read_graph, write_graph
from quantrack.onnx.grid_assignment import ConvInput, Groups, assign_grids
from quantrack.onnx.inspect import has_integer_convolutions, sums_can_saturate
from quantrack.onnx.integer_kernels import (
    dequantize_late,
    double_by_copying,
    fill_input_channels,
    own_zero_points,
    take_wholes,
)
from quantrack.runtime.parity import measure_parity
from quantrack.runtime.session import REFERENCE, SessionSettings, open_session
from quantrack.runtime.tensor_ranges import observe_tensors

SILUS = 25  # of the small detector


@pytest.fixture(scope="session")
def observed(small):
    path = small.files("w8a8", placement="full").optimized
    return observe_tensors(path, observable_tensors(path), small.calibration.batches(small.SIZE, 1), 2, "cpu")


@pytest.fixture(scope="session")
def full(small, observed, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("full") / "full.onnx"
    place_everywhere(small.files("w8a8", placement="full").optimized, target, observed)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    return target


def optimized_operators(path: Path, folder: Path) -> Counter:
    """Operators of the graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_every_quantized_convolution_becomes_an_integer_kernel(small, full, tmp_path):
    before = optimized_operators(small.files("w8a8", placement="full").optimized, tmp_path)
    after = optimized_operators(full, tmp_path)
    convolutions = small.files("w8a8", placement="full").optimized_nodes["Conv"]
    assert before["QLinearConv"] <= 2  # results that go to the next convolution's quantizer without an activation
    assert after["QLinearConv"] == convolutions - 1
    assert after["Conv"] == 1  # DFL
    assert after["QuickGelu"] == before["QuickGelu"] == SILUS  # all SiLUs are small at this size
    assert after["QLinearSigmoid"] == after["QLinearMul"] == 0
    assert after["QLinearAdd"] == 4
    assert after["Resize"] == 0


def test_every_node_has_a_name_of_its_own(full):
    """Runtimes' errors and profiles go by them."""
    names = [node.name for node in onnx.load(full).graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_large_silus_are_integer_kernels(small, observed, tmp_path, monkeypatch):
    target = tmp_path / "full.onnx"
    sizes = sorted(prod(shape) for shape in shapes_of_silus(small.files("w8a8", placement="full").optimized))
    monkeypatch.setattr("quantrack.onnx.float_silu.MOST_VALUES", sizes[10])
    place_everywhere(small.files("w8a8", placement="full").optimized, target, observed)
    after = optimized_operators(target, tmp_path)
    small_ones = sum(size <= sizes[10] for size in sizes)
    assert after["QuickGelu"] == small_ones
    assert after["QLinearSigmoid"] == after["QLinearMul"] == len(sizes) - small_ones > 0


def shapes_of_silus(path: Path) -> list[list[int]]:
    graph = read_graph(path)
    shapes = graph.shapes()
    return [
        shapes[node.output[0]]
        for node in graph.nodes
        if node.op_type == "Sigmoid" and silu_product(graph, node.input[0])
    ]


def test_silu_in_one_operator_gives_the_same(small, tmp_path):
    """As ONNX Runtime computes it."""
    path, target = tmp_path / "float.onnx", tmp_path / "silu.onnx"
    plain = read_graph(small.files("w8a8", placement="full").optimized)
    strip_activation_quantizers(plain)
    write_graph(plain, path)
    silu_in_float(plain)
    write_graph(plain, target)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    assert Counter(node.op_type for node in plain.nodes)[SILU] == SILUS
    image = network_input(small.calibration.paths[1], small.SIZE)[None]
    expected = open_session(path, "cpu", REFERENCE).run(image)
    np.testing.assert_allclose(open_session(target, "cpu", REFERENCE).run(image), expected, rtol=1e-3, atol=1e-3)


def silu_model(nodes: list[onnx.NodeProto], outputs: list[str], sides: list[object]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value(name, 1, sides) for name in "xz"], [value(o, 1, None) for o in outputs]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def two_silus(sides: list[object]) -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("Sigmoid", ["x"], ["s"]),
        node("Mul", ["x", "s"], ["y"], name="first"),
        node("Sigmoid", ["y"], ["t"]),
        node("Mul", ["t", "y"], ["z2"], name="second"),
    ]
    return silu_model(nodes, ["z2"], sides)


def test_the_file_defines_silu_for_other_runtimes():
    merged = Graph(two_silus([2, 3]))
    silu_in_float(merged)
    assert [item.op_type for item in merged.nodes] == [SILU, SILU]
    assert [item.domain for item in merged.model.opset_import].count("com.microsoft") == 1
    assert len(merged.model.functions) == 1
    x = np.linspace(-6, 6, 6, dtype=np.float32).reshape(2, 3)
    (y,) = ReferenceEvaluator(merged.model).run(None, {"x": x, "z": x})
    once = x / (1 + np.exp(-x))
    np.testing.assert_allclose(y, once / (1 + np.exp(-once)), rtol=1e-5)


@pytest.mark.parametrize("sides", [["side", 3], [2**9, 2**10], None])
def test_silus_of_large_or_unknown_size_stay(sides):
    graph = Graph(two_silus(sides))
    silu_in_float(graph)
    assert graph.nodes == list(two_silus(sides).graph.node)
    assert not graph.model.functions


def test_only_silu_is_written_as_one_operator():
    node = helper.make_node
    nodes = [
        node("Sigmoid", ["x"], ["gate"]),
        node("Mul", ["z", "gate"], ["gated"]),  # another tensor's gate
        node("Sigmoid", ["z"], ["scores"]),
        node("Relu", ["x"], ["y"]),
        node("Sigmoid", ["y"], ["used"]),
        node("Mul", ["y", "used"], ["silu"]),
        node("Neg", ["used"], ["twice"]),  # its sigmoid is used elsewhere
        node("Relu", ["z"], ["v"]),
        node("Sigmoid", ["v"], ["shown"]),  # its sigmoid is an output
        node("Mul", ["v", "shown"], ["other"]),
    ]
    graph = Graph(silu_model(nodes, ["gated", "scores", "silu", "twice", "shown", "other"], [1, 3]))
    silu_in_float(graph)
    assert graph.nodes == nodes
    assert not graph.model.functions


def test_calibrated_grids_stay(small, full):
    """A convolution's input keeps its scale and zero point, or shares one that reaches further."""
    calibrated = strip_activation_quantizers(read_graph(small.files("w8a8", placement="full").optimized))
    graph = read_graph(full)
    same = 0
    for name, conv_input in calibrated.items():
        node = next(node for node in graph.nodes if node.name == name)
        quantize = graph.producers[graph.producers[node.input[0]].input[0]]
        grid = Grid(float(graph.array(quantize.input[1])), int(graph.array(quantize.input[2])))
        same += grid.scale == pytest.approx(conv_input.grid.scale) and grid.zero_point == conv_input.grid.zero_point
        assert grid.high >= conv_input.grid.high - 1.01 * grid.scale
        assert grid.low <= conv_input.grid.low + 1.01 * grid.scale
    assert same > len(calibrated) / 2


def test_integer_kernels_compute_what_the_file_says(small, full):
    """Against every Q/DQ in float: equal but for roundings that fall the other way."""
    images = [network_input(path, small.SIZE) for path in small.calibration.paths]
    fast, exact = open_session(full, "cpu"), open_session(full, "cpu", REFERENCE)
    assert not fast.settings.fold_weights
    parity = measure_parity(exact.run, fast, images, "one2one")
    assert parity.unmatched == 0
    assert parity.mean_abs is not None
    assert 0 < parity.mean_abs < 0.02


def test_exact_sums_are_possible(small, full):
    """ONNX Runtime makes weights beyond 7 bits unsigned, and refuses a zero point that two of them share."""
    graph = read_graph(full)
    large = [
        node.input[2]
        for node in graph.nodes
        if node.op_type == "DequantizeLinear"
        and node.input[0] in graph.initializers
        and graph.array(node.input[0]).dtype == np.int8
        and np.abs(graph.array(node.input[0]).astype(int)).max() > 64
    ]
    assert len(large) > 10
    assert len(set(large)) == len(large)
    image = network_input(small.calibration.paths[1], small.SIZE)[None]
    exact = open_session(full, "cpu", SessionSettings(exact_sums=True))
    np.testing.assert_array_equal(exact.run(image), open_session(full, "cpu").run(image))


@pytest.mark.parametrize(("depthwise", "saturates"), [(False, True), (True, False)])
def test_its_weights_fit_in_pairs(full, tmp_path, depthwise, saturates):
    """So that integer kernels add exactly without VNNI, as they would not with large weights everywhere."""
    assert has_integer_convolutions(full)
    assert not sums_can_saturate(full)
    graph = read_graph(full)
    weights = [graph.producers[node.input[1]].input[0] for node in graph.nodes if is_quantized_convolution(graph, node)]
    shapes = {name: graph.initializers[name].dims for name in weights}
    chosen = next(name for name, shape in shapes.items() if (shape[1] == 1) == depthwise)
    graph.initializers[chosen].CopyFrom(numpy_helper.from_array(np.full(shapes[chosen], 127, np.int8), chosen))
    write_graph(graph, tmp_path / "large.onnx")
    assert sums_can_saturate(tmp_path / "large.onnx") == saturates


def is_quantized_convolution(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether it is a convolution of quantized weights."""
    return node.op_type == "Conv" and node.input[1] in graph.producers


def channels_last(graph: Graph) -> None:
    """The head's rewrite, and what it wants before it."""
    dequantize_late(graph)
    keep_channels_last(graph)


@pytest.mark.parametrize("rewrite", [fill_input_channels, double_by_copying, dequantize_late, channels_last])
def test_rewrites_for_speed_change_no_value(small, observed, tmp_path, monkeypatch, rewrite):
    # of all the rewrites for kernels this one is not for speed: a processor without VNNI opens no file without it
    monkeypatch.setattr("quantrack.onnx.full_placement.suit_integer_kernels", own_zero_points)
    plain, rewritten = tmp_path / "plain.onnx", tmp_path / "rewritten.onnx"
    place_everywhere(small.files("w8a8", placement="full").optimized, plain, observed)
    graph = read_graph(plain)
    rewrite(graph)
    write_graph(graph, rewritten)
    assert len(read_graph(rewritten).nodes) != len(read_graph(plain).nodes)
    last = [name for name in read_graph(rewritten).producers if name.endswith(LAST)]
    assert len(last) == (4 if rewrite is channels_last else 0)  # boxes and scores, of all positions and of the selected
    before, after = open_session(plain, "cpu"), open_session(rewritten, "cpu")
    images = [network_input(path, small.SIZE) for path in small.calibration.paths]
    np.testing.assert_array_equal(before.run(images[1][None]), after.run(images[1][None]))


def test_wholes_are_taken_in_place_of_all_their_parts(small, tmp_path):
    path, target = tmp_path / "float.onnx", tmp_path / "wholes.onnx"
    plain = read_graph(small.files("w8a8", placement="full").optimized)
    strip_activation_quantizers(plain)
    write_graph(plain, path)
    before = Counter(node.op_type for node in plain.nodes)
    take_wholes(plain)
    write_graph(plain, target)
    after = Counter(node.op_type for node in plain.nodes)
    assert before["Slice"] - after["Slice"] == 1  # C2f takes both halves of a tensor, and computes on from one
    image = network_input(small.calibration.paths[1], small.SIZE)[None]
    np.testing.assert_array_equal(
        open_session(path, "cpu", REFERENCE).run(image), open_session(target, "cpu", REFERENCE).run(image)
    )


def test_slices_are_kept_where_the_whole_will_not_do():
    value, node = helper.make_tensor_value_info, helper.make_node
    integers = {"0": 0, "1": 1, "2": 2, "3": 3}
    constants = [onnx.numpy_helper.from_array(np.array([number]), name) for name, number in integers.items()]
    nodes = [
        node("Relu", ["x"], ["y"]),
        node("Slice", ["y", "0", "2", "1", "1"], ["a"]),
        node("Slice", ["y", "2", "3", "1", "1"], ["b"]),
        node("Slice", ["y", "0", "2", "2", "1"], ["c"]),
        node("Concat", ["b", "a"], ["other order"], axis=1),
        node("Concat", ["a", "b"], ["other axis"], axis=2),
        node("Concat", ["a", "y"], ["not all"], axis=1),
        node("Concat", ["c", "b"], ["sliced along another axis"], axis=1),
        node("Concat", ["y", "a", "b", "a"], ["in the middle"], axis=1),
    ]
    outputs = [value(item.output[0], 1, None) for item in nodes[4:]]
    graph = Graph(helper.make_model(helper.make_graph(nodes, "g", [value("x", 1, [1, 3, 3, 3])], outputs, constants)))
    take_wholes(graph)
    assert graph.nodes[:-1] == nodes[:-1]
    assert graph.nodes[-1].input == ["y", "y", "a"]


def test_detections_are_selected_on_integers(full):
    graph = read_graph(full)
    best, selected = (next(node for node in graph.nodes if node.op_type == kind) for kind in ("ReduceMax", "TopK"))
    types = {
        item.name: item.type.tensor_type.elem_type
        for item in onnx.shape_inference.infer_shapes(graph.model).graph.value_info
    }
    assert types[best.input[0]] == onnx.TensorProto.UINT8
    assert graph.producers[selected.input[0]].op_type == "DequantizeLinear"


def test_the_selection_has_channels_last(full, tmp_path):
    """No level is turned around: of what is selected from, ONNX Runtime's graph has [1, positions, channels]."""
    graph = read_graph(full)
    best = next(node for node in graph.nodes if node.op_type == "ReduceMax")
    assert [list(item.ints) for item in best.attribute if item.name == "axes"] == [[2]]
    concatenated = [node for node in graph.nodes if node.op_type == "Concat" and node.output[0].endswith(LAST)]
    assert len(concatenated) == 2  # boxes and scores
    readers = Counter(reader.op_type for node in concatenated for reader in graph.consumers[node.output[0]])
    assert readers == {"Gather": 2, "ReduceMax": 1}
    optimized_operators(full, tmp_path)
    made = read_graph(tmp_path / "optimized.onnx")
    for node in concatenated:
        made_by = next(each for each in made.nodes if each.name == node.name)
        for name in made_by.input:
            assert made.producers[name].op_type == "Reshape"
            assert made.producers[made.producers[name].input[0]].op_type == "QLinearConv"


SIDES = {"x0": (3, 4), "x1": (2, 2)}


def selecting_model(change: str = "", batch: int = 1) -> onnx.ModelProto:
    """Two levels of quantized results, the best channel of each position, and two positions of all channels."""
    value, node, grid = helper.make_tensor_value_info, helper.make_node, ["scale", "zero"]
    weights = np.random.default_rng(1).normal(size=(3, 2, 1, 1)).astype(np.float32)
    constants = {
        "scale": np.float32(0.04), "zero": np.uint8(99), "w": weights, "axis": np.array([1]),
        "flat": np.array([batch, 3, -1]), "two": np.array([2]), "all": np.array([batch, 3, 2]),
    }  # fmt: skip
    nodes = [
        *(node("Conv", [f"x{k}", "w"], [f"y{k}"]) for k in (0, 1)),
        *(node("QuantizeLinear", [f"y{k}", *grid], [f"q{k}"]) for k in (0, 1)),
        *(node("Reshape", [f"q{k}", "flat"], [f"r{k}"]) for k in (0, 1)),
        node("Concat", ["r0", "r1"], ["whole"], axis=-1, name="levels"),
        node("ReduceMax", ["whole"], ["best"], axes=[1], keepdims=0),
        node("DequantizeLinear", ["best", *grid], ["scores"]),
        node("TopK", ["scores", "two"], ["top", "places"], axis=1),
        node("Unsqueeze", ["places", "axis"], ["row"]),
        node("Expand", ["row", "all"], ["indices"]),
        node("GatherElements", ["whole", "indices"], ["taken"], axis=2),
        node("DequantizeLinear", ["taken", *grid], ["z"]),
    ]
    outputs = ["top", "z"]
    if change:
        nodes, outputs = CHANGES[change](nodes, outputs, constants)
    inputs = [value(name, 1, [batch, 2, *sides]) for name, sides in SIDES.items()]
    initializers = [numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items()]
    shown = [value(name, 2 if name == "whole" else 1, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, shown, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def another_reader(nodes, outputs, constants):
    return [*nodes, helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["seen"])], [*outputs, "seen"]


def an_output(nodes, outputs, constants):
    return nodes, [*outputs, "whole"]


def in_float(nodes, outputs, constants):
    renamed = {"q0": "y0", "q1": "y1", "scores": "best", "z": "taken"}
    kept = [node for node in nodes if "Quantize" not in node.op_type and node.op_type != "DequantizeLinear"]
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return kept, ["top", "taken"]


def the_best_position(nodes, outputs, constants):
    """Of each channel, and then two channels of all positions alike: [1, 2, positions]."""
    by_name = {node.output[0]: node for node in nodes}
    by_name["best"].attribute[0].ints[:] = [2]
    return nodes, outputs


def with_the_axis_kept(nodes, outputs, constants):
    by_name = {node.output[0]: node for node in nodes}
    by_name["best"].attribute[1].i = 1
    constants["last"] = np.array([1, 16])
    flat = helper.make_node("Reshape", ["scores", "last"], ["scores in a row"])
    by_name["top"].input[0] = "scores in a row"
    return [*nodes[:9], flat, *nodes[9:]], outputs


def other_positions_of_each_channel(nodes, outputs, constants):
    by_name = {node.output[0]: node for node in nodes}
    constants["more"] = np.array([[[0, 1], [1, 2], [2, 0]]])
    by_name["taken"].input[1] = "more"
    return nodes, outputs


def a_position_of_each_channel(nodes, outputs, constants):
    """One for each of three channels, repeated: [3] to [3, 1] to [1, 3, 2]."""
    by_name = {node.output[0]: node for node in nodes}
    constants["own"] = np.array([0, 5, 9])
    by_name["row"].input[0] = "own"
    return nodes, outputs


def fewer_channels(nodes, outputs, constants):
    constants["all"] = np.array([1, 2, 2])
    return nodes, outputs


def channels_by_position(nodes, outputs, constants):
    """GatherElements along the channels."""
    by_name = {node.output[0]: node for node in nodes}
    by_name["taken"].attribute[0].i = 1
    constants["own"] = np.array([[0, 2]])
    by_name["row"].input[0] = "own"
    return nodes, outputs


CHANGES = {
    each.__name__: each
    for each in (
        another_reader, an_output, in_float, the_best_position, with_the_axis_kept, other_positions_of_each_channel,
        a_position_of_each_channel, fewer_channels, channels_by_position,
    )
}  # fmt: skip


def selected(model: onnx.ModelProto, batch: int = 1) -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    feed = {name: draws.normal(size=(batch, 2, *sides)).astype(np.float32) for name, sides in SIDES.items()}
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)


def test_levels_are_selected_from_with_channels_last():
    graph = Graph(selecting_model())
    keep_channels_last(graph)
    kinds = Counter(node.op_type for node in graph.nodes)
    assert (kinds["GatherElements"], kinds["Expand"], kinds["Gather"], kinds["Transpose"]) == (0, 0, 1, 3)
    expected = selected(selecting_model())
    assert len(set(expected[1].flat)) == expected[1].size
    for before, after in zip(expected, selected(graph.model), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("change", CHANGES)
def test_selections_of_other_kinds_stay(change):
    selected(selecting_model(change))  # it is a model that can be run
    graph = Graph(selecting_model(change))
    keep_channels_last(graph)
    assert graph.nodes == list(selecting_model(change).graph.node)


def test_selections_from_several_pictures_stay():
    selected(selecting_model(batch=2), 2)
    graph = Graph(selecting_model(batch=2))
    keep_channels_last(graph)
    assert graph.nodes == list(selecting_model(batch=2).graph.node)


def test_selections_from_levels_of_unknown_sides_stay():
    model = selecting_model()
    for side in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_param = "side"
    graph = Graph(model)
    before = graph.nodes
    keep_channels_last(graph)
    assert graph.nodes == before


def test_the_one_to_many_head_too(small, tmp_path):
    path, target = small.files("w4a8", "one2many", placement="full").optimized, tmp_path / "full.onnx"
    tensors = observable_tensors(path)
    ranges = observe_tensors(path, tensors, small.calibration.batches(small.SIZE, 1), 2, "cpu")
    place_everywhere(path, target, ranges)
    assert optimized_operators(target, tmp_path)["QLinearConv"] == SMALL_LAYERS
    assert open_session(target, "cpu").output_shape == open_session(path, "cpu").output_shape


def test_observed_ranges_hold_every_value(small, observed, tmp_path):
    path = small.files("w8a8", placement="full").optimized
    assert set(observed) == set(observable_tensors(path))
    model = onnx.load(path)
    model.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in observed)
    onnx.save(model, tmp_path / "tapped.onnx")
    session = open_session(tmp_path / "tapped.onnx", "cpu").inference
    pictures = list(small.calibration.batches(small.SIZE, 1))[:2]
    seen = [session.run(list(observed), {"images": picture}) for picture in pictures]
    for name, *values in zip(observed, *seen, strict=True):
        assert observed[name] == ObservedRange(min(each.min() for each in values), max(each.max() for each in values))
    assert any(first.max() > second.max() for first, second in zip(*seen, strict=True))
    assert any(first.max() < second.max() for first, second in zip(*seen, strict=True))


def test_float_activations_are_refused(small, tmp_path):
    with pytest.raises(QuantrackError, match="no activation is quantized; full placement needs a W4A8 or W8A8 model"):
        place_everywhere(small.files("w8a16", placement="full").optimized, tmp_path / "full.onnx", {})


def test_signed_activations_are_refused(small, tmp_path):
    with pytest.raises(QuantrackError, match="signed activations; full placement needs asymmetric ones"):
        place_everywhere(small.files("w8a8", recipe="naive").optimized, tmp_path / "full.onnx", {})
    assert not (tmp_path / "full.onnx").exists()


def test_what_is_cut_and_what_is_not(small, observed):
    graph = read_graph(small.files("w8a8", placement="full").optimized)
    conv_inputs = strip_activation_quantizers(graph)
    tensors = tensors_to_quantize(graph, conv_inputs)
    wide = {name: ObservedRange(-50.0, 30.0) for name in tensors}
    grids = assign_grids(graph, tensors, conv_inputs, wide)
    of_silu = {node.input[0] for node in graph.nodes if node.op_type == "Sigmoid" and node.input[0] in tensors}
    assert len(of_silu) == SILUS
    for name in of_silu:
        assert grids[name].low == pytest.approx(SILU_FROM, abs=grids[name].scale)
    scores = [node.output[0] for node in graph.nodes if "one2one_cv3" in node.name and node.name.endswith(".2/Conv")]
    boxes = [node.output[0] for node in graph.nodes if "one2one_cv2" in node.name and node.name.endswith(".2/Conv")]
    assert len(scores) == len(boxes) == 2
    assert all(grids[name].low == pytest.approx(SCORES_FROM, abs=grids[name].scale) for name in scores)
    assert all(grids[name].low == pytest.approx(-50, abs=0.5) for name in boxes)
    sigmoids = {node.output[0] for node in graph.nodes if node.op_type == "Sigmoid"} & tensors
    assert {grids[name] for name in sigmoids} == {Grid(1 / 255, 0)}


def concatenation(narrow: float) -> tuple[Graph, dict[str, ObservedRange]]:
    """A picture through two convolutions into Concat and a third convolution; one branch is narrow."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Add", ["images", "images"], ["a"]),
        helper.make_node("Add", ["a", "images"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("Conv", ["c", "w"], ["y"], name="last"),
    ]
    weights = onnx.numpy_helper.from_array(np.ones((1, 6, 1, 1), np.float32), "w")
    shape = [1, 3, 8, 8]
    graph = helper.make_graph(nodes, "g", [value("images", 1, shape)], [value("y", 1, None)], [weights])
    return Graph(helper.make_model(graph)), {
        "a": ObservedRange(0.0, narrow),
        "b": ObservedRange(0.0, 10.0),
        "c": ObservedRange(0.0, 10.0),
        "images": ObservedRange(0.0, 1.0),
        "y": ObservedRange(0.0, 1.0),
    }


@pytest.mark.parametrize(("narrow", "aligned"), [(4.0, False), (6.0, True)])
def test_operands_of_concat_are_aligned_where_that_costs_less_than_a_bit(narrow, aligned):
    graph, ranges = concatenation(narrow)
    conv_inputs = {"last": ConvInput("c", Grid.over(0.0, 10.0))}
    tensors = tensors_to_quantize(graph, conv_inputs)
    assert tensors >= {"a", "b", "c", "y"}
    grids = assign_grids(graph, tensors, conv_inputs, ranges)
    assert (grids["a"] == grids["c"]) is aligned
    assert grids["b"] == grids["c"] == Grid.over(0.0, 10.0)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("operator", "aligned"), [("Relu", False), ("Sqrt", True)])
def test_a_relu_keeps_a_grid_from_zero_up(operator, aligned, pooled):
    graph, ranges = concatenation(9.0)
    graph.nodes[0].CopyFrom(helper.make_node(operator, ["images"], ["r" if pooled else "a"]))
    if pooled:
        pool = helper.make_node("MaxPool", ["r"], ["a"], kernel_shape=[1, 1])
        graph = Graph(graph.model)
        graph.replace([graph.nodes[0], pool, *graph.nodes[1:]])
        ranges["r"] = ranges["a"]
    conv_inputs = {"last": ConvInput("c", Grid.over(-3.0, 10.0))}
    tensors = tensors_to_quantize(graph, conv_inputs) | ({"a", "r"} if pooled else {"a"})
    grids = assign_grids(Graph(graph.model), tensors, conv_inputs, ranges)
    assert grids["c"].zero_point > 0
    assert (grids["a"] == grids["c"]) is aligned
    assert (grids["a"].zero_point == 0) is not aligned


def test_an_operand_that_stays_float_is_not_aligned():
    graph, ranges = concatenation(6.0)
    conv_inputs = {"last": ConvInput("c", Grid.over(0.0, 10.0))}
    grids = assign_grids(graph, tensors_to_quantize(graph, conv_inputs) - {"b"}, conv_inputs, ranges)
    assert grids["a"] == grids["c"]
    assert "b" not in grids


def test_a_dead_channel_keeps_its_bias(small, observed, tmp_path):
    source, target = tmp_path / "dead.onnx", tmp_path / "full.onnx"
    graph = read_graph(small.files("w8a8", placement="full").optimized)
    first = next(node for node in graph.nodes if node.op_type == "Conv")
    dequantize = graph.producers[first.input[1]]
    scale, bias = (graph.array(name).copy() for name in (dequantize.input[1], first.input[2]))
    integers = graph.array(dequantize.input[0]).copy()
    scale[0], bias[0], integers[0] = 1e-10, 1.5, 0
    scale[1], bias[1], integers[1] = 1e-10, -1.5, 3  # and one that is nearly dead
    dequantize.input[0], dequantize.input[1] = graph.add("weight", integers), graph.add("scale", scale)
    first.input[2] = graph.add("bias", bias)
    write_graph(graph, source)
    place_everywhere(source, target, observed)
    after = read_graph(target)
    node = next(node for node in after.nodes if node.op_type == "Conv")
    of_weight, of_bias = (after.producers[name] for name in node.input[1:3])
    kept = after.array(of_bias.input[0]) * after.array(of_bias.input[1]).astype(np.float64)
    np.testing.assert_allclose(kept, bias, atol=1e-4)
    assert not after.array(of_weight.input[0])[:2].any()
    np.testing.assert_array_equal(after.array(of_weight.input[0])[2:, :3], integers[2:])
    np.testing.assert_array_equal(after.array(of_weight.input[1])[2:], scale[2:])


def test_grids():
    assert covering(Grid.over(-1, 2), Grid.over(0, 4)) == Grid.over(Grid.over(-1, 2).low, 4)
    assert Grid.over(3.0, 5.0).low == 0.0  # zero is always on the grid
    assert Grid.over(0.0, 0.0).scale > 0
    groups = Groups(["a", "b", "c"])
    groups.set_grid("a", Grid(1.0, 0))
    groups.set_grid("b", Grid(2.0, 0))
    groups.join("a", "b")
    assert groups.grid("a") == groups.grid("b") == Grid(2.0, 0)
    assert groups.grid("c") is None
    groups.join("a", "elsewhere")
    assert list(groups) == [["a", "b"], ["c"]]
    assert groups.of("b") == ["a", "b"]


PLACED = """
import json, sys
from pathlib import Path
from quantrack.onnx.activation_grid import ObservedRange
from quantrack.onnx.full_placement import place_everywhere
source, target, ranges = sys.argv[1:]
place_everywhere(Path(source), Path(target), {n: ObservedRange(*ends) for n, ends in json.loads(ranges).items()})
"""


def test_the_same_bytes_in_every_process(small, observed, tmp_path):
    """In each, sets of names have another order."""
    ranges = json.dumps({name: (seen.minimum, seen.maximum) for name, seen in observed.items()})
    contents = set()
    for seed in ("1", "2"):
        target = tmp_path / f"{seed}.onnx"
        source = small.files("w8a8", placement="full").optimized
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        command = [sys.executable, "-c", PLACED, str(source), str(target), ranges]
        subprocess.run(command, env=environment, check=True)
        contents.add(target.read_bytes())
    assert len(contents) == 1


def test_what_relu_reads_is_not_quantized(tmp_path: Path) -> None:
    """Runtimes compute it with the convolution; a grid over what it reads would lie half on what it removes."""
    value, node = helper.make_tensor_value_info, helper.make_node
    nodes = [
        node("Conv", ["images", "w"], ["a"], name="one"),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w"], ["c"], name="two"),
        node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "w"], ["e"], name="three"),
        node("Add", ["c", "e"], ["y"]),  # what is also read elsewhere keeps its own
    ]
    weights = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32)[:, :, None, None], "w")
    shape = [1, 3, 8, 8]
    graph = Graph(
        helper.make_model(helper.make_graph(nodes, "g", [value("images", 1, shape)], [value("y", 1, shape)], [weights]))
    )
    grid = Grid(1 / 255, 0)
    inputs = {name: ConvInput(tensor, grid) for name, tensor in (("one", "images"), ("two", "b"), ("three", "d"))}
    assert tensors_to_quantize(graph, inputs) == {"images", "b", "c", "d", "e"}
    assert (graph.activated("a"), graph.activated("c"), graph.activated("y")) == ("b", "c", "y")


@pytest.mark.parametrize(
    ("relu", "scales", "zero_point", "float_input", "kernels"),
    [
        (True, 1, 0, False, 1),
        (False, 1, 50, False, 1),
        (True, 1, 50, False, 0),  # the Relu stays between the two
        (True, 3, 0, False, 0),  # equalized channels
        (False, 1, 0, True, 0),
    ],
)
def test_what_counts_as_an_integer_convolution_becomes_one(relu, scales, zero_point, float_input, kernels, tmp_path):
    value, node = helper.make_tensor_value_info, helper.make_node
    axis = {"axis": 1} if scales > 1 else {}
    nodes = [
        node("QuantizeLinear", ["images", "scale", "zero"], ["qx"]),
        node("DequantizeLinear", ["qx", "scale", "zero"], ["x"]),
        node("DequantizeLinear", ["integers", "scale", "signed zero"], ["w"]),
        node("Conv", ["images" if float_input else "x", "w"], ["a"]),
        *([node("Relu", ["a"], ["b"])] if relu else []),
        node("QuantizeLinear", ["b" if relu else "a", "scales", "zeros"], ["q"], **axis),
        node("DequantizeLinear", ["q", "scale", "zero of y"], ["y"]),
    ]
    constants = {
        "integers": 100 * np.eye(3, dtype=np.int8)[:, :, None, None], "signed zero": np.int8(0),
        "scale": np.float32(1 / 255), "zero": np.uint8(0), "zero of y": np.uint8(zero_point),
        "scales": np.full(scales, 1 / 255, np.float32) if scales > 1 else np.float32(1 / 255),
        "zeros": np.full(scales, zero_point, np.uint8) if scales > 1 else np.uint8(zero_point),
    }  # fmt: skip
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    shape = [1, 3, 8, 8]
    graph = helper.make_graph(nodes, "g", [value("images", 1, shape)], [value("y", 1, shape)], initializers)
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    assert has_integer_convolutions(path) == bool(kernels)
    assert optimized_operators(path, tmp_path)["QLinearConv"] == kernels
