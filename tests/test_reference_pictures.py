"""A prompt's reference picture, however its column holds it: read, or refused before anything is drawn with what is needed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_runs import folder_of, prepare, refused, table, works

from fashiondpo_pipeline import references
from fashiondpo_pipeline.codecs import encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.prompts import open_splits

PROMPTS = {"a red dress": "train", "a blue hat": "train", "a green bag": "held-out", "a pink boot": "held-out"}
PICTURES = [encode_png(np.full((8, 8, 3), 50 * n, np.uint8)) for n in range(4)]
ASKED = ("--set", "experts.look={use: clip_image, options: {model: 'local-dir:CLIP'}}", "--set", "rounds=1", "--set", "sample.candidates=2",
         "--set", "evaluate.pictures=1")
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(folder, cells, kind):
    columns = {"prompt": list(PROMPTS), "split": list(PROMPTS.values()), "reference": pa.array(cells, kind)}
    pq.write_table(pa.table(columns), folder / "p.parquet")
    return folder / "p.parquet"


def lay(folder, kind):
    """A file of prompts that holds the pictures in one of many ways."""
    names = [f"at/r{n}.png" for n in range(4)]
    (folder / "at").mkdir(exist_ok=True)
    for name, data in zip(names, PICTURES, strict=True):
        (folder / name).write_bytes(data)
    if kind in ("binary", "large_binary"):
        return parquet(folder, PICTURES, getattr(pa, kind)())
    if kind == "struct":
        return parquet(folder, [{"bytes": data, "path": None} for data in PICTURES], PICTURE)
    if kind == "struct of paths":
        return parquet(folder, [{"bytes": None, "path": name} for name in names], PICTURE)
    if kind == "path":
        return parquet(folder, names, pa.string())
    rows = [{"prompt": prompt, "split": split, "reference": name} for (prompt, split), name in zip(PROMPTS.items(), names, strict=True)]
    if kind == "csv":
        (folder / "p.csv").write_text("prompt,split,reference\n" + "".join(",".join(row.values()) + "\n" for row in rows))
        return folder / "p.csv"
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "p.jsonl"


KINDS = ["binary", "large_binary", "struct", "struct of paths", "path", "csv", "jsonl"]


def opened(path):
    return references.filled(open_splits(path, 0.2, {"train": None, "held-out": None}), path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_is_the_same_picture_however_it_is_held(tmp_path, kind):
    splits = opened(lay(tmp_path, kind))
    found = [row["reference"]["bytes"] for split in ("train", "held-out") for row in splits[split].rows]
    assert found == PICTURES
    assert all("reference" in prompts.columns for prompts in splits.values())


def test_a_line_without_the_key_has_no_reference_and_the_others_keep_theirs(tmp_path):
    path = lay(tmp_path, "jsonl")
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    del first["reference"]
    path.write_text("\n".join(map(json.dumps, [first, *others])))
    found = [row["reference"] for split in ("train", "held-out") for row in opened(path)[split].rows]
    assert found[0] is None and [picture["bytes"] for picture in found[1:]] == PICTURES[1:]


def test_a_table_that_was_read_before_keeps_its_identity(tmp_path):
    path = lay(tmp_path, "struct")
    before = open_splits(path, 0.2, {"train": None, "held-out": None})
    assert {split: found.about for split, found in opened(path).items()} == {split: found.about for split, found in before.items()}


@pytest.mark.parametrize("kind", ["csv", "struct of paths"])
def test_a_picture_beside_the_prompts_that_changes_makes_other_prompts(tmp_path, kind, monkeypatch):
    """Though the file of prompts, by which what is known of it is remembered, is as it was."""
    from fashiondpo_pipeline import remembered

    monkeypatch.setattr(remembered, "SETTLED", -1.0)
    monkeypatch.setenv("FDPO_CACHE", str(tmp_path / "cache"))
    path = lay(tmp_path, kind)
    before = [opened(path)["train"].identity for _ in range(2)]
    (tmp_path / "at/r0.png").write_bytes(PICTURES[3])
    assert before[0] == before[1] != opened(path)["train"].identity


@pytest.mark.parametrize(("cells", "kind", "said"), [
    ([[{"bytes": data, "path": None}] for data in PICTURES], pa.list_(PICTURE), "it is a list: of 'a-red-dress-"),
    ([1, 2, 3, 4], pa.int64(), "it is of type int: of 'a-red-dress-"),
    ([{"bytes": None, "path": None}] * 4, PICTURE, "there are neither bytes nor a path: of"),
    ([b"no picture"] * 4, pa.binary(), "the picture cannot be read: of"),
    (["../r0.png"] * 4, pa.string(), "the path leads out of its folder: of"),
    (["/etc/hostname"] * 4, pa.string(), "the path leads out of its folder: of"),
    (["none.png"] * 4, pa.string(), "the file is not there: of"),
    ([b"version https://git-lfs.github.com/spec/v1\noid"] * 4, pa.large_binary(), "a git LFS pointer stands where the picture should be: of"),
])
def test_what_is_no_picture_is_refused_with_what_is_needed(tmp_path, cells, kind, said):
    path = parquet(tmp_path, cells, kind)
    with pytest.raises(UserError) as problem:
        opened(path)
    assert str(problem.value).startswith(f"{path}, column 'reference': {said}")
    assert "and of 3 more prompts; each should be a picture's bytes, bytes and path as Hugging Face saves them, or the path of a file beside " \
        "p.parquet" in str(problem.value)


def test_a_prompt_may_have_none(tmp_path):
    splits = opened(parquet(tmp_path, [PICTURES[0], None, PICTURES[2], None], pa.binary()))
    assert [row["reference"] and row["reference"]["bytes"] for row in splits["train"].rows] == [PICTURES[0], None]


def test_a_run_scores_by_paths_and_refuses_before_it_draws(tmp_path, tiny_sd, tiny_clip, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, tiny_sd, tiny_clip))
    asked = [word.replace("CLIP", str(tiny_clip)) for word in ASKED]
    lay(tmp_path, "csv")
    for stage in ("sample", "score"):
        works(stage, "--round", "1", *asked, "--set", "prompts.file=p.csv")
    scores = table(folder_of(tmp_path / "runs/t", 1, "score-look"), "scores")
    assert len(scores) == 4 and np.isfinite(scores["score"].to_numpy()).all()
    parquet(tmp_path, [[1]] * 4, pa.list_(pa.int64()))
    drawn = sorted(tmp_path.glob("runs/t/*/*"))
    assert "column 'reference': it is a list" in refused("round", *asked, "--set", "prompts.file=p.parquet")
    assert sorted(tmp_path.glob("runs/t/*/*")) == drawn
