"""Odd files for every parser of foreign text and bytes: each ends in a result or in a sentence, within a bounded time.

    python tests/fuzz/campaign.py --inputs 100000            # all parsers, the inputs shared out among them
    python tests/fuzz/campaign.py --inputs 5000 --only yaml  # one of them

Inputs are mutations of small whole files (those below, and those of ../shared/cases where it is there) and, for Parquet, tables of odd cells.
Hypothesis draws them from a seed and makes one that fails small; it is kept in --keep. tests/test_fuzz.py runs a little of each.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import re
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from fashiondpo_pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT.parent / "shared" / "cases"
SECONDS = 10.0  # for one input; most take a few milliseconds
LARGEST = 1 << 16  # bytes of a seed

Parser = Callable[[bytes, Path], Any]


@dataclass(frozen=True)
class Target:
    """One parser: whole files to begin with, what reads such a file, and the exceptions that are an answer."""

    seeds: Callable[[], list[bytes]]
    run: Parser
    answers: tuple[type[BaseException], ...] = (UserError,)
    odd: Callable[[], st.SearchStrategy[bytes]] | None = None  # inputs that are no mutations
    share: float = 1.0  # of the inputs, beside the others


class TooSlow(Exception):
    """An input took longer than it may."""


# -- inputs

WORDS = [
    b"",
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b'"',
    b'""',
    b",",
    b";",
    b"\t",
    b"\r",
    b"\n",
    b"[",
    b"]",
    b"{",
    b"}",
    b":",
    b"*",
    b"&a",
    b"<<",
    b"!!",
    b"|",
    b">",
    b"%",
    b"~",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"0",
    b"9" * 30,
    b"9" * 5000,
    b"1e-400",
    b"0x",
    b"0b_",
    b"\\ud800",
    b"\\u0000",
    b"\x1b[2J",
    "é".encode(),
    "é".encode("utf-16"),
    b"true",
    b"no",
    b"2024-13-45",
    b"../../x",
    b"/dev/zero",
    b"C:\\x",
    b"[" * 300,
    b'{"a":' * 300,
    b"A" * 2000,
    b"\xed\xa0\x80",
    "\u202e".encode(),
    "\u2028".encode(),
    b"1_000",
    b"1:30",
    b"PAR1",
    b"IEND",
    b"lora_unet_",
    b".alpha",
]


TOKEN = re.compile(rb'"[^"\n]*"|[\w.-]+|[^\w\s]')


@st.composite
def mutations(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed after a few edits, half of which keep to its words, so that the parts behind the parser are met too."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 2, 2, 3, 8]))):
        at, edit = draw(st.integers(0, len(data))), draw(st.integers(0, 9))
        end = min(len(data), at + draw(st.sampled_from([1, 1, 2, 4, 16, 200, 1 << 16])))
        if edit > 5 and (tokens := [found.span() for found in TOKEN.finditer(data)]):
            at, end = draw(st.sampled_from(tokens))
            data[at:end] = draw(st.sampled_from([*WORDS, bytes(data[slice(*draw(st.sampled_from(tokens)))])]))
        elif edit == 0 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == 1:
            del data[at:end]
        elif edit == 2:
            data[at:at] = data[at:end]
        elif edit == 3:
            data[at:at] = draw(st.sampled_from(WORDS))
        elif edit == 4:
            data[at:end] = draw(st.binary(max_size=8))
        else:
            other = draw(st.sampled_from(seeds))
            data[at:end] = other[draw(st.integers(0, len(other))) :]
    return bytes(data[: 1 << 20])


def _struct(*pictures: Any) -> pa.Array:
    return pa.array(
        [{"bytes": data, "path": path} for data, path in pictures],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )


@cache
def odd_columns() -> list[pa.Array]:
    """Columns of two rows, of every type that a stranger's table may have where text, a number or a picture is looked for."""
    one = png()
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe")
    )
    return [
        pa.array(["a red dress", "a bag"]),
        pa.array(["", None], pa.string()),
        broken,
        pa.array(["\x1b[2J", "\0"]),
        pa.array(["x" * 140_000, "y"]),
        pa.array([1, 0]),
        pa.array([2**63 - 1, -(2**63)]),
        pa.array([1.0, 0.0]),
        pa.array([float("nan"), float("inf")]),
        pa.array([0.5, None]),
        pa.array([True, False]),
        pa.array([None, None], pa.null()),
        pa.array([one, one]),
        pa.array([one, None], pa.large_binary()),
        pa.array([b"no picture", b""]),
        _struct((one, "a.png"), (one, None)),
        _struct((None, "0.png"), (None, "../0.png")),
        _struct((b"x", "x"), (None, None)),
        pa.array([2**62, -(2**62)], pa.int64()).cast(pa.timestamp("us")),
        pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
        pa.array([[], ["a"]]),
        pa.array([[1, None], None]),
        pa.array([{"a": {"b": 1}}, None]),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([[("k", 1), ("k", 2)], []], pa.map_(pa.string(), pa.int64())),
        pa.array(["1", "0"]),
        pa.array(["nan", "1e999"]),
        pa.array(["0.png", "gone.png"]),
        pa.array(["/etc/hostname", "C:\\a.png"]),
        pa.array([10**30, None], pa.decimal128(38)),
        pa.array([2**62, 1], pa.duration("s")),
        pa.array(["0" * 8, "1" * 8]).cast(pa.large_string()),
        pa.array([b"ab", b"cd"], pa.binary(2)),
    ]


