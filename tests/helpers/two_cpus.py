"""Ultralytics' DDP with two CPUs in the place of two GPUs, and gloo in that of NCCL; the rest is what runs on GPUs.

A module of its own, as the processes that the trainer starts import it by name.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.utils import LOCAL_RANK, RANK

from quantrack.detector.training import Epoch, FineTuning


class OnCpu(nn.parallel.DistributedDataParallel):
    """DDP without the number of a GPU."""

    def __init__(self, module: nn.Module, device_ids: object, **settings: Any) -> None:
        super().__init__(module, **settings)


class OnTwoCpus(FineTuning):
    """Writes each batch's pictures, and what its process has learned after it, into `rank-N.jsonl`."""

    world_size = property(lambda trainer: 2, lambda trainer, number_of_gpus: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ddp = LOCAL_RANK == -1

    def _setup_ddp(self) -> None:
        torch.set_num_threads(1)
        nn.parallel.DistributedDataParallel = OnCpu
        dist.init_process_group("gloo", timeout=timedelta(minutes=1))

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.pictures = [Path(path).name for path in batch["im_file"]]
        return super().preprocess_batch(batch)

    def _end_batch(self) -> None:
        super()._end_batch()
        learned = torch.cat([parameter.detach().flatten() for parameter in self.model.module.parameters()])
        seen = {"pictures": self.pictures, "learned": float(learned.double().square().sum())}
        with (self.job.folder / f"rank-{RANK}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")


def note(folder: Path, epoch: Epoch) -> None:
    """Write an epoch's number into `epochs`."""
    with (folder / "epochs").open("a") as file:
        file.write(f"{epoch.number}\n")
