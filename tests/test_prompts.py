"""Prompts from every kind of file, each mistake with its line, and a split that never moves a prompt."""

import json
import math
import subprocess
import sys

import numpy as np
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


@pytest.mark.parametrize(("kind", "more"), [(".txt", ""), (".csv", " (in a spreadsheet: CSV UTF-8)"), (".jsonl", "")])
def test_a_wrong_encoding_is_named_with_its_line(tmp_path, kind, more):
    path = put(tmp_path, f"p{kind}", "a red dress\na bag\nein grünes Hemd".encode("latin-1"))
    assert refused(path) == f"{path}, line 3: not UTF-8 (byte 24); save the file as UTF-8{more}"
    path = put(tmp_path, f"p{kind}", "ein grünes Hemd\na bag\nein grünes Hemd".encode("cp1252"))
    assert refused(path).splitlines() == [f"{path}: 2 things do not fit", f"  line 1: not UTF-8 (byte 6); save the file as UTF-8{more}",
                                          f"  line 3: not UTF-8 (byte 28); save the file as UTF-8{more}"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(("name", "content"), [("p.txt", "ein grünes Hemd\r\na bag\r\n"), ("p.csv", "prompt\r\nein grünes Hemd\r\na bag\r\n"),
                                               ("p.jsonl", '{"prompt": "ein grünes Hemd"}\n{"prompt": "a bag"}')])
def test_what_a_byte_order_mark_says_is_heeded(tmp_path, encoding, name, content):
    assert sorted(everything(put(tmp_path, name, content.encode(encoding)))) == ["a bag", "ein grünes Hemd"]


def test_utf_16_that_ends_in_mid_letter_is_named_and_without_its_mark_has_control_characters(tmp_path):
    path = put(tmp_path, "p.txt", "a red dress".encode("utf-16")[:-1])
    assert refused(path) == f"{path}: it begins as UTF-16 and does not go on so (byte 22); save the file as UTF-8"
    path = put(tmp_path, "p.txt", "a red dress".encode("utf-16-le"))
    assert refused(path) == f"{path}, line 1: the prompt holds the control character U+0000; take it out"


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


def test_an_unquoted_comma_cuts_no_prompt(tmp_path):
    path = put(tmp_path, "p.csv", "prompt\na red dress, white background, studio light\na bag\na blue shirt, on a model\n")
    assert refused(path).splitlines() == [f"{path}: 2 things do not fit", "  line 2: 3 cells instead of 1; put cells with a comma in quotes",
                                          "  line 4: 2 cells instead of 1; put cells with a comma in quotes"]
    path = put(tmp_path, "p.csv", "prompt,colour\na red dress\n")
    assert refused(path) == f"{path}, line 2: 1 cells instead of 2; give every column a cell, an empty one if need be"


def test_a_stray_quote_swallows_nothing(tmp_path):
    opens = 'a quote opens and does not close; close it, or write "" for a quote within quotes'
    path = put(tmp_path, "p.csv", 'prompt,style\n"a,x\nb,y\nc,z,1\n')
    assert refused(path).splitlines() == [f"{path}: 2 things do not fit", f"  line 2: {opens}",
                                          "  line 4: 3 cells instead of 2; put cells with a comma in quotes"]
    path = put(tmp_path, "p.csv", 'prompt,style\n"a,x\n' + "a photo of a garment,x\n" * 9_000)
    assert refused(path).splitlines()[1] == f"  line 2: {opens}", "the csv module ends at 128 KiB with an error of its own"
    path = put(tmp_path, "p.csv", 'prompt,style\n"a,x\na 5"" heel,y\na bag",z\n"a hat" red,x\n')
    assert refused(path) == f'{path}, line 5: text follows a closing quote; put the whole cell in quotes, with "" for a quote within'
    path = put(tmp_path, "p.csv", 'prompt,style\n"a,x\na 5" heel,y\n')
    assert refused(path) == (f'{path}, line 2: text follows a closing quote; it closes in line 3; put the whole cell in quotes, with "" for a '
                             "quote within")


def test_many_stray_quotes_cost_no_time_and_name_no_more_than_twenty(tmp_path):
    path = put(tmp_path, "p.csv", "prompt\n" + '"\n\n"x' * 5_000)
    told = refused(path).splitlines()
    assert len(told) <= 22


@pytest.mark.parametrize(("name", "content", "where"), [
    ("p.csv", "prompt,style,style\na,x,y\n", ", line 1: the column 'style' is"),
    ("p.csv", "prompt,prompt\na,b\n", ", line 1: the column 'prompt' is"),
    ("p.jsonl", '{"prompt": "a", "prompt": "b"}', ", line 1: not JSON (the key 'prompt' is given"),
])
def test_of_two_columns_of_one_name_none_wins(tmp_path, name, content, where):
    assert refused(path := put(tmp_path, name, content)).startswith(f"{path}{where}")


def test_two_parquet_columns_of_one_name_are_named(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet") == f"{tmp_path / 'p.parquet'}: the column 'prompt' is there twice; rename or drop one of them"


@pytest.mark.parametrize(("name", "content"), [
    ("p.csv", "prompt;colour\na red, warm dress;red\n"), ("p.csv", "prompt\tcolour\na red, warm dress\tred\n"),
    ("p.tsv", "prompt\tcolour\na red, warm dress\tred\n"), ("P.CSV", 'prompt,colour,,\n"a red, warm dress",red,,\n,,,\n'),
])
def test_a_table_is_read_as_spreadsheets_save_it(tmp_path, name, content):
    (row,) = everything(put(tmp_path, name, content), 0.0).values()
    assert (row["prompt"], row["colour"], sorted(row)) == ("a red, warm dress", "red", ["colour", "group", "prompt", "split"])


def test_a_cell_without_a_column_is_named(tmp_path):
    path = put(tmp_path, "p.csv", "prompt,,colour\na,b,c\n")
    assert refused(path) == f"{path}, line 2: cell 2 is in a column without a name; name it in the first line"


LONG = "x" * ((1 << 17) + 1)


@pytest.mark.parametrize(("row", "sentence"), [
    ({"prompt": 3}, "the prompt is a number (3), not text; put it in quotes"),
    ({"prompt": ["a"]}, "the prompt is a list (['a']), not text; put it in quotes"),
    ({"prompt": {"a": 1}}, "the prompt is an object ({'a': 1}), not text; put it in quotes"),
    ({"prompt": True}, "the prompt is true or false (True), not text; put it in quotes"),
    ({"prompt": "a", "group": ["x"]}, "the group is a list (['x']), not text; put its key in quotes"),
    ({"prompt": "a", "group": math.nan}, "the group is a number (nan), not text; put its key in quotes"),
    ({"prompt": "a", "split": ["x"]}, "split ['x'] is not one of 'train', 'held-out'"),
    ({"prompt": "a", "split": 0}, "split 0 is not one of 'train', 'held-out'"),
    ({"prompt": "a\0"}, "the prompt holds the control character U+0000; take it out"),
    ({"prompt": "a\x1b[2Jb"}, "the prompt holds the control character U+001B; take it out"),
    ({"prompt": "a", "group": "b\x07"}, "the group holds the control character U+0007; take it out"),
    ({"prompt": "a", "tags": [{"n": "\ud800"}]}, "the tags holds half a character (U+D800); take it out"),
    ({"prompt": "\udcff"}, "the prompt holds half a character (U+DCFF); take it out"),
    ({"prompt": LONG}, "the prompt is longer than 131,072 letters; shorten it"),
])
def test_what_a_cell_is_not_is_said_with_its_line(tmp_path, row, sentence):
    path = put(tmp_path, "p.jsonl", '{"prompt": "fine"}\n' + json.dumps(row))
    assert refused(path) == f"{path}, line 2: {sentence}"


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("p.csv", f"prompt\n{LONG}\n", "a cell is longer than 131,072 letters; shorten it"),
    ("p.txt", f"\n{LONG}", "the prompt is longer than 131,072 letters; shorten it"),
    ("p.jsonl", '\n{"prompt": "a", "n": ' + "[" * 5_000 + "]" * 5_000 + "}", "not JSON (it is nested more than 64 deep)"),
    ("p.jsonl", '\n{"prompt": "a", "n": ' + "[" * 70 + "]" * 70 + "}", "not JSON (it is nested more than 64 deep)"),
    ("p.txt", "\na\x0cb", "the prompt holds the control character U+000C; take it out"),
])
def test_what_is_too_long_or_too_deep_is_named(tmp_path, name, content, sentence):
    assert refused(path := put(tmp_path, name, content)) == f"{path}, line 2: {sentence}"