@st.composite
def odd_tables(draw: st.DrawFn, names: list[str]) -> bytes:
    """A Parquet file with columns of these names, each of any type."""
    some = draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names)))
    table = pa.Table.from_arrays([draw(st.sampled_from(odd_columns())) for _ in some], names=some)
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink)
    except pa.ArrowException:  # not every type has a place in Parquet
        return b""
    return sink.getvalue()


@cache
def png(mode: str = "RGB", kind: str = "PNG") -> bytes:
    Image.new(mode, (12, 9), 7).save(sink := io.BytesIO(), kind)
    return sink.getvalue()


def parquet(table: pa.Table) -> bytes:
    pq.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


def cases(*endings: str) -> list[bytes]:
    """Small files of ../shared/cases with these endings."""
    found = (
        sorted(path for path in CASES.rglob("*") if path.suffix in endings and path.is_file())
        if CASES.is_dir()
        else []
    )
    return [path.read_bytes() for path in found if path.stat().st_size <= LARGEST]


# -- parsers


def _prompts(ending: str) -> Parser:
    def run(data: bytes, folder: Path) -> None:
        from fashiondpo_pipeline import prompts

        path = folder / f"p{ending}"
        path.write_bytes(data)
        for split in prompts.read(path).values():
            split.about  # noqa: B018 - its identity is worked out
            json.dumps([{name: repr(cell) for name, cell in row.items()} for row in split.rows]).encode()
            "".join(row["group"] + row["prompt"] + row["split"] for row in split.rows).encode()

    return run


def _references(ending: str) -> Parser:
    """Prompts with a column of pictures that they refer to."""

    def run(data: bytes, folder: Path) -> None:
        from fashiondpo_pipeline import prompts, references

        (folder / "0.png").write_bytes(png())
        path = folder / f"p{ending}"
        path.write_bytes(data)
        for split in references.filled(prompts.read(path), path).values():
            split.about  # noqa: B018 - its identity is worked out
            assert all(isinstance(row.get("reference"), dict | None) for row in split.rows)

    return run


def _yaml(data: bytes, folder: Path) -> None:
    from fashiondpo_pipeline import config
    from fashiondpo_pipeline.identity import canonical

    (folder / "c.yaml").write_bytes(data)
    found = config.load(folder / "c.yaml")
    canonical(found.model_dump(mode="json")).encode()
    assert config.load(None, text=config.template(found)) == found


def _set(data: bytes, folder: Path) -> None:
    from fashiondpo_pipeline import config
    from fashiondpo_pipeline.identity import canonical

    found = config.load(None, data.decode("utf-8", "surrogateescape").split("\n--set "))
    canonical(found.model_dump(mode="json")).encode()


def _answers(data: bytes, folder: Path) -> None:
    from fashiondpo_pipeline import annotations

    (folder / "bob.jsonl").write_bytes(data)
    for answer in annotations.read(folder / "bob.jsonl"):
        f"{answer.label} {answer.preference} {answer.duel.sides('bob')} {answer.of}".encode()


