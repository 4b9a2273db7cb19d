"""What the tensors of one module in a LoRA file add to its weight: LoRA, LoCon, LoHa, LoKr and full differences, and DoRA on any of them.

Formulas as in LyCORIS (Yeh et al. 2024, 2309.14859), whose own merging multiplies LoHa's and LoKr's scale in twice; its training does not.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fashiondpo_pipeline.lora_names import Place

KINDS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "diff": "full difference"}
# What each kind needs, in any of these sets; more than a set and the optional ones is a tensor too many.
_SETS: dict[str, list[set[str]]] = {
    "LoRA": [{"down", "up"}, {"down", "mid", "up"}],
    "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *cores} for cores in ((), ("hada_t1", "hada_t2"))],
    "LoKr": [first | second for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
             for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_t2", "lokr_w2_a", "lokr_w2_b"})],
    "full difference": [{"diff"}],
}


@dataclass(frozen=True)
class LowRank:
    """up @ down, (out, in) with the inputs flattened."""

    down: Tensor  # (r, in...)
    up: Tensor  # (out, r...)
    kind: str = "LoRA"

    @property
    def size(self) -> tuple[int, int]:
        return len(self.up), self.down[0].numel()

    def at(self, place: Place) -> "LowRank":
        return replace(self, up=place.rows(self.up))

    def matrix(self, device: torch.device, scale: float) -> Tensor:
        return scale * self.up.to(device).flatten(1) @ self.down.to(device).flatten(1)


@dataclass(frozen=True)
class Formula:
    """A LoHa, LoKr or full difference, kept as the file has it: as a whole matrix it may be a thousand times larger."""

    kind: str
    parts: dict[str, Tensor]
    scale: float = 1.0
    place: Place | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the whole, with the inputs flattened."""
        p = self.parts
        if self.kind == "full difference":
            return len(p["diff"]), p["diff"][0].numel()
        if self.kind == "LoHa":
            core = p.get("hada_t1")
            out = p["hada_w1_a"].shape[0 if core is None else 1]
            return out, p["hada_w1_b"].shape[1] * (1 if core is None else core[0, 0].numel())
        first, second = ((_size(p, name)) for name in ("lokr_w1", "lokr_w2"))
        return first[0] * second[0], first[1] * second[1]

    def at(self, place: Place) -> "Formula":
        return replace(self, place=place)

    def matrix(self, device: torch.device, scale: float) -> Tensor:
        p = {name: tensor.to(device) for name, tensor in self.parts.items()}
        whole = {"LoHa": _loha, "LoKr": _lokr, "full difference": lambda p: p["diff"]}[self.kind](p).reshape(self.size)
        return scale * self.scale * (self.place.rows(whole) if self.place else whole)


def _size(parts: dict[str, Tensor], name: str) -> tuple[int, int]:
    if name in parts:
        return len(parts[name]), parts[name][0].numel()
    a, b, core = parts[f"{name}_a"], parts[f"{name}_b"], parts.get("lokr_t2") if name == "lokr_w2" else None
    return (len(a), b.shape[1]) if core is None else (a.shape[1], b.shape[1] * core[0, 0].numel())


def _loha(p: dict[str, Tensor]) -> Tensor:
    """(w1a w1b) * (w2a w2b), entry by entry."""
    if "hada_t1" not in p:
        return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
    return _tucker(p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"]) * _tucker(p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"])


def _lokr(p: dict[str, Tensor]) -> Tensor:
    """kron(w1, w2), each whole or a product."""
    first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        second = p["lokr_w2"]
    elif "lokr_t2" in p:
        second = _tucker(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        second = p["lokr_w2_a"] @ p["lokr_w2_b"]
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(out, in, kernel...) of a core (r, r, kernel...), a (r, out) and b (r, in)."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def change_of(parts: dict[str, Tensor], strength: float | None) -> LowRank | Formula | None:
    """What one module's tensors add. strength: alpha, over rank or its root. None where they make up none of the kinds.

    A LoCon's `lora_mid` (r, r, kernel...) goes into `down`, which then has the kernel.
    """
    kind = next((KINDS[name] for name in KINDS if name in parts), None)
    if kind is None or set(parts) not in _SETS[kind]:
        return None
    if kind == "full difference":
        return Formula(kind, parts)
    scale = 1.0 if strength is None else strength
    if kind != "LoRA":
        return Formula(kind, parts, scale)
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = torch.einsum("mn...,nj->mj...", parts["mid"], down.flatten(1))
    return LowRank(down, up * scale)


def rank_of(parts: dict[str, Tensor]) -> int | None:
    """The rank that alpha is over; None where no matrix shows one (a LoKr of two whole matrices)."""
    for name, dimension in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in parts:
            return parts[name].shape[dimension]
    return None


@dataclass(frozen=True)
class Layer:
    """What a file does to one module: W + change; with a magnitude (DoRA) each row, or each input, then has that length; bias + bias.

    Without change, magnitude and bias it is a module of a text encoder, changed in a way that is not read here.
    """

    change: LowRank | Formula | None = None
    magnitude: Tensor | None = None  # (out, 1), or (1, in) with all of its kernel
    bias: Tensor | None = None  # (out,)

    @property
    def kind(self) -> str:
        return self.change.kind if self.change else "full difference" if self.bias is not None else "unknown change"

    def fits(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        if self.bias is not None and (bias is None or bias.shape != self.bias.shape):
            return False
        if self.change is None:
            return self.bias is not None
        if weight is None or self.change_size != (len(weight), weight[0].numel()):
            return False
        return self.magnitude is None or self.magnitude.shape in ((len(weight), 1), (1, weight.shape[1]))

    @property
    def change_size(self) -> tuple[int, int] | None:
        if self.change is None:
            return None
        out, inputs = self.change.size
        place = getattr(self.change, "place", None)
        return (out if place is None else out * place.last // place.of - out * place.first // place.of), inputs

    def fused(self, weight: Tensor, scale: float) -> Tensor:
        """The weight with the change in it, computed in fp32 where the weight lies."""
        rows = weight.float().reshape(len(weight), -1)  # (out, in)
        if self.change is not None:
            rows = rows + self.change.matrix(weight.device, scale)
        if self.magnitude is not None:
            magnitude = self.magnitude.to(weight.device)
            if len(magnitude) == len(weight):
                rows = rows * (magnitude / rows.norm(dim=1, keepdim=True))
            else:  # each input's length over all outputs and its kernel
                kernels = rows.view(*weight.shape[:2], -1)
                rows = kernels * (magnitude[..., None] / kernels.norm(dim=(0, 2), keepdim=True))
        return rows.reshape(weight.shape).to(weight.dtype)


def strength(alpha: float, rank: int, rslora: bool = False) -> float:
    """What up @ down is multiplied with.

    >>> strength(8.0, 4), strength(8.0, 4, rslora=True)
    (2.0, 4.0)
    """
    return alpha / (math.sqrt(rank) if rslora else rank)
