"""Walking a network block by block: what blocks give is kept, whatever its kind."""

from pathlib import Path

import torch
from torch import Tensor, nn

from quantrack.quantization.block_walk import ActivationStore, BlockWalk


class Halves(nn.Conv2d):
    """As YOLOv9's CBLinear: a convolution whose output is taken apart."""

    f = -1

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).split(2, dim=1)


class Sum(nn.Module):
    """As CBFuse: a part of one block's output and another block's."""

    f = (0, 1)

    def forward(self, inputs: list[Tensor | tuple[Tensor, ...]]) -> Tensor:
        halves, whole = inputs
        return halves[1] + whole


class Second(nn.Module):
    """A part of the block before."""

    f = -1

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return 2 * x[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Halves(3, 4, 1), Second(), Sum())
        self.model[2].f = [0, 1]


def test_a_block_may_give_several_tensors() -> None:
    net, pictures = Net().eval(), torch.rand(2, 3, 4, 4)
    for memory_gb in (1.0, 0.0):  # in memory, and on disk
        with BlockWalk(net, iter([pictures]), torch.device("cpu"), memory_gb) as walk:
            for block in walk.blocks[:2]:
                walk.advance(block)
            halves, whole = walk.inputs(walk.blocks[2], 0)
            found = net.model[2]([halves, whole])
        first, second = net.model[0](pictures)
        torch.testing.assert_close(found, second + 2 * first)


def test_room_is_given_back() -> None:
    store = ActivationStore(1e-6)  # a thousand bytes
    pair = (torch.zeros(100), torch.zeros(100))
    store.put((0, 0), pair)
    store.put((1, 0), pair)  # beyond the room, so on disk
    assert [path.name for path in Path(store.folder.name).iterdir()] == ["1-0.pt"]
    store.drop(0)
    assert store.room == 1000
    assert [len(one) for one in store.get((1, 0))] == [100, 100]
    store.close()
