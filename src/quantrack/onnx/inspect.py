"""Count an ONNX graph's nodes, check it, and read or write the facts it carries."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from quantrack.errors import QuantrackError
from quantrack.files import atomic_path, file_digest
from quantrack.schemes import MAX_PAIR_SUM, VARIANTS, Variant

QDQ_OPERATORS = ("QuantizeLinear", "DequantizeLinear")
COUNTED = (*QDQ_OPERATORS, "Clip", "Conv")
INTEGER_SUMS = ("Conv", "MatMul", "Gemm")
FACTS_KEY = "quantrack"


@dataclass(frozen=True)
class ModelFacts:
    """What an exported file says of itself, so that it can be evaluated, compared and served on its own.

    `category_ids` are the annotation file's ids of the classes; empty in files older than the field.
    `placement` says where the activations' quantizers are, `weight_storage` the type of 4-bit weights,
    `precision` the type between quantizers, `target` the runtime that it was made for, `method` whether the
    quantized model was trained (qat) or not (ptq).
    """

    model: str
    model_digest: str
    head: str
    imgsz: int
    mode: str
    recipe: str
    class_names: tuple[str, ...]
    weight_bits_avg: float | None = None
    category_ids: tuple[int, ...] = ()
    placement: str = "inputs"
    weight_storage: str = "int8"
    precision: str = "fp32"
    target: str = "onnxruntime"
    method: str = "ptq"

    @property
    def variant(self) -> Variant:
        """What sets the file apart from others of its mode and recipe."""
        return Variant(*(getattr(self, name) for name in VARIANTS))


def load_onnx(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file.

    Raises:
        QuantrackError: the file is missing or is not ONNX.
    """
    if not path.is_file():
        raise QuantrackError(f"onnx={path}: no such file")
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's own exception types differ between its backends
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]  # may name a missing data file
        raise QuantrackError(f"onnx={path}: not a readable ONNX file ({first_line})") from error


def check_onnx(path: Path) -> None:
    """Run `onnx.checker` with shape inference.

    Raises:
        QuantrackError: the checker refuses the graph.
    """
    model = load_onnx(path)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise QuantrackError(f"{path}: refused by onnx.checker ({first_line})") from error


def count_nodes(path: Path) -> dict[str, int]:
    """Nodes by operator name."""
    return dict(Counter(node.op_type for node in load_onnx(path).graph.node))


def node_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """The node counts as metrics; an operator that is not in the graph counts 0."""
    metrics = {f"nodes_{operator}": float(counts.get(operator, 0)) for operator in COUNTED}
    return metrics | {"nodes_total": float(sum(counts.values()))}


def has_quantizers(path: Path) -> bool:
    """Whether any value goes through DequantizeLinear."""
    return "DequantizeLinear" in count_nodes(path)


def has_integer_convolutions(path: Path) -> bool:
    """Whether a runtime can compute most convolutions on integers: all that they read and give is quantized.

    What they give has one scale, and if a Relu comes between, no integer below its zero.
    """
    graph = load_onnx(path).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    relus = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Relu"}
    quantizers = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    constants = _constants(graph)
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    on_integers = 0
    for node in convolutions:
        activated = relus.get(node.output[0], node.output[0])
        quantizer = quantizers.get(activated)
        if quantizer is None or any(made_by.get(name) != "DequantizeLinear" for name in node.input[:2]):
            continue
        scale, zero_point = constants.get(quantizer.input[1]), [constants.get(name) for name in quantizer.input[2:]]
        one_scale = scale is not None and math.prod(scale.dims) == 1
        on_integers += one_scale and (activated == node.output[0] or all(_is_lowest(each) for each in zero_point))
    return 2 * on_integers > len(convolutions)


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """What a graph says of values that do not depend on its input: initializers, copies of them, Constant nodes."""
    found = {item.name: item for item in graph.initializer}
    for node in graph.node:
        values = [item.t for item in node.attribute if item.name == "value"] if node.op_type == "Constant" else []
        if values:
            found[node.output[0]] = values[0]
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _is_lowest(zero_point: onnx.TensorProto | None) -> bool:
    """Whether nothing on a grid lies below zero, as far as the file says."""
    if zero_point is None:
        return False
    value = onnx.numpy_helper.to_array(zero_point)
    return bool((value == np.iinfo(value.dtype).min).all())


