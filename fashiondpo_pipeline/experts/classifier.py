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

    model: folder or hub id. label: template over the prompt's columns that names one of the model's labels.
    """

    version, range, classifies = 2, (-math.inf, 0.0), True
    needs: tuple[str, ...] = ("picture",)

    def __init__(self, model: str, label: str, revision: str | None = None):
        import string

        self.model, self.label, self.revision = model, label, revision
        self.weights = {"model": Place(model, "classifier", revision)}
        self.needs = ("picture", *(name for _, name, _, _ in string.Formatter().parse(label) if name))

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
        self._place = {label: number for number, label in self._net.config.id2label.items()}

    @property
    def preprocessing(self) -> str:
        """What is done to a picture before the network sees it."""
        return self._see.to_json_string()

    def __call__(self, rows: list[dict]) -> list[tuple]:
        from fashiondpo_pipeline.tiles import tiled

        inputs = self._see([row["picture"] for row in rows], return_tensors="pt")["pixel_values"]
        logits = tiled(lambda tile: self._net(tile.to(self._device)).logits.cpu(), inputs, TILE)  # (b, labels)
        log_p = logits.double().log_softmax(-1).numpy()
        return [self._one(row, opinion) for row, opinion in zip(rows, log_p, strict=True)]

    def _one(self, row: dict, log_p: np.ndarray) -> tuple:
        label = self.label.format(**row)
        if label not in self._place:
            return math.nan, f"the classifier has no label '{label}'"
        place = self._place[label]
        return float(log_p[place]), None, bool(log_p.argmax() == place)
