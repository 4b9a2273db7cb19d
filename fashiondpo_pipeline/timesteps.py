"""Which steps of a walk are kept for finetuning."""

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
