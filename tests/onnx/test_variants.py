"""Float16 between quantizers, and files for TensorRT."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from quantrack.datasets.pictures import network_input
from quantrack.errors import QuantrackError
from quantrack.onnx.exported_files import for_tensorrt, in_float16
from quantrack.onnx.tensorrt import require_tensorrt_ready
from quantrack.quantization.activation_range_search import ActivationRangeSearch
from quantrack.quantization.channel_equalization import ChannelEqualization
from quantrack.quantization.fit_pair_sums import FitPairSums
from quantrack.quantization.gptq import Gptq
from quantrack.quantization.insert_quantizers import InsertQuantizers
from quantrack.quantization.recipe import Recipe, parse_recipe, recipe_for
from quantrack.runtime.parity import measure_parity
from quantrack.runtime.session import open_session
from quantrack.schemes import Variant


@pytest.mark.parametrize("mode", ["w4a16", "w8a8"])
def test_float16_between_quantizers(small, mode):
    files = small.files(mode)
    half = in_float16(files, small.facts(mode, "one2one"))
    assert half.optimized.name == f"small-{mode}-qcdq-ptq-fp16-opt.onnx"
    model = onnx.load(half.optimized)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    types = {item.data_type for item in model.graph.initializer if item.name in scales}
    assert types == {onnx.TensorProto.FLOAT16}
    assert half.optimized_nodes["DequantizeLinear"] == files.optimized_nodes["DequantizeLinear"]
    images = [network_input(path, small.SIZE) for path in small.calibration.paths]
    session = open_session(half.optimized, "cpu")
    assert session.run(images[0][None]).dtype == np.float32
    parity = measure_parity(open_session(files.optimized, "cpu").run, session, images, "one2one")
    assert parity.mean_abs is not None
    assert 0 < parity.mean_abs < 0.02


def test_symmetric_activations_are_ready_for_tensorrt(small):
    files = small.files("w8a8", recipe="naive")
    ready = for_tensorrt(files, small.facts("w8a8", "one2one"))
    assert ready.optimized.name == "small-w8a8-qcdq-ptq-tensorrt-opt.onnx"
    assert ready.optimized_nodes["QuantizeLinear"] == files.optimized_nodes["QuantizeLinear"]


def test_zero_points_and_clips_are_refused(small):
    with pytest.raises(QuantrackError, match="its zero point is not a signed 0; TensorRT would refuse it"):
        require_tensorrt_ready(small.files("w8a8").optimized)
    with pytest.raises(QuantrackError, match="a Clip between Q and DQ; TensorRT would refuse it"):
        require_tensorrt_ready(small.files("w4a16").plain)


@pytest.mark.parametrize("name", ["fast", "default", "best"])
def test_recipes_for_tensorrt_are_symmetric(name):
    recipe = parse_recipe(name)
    assert recipe_for(Variant(), recipe) is recipe
    steps = recipe_for(Variant(target="tensorrt"), recipe).steps
    symmetric = InsertQuantizers(activation="symmetric")
    kept = [step for step in recipe.steps if not isinstance(step, ChannelEqualization)]
    assert steps == tuple(symmetric if isinstance(step, InsertQuantizers) else step for step in kept)
    assert symmetric in steps
    assert len(steps) == len(recipe.steps) - 1


def test_full_placement_keeps_one_scale_for_all_channels_and_searches_more_ranges():
    recipe = parse_recipe("default")
    steps = recipe_for(Variant(placement="full"), recipe).steps
    kept = [step for step in recipe.steps if not isinstance(step, ChannelEqualization)]
    assert len(kept) == len(recipe.steps) - 1
    fitting = [replace(step, fit_pairs=True) if isinstance(step, Gptq) else step for step in kept]
    searching = [
        ActivationRangeSearch(least_share=0.01) if step == ActivationRangeSearch() else step for step in fitting
    ]
    assert searching != fitting
    assert steps == (*searching[:-1], FitPairSums(), searching[-1])


@pytest.mark.parametrize(("equalized", "given", "used"), [(True, 0.1, 0.01), (True, 0.0, 0.0), (False, 0.1, 0.1)])
def test_full_placement_searches_more_only_in_the_place_of_equalized_channels(equalized, given, used):
    equalization = (ChannelEqualization(),) if equalized else ()
    own = Recipe("own", (InsertQuantizers(), *equalization, ActivationRangeSearch(least_share=given)))
    full = recipe_for(Variant(placement="full"), own).steps
    assert full == (InsertQuantizers(), ActivationRangeSearch(least_share=used), FitPairSums())