def sums_can_saturate(path: Path) -> bool:
    """Whether weights may be so large that integer kernels of x86 processors without VNNI add their products wrongly.

    Those add the products of two neighbours in 16 bits. Weights of which the file does not say what they are may.
    """
    graph = load_onnx(path).graph
    constants = _constants(graph)
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        dequantize = producers.get(node.input[1]) if node.op_type in INTEGER_SUMS else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        parts = _stored_parts(dequantize.input[0], producers)
        if any(part not in constants or _exceeds(node, constants[part]) for part in parts):
            return True
    return False


def _stored_parts(integers: str, producers: Mapping[str, onnx.NodeProto]) -> list[str]:
    """The tensors that integers are put together from, output channels as wholes: constants, if the file has them."""
    node = producers.get(integers)
    if node is None or node.op_type not in ("Cast", "Concat", "Gather"):
        return [integers]
    taken = node.input if node.op_type == "Concat" else node.input[:1]
    return [part for name in taken for part in _stored_parts(name, producers)]


def _exceeds(node: onnx.NodeProto, stored: onnx.TensorProto) -> bool:
    """Whether two of the weights that one operator adds in 16 bits are too large for that. Unsigned ones always fit."""
    if stored.data_type != onnx.TensorProto.INT8:
        return False
    weight = onnx.numpy_helper.to_array(stored).astype(np.int16)
    if node.op_type != "Conv":
        return bool((np.abs(weight) > MAX_PAIR_SUM // 2).any())  # in whichever order they are taken
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    if weight.shape[1] == 1 and groups >= len(weight):
        return False  # depthwise convolutions add in 32 bits
    in_order = np.moveaxis(weight, 1, -1)
    # kernels may fill channels up to an even number
    even = np.pad(in_order, [*[(0, 0)] * (in_order.ndim - 1), (0, in_order.shape[-1] % 2)])
    return any(_largest_pair(one.reshape(len(one), -1)) > MAX_PAIR_SUM for one in (in_order, even))


def _largest_pair(in_order: NDArray[np.int16]) -> int:
    """The largest sum of two neighbours of one sign in rows of integers."""
    pairs = np.pad(in_order, ((0, 0), (0, in_order.shape[1] % 2))).reshape(len(in_order), -1, 2)
    return int(max(pairs.clip(min=0).sum(axis=2).max(), -pairs.clip(max=0).sum(axis=2).min()))


def require_same_qdq(before: Mapping[str, int], after: Mapping[str, int], path: Path) -> None:
    """Refuse a cleaned graph that lost or gained quantizers.

    Raises:
        QuantrackError: the count of QuantizeLinear or DequantizeLinear nodes differs.
    """
    for operator in QDQ_OPERATORS:
        old, new = before.get(operator, 0), after.get(operator, 0)
        if old != new:
            raise QuantrackError(f"{path}: clean-up changed {operator} from {old} to {new}; quantization would be lost")


def write_facts(path: Path, facts: ModelFacts) -> None:
    """Store the facts in the file's metadata."""
    model = load_onnx(path)
    onnx.helper.set_model_props(model, {FACTS_KEY: json.dumps(asdict(facts))})
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))


def file_facts(path: Path, head: str, imgsz: int) -> ModelFacts:
    """The facts that a file carries; for one that Quantrack did not write, what can be seen of it.

    Raises:
        QuantrackError: the file is missing or is not ONNX.
    """
    carried = read_facts(path)
    return carried or ModelFacts(path.stem, file_digest(path), head, imgsz, "external", "external", ())


def read_facts(path: Path) -> ModelFacts | None:
    """The facts of a file that Quantrack wrote; None for any other ONNX file.

    Raises:
        QuantrackError: the file is missing or is not ONNX, or another version's facts lack something.
    """
    known = {item.name for item in fields(ModelFacts)}
    for entry in load_onnx(path).metadata_props:
        if entry.key == FACTS_KEY:
            try:
                content = {name: value for name, value in json.loads(entry.value).items() if name in known}
                lists = {name: tuple(content.get(name, ())) for name in ("class_names", "category_ids")}
                return ModelFacts(**(content | lists))
            except (ValueError, TypeError, AttributeError) as error:
                raise QuantrackError(
                    f"onnx={path}: its `{FACTS_KEY}` cannot be read ({error}); export it again"
                ) from error
    return None