def _listed(ending: str) -> Parser:
    def run(data: bytes, folder: Path) -> None:
        from fashiondpo_pipeline import annotations

        (folder / f"l{ending}").write_bytes(data)
        annotations.listed(folder / f"l{ending}", {"g": {0, 1}, "7": {0, 1}})

    return run


def _reply(data: bytes, folder: Path) -> None:
    """A judge's words, and what a server says of a failure."""
    from fashiondpo_pipeline.experts import chat, levels

    text = (
        data.decode("utf-8", "surrogatepass" if b"\xed" in data else "replace")
        if b"\xff" not in data
        else data.decode("latin-1")
    )
    assert levels.read_level(text) in {None, *range(1, 11)}
    score, reason, reply = levels.judged({}, text, 10, 0.5)
    pa.array([score]), pa.array([reason, reply], pa.string())
    chat._detail(data).encode()
    assert chat._seconds(text) >= 0


def _server(data: bytes, folder: Path) -> None:
    """A server's whole answer, as the expert takes it."""
    from fashiondpo_pipeline.experts import chat, vlm_server

    choice = chat.Chat(base_url="http://localhost:1/v1")._understood(200, data, None)
    expert = vlm_server.VisionLanguageServer("http://localhost:1/v1", "m")
    expert._ask = lambda row: choice  # type: ignore[method-assign]
    score, reason, *reply = expert._one({})
    pa.array([float(score)]), pa.array([reason, *reply], pa.string())


def _imported(name: str, file: str) -> Parser:
    def run(data: bytes, folder: Path) -> None:
        from fashiondpo_pipeline import formats
        from fashiondpo_pipeline.formats import guess

        source = folder / "source"
        source.mkdir()
        for number in range(2):
            (source / f"{number}.png").write_bytes(png())
        (source / file).write_bytes(data)
        with contextlib.suppress(UserError):
            guess.guess(source)
        made = formats.read(name, source if file.startswith("metadata") else source / file, folder / "out")
        for table in (*made.pictures(), *made.pairs()):
            table.to_pylist()

    return run


def _picture(data: bytes, folder: Path) -> None:
    from fashiondpo_pipeline.codecs import decode_picture

    assert decode_picture(data, "here").mode == "RGB"


def _lora(data: bytes, folder: Path) -> None:
    from fashiondpo_pipeline import lora_formats

    (folder / "l.safetensors").write_bytes(data)
    lora_formats.read(folder / "l.safetensors", "sd")


def _pairset(file: str) -> Parser:
    def run(data: bytes, folder: Path) -> None:
        from fashiondpo_pipeline import pairsets

        for name, content in pair_set().items():
            (folder / name).write_bytes(data if name == file else content)
        manifest = json.loads(pair_set()["manifest.json"])
        if file != "manifest.json":  # as one who means harm, or a tool, would leave it
            manifest["files"][file]["bytes"] = len(data)
            (folder / "manifest.json").write_text(json.dumps(manifest))
        found = pairsets.PairSet.open(folder)
        found.altered(), pairsets.in_words(found)
        for table in (*found.pictures(), *found.pairs()):
            table.to_pylist()
        for table in found.pairs():
            for row in table.to_pylist():
                found.picture(row["group"], row["first"])

    return run


@cache
def pair_set() -> dict[str, bytes]:
    from fashiondpo_pipeline import pairsets

    with tempfile.TemporaryDirectory() as place:
        pictures = [
            {
                "group": "g",
                "candidate": n,
                "prompt": "a bag",
                "picture": {"bytes": png(), "path": f"{n}.png"},
                "source": None,
            }
            for n in (0, 1)
        ]
        pairsets.write(
            Path(place) / "s",
            iter(pictures),
            iter([{"group": "g", "first": 0, "second": 1, "label": 1.0}]),
            {"source": "x", "lineage": {}, "dropped": {}},
        )
        return {path.name: path.read_bytes() for path in sorted((Path(place) / "s").iterdir())}


def _step(file: str, begun: bool = False) -> Parser:
    """A step of a run, whole or begun, with one of its small files damaged, as `status --verify` and readers meet it."""

    def run(data: bytes, place: Path) -> None:
        from fashiondpo_pipeline.workspace import Output

        folder = place / step_folder()[0]
        for name, content in step_folder()[1].items():
            if begun and name == "manifest.json":
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data if name == file else content)
        out = Output(folder, {}, {})
        out.verify()
        out.table("scores").to_pylist()
        out.columns("scores")
        if not begun:
            out.count("scores")
        out.open()

    return run


