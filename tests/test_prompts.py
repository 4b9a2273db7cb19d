"""Prompts from every kind of file, each mistake with its line, and a split that never moves a prompt."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.prompts import HELD_OUT, TRAIN, Prompts, read

LINES = ["a red dress", "a navy boot", "ein grünes Hemd", "a bag, black"]


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def everything(path, held_out=0.2):
    """Every row by its prompt."""
    return {row["prompt"]: row for split in read(path, held_out).values() for row in split.rows}


def refused(path):
    with pytest.raises(UserError) as problem:
        read(path)
    return str(problem.value)


# -- kinds of file


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = put(tmp_path, "p.txt", "\n".join(["  a red dress ", "", *LINES[1:], ""]))
    assert sorted(everything(path)) == sorted(LINES)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(tmp_path):
    assert sorted(everything(put(tmp_path, "p.txt", b"\xef\xbb\xbf" + "\r\n".join(LINES).encode()))) == sorted(LINES)


def test_a_csv_file_keeps_its_other_columns(tmp_path):
    path = put(tmp_path, "p.csv", 'group,prompt,colour,split\nb1,"a bag, black",black,train\nd1,a dress,red,held-out\n')
    found = read(path)
    assert found[TRAIN].rows == [{"group": "b1", "prompt": "a bag, black", "colour": "black", "split": "train"}]
    assert found[HELD_OUT].rows == [{"group": "d1", "prompt": "a dress", "colour": "red", "split": "held-out"}]


def test_a_jsonl_file_keeps_what_its_objects_hold(tmp_path):
    rows = [{"prompt": line, "n": n} for n, line in enumerate(LINES)] + [{"prompt": "a\u2028line separator", "n": 9}]
    path = put(tmp_path, "p.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert {prompt: row["n"] for prompt, row in everything(path).items()} == {row["prompt"]: row["n"] for row in rows}


def test_a_parquet_file_keeps_its_columns_but_no_plain_binary_one(tmp_path):
    table = pa.table({"prompt": LINES[:2], "colour": ["red", "navy"], "reference": [{"bytes": b"x", "path": "x.png"}, None],
                      "raw": [b"1", b"2"]})
    pq.write_table(table, tmp_path / "p.parquet")
    found = everything(tmp_path / "p.parquet")
    assert found["a red dress"]["colour"] == "red"
    assert found["a red dress"]["reference"] == {"bytes": b"x", "path": "x.png"}
    assert found["a navy boot"]["reference"] is None
    assert "raw" not in found["a red dress"]


# -- keys


def test_every_prompt_gets_a_readable_key_of_its_own(tmp_path):
    groups = [row["group"] for row in everything(put(tmp_path, "p.txt", "A red dress!\na red dress\n!!!\n???")).values()]
    assert len(set(groups)) == 4
    assert sum(group.startswith("a-red-dress-") for group in groups) == 2
    assert sum(group.startswith("prompt-") for group in groups) == 2


def test_a_given_key_is_kept_as_text(tmp_path):
    rows = "\n".join(json.dumps({"prompt": line, "group": n}) for n, line in enumerate(LINES))
    assert [everything(put(tmp_path, "p.jsonl", rows))[line]["group"] for line in LINES] == ["0", "1", "2", "3"]


# -- the split


def test_the_split_is_a_hash_of_the_text_and_of_nothing_else(tmp_path):
    """Adding prompts, reordering them, another kind of file: no prompt changes sides."""
    many = [f"a dress number {n}" for n in range(300)]
    first = {prompt: row["split"] for prompt, row in everything(put(tmp_path, "a.txt", "\n".join(many))).items()}
    more = "\n".join(json.dumps({"prompt": prompt}) for prompt in [*reversed(many), "a hat"])
    second = {prompt: row["split"] for prompt, row in everything(put(tmp_path, "b.jsonl", more)).items()}
    assert second == first | {"a hat": second["a hat"]}
    assert 0.13 < list(first.values()).count(HELD_OUT) / 300 < 0.27


def test_a_larger_share_only_adds_held_out_prompts(tmp_path):
    path = put(tmp_path, "p.txt", "\n".join(f"prompt {n}" for n in range(100)))
    small, large = ({row["prompt"] for row in read(path, share)[HELD_OUT].rows} for share in (0.1, 0.4))
    assert small < large
    assert read(path, 0.0)[HELD_OUT].rows == []


def test_the_split_is_the_same_in_another_process_and_release(tmp_path):
    path = put(tmp_path, "p.txt", "\n".join(f"prompt {n}" for n in range(20)))
    code = "import sys; from pathlib import Path; from fashiondpo_pipeline.prompts import read; " \
           "print(*(row['prompt'].split()[1] for row in read(Path(sys.argv[1]))['held-out'].rows))"
    told = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True,
                          env={"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)})
    assert told.stdout.split() == [row["prompt"].split()[1] for row in read(path)[HELD_OUT].rows] == ["3", "6", "13", "15"]


# -- identity


ROWS = st.lists(st.dictionaries(st.sampled_from(["prompt", "group", "colour"]), st.text(max_size=3)), max_size=3)


@given(ROWS, ROWS)
def test_an_identity_changes_if_and_only_if_a_row_does(first, second):
    assert (Prompts(first).identity == Prompts(second).identity) == (first == second)


def test_a_reference_picture_is_part_of_the_identity():
    def identity(data):
        return Prompts([{"group": "a", "prompt": "a", "reference": {"bytes": data, "path": None}}]).identity

    assert identity(b"one") == identity(b"one") != identity(b"two")


def test_an_identity_takes_whatever_a_table_holds(tmp_path):
    table = pa.table({"prompt": ["a"], "when": pa.array([1], pa.timestamp("s")), "size": [float("nan")], "tags": [["x", "y"]]})
    pq.write_table(table, tmp_path / "p.parquet")
    splits = [read(tmp_path / "p.parquet") for _ in range(2)]
    assert splits[0][TRAIN].identity == splits[1][TRAIN].identity


# -- mistakes


@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl"])
def test_a_wrong_encoding_is_named_with_its_line(tmp_path, kind):
    path = put(tmp_path, f"p{kind}", "a red dress\na bag\nein grünes Hemd".encode("latin-1"))
    assert refused(path) == f"{path}, line 3: not UTF-8 (byte 24); save the file as UTF-8"


@pytest.mark.parametrize(("name", "content"), [("p.txt", ""), ("p.txt", " \n\n"), ("p.jsonl", ""), ("p.csv", "prompt\n")])
def test_an_empty_file_is_named(tmp_path, name, content):
    path = put(tmp_path, name, content)
    assert refused(path) == f"{path}: there is no prompt in it; write one a line"


def test_an_empty_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet") == f"{tmp_path / 'p.parquet'}: there is no prompt in it; write one a line"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("p.csv", "prompt,colour\na dress,red\n\n  ,navy\n", 4),
        ("p.csv", 'prompt,colour\n"a dress\nof two lines",red\n,navy\n', 4),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ""}', 3),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', 2),
        ("p.jsonl", '{"prompt": 3}', 1),
    ],
)
def test_an_empty_prompt_is_named_with_its_line(tmp_path, name, content, line):
    path = put(tmp_path, name, content)
    assert refused(path) == f"{path}, line {line}: the prompt is empty; fill it or take the line out"


def test_a_prompt_given_twice_is_named_with_both_lines(tmp_path):
    path = put(tmp_path, "p.csv", "group,prompt\nx,a dress\ny,a bag\nx,a boot\n")
    assert refused(path) == f"{path}, line 4: 'x' was given in line 2; take one of them out"
    path = put(tmp_path, "p.txt", "a dress\na bag\na dress")
    assert refused(path).endswith(" was given in line 1; take one of them out")


def test_a_split_that_is_none_is_named(tmp_path):
    path = put(tmp_path, "p.csv", "prompt,split\na dress,train\na bag,test\n")
    assert refused(path) == f"{path}, line 3: split 'test' is not one of 'train', 'held-out'"


def test_a_missing_column_is_named(tmp_path):
    path = put(tmp_path, "p.csv", "text,colour\na dress,red\n")
    assert refused(path) == f"{path}: no column 'prompt' in its first line; name the columns there"
    pq.write_table(pa.table({"text": ["a dress"], "colour": ["red"]}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet") == f"{tmp_path / 'p.parquet'}: no column 'prompt', only text, colour; rename one"


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = put(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b"')
    assert refused(path).startswith(f"{path}, line 2: not JSON (")
    path = put(tmp_path, "q.jsonl", '{"prompt": "a"}\n["b"]')
    assert refused(path) == f'{path}, line 2: expected an object such as {{"prompt": "a red dress"}}'


def test_an_unknown_kind_of_file_is_named(tmp_path):
    assert refused(put(tmp_path, "p.xlsx", "a dress")) == (
        "prompts.file: p.xlsx is none of .txt, .csv, .jsonl, .parquet; save it as one of them"
    )


def test_a_binary_file_of_an_unknown_kind_is_no_question_of_encoding(tmp_path):
    assert refused(put(tmp_path, "p.xlsx", b"PK\x03\x04\xff\xfe")) == (
        "prompts.file: p.xlsx is none of .txt, .csv, .jsonl, .parquet; save it as one of them"
    )


def test_a_missing_file_is_named(tmp_path):
    assert refused(tmp_path / "p.txt") == (
        f"prompts.file: there is no file {tmp_path / 'p.txt'}; check the path (relative ones start in the working folder)"
    )


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = put(tmp_path, "p.parquet", "prompt\na dress\n")
    assert refused(path).startswith(f"{path} cannot be read (")
