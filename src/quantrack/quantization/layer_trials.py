"""Change one convolution at a time, and see what each change does to the detector's raw outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from quantrack.detector.blocks import INPUT, Output, network_blocks, run_block, run_blocks
from quantrack.detector.heads import RawOutputTap, raw_outputs
from quantrack.progress import track
from quantrack.quantization.divergence import Divergence, divergence
from quantrack.quantization.job import QuantizationJob

BATCH = 4  # every block's outputs of a batch are held at once
K = TypeVar("K")
Trial = Callable[[], AbstractContextManager[None]]
Trials = Mapping[str, Mapping[K, Trial]]
Measure = Callable[[Divergence], Tensor]


@torch.no_grad()
def trial_errors(
    job: QuantizationJob, probe: nn.Module, trials: Trials[K], measure: Measure, label: str
) -> dict[str, dict[K, float]]:
    """What each trial does to the outputs of `probe`, by layer name and what is tried.

    A trial changes what its layer does in `probe` while its context is open. The error is the mean over the job's
    pictures of `measure`, against `probe` as it is. Time: for each trial, a pass from its block on.
    """
    sums = {name: dict.fromkeys(tried, 0.0) for name, tried in trials.items()}
    few = replace(job, batch=BATCH)
    with raw_outputs(probe) as tap:
        for batch in track(few.batches(), label, total=few.batch_count):
            share = len(batch) / len(few.calibration.paths)
            for name, key, error in _errors_of_batch(probe, tap, batch, trials, measure):
                sums[name][key] += share * error
    return sums


def _errors_of_batch(
    probe: nn.Module, tap: RawOutputTap, batch: Tensor, trials: Trials[K], measure: Measure
) -> Iterator[tuple[str, K, float]]:
    """Layer, what is tried, and error; only the blocks from the layer's own on are run again."""
    blocks = network_blocks(probe)
    outputs: dict[int, Output] = {INPUT: batch}
    for block in blocks:
        outputs[block.index] = run_block(probe, block, [outputs[source] for source in block.sources])
    reference = tap.taken()
    for block in blocks:
        for name in filter(block.holds, trials):
            for key, trial in trials[name].items():
                with trial():
                    run_blocks(probe, blocks[block.index :], outputs)
                yield name, key, float(measure(divergence(tap.taken(), reference)))