@cache
def step_folder() -> tuple[str, dict[str, bytes]]:
    """A finished step: the folder's name, and its files."""
    from fashiondpo_pipeline.workspace import Run, Step

    step = Step("score", "score-x", 1, 1, {"a": 1})
    with tempfile.TemporaryDirectory() as place:
        out = Run(Path(place)).output(step)
        out.open()
        out.write(0, scores=pa.table({"group": ["g"], "candidate": [0], "score": [0.5]}))
        out.finish({"pairs": 1})
        files = {
            path.relative_to(out.folder).as_posix(): path.read_bytes()
            for path in sorted(out.folder.rglob("*"))
            if path.is_file()
        }
    return step.folder, files


def step_seeds(file: str) -> list[bytes]:
    """A file of it; of JSON also as versions before wrote it, without a hash of itself."""
    whole = step_folder()[1][file]
    if not file.endswith(".json"):
        return [whole]
    return [whole, json.dumps({key: value for key, value in json.loads(whole).items() if key != "sum"}).encode() + b"\n"]


def _remembered(data: bytes, folder: Path) -> None:
    from fashiondpo_pipeline import remembered

    (folder / "files.json").write_bytes(data)
    remembered._read(folder / "files.json")


def tiny_loras() -> list[bytes]:
    import torch
    from safetensors.torch import save

    down, up = torch.zeros(2, 8), torch.zeros(8, 2)
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return [
        save(
            {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up},
            {"format": "pt", "lora_adapter_metadata": '{"unet.lora_alpha": 2}'},
        ),
        save(
            {
                f"{kohya}.lora_down.weight": down,
                f"{kohya}.lora_up.weight": up,
                f"{kohya}.alpha": torch.tensor(2.0),
            }
        ),
    ]


PROMPT_LINES = b"a red dress\n\na bag, black\nein gr\xc3\xbcnes Hemd\n"
PROMPT_CSV = b'group,prompt,colour,split\nb1,"a bag, ""black""",black,train\nd1,a dress,red,held-out\n'
PROMPT_ROWS = b'{"prompt": "a red dress", "group": 1, "tags": ["x", {"y": 1.5}]}\n{"prompt": "a bag", "split": "train"}\n'
ANSWER = b'{"of": "x", "group": "g", "left": 0, "right": 1, "verdict": "left", "pictures": [null, "ab"]}\n{"undo": 0}\n'
REPLIES = [
    b"8-Very Good Quality",
    b'{"level": 8}',
    b"<think>a 3</think> 8/10",
    b'{"choices": [{"message": {"content": "8", "refusal": null}, "finish_reason": "stop", "logprobs": {"content": [{"token": "8", "logprob": -0.1,'
    b' "top_logprobs": [{"token": "8", "logprob": -0.1}, {"token": "9", "logprob": -2.5}]}]}}]}',
    b'{"error": {"message": "no such model"}}',
    b'{"choices": [{"message": {"content": [{"type": "text", "text": "7"}]}}]}',
]
METADATA = b'{"prompt": "a bag", "image_0_file_name": "0.png", "image_1_file_name": "1.png", "label": 1, "gap": 0.5}\n'
METADATA_CSV = (
    b"prompt,image_0_file_name,image_1_file_name,label\na bag,0.png,1.png,1.0\na hat,1.png,0.png,0.5\n"
)
INVOKE = b'{"prompt": "a bag", "image_0": "0.png", "image_1": "1.png", "prefer_0": true, "prefer_1": false}\n'
CAPTIONS = b'{"text": "a bag", "image": "0.png"}\n'
KTO = b"file_name,caption,split\n0.png,a bag,exclusive_win\n1.png,a bag,exclusive_lose\n"
PLAIN = b"prompt,first,second,label\na bag,0.png,1.png,1\n"
JSON_LIST = (
    b'[{"prompt": "a bag", "image_path": ["0.png", "1.png"], "human_preference": [1, 0]},'
    b' {"prompt": "b", "path1": "0.png", "path2": "1.png"}]'
)
LABEL_STUDIO = (
    b'[{"data": {"prompt": "a bag", "image_0": "0.png", "image_1": "1.png"}, "annotations": [{"completed_by": 1, "result": [{"type": "pairwise",'
    b' "value": {"selected": "left"}}]}]}]'
)
PICKAPIC = [
    "caption",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "has_label",
    "image_0_uid",
    "image_1_uid",
    "ranking_id",
    "user_id",
]
HUGGINGFACE = [
    "prompt",
    "image_0",
    "image_1",
    "chosen",
    "rejected",
    "image",
    "label",
    "label_0",
    "label_1",
    "prefer_0",
    "prefer_1",
    "annotator",
    "gap",
    "source",
    "source_0",
]


