"""The blocks that a detector is made of, and how data flows between them.

An Ultralytics model is a list of modules, each of which names the modules it takes its input from.
Steps that work block by block (GPTQ, block reconstruction, sensitivity) walk that list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

INPUT = -1
Output = Tensor | tuple[Tensor, ...]  # YOLOv9's CBLinear gives several


@dataclass(frozen=True)
class Block:
    """One block: its module's name, and the blocks it takes input from (`INPUT` is the picture)."""

    index: int
    name: str
    sources: tuple[int, ...]
    takes_list: bool

    def holds(self, name: str) -> bool:
        """Whether a module of this name lies in the block."""
        return not self.name or name.startswith(f"{self.name}.")


def network_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The blocks in the order they run; a model of unknown structure is one block."""
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or not all(hasattr(layer, "f") for layer in layers):
        return (Block(0, "", (INPUT,), takes_list=False),)
    return tuple(_block(index, cast("Any", layer).f) for index, layer in enumerate(layers))


def _block(index: int, sources: int | list[int]) -> Block:
    """Ultralytics counts back from the block where a source is negative."""
    listed = [sources] if isinstance(sources, int) else sources
    absolute = tuple(index + source if source < 0 else source for source in listed)
    return Block(index, f"model.{index}", absolute, takes_list=not isinstance(sources, int))


def run_block(model: nn.Module, block: Block, inputs: Sequence[Output]) -> Output:
    """The block's output for the outputs of its sources; the last block gives the detections."""
    module = model.get_submodule(block.name)
    # modules may change the list they are given, and what is kept for others must not change
    output = module(list(inputs)) if block.takes_list else module(inputs[0])
    return cast("Output", output)


def run_blocks(model: nn.Module, blocks: Sequence[Block], outputs: dict[int, Output]) -> Output:
    """Run consecutive blocks on, from the outputs of those before (by index); the last one's output.

    `outputs` is left as it was.
    """
    known = dict(outputs)
    for block in blocks:
        known[block.index] = run_block(model, block, [known[source] for source in block.sources])
    return known[blocks[-1].index]


def tensors_of(output: Output) -> tuple[Tensor, ...]:
    """All that a block gives."""
    return (output,) if isinstance(output, Tensor) else output


def each_of(output: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """The same kind of output, of changed tensors."""
    return change(output) if isinstance(output, Tensor) else tuple(change(one) for one in output)


def last_use(blocks: Sequence[Block]) -> dict[int, int]:
    """For each source, the last block that takes it: afterwards its outputs may be forgotten."""
    return {source: block.index for block in blocks for source in block.sources}
