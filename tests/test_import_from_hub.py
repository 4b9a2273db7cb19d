"""A part of a data set of the hub at one commit: only what is needed is fetched, and what the hub refuses is a sentence."""

import json

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, HubServer
from test_formats import painted, pickapic, reasons, told
from whole_runs import fdpo

from fashiondpo_pipeline import formats
from fashiondpo_pipeline.errors import UserError

SET = f"hf://ann/hats@{COMMIT}"
ROWS, BIG = 40, 1 << 18  # rows of a shard, one a row group; bytes of a picture


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with two large shards and a set of pictures."""
    pickapic(tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    for name in ("jpg_0", "jpg_1"):
        large = pa.array([data + bytes(BIG) for data in table[name].to_pylist()], pa.binary())
        table = table.set_column(table.schema.get_field_index(name), name, large)
    pq.write_table(pa.concat_tables([table] * (ROWS // 4)), tmp_path / "p.parquet", row_group_size=1, compression="none", use_dictionary=False)
    shard = (tmp_path / "p.parquet").read_bytes()
    lines = [{"chosen_file_name": "a.png", "rejected_file_name": "more/b.png", "prompt": "a hat"}, {"file_name": "../README.md", "prompt": "x"}]
    files = {"data/train-00000-of-00002.parquet": shard, "data/train-00001-of-00002.parquet": shard, "README.md": b"# hats",
             "pictures/metadata.jsonl": "\n".join(map(json.dumps, lines)).encode(), "pictures/a.png": painted(1), "pictures/more/b.png": painted(2),
             "pictures/unused.png": painted(3)}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_of_a_large_set_only_what_is_taken_is_fetched(hub, tmp_path):
    found = formats.read("pickapic", f"{SET}/data", tmp_path / "set", most=3)
    assert found.counts["pairs"] == 3 and told(found)[0][1].startswith(painted(0, "JPEG"))
    size = len(hub.files["data/train-00000-of-00002.parquet"])
    assert 6 * BIG < hub.sent["data/train-00000-of-00002.parquet"] < size / 2 and size > 2 * ROWS * BIG
    assert hub.sent.get("data/train-00001-of-00002.parquet", 0) == 0, "the second shard is not touched"
    assert found.manifest["lineage"] == {"format": "pickapic", "path": f"{SET}/data", "columns": {}, "split": None, "most": 3}


def test_pictures_beside_a_table_are_fetched_as_rows_name_them(hub, tmp_path):
    found = formats.read("huggingface", f"{SET}/pictures", tmp_path / "set")
    assert [row[:4] for row in told(found)] == [("a hat", painted(1), painted(2), 1.0)]
    assert reasons(found) == {"the path leads out of its folder": 1, "no row that was taken names the picture": 1}
    named = formats.read("huggingface", f"hf://datasets/ann/hats@{COMMIT}/pictures/metadata.jsonl", tmp_path / "named")
    assert told(named) == told(found) and reasons(named) == {"the path leads out of its folder": 1}


def test_the_command_says_what_it_took(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fdpo("import", "pickapic", f"{SET}/data", "--most", "2")
    assert done.code == 0 and done.out == "pairs/hats\n"
    assert "note: 2 rows were taken (--most), and nothing behind them was looked at" in done.err


@pytest.mark.parametrize(("url", "sentence"), [
    ("hf://ann/hats", "name the whole commit, 40 digits"), ("hf://ann/hats@main", "name the whole commit, 40 digits"),
    ("hf://ann/hats@" + COMMIT[:7], "name the whole commit, 40 digits"), ("hf://hats", "is named hf://OWNER/NAME@COMMIT"),
    ("hf://bob/hats@" + COMMIT, "the hub gives no files"), (SET + "/nowhere", "there are no files in it")])
def test_what_the_hub_does_not_have_is_a_sentence(url, sentence, hub, tmp_path):
    with pytest.raises(UserError, match=sentence):
        formats.read("pickapic", url, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_hub_that_fails_in_the_middle_ends_the_import_instead_of_calling_rows_broken(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's own tries
    hub.failing = True
    with pytest.raises(UserError, match=r"the hub gives no files .*`hf download --repo-type dataset` it where there is a network"):
        formats.read("pickapic", f"{SET}/data", tmp_path / "set")


def test_offline_it_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="the hub gives no files"):
        formats.read("pickapic", SET, tmp_path / "set")
