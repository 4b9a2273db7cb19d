"""A little of the fuzzing campaign for each parser; `python tests/fuzz/campaign.py` does a hundred thousand inputs."""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from fashiondpo_pipeline.errors import UserError

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import campaign

SHARES = campaign.shares(campaign.targets(), 1_500)


@pytest.mark.parametrize("name", SHARES)
def test_an_odd_input_ends_in_a_result_or_in_a_sentence(name, tmp_path):
    told = Counter()
    failed = campaign.campaign(campaign.targets()[name], SHARES[name], 0, tmp_path, told)
    assert failed is None, failed
    assert told.total() >= SHARES[name] // 2, "hypothesis leaves out inputs that it has had"


@pytest.mark.parametrize("name", SHARES)
def test_every_parser_is_begun_with_a_file_that_it_reads(name, tmp_path):
    target = campaign.targets()[name]
    assert campaign.meet(target, target.seeds()[0], tmp_path) == "read"


FOUND = [  # by the campaign, each in the parser behind it
    ("import metadata.csv", campaign.METADATA_CSV.replace(b"label", b"\xecabel")),
    ("import json", campaign.JSON_LIST.replace(b"prompt", b"\xf0rompt", 1)),
    ("import tsv", campaign.PLAIN.replace(b",", b"\t").replace(b"label", b"\x80abel")), ("import csv", campaign.PLAIN.replace(b"label", b"\x80abel")),
    ("import arrow", campaign.arrow().replace(b"prompt", b"pro\xf8pt")),
    *((name, campaign.targets()[name].seeds()[1].replace(b"sha256", b"rha256")) for name in ("step manifest.json", "step begun")),
]


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_the_campaign_found_is_a_sentence_now(name, data, tmp_path):
    target = campaign.targets()[name]
    if name == "import json":  # of its two rows one is sound
        assert campaign.meet(target, data, tmp_path) == "read"
        return
    with pytest.raises(UserError, match=r"a column's name is not UTF-8|is damaged|the Arrow file is broken"):
        target.run(data, tmp_path)


def test_a_traceback_and_a_hang_are_found_and_a_sentence_is_none(tmp_path, monkeypatch):
    def breaks(data, folder):
        if b"!" in data:
            raise KeyError("x")

    def refuses(data, folder):
        raise UserError("this is no file")

    told = Counter()
    data, problem = campaign.campaign(campaign.Target(lambda: [b"a", b"c!"], breaks), 200, 0, tmp_path, told)
    assert b"!" in data and isinstance(problem, KeyError)
    assert campaign.campaign(campaign.Target(lambda: [b"a"], refuses), 20, 0, tmp_path, told) is None and told["UserError"]
    monkeypatch.setattr(campaign, "SECONDS", 0.01)
    with pytest.raises(campaign.TooSlow):
        campaign.meet(campaign.Target(lambda: [b""], lambda data, folder: time.sleep(60)), b"", tmp_path)