def spreadsheet() -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    for line in PLAIN.decode().splitlines():
        book.active.append(line.split(","))
    book.save(sink := io.BytesIO())
    return sink.getvalue()


def packed(kind: str) -> bytes:
    """WebDataset's members, or a folder with a metadata file."""
    sink = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=sink, mode="w") as archive:
            for name, data in {"0.jpg_0.png": png(), "0.jpg_1.png": png("L"), "0.json": b'{"caption": "a bag", "label_0": 1, "label_1": 0}'}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    else:
        with zipfile.ZipFile(sink, "w") as archive:
            for name, data in {"0.png": png(), "1.png": png("L"), "metadata.jsonl": METADATA}.items():
                archive.writestr(name, data)
    return sink.getvalue()


def arrow() -> bytes:
    row = {
        "prompt": pa.array(["a bag"]),
        "image_0": _struct((png(), "a")),
        "image_1": _struct((png("L"), "b")),
        "label": pa.array([1.0]),
    }
    table, sink = pa.table(row), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _pickapic() -> list[bytes]:
    row = {
        "caption": ["a bag"],
        "jpg_0": [png()],
        "jpg_1": [png("L")],
        "label_0": [1.0],
        "label_1": [0.0],
        "has_label": [True],
        "ranking_id": [3],
        "user_id": [2],
    }
    return [parquet(pa.table(row))]


def _huggingface() -> list[bytes]:
    row = {
        "prompt": pa.array(["a bag"]),
        "image_0": _struct(
            (png(), "a"),
        ),
        "image_1": _struct(
            (png("L"), "b"),
        ),
        "label": pa.array([1.0]),
    }
    return [parquet(pa.table(row))]


