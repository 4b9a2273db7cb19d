"""How far people agree, kept up to date one label at a time: what a figure costs does not depend on how much has been said."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

Item = Hashable
Label = str
NAN = float("nan")


class Agreement:
    """Labels of any number of people, gaps allowed, and the counts of which Cohen's kappa and Krippendorff's alpha are made.

    The counts are whole numbers, so that a label put and taken away again leaves the figures as they were.
    """

    def __init__(self) -> None:
        self._labels: dict[Item, dict[str, Label]] = {}
        self._crossed: dict[tuple[str, str], Counter[tuple[Label, Label]]] = {}  # of two people: what each said of what both labelled
        self._margins: Counter[Label] = Counter()  # n_c, of items with at least two labels
        self._apart: Counter[int] = Counter()  # an item's number of labels m -> ordered pairs of them that differ, of all such items

    @classmethod
    def of(cls, found: Mapping[str, Mapping[Any, Label]]) -> "Agreement":
        """found: who -> item -> label."""
        made = cls()
        for name, labels in found.items():
            for item, label in labels.items():
                made.put(name, item, label)
        return made

    def put(self, name: str, item: Item, label: Label | None) -> None:
        """From now on somebody's label of an item is this; None: there is none."""
        there = self._labels.setdefault(item, {})
        before = there.get(name)
        if label == before:
            return
        self._count(there, -1)
        for other, theirs in there.items():
            if other != name:
                for mine, by in ((before, -1), (label, 1)):
                    if mine is not None:
                        self._cross(name, mine, other, theirs, by)
        if label is None:
            del there[name]
        else:
            there[name] = label
        self._count(there, 1)

    def _cross(self, one: str, said: Label, other: str, theirs: Label, by: int) -> None:
        two, what = ((one, other), (said, theirs)) if one < other else ((other, one), (theirs, said))
        self._crossed.setdefault(two, Counter())[what] += by

    def _count(self, there: Mapping[str, Label], by: int) -> None:
        """Put an item's labels into the counts of alpha, or take them out."""
        labels = Counter(there.values())
        many = len(there)
        if many > 1:
            for label, count in labels.items():
                self._margins[label] += by * count
            self._apart[many] += by * (many**2 - sum(count**2 for count in labels.values()))

    def kappas(self) -> list[tuple[str, str, int, float]]:
        """(one, other, items that both labelled, Cohen's kappa) of each two that labelled any together."""
        found = ((*two, cells.total(), cohen_kappa_of(cells)) for two, cells in sorted(self._crossed.items()))
        return [line for line in found if line[2]]

    def alpha(self) -> float:
        """Krippendorff's alpha of all: see `krippendorff_alpha`."""
        total = self._margins.total()
        observed = sum(apart / (many - 1) for many, apart in sorted(self._apart.items()))
        expected = (total**2 - sum(count**2 for count in self._margins.values())) / (total - 1) if total > 1 else 0.0
        return 1 - observed / expected if expected else NAN


def cohen_kappa_of(cells: Mapping[tuple[Label, Label], int]) -> float:
    """(p_o - p_e) / (1 - p_e); NaN where nothing is labelled or chance alone would agree.  Cohen 1960, eq. 1.

    cells: (what one said, what the other said) -> of how many items. p_o: share labelled alike. p_e: the same if each gave their own
    shares of labels at random.
    """
    both = sum(cells.values())
    if not both:
        return NAN
    first, second = Counter[Label](), Counter[Label]()
    for (one, other), count in cells.items():
        first[one] += count
        second[other] += count
    observed = sum(count for (one, other), count in cells.items() if one == other) / both
    chance = sum(first[label] * second[label] for label in first) / both**2
    return (observed - chance) / (1 - chance) if chance < 1 else NAN


def cohen_kappa(one: Mapping[Any, Label], other: Mapping[Any, Label]) -> float:
    """Cohen's kappa over what both labelled; see `cohen_kappa_of`."""
    return cohen_kappa_of(Counter((one[item], other[item]) for item in one.keys() & other.keys()))


def krippendorff_alpha(found: Iterable[Mapping[Any, Label]]) -> float:
    """1 - D_o / D_e of nominal labels, any number of annotators, gaps allowed; NaN without disagreement to expect.  Krippendorff 2011.

    o_ck: pairs of labels (c, k) within an item, each item's counted 1 / (its labels - 1); n_c its margins, n their sum;
    D_o = sum of o_ck over c != k, D_e = sum of n_c n_k / (n - 1) over c != k.
    """
    return Agreement.of({str(number): each for number, each in enumerate(found)}).alpha()
