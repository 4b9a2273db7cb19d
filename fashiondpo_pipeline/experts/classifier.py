"""A picture classifier as an expert: how sure it is of the label that was asked for."""

import math
from pathlib import Path

import numpy as np

from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError, check_pulled
from fashiondpo_pipeline.experts.weights import Place

TILE = 64


class Classifier:
    """ln p(label | picture) of a transformers image classifier, in (-inf, 0], and whether no other label is likelier.

    model: folder or hub id. label: template over the prompt's columns that names one of the model's labels; or several,
    of a model that names several attributes at once: "colour: {colour}", "pattern: {pattern}". Labels that begin with
    the same word and a colon then compete with each other alone, the logarithms are added up, and a picture is right
    if every attribute is.
    """

    version, range, classifies = 2, (-math.inf, 0.0), True
    needs: tuple[str, ...] = ("picture",)

    def __init__(self, model: str, label: str | list[str], revision: str | None = None):
        import string

        self.model, self.label, self.revision = model, label, revision
        self.templates = [label] if isinstance(label, str) else list(label)
        self.weights = {"model": Place(model, "classifier", revision)}
        names = [name for template in self.templates for _, name, _, _ in string.Formatter().parse(template) if name]
        self.needs = ("picture", *dict.fromkeys(names))

    def files(self) -> dict[str, Path]:
        where = locate(self.model)
        return {"model": where} if where.exists() or self.model.startswith("embedded:") else {}

    def load(self, device: str, prepared: Path | None) -> None:
        from safetensors import SafetensorError
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        where = locate(self.model)
        source = str(where) if where.exists() else self.model
        try:
            self._net = AutoModelForImageClassification.from_pretrained(source, revision=self.revision, use_safetensors=True)
            self._see = AutoImageProcessor.from_pretrained(source, revision=self.revision)
        except (OSError, ValueError, SafetensorError) as problem:
            check_pulled(where)
            raise UserError(
                f"classifier '{self.model}' cannot be loaded ({str(problem).splitlines()[0]}): "
                "name a folder or hub id of a transformers image classifier"
            ) from problem
        self._net.to(device).eval()
        self._device = device
        labels = self._net.config.id2label
        self._place = {label: number for number, label in labels.items()}
        alone = isinstance(self.label, str)  # all labels compete
        self._attribute = ["" if alone else labels[number].partition(":")[0] for number in range(len(labels))]

    @property
    def preprocessing(self) -> str:
        """What is done to a picture before the network sees it."""
        return self._see.to_json_string()

    def __call__(self, rows: list[dict]) -> list[tuple]:
        from fashiondpo_pipeline.tiles import tiled

        inputs = self._see([row["picture"] for row in rows], return_tensors="pt")["pixel_values"]
        logits = tiled(lambda tile: self._net(tile.to(self._device)).logits.cpu(), inputs, TILE)  # (b, labels)
        log_p = log_softmax_by(self._attribute, logits.double().numpy())
        return [self._one(row, opinion) for row, opinion in zip(rows, log_p, strict=True)]

    def _one(self, row: dict, log_p: np.ndarray) -> tuple:
        labels = [template.format(**row) for template in self.templates]
        unknown = [label for label in labels if label not in self._place]
        if unknown:
            return math.nan, f"the classifier has no label '{unknown[0]}'"
        places = [self._place[label] for label in labels]
        rivals = [log_p[[name == self._attribute[place] for name in self._attribute]].max() for place in places]
        right = all(log_p[place] == best for place, best in zip(places, rivals, strict=True))
        return float(log_p[places].sum()), None, right


def log_softmax_by(attributes: list[str], logits: np.ndarray) -> np.ndarray:
    """ln p of each label among those of the same attribute: (b, labels) for logits (b, labels)."""
    out = np.empty_like(logits)
    for attribute in dict.fromkeys(attributes):
        places = [place for place, name in enumerate(attributes) if name == attribute]
        some = logits[:, places] - logits[:, places].max(1, keepdims=True)
        out[:, places] = some - np.log(np.exp(some).sum(1, keepdims=True))
    return out