def _pictures() -> list[bytes]:
    made = [
        png(mode, kind)
        for mode, kind in (
            ("RGB", "PNG"),
            ("RGBA", "PNG"),
            ("P", "PNG"),
            ("L", "PNG"),
            ("1", "PNG"),
            ("I;16", "PNG"),
            ("LA", "PNG"),
            ("RGB", "JPEG"),
            ("L", "JPEG"),
            ("CMYK", "JPEG"),
            ("RGB", "WEBP"),
            ("RGBA", "WEBP"),
            ("RGB", "GIF"),
        )
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(turned := io.BytesIO(), "JPEG", exif=exif)
    return [*made, turned.getvalue(), *cases(".png", ".jpg", ".webp")]


def _prompt_tables() -> list[bytes]:
    return [
        parquet(
            pa.table(
                {
                    "prompt": ["a", "b"],
                    "group": ["g", "h"],
                    "n": [1, None],
                    "when": pa.array([1, 2], pa.timestamp("us")),
                }
            )
        ),
        *cases(".parquet"),
    ]


def _configurations() -> list[bytes]:
    return [
        (ROOT / "pipeline.yaml").read_bytes(),
        b"name: a\nsample: &a {eta: 0.5, steps: 7}\nevaluate: {<<: *a, steps: 9}\n",
        b"experts: {x: {use: clip_text, options: {a: [1, null, 'y']}}}\npair: {weights: {x: 1.0e-1}}\nevaluate: {judge: null}\n",
        *cases(".yaml"),
    ]


def _lists() -> dict[str, list[bytes]]:
    return {
        ".csv": [b"group,first,second\ng,0,1\n7,1,0\n"],
        ".jsonl": [b'{"group": "g", "first": 0, "second": 1}\n'],
        ".parquet": [parquet(pa.table({"group": ["g"], "first": [0], "second": [1]}))],
    }


def targets() -> dict[str, Target]:
    """Every parser, by name."""
    from fashiondpo_pipeline.experts.chat import NoAnswer, _Unwell

    found = {
        "prompts .txt": Target(
            lambda: [PROMPT_LINES, PROMPT_LINES.decode().encode("utf-16")], _prompts(".txt")
        ),
        "prompts .csv": Target(
            lambda: [
                PROMPT_CSV,
                PROMPT_CSV.replace(b",", b";"),
                PROMPT_CSV.decode().encode("utf-16"),
                *cases(".csv"),
            ],
            _prompts(".csv"),
            share=2,
        ),
        "prompts .tsv": Target(lambda: [PROMPT_CSV.replace(b",", b"\t")], _prompts(".tsv")),
        "prompts .jsonl": Target(lambda: [PROMPT_ROWS, *cases(".jsonl")], _prompts(".jsonl"), share=2),
        "prompts .parquet": Target(
            _prompt_tables,
            _prompts(".parquet"),
            odd=lambda: odd_tables(["prompt", "prompt", "group", "split", "colour"]),
            share=2,
        ),
        "references .csv": Target(lambda: [b"prompt,reference\na bag,0.png\na hat,\n"], _references(".csv"), share=0.5),
        "references .jsonl": Target(
            lambda: [b'{"prompt": "a bag", "reference": "0.png"}\n{"prompt": "a hat", "reference": {"path": "0.png"}}\n'],
            _references(".jsonl"),
        ),
        "references .parquet": Target(
            lambda: [parquet(pa.table({"prompt": ["a bag", "a hat"], "reference": _struct((png(), "a"), (None, "0.png"))}))],
            _references(".parquet"),
            odd=lambda: odd_tables(["prompt", "reference", "group"]),
        ),
        "yaml": Target(_configurations, _yaml, share=0.6),
        "--set": Target(
            lambda: [
                b"finetune.beta=500",
                b"pair.weights={clip_i: 1}\n--set name=x",
                b"experts.judge.options.a=[1, {b: null}]",
                b"seed=7",
                b"sample.save=[0, 2]",
                b"finetune.options={a: &x [1], b: *x}",
            ],
            _set,
            share=2,
        ),
        "annotations": Target(lambda: [ANSWER, *cases(".jsonl")], _answers, share=2),
        **{
            f"list of pairs {ending}": Target(
                lambda e=ending: _lists()[e],
                _listed(ending),
                odd=(lambda: odd_tables(["group", "first", "second"])) if ending == ".parquet" else None,
            )
            for ending in (".csv", ".jsonl", ".parquet")
        },
        "judge's reply": Target(lambda: REPLIES, _reply, (UserError, UnicodeDecodeError), share=2),
        "judge's server": Target(
            lambda: [reply for reply in REPLIES if b"choices" in reply],
            _server,
            (UserError, NoAnswer, _Unwell),
            share=2,
        ),
        "import metadata.jsonl": Target(
            lambda: [METADATA, *cases(".jsonl")], _imported("huggingface", "metadata.jsonl")
        ),
        "import metadata.csv": Target(
            lambda: [METADATA_CSV, *cases(".csv")], _imported("huggingface", "metadata.csv")
        ),
        "import huggingface": Target(
            lambda: [*_huggingface(), *cases(".parquet")],
            _imported("huggingface", "x.parquet"),
            odd=lambda: odd_tables(HUGGINGFACE),
        ),
        "import pickapic": Target(
            lambda: [*_pickapic(), *cases(".parquet")],
            _imported("pickapic", "x.parquet"),
            odd=lambda: odd_tables(PICKAPIC),
        ),
        "import invoke": Target(lambda: [INVOKE], _imported("invoke", "x.jsonl")),
        "import captions": Target(lambda: [CAPTIONS], _imported("captions", "x.jsonl")),
        "import kto": Target(lambda: [KTO], _imported("kto", "x.csv")),
        "import json": Target(lambda: [JSON_LIST, LABEL_STUDIO, *cases(".json")], _imported("json", "x.json")),
        "import tsv": Target(lambda: [PLAIN.replace(b",", b"\t"), PLAIN.replace(b",", b";")], _imported("csv", "x.tsv")),
        "import xlsx": Target(lambda: [spreadsheet()], _imported("csv", "x.xlsx"), share=0.5),
        "import tar": Target(lambda: [packed("tar")], _imported("huggingface", "x.tar"), share=0.5),
        "import zip": Target(lambda: [packed("zip")], _imported("huggingface", "x.zip"), share=0.5),
        "import arrow": Target(lambda: [arrow()], _imported("huggingface", "x.arrow"), share=0.5),
        "import csv": Target(lambda: [PLAIN, *cases(".csv")], _imported("csv", "x.csv")),
        "picture": Target(_pictures, _picture, share=3),
        "lora": Target(tiny_loras, _lora),
        **{
            f"pair set {name}": Target(lambda n=name: [pair_set()[n]], _pairset(name), odd=odd)
            for name, odd in (
                ("manifest.json", None),
                (
                    "pictures-00000.parquet",
                    lambda: odd_tables(["group", "candidate", "prompt", "picture", "source", "liked"]),
                ),
                (
                    "pairs-00000.parquet",
                    lambda: odd_tables(["group", "first", "second", "label", "annotator", "gap", "source"]),
                ),
            )
        },
        **{
            f"step {name}": Target(lambda n=name: step_seeds(n), _step(name), share=0.5)
            for name in ("manifest.json", "claim.json", "parts/00000.json", "parts/scores-00000.parquet")
        },
        "step begun": Target(
            lambda: step_seeds("parts/00000.json"), _step("parts/00000.json", begun=True), share=0.5
        ),
        "remembered": Target(
            lambda: [b'{"sha256 /x": {"stamp": [1, 2, 3, 4], "answer": "ab"}}'], _remembered, share=0.5
        ),
    }
    return found


# -- the campaign


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TooSlow in whatever runs longer."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def meet(target: Target, data: bytes, place: Path) -> str:
    """What a parser makes of an input, in a folder of its own: "read" or the name of the answer; anything else is raised."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        try:
            with within(SECONDS), contextlib.redirect_stdout(io.StringIO()):
                target.run(data, Path(folder))
        except target.answers as problem:
            assert re.search(r"\S", str(problem)), "an answer without words"
            return type(problem).__name__
    return "read"


def campaign(
    target: Target, inputs: int, number: int, place: Path, told: Counter[str]
) -> tuple[bytes, BaseException] | None:
    """Try so many inputs; told counts what became of them. Returns the smallest one that failed, with its exception."""
    seeds = target.seeds()
    with contextlib.suppress(target.answers), tempfile.TemporaryDirectory(dir=place) as folder:
        target.run(seeds[0], Path(folder))  # imports what it needs, which takes longer than an input may
    strategy = mutations(seeds)
    if target.odd is not None:
        strategy = st.one_of(strategy, target.odd())
    failed: list[tuple[bytes, BaseException]] = []

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(strategy)
    def every(data: bytes) -> None:
        try:
            told[meet(target, data, place)] += 1
        except BaseException as problem:
            failed.append((data, problem))
            raise

    try:
        every()
    except Exception:
        if not failed:
            raise
    return failed[-1] if failed else None


def shares(chosen: Mapping[str, Target], inputs: int) -> dict[str, int]:
    """How many inputs each parser gets; they add up to at least `inputs`."""
    whole = sum(target.share for target in chosen.values())
    return {name: -int(-inputs * target.share // whole) for name, target in chosen.items()}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--inputs", type=int, default=100_000, help="in all")
    words.add_argument("--only", action="append", help="a parser's name, or its beginning; may be repeated")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument(
        "--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that failed"
    )
    words.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    asked = words.parse_args()
    chosen = {
        name: target
        for name, target in targets().items()
        if not asked.only or any(name.startswith(one) for one in asked.only)
    }
    if not chosen:
        sys.exit(f"no parser is called so; there are: {', '.join(targets())}")
    faulthandler.enable()
    broken, total = 0, 0
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        for name, count in shares(chosen, asked.inputs).items():
            told: Counter[str] = Counter()
            begun = time.perf_counter()
            failed = campaign(chosen[name], count, asked.seed, Path(place), told)
            total += told.total()
            print(
                f"{name:32} {told.total():7,} inputs  {time.perf_counter() - begun:6.1f} s  {dict(told)}",
                flush=True,
            )
            if failed:
                broken += 1
                asked.keep.mkdir(parents=True, exist_ok=True)
                file = asked.keep / re.sub(r"\W+", "-", name)
                file.write_bytes(failed[0])
                print(f"  FAILED with {file} ({len(failed[0]):,} bytes):")
                print("".join(traceback.format_exception(failed[1])[-6:]), flush=True)
    print(f"{total:,} inputs, {broken} parsers failed")
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
