"""Several processes at one run, as `torchrun` or `accelerate launch` start them: who does which share, and how shares become one.

A launcher says in the environment how many there are and which one this is (RANK, WORLD_SIZE, LOCAL_RANK) and where they meet
(MASTER_ADDR, MASTER_PORT). Nothing else is asked of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from fashiondpo_pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor  # torch is imported in methods only: `fdpo status` asks whether it is alone and loads none

PATIENCE = timedelta(days=7)  # one process may draw for hours while another waits


def count() -> int:
    """How many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def alone() -> bool:
    """Whether this is the only process."""
    return count() == 1


class Processes:
    """One of `count` processes; `rank` 0 alone writes what there is one of. Alone, everything here does nothing.

    Raises UserError where each would need a GPU of its own and there is none, and wherever another process turns out to have ended.
    """

    def __init__(self, device: str = "cpu"):
        self.count, self.rank = count(), rank()
        if self.count == 1:
            return
        import torch

        local = int(os.environ.get("LOCAL_RANK", "0"))
        gpu = device.startswith("cuda")
        if gpu and (device != f"cuda:{local}" or local >= torch.cuda.device_count()):
            raise UserError(f"machine.device is {device}, but process {local} of this machine needs a GPU of its own and there are "
                            f"{torch.cuda.device_count()}: set machine.device to auto, and start as many processes as there are GPUs")
        if gpu:
            torch.cuda.set_device(device)
        with self._together():
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, items: list) -> list:
        """Every `count`-th item, beginning with the rank's own."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Return once all are here."""
        if self.count > 1:
            import torch

            self.total(torch.zeros(1))  # not barrier(), which would wait on the GPU

    def total(self, values: "Tensor") -> "Tensor":
        """The sum of everybody's values, everywhere; in place."""
        if self.count > 1:
            import torch

            with self._together():
                torch.distributed.all_reduce(values)
        return values

    def total_gradients(self, parameters: list["Tensor"]) -> None:
        """Sum everybody's gradients into everybody's parameters; one that got none counts as zero."""
        if self.count == 1:
            return
        import torch

        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.total(torch.cat([p.grad.flatten() for p in parameters]))  # type: ignore[union-attr]
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]

    def total_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        """Sums of named numbers, everywhere."""
        import torch

        summed = self.total(torch.tensor(list(numbers.values()), dtype=torch.float64))
        return dict(zip(numbers, summed.tolist(), strict=True))

    def close(self) -> None:
        """Part, at the end of what was done together; after a failure a process ends without."""
        if self.count > 1:
            import torch

            torch.distributed.destroy_process_group()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Where all must take part. What gloo and NCCL say of a lost connection means that another process has ended."""
        try:
            yield
        except RuntimeError as problem:
            raise UserError(f"another of the {self.count} processes has ended ({str(problem).splitlines()[0]}): what was finished is kept; "
                            "the same command goes on from there") from problem


def first_to_fail() -> bool:
    """Whether no other process of this run has failed before this one: one of them says why, the others end without a word."""
    if alone():
        return True
    from torch.distributed import TCPStore

    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        place = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))
        return place.add(f"failures of start {again}", 1) == 1
    except (KeyError, RuntimeError):  # there is no place where they meet, or it ended with its process
        return True
