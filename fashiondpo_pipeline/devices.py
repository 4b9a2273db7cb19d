"""Which device torch computes on, by its name in the configuration."""

from fashiondpo_pipeline.errors import UserError


def find(wanted: str, what: str) -> str:
    """cpu, mps, cuda or cuda:N; `auto` is the best there is. Raises UserError, which names `what`, if torch finds no such device."""
    import torch

    gpus, apple = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    kind, _, number = wanted.partition(":")
    if kind == "auto":
        return "cuda" if gpus else "mps" if apple else "cpu"
    if kind == "cuda" and not gpus:
        raise UserError(f"{what} is {wanted}, but torch finds no GPU: use auto or cpu")
    if kind == "cuda" and int(number or 0) >= gpus:
        raise UserError(f"{what} is {wanted}, but torch finds {gpus}, which count from 0: use cuda:{gpus - 1}, or auto")
    if kind == "mps" and not apple:
        raise UserError(f"{what} is mps, but torch finds no GPU of Apple's: use auto or cpu")
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"{what} is '{wanted}', which is no device: use auto, cpu, mps, cuda or cuda:N")
    return wanted
