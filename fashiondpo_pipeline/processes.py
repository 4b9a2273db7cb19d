"""Several processes at one run, as `accelerate launch` starts them: who does which share, and how shares become one."""

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

PATIENCE = timedelta(days=7)  # one process may draw for hours while another waits


class Processes:
    """One of `count` processes; `rank` 0 alone writes what there is one of. Alone, everything here does nothing."""

    def __init__(self, device: str = "cpu"):
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=device == "cpu", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, items: list) -> list:
        """Every `count`-th item, beginning with the rank's own."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Return once all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of everybody's values, everywhere; in place."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def total_gradients(self, parameters: list[Tensor]) -> None:
        """Sum everybody's gradients into everybody's parameters; one that got none counts as zero."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.total(torch.cat([p.grad.flatten() for p in parameters]))  # type: ignore[union-attr]
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]

    def total_numbers(self, numbers: dict[str, float]) -> dict[str, float]:
        """Sums of named numbers, everywhere."""
        summed = self.total(torch.tensor(list(numbers.values()), dtype=torch.float64))
        return dict(zip(numbers, summed.tolist(), strict=True))

    def everyone(self, thing: Any) -> Any:
        """The first process's thing, everywhere; plain data only."""
        if self.count == 1:
            return thing
        things = [thing]
        torch.distributed.broadcast_object_list(things)
        return things[0]


def alone() -> bool:
    """Whether this is the only process, known without importing anything heavy."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1