def test_parquet_cells_that_python_cannot_hold_are_named_with_their_rows(tmp_path):
    text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    when = pa.array([2**62, 2**62], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a", "b"], "when": when}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet").splitlines()[0] == f"{tmp_path / 'p.parquet'}: 2 things do not fit"
    assert "  row 2: the when cannot be read (" in refused(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": text}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet").startswith(f"{tmp_path / 'p.parquet'}, row 2: the prompt cannot be read ('utf-8' codec")
    pq.write_table(pa.table({"prompt": [b"a"]}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet") == f"{tmp_path / 'p.parquet'}: the column 'prompt' holds bytes, not text; save it as text"


def test_a_parquet_file_whose_columns_have_no_name_in_utf_8_is_named(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "colour": ["b"]}), tmp_path / "p.parquet")
    (tmp_path / "p.parquet").write_bytes((tmp_path / "p.parquet").read_bytes().replace(b"colour", b"colo\xff\xfe"))
    assert refused(tmp_path / "p.parquet").startswith(f"{tmp_path / 'p.parquet'} cannot be read ('utf-8' codec")


def test_all_lines_are_named_at_once_the_first_twenty_and_how_many_more(tmp_path):
    path = put(tmp_path, "p.jsonl", "\n".join(["{}", '{"prompt": "a"}'] * 30))
    told = refused(path).splitlines()
    assert told[0] == f"{path}: 59 things do not fit"  # each empty prompt, and each repetition of `a`
    assert [line.split(":")[0] for line in told[1:21]] == [f"  line {n}" for n in (1, *range(3, 22))]
    assert told[21:] == ["  and 39 more"]


