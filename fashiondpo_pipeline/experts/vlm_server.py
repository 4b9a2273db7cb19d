"""Quality in levels by a vision-language model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, OpenAI)."""

import base64
import io
import math
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from fashiondpo_pipeline.experts import levels as quality
from fashiondpo_pipeline.experts.ahead import ahead
from fashiondpo_pipeline.experts.chat import Chat, NoAnswer, Rejected
from fashiondpo_pipeline.experts.vlm import check_levels

TOP = 20  # alternatives asked for at each token, as many as servers commonly give


class VisionLanguageServer:
    """Expected quality level of a picture, in [1, levels], from the answer's token probabilities where the server reports them.

    base_url, model: as the server calls them. key_variable: name of the environment variable that holds the key. template,
    template_file, levels, sure, tokens: as of `vlm`. json_schema: ask for {"level": N} where the server can hold the model to it.
    in_flight: requests at once. timeout: seconds for a whole answer. retries, back_off, most_calls, most_failures: see `Chat`.
    """

    version, replies = 1, True
    needs: tuple[str, ...] = ("picture",)  # and columns of the prompts that the template names
    stochastic = True  # servers batch as they please, which rounds differently each time
    effort = ("key_variable", "in_flight", "timeout", "retries", "back_off", "most_calls", "most_failures")  # change no score

    def __init__(
        self, base_url: str, model: str, key_variable: str | None = None, template: str | None = None, template_file: str | None = None,
        levels: int = 10, sure: float = 0.5, tokens: int = 16, temperature: float = 0.0, json_schema: bool = True, in_flight: int = 8,
        timeout: float = 60.0, retries: int = 3, back_off: float = 1.0, most_calls: int | None = None, most_failures: int = 5,
    ):
        check_levels(levels, sure)
        self.model, self.levels, self.sure, self.tokens, self.temperature = model, levels, sure, tokens, temperature
        self.template, self.template_file = quality.template_of(template, template_file), template_file
        self.in_flight = in_flight
        self.client: dict[str, Any] = {
            "base_url": base_url, "key_variable": key_variable, "timeout": timeout, "retries": retries, "back_off": back_off,
            "most_calls": most_calls, "most_failures": most_failures, "connections": in_flight,
        }
        self.wishes: tuple[str, ...] = (*(["response_format"] if json_schema else []), "logprobs")
        self.range = (1.0, float(levels))
        self.needs = ("picture", *quality.columns_of(self.template))
        self.notes: list[str] = []  # what the person should know; whoever shows them empties the list

    def files(self) -> dict[str, Path]:
        return quality.file_of(self.template_file)

    def load(self, device: str, prepared: Path | None) -> None:
        self._chat = Chat(**self.client)
        self._lock, self._settled = threading.Lock(), False

    def __call__(self, rows: list[dict]) -> list[tuple[float, str | None] | tuple[float, str | None, str]]:
        with self._chat:
            first = [self._one(row) for row in rows[: 0 if self._settled else 1]]  # alone, as it finds out what the server can do
            return first + list(ahead(self._one, rows[len(first):], most=2 * self.in_flight, threads=self.in_flight))

    def _one(self, row: dict) -> tuple[float, str | None] | tuple[float, str | None, str]:
        try:
            choice = self._ask(row)
        except NoAnswer as problem:
            return math.nan, str(problem)
        reply = _text(choice["message"].get("content"))
        if choice.get("finish_reason") == "content_filter" or choice["message"].get("refusal"):
            return math.nan, "the server refused to judge the picture", reply or _text(choice["message"].get("refusal"))
        tokens = (choice.get("logprobs") or {}).get("content") if isinstance(choice.get("logprobs"), dict) else None
        return quality.judged(_reported(tokens, reply, self.levels), reply, self.levels, self.sure)

    def _ask(self, row: dict) -> dict:
        """The answer, with as much of what is wished for as the server can do; that is found out once, and said."""
        if self._settled:
            return self._chat.ask(self._body(row, self.wishes))
        every = self.wishes
        for dropped in range(len(every) + 1):
            wishes = every[dropped:]
            try:
                choice = self._chat.ask(self._body(row, wishes))
            except Rejected as problem:
                if not wishes:
                    raise  # not even the bare question: it is the picture or the prompt
                reason = problem
                continue
            with self._lock:
                if dropped and not self._settled:
                    self.notes.append(f"{self.model} is asked without {' and '.join(every[:dropped])} from now on: {reason}")
                self.wishes, self._settled = wishes, True
            return choice
        raise AssertionError("the last round of the loop returns or raises")

    def _body(self, row: dict, wishes: tuple[str, ...]) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": data_url(row["picture"])}},
                   {"type": "text", "text": quality.question(self.template, row, self.levels)}]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": self.tokens,
                                "temperature": self.temperature}
        if "response_format" in wishes:
            level = {"type": "integer", "enum": list(range(1, self.levels + 1))}
            schema = {"type": "object", "properties": {"level": level}, "required": ["level"], "additionalProperties": False}
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "quality", "strict": True, "schema": schema}}
        if "logprobs" in wishes:
            body |= {"logprobs": True, "top_logprobs": TOP}
        return body


def data_url(picture: Image.Image) -> str:
    """A picture as a PNG in a data: address."""
    picture.convert("RGB").save(buffer := io.BytesIO(), "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(content: Any) -> str:
    """A message's content as text; of a list of parts, their texts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _reported(tokens: Any, reply: str, levels: int) -> dict[int, float]:
    """`quality.reported`; nothing where the server's report is not as it should be."""
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        return {}
    try:
        return quality.reported(tokens, reply, levels)
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}
