from pathlib import Path

import numpy as np
import onnx
import pytest

from quantrack.datasets.pictures import network_input
from quantrack.errors import QuantrackError
from quantrack.onnx.exported_files import pack_weights
from quantrack.onnx.float_silu import SILU
from quantrack.onnx.full_placement import observable_tensors, place_everywhere
from quantrack.onnx.graph import read_graph, write_graph
from quantrack.onnx.inspect import read_facts, sums_can_saturate
from quantrack.onnx.int4 import store_as_int4
from quantrack.runtime.parity import require_same_outputs
from quantrack.runtime.session import open_session
from quantrack.runtime.tensor_ranges import observe_tensors


def packed_tensors(path: Path) -> list[onnx.TensorProto]:
    return [item for item in onnx.load(path).graph.initializer if item.data_type == onnx.TensorProto.INT4]


def weights_of_four_bits(path: Path) -> int:
    four_dimensional = [
        onnx.numpy_helper.to_array(item)
        for item in onnx.load(path).graph.initializer
        if item.data_type == onnx.TensorProto.INT8 and len(item.dims) == 4
    ]
    return sum(bool(values.min() >= -8 and values.max() <= 7) for values in four_dimensional)


@pytest.mark.parametrize("mode", ["w4a8", "w4a16"])
def test_packed_weights_give_the_same_bits(small, tmp_path, mode):
    source, target = small.files(mode).optimized, tmp_path / "packed.onnx"
    count = store_as_int4(source, target)
    packed = packed_tensors(target)
    assert len(packed) == count == weights_of_four_bits(source) == 23
    assert all(len(item.raw_data) == -(-int(np.prod(item.dims)) // 2) for item in packed)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    assert not any(node.op_type in ("Clip", "Cast") and "int4" in node.name for node in onnx.load(target).graph.node)
    images = [network_input(path, small.SIZE)[None] for path in small.calibration.paths]
    require_same_outputs(open_session(source, "cpu"), open_session(target, "cpu"), images)
    assert target.stat().st_size < 0.75 * source.stat().st_size


@pytest.mark.parametrize("placement", ["inputs", "full"])
def test_channels_of_different_bits_are_packed_by_channel(small, tmp_path, placement):
    source = small.files("w4a8", placement=placement, channels=True).optimized
    target = tmp_path / "packed.onnx"
    if placement == "full":
        source = placed(small, source, tmp_path / "full.onnx")
    count = store_as_int4(source, target)
    gathers = [node for node in onnx.load(target).graph.node if node.op_type == "Gather" and "int4" in node.name]
    assert len(gathers) == 10
    assert count == len(packed_tensors(target)) >= len(gathers)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    rest = [item for item in onnx.load(target).graph.initializer if item.name.endswith("/rest")]
    assert len(rest) == len(gathers)
    for item in rest:  # holds no channel that could have been packed
        channels = onnx.numpy_helper.to_array(item).reshape(item.dims[0], -1)
        assert ((channels.min(axis=1) < -8) | (channels.max(axis=1) > 7)).all()
    images = [network_input(path, small.SIZE)[None] for path in small.calibration.paths]
    require_same_outputs(open_session(source, "cpu"), open_session(target, "cpu"), images)
    assert target.stat().st_size < 0.97 * source.stat().st_size  # half of the weights of a small net


def placed(small, source, target):
    """A file with quantizers everywhere."""
    tensors = observable_tensors(source)
    ranges = observe_tensors(source, tensors, small.calibration.batches(small.SIZE, 1), 2, "cpu")
    place_everywhere(source, target, ranges)
    return target


def test_large_weights_are_seen_among_packed_ones(small, tmp_path):
    source, target = small.files("w4a8", placement="full", channels=True).optimized, tmp_path / "packed.onnx"
    store_as_int4(source, target)
    assert not sums_can_saturate(target)
    model = onnx.load(target)
    rest = next(item for item in model.graph.initializer if item.name.endswith("/rest") and item.dims[1] > 1)
    rest.CopyFrom(onnx.numpy_helper.from_array(np.full(rest.dims, 127, np.int8), rest.name))
    onnx.save(model, target)
    assert sums_can_saturate(target)


def test_integer_kernels_stay_with_full_placement(small, tmp_path):
    source = small.files("w4a8", placement="full").optimized
    full, target = tmp_path / "full.onnx", tmp_path / "packed.onnx"
    placed(small, source, full)
    assert store_as_int4(full, target) == len(packed_tensors(target))
    assert [item.name for item in onnx.load(target).functions] == [SILU]
    onnx.checker.check_model(onnx.load(target), full_check=True)
    images = [network_input(path, small.SIZE)[None] for path in small.calibration.paths]
    require_same_outputs(open_session(full, "cpu"), open_session(target, "cpu"), images)


@pytest.mark.parametrize("placement", ["inputs", "full"])
def test_layers_that_share_weights_are_each_rewritten(small, tmp_path, placement):
    """Of equal constants the exporter keeps one: two pruned layers of one shape."""
    exported, source = small.files("w4a8", placement=placement).optimized, tmp_path / "shared.onnx"
    graph = read_graph(exported)
    convolutions = [node for node in graph.nodes if node.op_type == "Conv" and node.input[1] in graph.producers]
    weights = [graph.producers[node.input[1]] for node in convolutions]
    shapes = [tuple(graph.initializers[node.input[0]].dims) for node in weights]
    one, other = next((a, b) for b in range(len(shapes)) for a in range(b) if shapes[a] == shapes[b])
    for place in (0, 1):
        weights[other].input[place] = weights[one].input[place]
    integers, scale = (graph.initializers[name] for name in weights[one].input[:2])
    integers.CopyFrom(onnx.numpy_helper.from_array(np.zeros(integers.dims, np.int8), integers.name))
    scale.CopyFrom(onnx.numpy_helper.from_array(np.full(scale.dims, 1e-12, np.float32), scale.name))  # has to be raised
    write_graph(graph, source)
    if placement == "full":
        source = placed(small, source, tmp_path / "full.onnx")
    target = tmp_path / "packed.onnx"
    store_as_int4(source, target)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    images = [network_input(path, small.SIZE)[None] for path in small.calibration.paths]
    require_same_outputs(open_session(source, "cpu"), open_session(target, "cpu"), images)


def test_a_changed_output_is_refused(small, tmp_path):
    source, target = small.files("w4a8").optimized, tmp_path / "packed.onnx"
    store_as_int4(source, target)
    model = onnx.load(target)
    packed = next(item for item in model.graph.initializer if item.data_type == onnx.TensorProto.INT4)
    packed.raw_data = bytes(byte ^ 0x77 for byte in packed.raw_data)
    onnx.save(model, target)
    images = [network_input(small.calibration.paths[0], small.SIZE)[None]]
    with pytest.raises(QuantrackError, match="its outputs are not those of"):
        require_same_outputs(open_session(source, "cpu"), open_session(target, "cpu"), images)


def test_eight_bit_weights_are_refused(small, tmp_path):
    with pytest.raises(QuantrackError, match="no weight is within 4 bits; give w4a8 or w4a16, and plan_bits"):
        store_as_int4(small.files("w8a8").optimized, tmp_path / "packed.onnx")


def test_the_file_says_what_it_is(small):
    files = small.files("w4a8")
    facts = small.facts("w4a8", "one2one")
    packed = pack_weights(files, facts)
    assert packed.optimized.name == "small-w4a8-qcdq-ptq-int4-opt.onnx"
    assert packed.plain == files.plain
    assert packed.plain_nodes == packed.optimized_nodes
    assert read_facts(packed.optimized) == facts
