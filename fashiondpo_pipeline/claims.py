"""Measures of size as sentences: what may be said of a tuned model, and with which interval. Pure functions
of what `evaluate` found.

An estimate is {value, low, high}; None as a value is unknown (of a best-of-n equivalent: beyond what was
drawn), as an end no bound.
"""

import math
from collections.abc import Mapping

Estimate = Mapping[str, float | None]



def known(best_of: Estimate) -> bool:
    """Whether there is a best-of-n equivalent; there is none where nobody rewarded is asked about held-out draws.

    >>> known({"value": None, "low": 9.0, "high": None}), known({"value": None, "low": None, "high": None})
    (True, False)
    """
    return best_of["value"] is not None or best_of["low"] is not None


def unbounded(best_of: Estimate) -> bool:
    """Whether the interval of a best-of-n equivalent excludes nothing, as of fewer than five prompts, or where there is none.

    >>> unbounded({"value": 3.0, "low": 0.0, "high": None}), unbounded({"value": 3.0, "low": 2.0, "high": None})
    (True, False)
    """
    return not best_of["low"] and best_of["high"] is None


def direction(best_of: Estimate) -> str:
    """Where the whole interval of a best-of-n equivalent lies: good (above 1), bad (below), open (it holds
    1).
    """
    if (best_of["low"] or 0.0) > 1:
        return "good"
    return "bad" if best_of["high"] is not None and best_of["high"] < 1 else "open"


def choice(best_of: Estimate) -> str:
    """A best-of-n equivalent without its interval.

    >>> [choice({"value": n, "low": 0.1, "most": 16}) for n in (3.42, 0.5, 1.0)]
    ['the best of 3.4', 'the worst of 2.0', 'the best of 1.0']
    >>> [choice({"value": n, "low": low, "most": 16}) for n, low in ((None, 9.0), (0.0, 0.0), (None, None))]
    ['better than the best of 16', 'worse than the worst of 16', 'of unknown worth beside those']
    """
    n, most = best_of["value"], best_of.get("most") or math.inf
    if not known(best_of):
        return "of unknown worth beside those"
    if n is None:
        return f"better than the best of {most:g}"
    if not n:
        return f"worse than the worst of {most:g}"
    return f"the best of {_n(n)}" if n >= 1 or _n(1 / n) == "1.0" else f"the worst of {_n(1 / n)}"


def with_interval(best_of: Estimate) -> str:
    """A best-of-n equivalent with its interval; `most` in it is how many pictures of a prompt there are to
    choose from.

    >>> with_interval({"value": 3.42, "low": 2.9, "high": 4.1, "most": 16})
    'the best of 3.4 [2.9, 4.1]'
    >>> with_interval({"value": 0.5, "low": 0.4, "high": 0.625, "most": 16})
    'the worst of 2.0 [1.6, 2.5]'
    >>> with_interval({"value": 1.1, "low": 0.8, "high": 1.5, "most": 16})
    'the best of 1.1 [worst of 1.2, best of 1.5]'
    >>> with_interval({"value": None, "low": 9.0, "high": None, "most": 16})
    'better than the best of 16 [9.0, more]'
    >>> with_interval({"value": 1.1, "low": 0.0, "high": None, "most": 16})
    'the best of 1.1 [anything]'
    """
    return f"{choice(best_of)} [{', '.join(ends(best_of))}]" if known(best_of) else choice(best_of)


def ends(best_of: Estimate) -> list[str]:
    """The ends of a best-of-n equivalent's interval, as counts of pictures where both are on one side of 1.

    >>> ends({"value": 3.42, "low": 2.9, "high": 4.1, "most": 16}), ends({"value": 0.5, "low": 0.0, "high": None, "most": 16})
    (['2.9', '4.1'], ['anything'])
    """
    low, high, beyond = best_of["low"] or 0.0, best_of["high"], "more"
    if unbounded(best_of):
        return ["anything"]
    best = beyond if high is None else _n(high)
    worst = _n(1 / low) if low else beyond
    if low >= 1:
        return [_n(low), best]
    if high is not None and high <= 1:
        return [_n(1 / high) if high else beyond, worst]
    return [f"worst of {worst}", f"best of {best}"]


def _n(n: float) -> str:
    return f"{n:.1f}"


def plain(found: Estimate, decimals: int = 2) -> str:
    """Any other estimate.

    >>> plain({"value": 0.85, "low": 0.8, "high": 0.9}), plain({"value": None, "low": None, "high": None})
    ('0.85 [0.80, 0.90]', 'unknown')
    """
    if found["value"] is None:
        return "unknown"
    low, high = ("any" if end is None else f"{end:.{decimals}f}" for end in (found["low"], found["high"]))
    return f"{found['value']:.{decimals}f} [{low}, {high}]"


def points(change: Estimate) -> str:
    """A change of a share, in points of per cent.

    >>> points({"value": 0.023, "low": 0.012, "high": 0.036})
    '+2.3 points [1.2, 3.6]'
    """
    if change["value"] is None:
        return "unknown"
    low, high = ("any" if end is None else f"{100 * end:.1f}" for end in (change["low"], change["high"]))
    return f"{100 * change['value']:+.1f} points [{low}, {high}]"


def right_share(right: Mapping) -> str:
    """Shares of pictures that are right, of the base and of the tuned model.

    >>> right_share({"base": {"value": 0.845}, "after": {"value": 0.868}})
    '84.5 -> 86.8 %'
    """
    base, after = (right[role]["value"] for role in ("base", "after"))
    return "unknown" if base is None or after is None else f"{100 * base:.1f} -> {100 * after:.1f} %"


def signed(found: Estimate) -> str:
    """An estimate of a change.

    >>> signed({"value": 0.31, "low": 0.2, "high": 0.4})
    '+0.31 [0.20, 0.40]'
    """
    return f"{'+' if found['value'] and found['value'] > 0 else ''}{plain(found)}"


def gained(size: Mapping) -> str:
    """Share right with what was mended and broken; where the judge does not classify, how far its mean moved.

    >>> gained({"right": {"base": {"value": 0.845}, "after": {"value": 0.868}, "change": {"value": 0.023, "low": 0.012, "high": 0.036},
    ...                   "mended": 16, "broken": 1, "pictures": 640}})
    '84.5 -> 86.8 % right, +2.3 points [1.2, 3.6]: 16 mended, 1 broken of 640'
    >>> gained({"right": None, "shift": {"value": 0.31, "low": 0.2, "high": 0.4}})
    'mean +0.31 [0.20, 0.40] standard deviations of the base'
    """
    if not size["right"]:
        return f"mean {signed(size['shift'])} standard deviations of the base"
    right = size["right"]
    turned = f"{right['mended']:,} mended, {right['broken']:,} broken of {right['pictures']:,}"
    return f"{right_share(right)} right, {points(right['change'])}: {turned}"
