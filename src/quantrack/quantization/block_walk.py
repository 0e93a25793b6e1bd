"""Walk a network once, block by block, over all calibration pictures.

Each block is run on the kept outputs of the blocks before it, so a step that looks at every layer
costs a few passes over the pictures in all, however many layers there are. What is kept lies in
memory up to a limit, and beyond it in a temporary folder on disk, unrounded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from quantrack.detector.blocks import (
    INPUT,
    Block,
    Output,
    each_of,
    last_use,
    network_blocks,
    run_block,
    tensors_of,
)

BYTES_PER_GB = 1e9
Key = tuple[int, int]  # block, batch


class ActivationStore:
    """Outputs by block and batch: up to `memory_gb` in memory, the others on disk."""

    def __init__(self, memory_gb: float) -> None:
        self.room = memory_gb * BYTES_PER_GB
        self.kept: dict[Key, Output] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="quantrack-activations-")

    def put(self, key: Key, value: Output) -> None:
        """Keep an output; on the CPU, whatever device it came from."""
        value = each_of(value, lambda one: one.detach().cpu())
        size = _bytes_of(value)
        if size <= self.room:
            self.room -= size
            self.kept[key] = value
        else:
            torch.save(value, self._path(key))

    def get(self, key: Key) -> Output:
        """The output of a key that was put and not dropped."""
        kept = self.kept.get(key)
        return torch.load(self._path(key), weights_only=True) if kept is None else kept

    def drop(self, block: int) -> None:
        """Forget all batches of a block."""
        for key in [key for key in self.kept if key[0] == block]:
            self.room += _bytes_of(self.kept.pop(key))
        for path in Path(self.folder.name).glob(f"{block}-*.pt"):
            path.unlink()

    def close(self) -> None:
        """Forget everything, and remove the folder."""
        self.kept.clear()
        self.folder.cleanup()

    def _path(self, key: Key) -> Path:
        return Path(self.folder.name) / f"{key[0]}-{key[1]}.pt"


def _bytes_of(output: Output) -> int:
    return sum(one.numel() * one.element_size() for one in tensors_of(output))


class BlockWalk:
    """The walk through one model; use it as a context, so that its room is given back.

    For each block in order: look at its inputs as often as needed, change the block's module, then
    `advance(block)`, which runs the changed block, so that later ones see its true output.
    """

    def __init__(self, model: nn.Module, batches: Iterator[Tensor], device: torch.device, memory_gb: float) -> None:
        self.model, self.device = model, device
        self.blocks = network_blocks(model)
        self.last_use = last_use(self.blocks)
        self.store = ActivationStore(memory_gb)
        self.sizes: list[int] = []  # pictures of each batch
        for batch, pictures in enumerate(batches):
            self.store.put((INPUT, batch), pictures)
            self.sizes.append(len(pictures))

    @property
    def batch_count(self) -> int:
        return len(self.sizes)

    def __enter__(self) -> BlockWalk:
        return self

    def __exit__(self, *error: object) -> None:
        self.store.close()

    def inputs(self, block: Block, batch: int) -> list[Output]:
        """What the block takes, for one batch."""
        return [self._on_device(source, batch) for source in block.sources]

    def output(self, block: Block, batch: int) -> Output:
        """A block's output for one batch: after `advance(block)`, while a later block needs it."""
        return self._on_device(block.index, batch)

    def _on_device(self, block: int, batch: int) -> Output:
        return each_of(self.store.get((block, batch)), lambda one: one.to(self.device))

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Run the block over all batches, keep its outputs if a later block needs them, forget what none does."""
        if block.index in self.last_use:
            for batch in range(self.batch_count):
                self.store.put((block.index, batch), run_block(self.model, block, self.inputs(block, batch)))
        for source in set(block.sources):
            if self.last_use[source] == block.index:
                self.store.drop(source)
