"""One training loop for the four small networks: AdamW, warm-up and cosine, averaged weights, checkpoints."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Tick = Callable[[int, int, float], None]


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a hundredth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def save(state: dict, path: Path) -> None:
    """Whole or not at all: a kill while writing leaves the previous file."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    checkpoint: Path,
    every: float,
    tick: Tick,
    decay: float = 0.998,
) -> float:
    """Train, leave the averaged weights in `model`, and return the seconds spent, those before a kill included.

    `loss_of(step)` takes its randomness from the step's number, so a run that was killed and continued equals one
    that was not. A checkpoint is written when `every` seconds have passed since the last.
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    done, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, done, seconds = state["average"], state["step"], state["seconds"]

    def keep(step: int) -> None:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
        save({**state, "step": step, "seconds": seconds + time.monotonic() - started}, checkpoint)

    model.train()
    started = saved = time.monotonic()
    for step in range(done, steps):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, steps, rate)
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        blend(average, model.state_dict(), min(decay, (1 + step) / (10 + step)))
        tick(step + 1, steps, loss.item())
        if time.monotonic() - saved > every or step + 1 == steps:
            keep(step + 1)
            saved = time.monotonic()
    model.load_state_dict(average)
    model.eval()
    return seconds + time.monotonic() - started


def fit_replayed(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    rate: float,
    checkpoint: Path,
    every: float,
    tick: Tick,
    decay: float = 0.998,
) -> float:
    """`fit` on a CUDA GPU for networks so small that starting their kernels takes longer than the arithmetic.

    One step is recorded as a CUDA graph and replayed. Hence `loss()` draws its batch on the device, from the device's
    own generator: a run that was killed goes on, but not to the same bits.
    """
    device = next(model.parameters()).device
    speed = torch.tensor(rate_at(0, steps, rate), device=device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=speed, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=True
    )
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    weights = [name for name, value in average.items() if value.is_floating_point()]
    done, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        for name, value in state["average"].items():
            average[name].copy_(value)
        done, seconds = state["step"], state["seconds"]
        speed = optimiser.param_groups[0]["lr"]

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimiser.step()
        with torch.no_grad():
            now = model.state_dict()
            torch._foreach_lerp_([average[name] for name in weights], [now[name] for name in weights], 1 - decay)
        return value.detach()

    model.train()
    started = saved = time.monotonic()
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # first steps make the optimiser's state, which a recording must find there
        for _ in range(min(3, steps - done)):
            speed.fill_(rate_at(done, steps, rate))
            step()
            done += 1
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    optimiser.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        value = step()
    for number in range(done, steps):
        speed.fill_(rate_at(number, steps, rate))
        graph.replay()
        if number % 50 == 49 or number == steps - 1:
            tick(number + 1, steps, value.item())
        if time.monotonic() - saved > every:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
            save({**state, "step": number + 1, "seconds": seconds + time.monotonic() - started}, checkpoint)
            saved = time.monotonic()
    torch.cuda.synchronize(device)
    model.load_state_dict(average)
    model.eval()
    return seconds + time.monotonic() - started


@torch.no_grad()
def blend(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    """Exponential moving average in place; counters and other whole numbers are copied."""
    for name, value in state.items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)