def test_a_split_that_is_none_is_named(tmp_path):
    path = put(tmp_path, "p.csv", "prompt,split\na dress,train\na bag,test\n")
    assert refused(path) == f"{path}, line 3: split 'test' is not one of 'train', 'held-out'"


def test_a_missing_column_is_named(tmp_path):
    path = put(tmp_path, "p.csv", "text,colour\na dress,red\n")
    assert refused(path) == f"{path}: no column 'prompt' in its first line, only text, colour; name the columns there"
    pq.write_table(pa.table({"text": ["a dress"], "colour": ["red"]}), tmp_path / "p.parquet")
    assert refused(tmp_path / "p.parquet") == f"{tmp_path / 'p.parquet'}: no column 'prompt', only text, colour; rename one"


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = put(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b"')
    assert refused(path).startswith(f"{path}, line 2: not JSON (")
    path = put(tmp_path, "q.jsonl", '{"prompt": "a"}\n["b"]')
    assert refused(path) == f'{path}, line 2: expected an object such as {{"prompt": "a red dress"}}'


def test_an_unknown_kind_of_file_is_named(tmp_path):
    assert refused(put(tmp_path, "p.xlsx", "a dress")) == (
        "prompts.file: p.xlsx is none of .txt, .csv, .tsv, .jsonl, .parquet; save it as one of them"
    )


def test_a_binary_file_of_an_unknown_kind_is_no_question_of_encoding(tmp_path):
    assert refused(put(tmp_path, "p.xlsx", b"PK\x03\x04\xff\xfe")) == (
        "prompts.file: p.xlsx is none of .txt, .csv, .tsv, .jsonl, .parquet; save it as one of them"
    )


def test_a_missing_file_is_named(tmp_path):
    assert refused(tmp_path / "p.txt") == (
        f"prompts.file: there is no file {tmp_path / 'p.txt'}; check the path (relative ones start in the working folder)"
    )


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = put(tmp_path, "p.parquet", "prompt\na dress\n")
    assert refused(path).startswith(f"{path} cannot be read (")
