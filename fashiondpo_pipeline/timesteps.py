"""Which steps of a walk are kept, and which of them finetuning uses."""

from fashiondpo_pipeline.errors import UserError


def saved_steps(save: str | int | list[int], steps: int) -> list[int]:
    """Step numbers whose x_t is kept: all of them, a count spread evenly over the walk, or just these.

    >>> saved_steps(4, 10), saved_steps([8, 2], 10)
    ([0, 3, 6, 9], [2, 8])
    """
    if isinstance(save, str):  # "all"
        return list(range(steps))
    if isinstance(save, int):
        if save > steps:
            raise UserError(f"sample.save: {save} steps cannot be kept of {steps}; lower it or raise sample.steps")
        return sorted({round(i * (steps - 1) / max(save - 1, 1)) for i in range(save)})
    wrong = [step for step in save if step >= steps]
    if wrong or not save:
        raise UserError(f"sample.save: {wrong or 'an empty list'} is not within the steps 0..{steps - 1}")
    return sorted(set(save))


def branches_at(sampled: dict, number: int, mixed: int = 2) -> int:
    """Rows through the denoiser that one step of a walk takes: `mixed` where guidance acts, else one. sampled: a sample step's settings."""
    low, high = sampled["guidance_interval"]
    return mixed if sampled["guidance"] != 1 and low <= number / max(sampled["steps"] - 1, 1) <= high else 1


def forwards(sampled: dict, mixed: int = 2) -> int:
    """Rows through the denoiser that one picture takes.

    >>> forwards({"steps": 10, "guidance": 1.5, "guidance_interval": [0.0, 0.5]})
    15
    """
    return sum(branches_at(sampled, number, mixed) for number in range(sampled["steps"]))


def in_window(kept: list[int], steps: int, window: list[float]) -> list[int]:
    """Places in `kept` of the steps within a part of the walk, from 0 (its first step, from noise) to 1 (its last).

    >>> in_window([0, 3, 6, 9], 10, [0.3, 0.9])
    [1, 2]
    """
    low, high = window
    found = [place for place, step in enumerate(kept) if low <= step / max(steps - 1, 1) <= high]
    if not found:
        raise UserError(f"finetune.window {window} holds none of the saved steps {kept} of {steps}: widen it, or save others")
    return found
