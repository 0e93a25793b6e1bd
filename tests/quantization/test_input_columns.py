import pytest
import torch
from torch import nn

from quantrack.quantization.input_columns import drawn_columns, input_columns, mean_column, output_size

LAYERS = {
    "3 x 3": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "1 x 1": nn.Conv2d(4, 6, 1),
    "depthwise": nn.Conv2d(4, 4, 7, padding=3, groups=4),
    "grouped, dilated, oblong": nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_drawn_columns_and_their_mean_are_those_of_all(layer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 12, 10, generator=generator)
    every = input_columns(x, layer)
    assert tuple(layer(x).shape[2:]) == output_size(x, layer)
    drawn = torch.randint(every.shape[2], (50,), generator=generator)
    assert torch.equal(drawn_columns(x, layer, drawn), every[:, :, drawn])
    torch.testing.assert_close(mean_column(x, layer), every.mean(dim=2))
    # what the columns are for: a convolution is their product with the weights
    weight = layer.weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)
    product = (weight @ every).reshape(layer.out_channels, len(x), *output_size(x, layer)).transpose(0, 1)
    torch.testing.assert_close(product + layer.bias[:, None, None], layer(x))
