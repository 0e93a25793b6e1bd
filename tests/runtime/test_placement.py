import pytest

from quantrack.errors import QuantrackError
from quantrack.runtime.placement import placement_of

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def event(name: str, operator: str, provider: str, duration: int, shape: list[int]) -> dict:
    arguments = {"op_name": operator, "provider": provider, "input_type_shape": [{"float": shape}]}
    return {"cat": "Node", "name": name, "dur": duration, "args": arguments}


EVENTS = [
    event("c1", "Conv", CUDA, 90000, [1, 64, 80, 80]),  # the first run, which prepares others
    event("c1", "Conv", CUDA, 2000, [1, 64, 80, 80]),
    event("c1", "Conv", CUDA, 4000, [1, 64, 80, 80]),
    event("c2", "QLinearConv", CUDA, 500, [1, 64, 80, 80]),
    event("g", "Gather", CPU, 10, [4]),
    event("m", "MemcpyToHost", CUDA, 100, [4]),
    {"cat": "Session", "name": "model_run", "dur": 9999, "args": {}},
]


def test_operators_are_counted_and_timed():
    placement = placement_of(EVENTS)
    first = placement.uses[0]
    assert (first.operator, first.nodes, first.compute_nodes, first.milliseconds) == ("Conv", 1, 1, 3.0)
    assert placement.nodes_by_provider() == {CUDA: 3, CPU: 1}
    assert placement.metrics() == {
        f"nodes_on_{CUDA}": 3.0,
        f"nodes_on_{CPU}": 1.0,
        "nodes_int8_compute": 1.0,
        "nodes_memcpy": 1.0,
    }
    assert placement.record()["operators"][0]["operator"] == "Conv"
    assert placement.record()["providers"] == [
        {"provider": CUDA, "nodes": 3, "milliseconds": pytest.approx(3.6)},
        {"provider": CPU, "nodes": 1, "milliseconds": 0.01},
    ]


def test_shapes_and_indices_may_stay_on_the_host():
    placement_of(EVENTS).require_gpu()


def test_tensorrt_is_on_the_gpu():
    fused = event("t", "TRTKernel", "TensorrtExecutionProvider", 50, [1, 8400])
    placement_of([*EVENTS, fused]).require_gpu()


def test_data_on_the_host_is_refused():
    fallen_back = [*EVENTS, event("t", "TopK", CPU, 50, [1, 8400])]
    with pytest.raises(QuantrackError, match=r"require_gpu=true: 1 compute nodes did not run on CUDA \(1 TopK on CPU"):
        placement_of(fallen_back).require_gpu()
