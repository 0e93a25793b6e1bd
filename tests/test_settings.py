import pytest

from quantrack.errors import UsageError
from quantrack.settings import CompareSettings, PtqSettings


def test_each_mode_of_a_comparison_gets_what_its_bits_have_a_use_for():
    settings = CompareSettings(placement="full", weight_storage="int4", avg_bits=4.5)
    children = {mode: settings.child(mode) for mode in ("w8a16", "w8a8", "w4a16", "w4a8")}
    assert {mode: (one.placement, one.weight_storage, one.avg_bits) for mode, one in children.items()} == {
        "w8a16": ("inputs", "int8", 0.0),
        "w8a8": ("full", "int8", 0.0),
        "w4a16": ("inputs", "int4", 4.5),
        "w4a8": ("full", "int4", 4.5),
    }


def test_kinds_for_names():
    assert PtqSettings(mode="w4a8").kind == "w4a8"
    assert PtqSettings(mode="W4A8", placement="full", weight_storage="int4").kind == "w4a8-full-int4"


@pytest.mark.parametrize("other", [{"placement": "full"}, {"weight_storage": "int4"}, {"precision": "fp16"}])
def test_tensorrt_takes_no_other_variant(other):
    with pytest.raises(UsageError, match="target=tensorrt: TensorRT places and stores by itself"):
        PtqSettings(target="tensorrt", **other)


def test_integer_kernels_do_not_compute_in_float16():
    with pytest.raises(UsageError, match="precision=fp16: placement=full computes on integers; use inputs"):
        PtqSettings(precision="fp16", placement="full")


def test_an_unknown_storage_is_refused():
    with pytest.raises(UsageError, match="weight_storage=int2: unknown weight_storage; use int8 or int4"):
        PtqSettings(weight_storage="int2")
