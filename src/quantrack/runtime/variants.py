"""Make the file that is run of the one that was exported: quantizers everywhere, packed weights."""

from __future__ import annotations

from itertools import islice

from torch import nn

from quantrack.datasets.calibration import CalibrationSet
from quantrack.onnx.exported_files import ExportedFiles, for_tensorrt, in_float16, pack_weights, place_in_full
from quantrack.onnx.full_placement import observable_tensors
from quantrack.onnx.inspect import ModelFacts
from quantrack.progress import say
from quantrack.runtime.parity import Network, require_same_outputs, torch_network
from quantrack.runtime.session import CPU, REFERENCE, TENSORRT, open_session, resolve_provider
from quantrack.runtime.tensor_ranges import observe_tensors

FULL, INT4, FLOAT16, TENSORRT_READY = "full", "int4", "fp16", "tensorrt"
COMPARED_PICTURES = 2


def make_variant(files: ExportedFiles, facts: ModelFacts, calibration: CalibrationSet, provider: str) -> ExportedFiles:
    """The files that the facts' placement, precision, target and weight storage ask for.

    Raises:
        QuantrackError: the file cannot be made so, or packed weights change an output.
    """
    if facts.placement == FULL:
        tensors, count = observable_tensors(files.optimized), len(calibration.paths)
        pictures = calibration.batches(facts.imgsz, 1)
        files = place_in_full(files, facts, observe_tensors(files.optimized, tensors, pictures, count, provider))
    if facts.precision == FLOAT16:
        files = in_float16(files, facts)
        warn_of_float16(provider)
    if facts.target == TENSORRT_READY:
        files = for_tensorrt(files, facts)
        ran = resolve_provider(provider)
        if ran != TENSORRT:
            say(f"target=tensorrt: measured on {ran}; where TensorRT is installed, give provider=tensorrt")
    if facts.weight_storage == INT4:
        unpacked, files = files, pack_weights(files, facts)
        # on the CPU, which gives the same bits each time; CUDA's choice of convolution algorithms differs by session
        before, after = open_session(unpacked.optimized, CPU), open_session(files.optimized, CPU)
        require_same_outputs(before, after, islice(calibration.batches(facts.imgsz, 1), COMPARED_PICTURES))
    return files


def warn_of_float16(provider: str) -> None:
    """Say so where a float16 file is no gain."""
    if resolve_provider(provider) == CPU:
        say("precision=fp16: ONNX Runtime's CPU provider computes it in float32, slower than the fp32 file")


def reference_for(files: ExportedFiles, facts: ModelFacts, model: nn.Module, provider: str) -> Network:
    """What the file that is run should give: what its PyTorch model gives.

    With full placement it has quantizers that PyTorch has not; there it is what ONNX Runtime makes of the
    file without any optimization, every Q/DQ in float, so that the integer kernels are checked.
    """
    if facts.placement == FULL:
        return open_session(files.optimized, provider, REFERENCE).run
    return torch_network(model)
