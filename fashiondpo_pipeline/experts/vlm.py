"""Quality in levels by a vision-language model that runs here.  FashionDPO (2504.12900), with the expected level of G-Eval (2303.16634)."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import levels as quality
from fashiondpo_pipeline.experts.weights import Place, gist


class VisionLanguage:
    """Expected quality level of a picture, in [1, levels]: sum of level times probability, of the tokens that name the levels.

    model: folder or hub id of a transformers image-text-to-text model; a hub id needs `revision`, its commit (all 40 digits). template or
    template_file: the question, with {levels} and columns of the prompts in braces. answer: what the answer begins with. sure: least
    probability of all levels together; below it the level is read from the reply of at most `tokens` tokens. batch: pictures a forward.
    Code that comes with a model is never run.
    """

    version, replies = 1, True
    needs: tuple[str, ...] = ("picture",)  # and columns of the prompts that the template names

    def __init__(
        self, model: str, revision: str | None = None, template: str | None = None, template_file: str | None = None, levels: int = 10,
        answer: str = "", sure: float = 0.5, tokens: int = 16, batch: int = 8, dtype: str = "auto",
    ):
        check_levels(levels, sure)
        self.model, self.revision, self.levels, self.answer, self.sure = model, revision, levels, answer, sure
        self.template, self.template_file = quality.template_of(template, template_file), template_file
        self.tokens, self.batch, self.dtype = tokens, batch, dtype
        self.range = (1.0, float(levels))
        self.needs = ("picture", *quality.columns_of(self.template))
        self.weights = {"model": Place(model, "vision-language model", revision)}
        if not (locate(model).exists() or revision):
            raise UserError(f"vision-language model '{model}': there is no such folder, and a hub id needs its commit: add `revision`")
        if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise UserError(f"vision-language model '{model}': revision '{revision}' is no commit: give all 40 digits, as a branch or tag can move")

    def files(self) -> dict[str, Path]:
        where = locate(self.model)
        return ({"model": where} if where.exists() else {}) | quality.file_of(self.template_file)

    def load(self, device: str, prepared: Path | None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where = locate(self.model)
        source = str(where) if where.exists() else self.model
        common: dict[str, Any] = {"revision": self.revision, "trust_remote_code": False}
        try:
            self._net = AutoModelForImageTextToText.from_pretrained(source, dtype=self.dtype, use_safetensors=True, **common)
            self._see = AutoProcessor.from_pretrained(source, **common)
        except ImportError as problem:
            raise UserError(f"vision-language model '{self.model}' needs a package that is not installed ({gist(problem)}): "
                            "install it with pip") from problem
        except (OSError, ValueError, KeyError) as problem:
            raise UserError(
                f"vision-language model '{self.model}' cannot be loaded ({gist(problem)}): "
                "name a folder or hub id of a transformers image-text-to-text model"
            ) from problem
        self._net.to(device).eval()
        self._device = device
        self._words = self._see.tokenizer
        self._words.padding_side = "left"  # so that each row's last token is its own
        if self._words.pad_token is None:
            self._words.pad_token = self._words.eos_token
        self._sequences = {n: self._written(n) for n in range(1, self.levels + 1)}

    def __call__(self, rows: list[dict]) -> list[tuple[float, str | None, str]]:
        return [answer for start in range(0, len(rows), self.batch) for answer in self._batch(rows[start : start + self.batch])]

    def _batch(self, rows: list[dict]) -> list[tuple[float, str | None, str]]:
        full = rows + rows[-1:] * (self.batch - len(rows))  # always of one size, so that kernels round alike
        inputs = self._see(text=[self._text(row) for row in full], images=[[row["picture"].convert("RGB")] for row in full],
                           return_tensors="pt", padding=True)
        log_p, replies = self._say(inputs, (), self.tokens)
        said: dict[tuple[int, ...], np.ndarray] = {(): log_p}
        for begun in sorted({s[:n] for every in self._sequences.values() for s in every for n in range(1, len(s))}, key=len):
            said[begun], _ = self._say(inputs, begun, 1)
        p = self._probabilities(said)  # level -> (b,)
        return [quality.judged({n: float(share[row]) for n, share in p.items()}, replies[row], self.levels, self.sure)
                for row in range(len(rows))]

    def _text(self, row: dict) -> str:
        asked = quality.question(self.template, row, self.levels)
        if self._see.chat_template is None:
            return f"{getattr(self._see, 'image_token', '<image>')}\n{asked}\n{self.answer}"
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
        return self._see.apply_chat_template([turn], add_generation_prompt=True, tokenize=False) + self.answer

    def _say(self, inputs: Any, begun: tuple[int, ...], tokens: int) -> tuple[np.ndarray, list[str]]:
        """(log-probabilities of the next token (b, vocabulary), the reply in full), after what is begun already."""
        import torch

        given = {name: value.to(self._device) for name, value in inputs.items()}
        for name, value in given.items():
            if begun and value.shape == inputs["input_ids"].shape:
                more = begun if name == "input_ids" else [int(name == "attention_mask")] * len(begun)
                tail = torch.tensor([more], device=self._device, dtype=value.dtype).expand(len(value), -1)
                given[name] = torch.cat([value, tail], 1)
        with torch.inference_mode():
            out = self._net.generate(**given, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True,
                                     pad_token_id=self._words.pad_token_id)
        log_p = out.logits[0].float().log_softmax(-1).cpu().numpy().astype(np.float64)
        new = out.sequences[:, given["input_ids"].shape[1]:]
        return log_p, self._words.batch_decode(new, skip_special_tokens=True)

    def _written(self, level: int) -> list[tuple[int, ...]]:
        """The token sequences that a level can be written in after the question: with a blank before it and without."""
        before = self._text_end
        start = self._words(before, add_special_tokens=False)["input_ids"]
        found = []
        for text in (f"{before}{level}", f"{before} {level}"):
            ids = self._words(text, add_special_tokens=False)["input_ids"]
            if ids[: len(start)] == start and len(ids) > len(start):
                found.append(tuple(ids[len(start):]))
        if not found:
            raise UserError(f"vision-language model '{self.model}': its tokenizer merges '{self.answer}' with the level after it; "
                            "let `answer` end in a word or a colon")
        return list(dict.fromkeys(found))

    @property
    def _text_end(self) -> str:
        """The end of every question, after which the level comes."""
        blank = dict.fromkeys(quality.columns_of(self.template), "")
        return self._text(blank)[-32:]

    def _probabilities(self, log_p: dict[tuple[int, ...], np.ndarray]) -> dict[int, np.ndarray]:
        written = [s for every in self._sequences.values() for s in every]
        each = dict(zip(written, quality.sequences_probability(written, log_p), strict=True))
        return {n: sum(each[s] for s in every) for n, every in self._sequences.items()}


def check_levels(levels: int, sure: float) -> None:
    """Raises UserError for a number of levels or a share that makes no sense."""
    if type(levels) is not int or not 2 <= levels <= 10:
        raise UserError(f"levels: should be a whole number from 2 to 10, not {levels!r}")
    if not 0 < sure <= 1:
        raise UserError(f"sure: should be a share above 0 and up to 1, not {sure!r}")
