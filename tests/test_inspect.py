"""`fdpo inspect`: exactly the rows asked for, the same rows in every file, sheets that are safe to open, and no torch."""

import csv
import io
import json
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fashiondpo_pipeline import codecs, schemas, terminal, views
from fashiondpo_pipeline.config import Pair, validate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.opinions import Opinions
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.workspace import Output
from stages import Session, inspecting, rescoring
from stages.inspecting import Question

TOY = {"use": "fashiondpo_pipeline.testing:Brightness"}
NAVY, DRESS, HAT, GREY, HELD = "navy-boot", "dress", "=hat", "grey-coat", "held"
TRAINED = [NAVY, DRESS, HAT, GREY]
PROMPTS = {
    NAVY: "a photo of a Navy boot", DRESS: 'a <script>alert("x")</script> dress', HAT: "=SUM(A1) hat",
    GREY: "a grey coat", HELD: "a held-out shirt",
}
SCORES = {  # taste and truth are rewarded 3 : 1, judge is watched
    "taste": {NAVY: [1, 2, 3, 4], DRESS: [1, 0, 0, 0], HAT: [5, 5, 5, 5], GREY: [None, 1, 2, 3], HELD: [1, 2, 3, 4]},
    "truth": {NAVY: [1, 2, 3, 4], DRESS: [0, 0, 0, 4], HAT: [5, 5, 5, 5], GREY: [None, None, None, 3], HELD: [1, 2, 3, 4]},
    "judge": {NAVY: [4, 3, 2, 1], DRESS: [0, 1, 2, 3], HAT: [1, 2, 3, 4], GREY: [None, 1, 2, 3], HELD: [4, 3, 2, 1]},
}
Z = 1 / 5**0.5  # [1, 2, 3, 4] has z-scores -3, -1, 1, 3 times this


def picture(group: str, number: int) -> bytes:
    return codecs.encode_png(np.full((4, 4, 3), 40 * list(PROMPTS).index(group) + number, np.uint8))


def configuration(root: Path) -> dict:
    return {
        "name": "made", "rounds": 2,
        "generator": {"model": str(root / "model")}, "prompts": {"file": str(root / "prompts.jsonl")},
        "experts": dict.fromkeys(SCORES, TOY), "evaluate": {"judge": "judge"},
        "pair": {"weights": {"taste": 3.0, "truth": 1.0}, "agree": None, "over": "group"},
    }


def session(root: Path) -> Session:
    return Session(validate(configuration(root), "here"), root / "runs" / "made", say=list[str]().append)


def draw(s: Session, step, groups: list[str]) -> None:
    out = s.run.output(step)
    out.open()
    for shard, group in enumerate(groups):
        rows = [
            {"group": group, "candidate": n, "prompt": PROMPTS[group], "round": step.round, "seed": 10 * shard + n,
             "guidance": 1.0, "picture": {"bytes": picture(group, n), "path": f"{group}/{n}.png"},
             "fault": "the latent is not finite" if (group, n) == (GREY, 0) else None}
            for n in range(4)
        ]
        out.write(shard, candidates=pa.Table.from_pylist(rows, schemas.CANDIDATES))
    out.finish()


def judge(s: Session, step, expert: str, groups: list[str]) -> None:
    out = s.run.output(step)
    out.open()
    for shard, group in enumerate(groups):
        scores = [float("nan") if x is None else float(x) for x in SCORES[expert][group]]
        why = [None if x == x else "the latent is not finite" if n == 0 else "too grey" for n, x in enumerate(scores)]
        out.write(shard, scores=pa.table([[group] * 4, range(4), scores, why], schema=schemas.SCORES))
    out.finish()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run made by hand: round 1 with four groups down to the step table, round 2 drawn but not scored."""
    root = tmp_path_factory.mktemp("inspect")
    (root / "model").mkdir()
    (root / "model" / "model_index.json").write_text("{}")
    rows = [{"group": g, "prompt": p, "split": "train" if g in TRAINED else "held-out"} for g, p in PROMPTS.items()]
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    s = session(root)
    base, first, second = s.chain(2).rounds
    draw(s, first.sample, TRAINED)
    draw(s, second.sample, TRAINED)
    draw(s, base.held_out, [HELD])
    for name in SCORES:
        judge(s, first.scores[name], name, TRAINED)
        judge(s, base.held_out_scores[name], name, [HELD])
    s.execute([first.pair])
    out = s.run.output(first.finetune)
    out.open()
    n = np.arange(30)
    told = {"step": n, "epoch": n // 10, "loss": 0.7 - n / 100, "accuracy": 0.5 + n / 100, "winner": n / 1e4, "loser": -n / 1e4}
    columns = [pa.array(told.get(field.name, 0 * n)).cast(field.type) for field in schemas.STEPS]
    out.write(0, steps=pa.table(columns, schema=schemas.STEPS))
    out.finish()
    return root


def look(root: Path, table: str, number=1, pairs=None, files=(), **asked) -> tuple[Session, list[dict]]:
    """The rows that a question gets, by way of the JSON file."""
    s, path = session(root), root / "out.json"
    inspecting.run(s, Question(table, **asked), number, pairs, {"json": path, **dict(files)})
    return s, [json.loads(line) for line in path.read_text().splitlines()]


def keys(rows: list[dict]) -> list[tuple[str, int]]:
    return [(row["group"], row["candidate"]) for row in rows]


def cells(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def said(s: Session) -> str:
    return "\n".join(s.say.__self__)


# -- the four tables

def test_candidates_are_shown_with_seed_fault_and_each_experts_score(root):
    _, rows = look(root, "candidates")
    assert len(rows) == 16
    assert rows[0] == {
        "group": NAVY, "candidate": 0, "prompt": PROMPTS[NAVY], "round": 1, "seed": 0, "guidance": 1.0,
        "guidance_interval": None, "guidance_rescale": None, "fault": None,
        "taste": 1.0, "truth": 1.0, "judge": 4.0, "missing": None,
    }
    assert rows[12]["fault"] == rows[12]["missing"] == "the latent is not finite"
    assert [rows[12][name] for name in SCORES] == [None] * 3
    assert [row["truth"] for row in rows[4:8]] == [0, 0, 0, 4]


def test_scores_have_the_mix_and_rank_and_go_from_best_to_worst(root):
    _, rows = look(root, "scores")
    assert keys(rows[:4]) == [(NAVY, 3), (NAVY, 2), (NAVY, 1), (NAVY, 0)]
    assert [row["mixed"] for row in rows[:4]] == pytest.approx([3 * Z, Z, -Z, -3 * Z])
    # one of four differs: its z-score is the root of 3, the others' a third of that, downwards
    high, low = 3**0.5, -(3**-0.5)
    assert keys(rows[4:8]) == [(DRESS, 0), (DRESS, 3), (DRESS, 1), (DRESS, 2)]
    assert [row["mixed"] for row in rows[4:8]] == pytest.approx([0.75 * high + 0.25 * low, 0.75 * low + 0.25 * high, low, low])
    assert [row["rank"] for row in rows[:12]] == [1, 2, 3, 4, 1, 2, 3, 3, 1, 1, 1, 1]
    assert [(row["mixed"], row["rank"]) for row in rows[13:]] == [(None, None)] * 3


def test_pairs_have_both_scores_margin_and_gaps(root):
    _, rows = look(root, "pairs", groups=("boot",))
    assert [(row["winner"], row["loser"]) for row in rows[:3]] == [(3, 0), (2, 0), (3, 1)]
    assert {(row["winner"], row["loser"]) for row in rows[3:]} == {(1, 0), (2, 1), (3, 2)}
    assert rows[0].pop("group") == NAVY and rows[0].pop("prompt") == "a photo of a Navy boot"
    assert rows[0] == pytest.approx({"winner": 3, "loser": 0, "winner_score": 3 * Z, "loser_score": -3 * Z,
                                     "margin": 6 * Z, "gap_taste": 6 * Z, "gap_truth": 6 * Z}, rel=1e-6)


def test_groups_without_a_pair_are_counted_by_reason(root, capsys):
    look(root, "pairs")
    text = capsys.readouterr().out
    assert "2 groups without a pair" in text
    assert re.search(r"1 +all scores are equal +=SUM\(A1\) hat", text)
    assert re.search(r"1 +taste gave no score for 1 of 4; truth gave no score for 3 of 4 +a grey", text)


def test_reasons_that_differ_in_figures_only_are_counted_together():
    within = "widest gap {} is within the margin 0.5"
    reasons = {"a": within.format(0.31), "b": "all scores are equal", "c": within.format(1e-05)}
    _, rows = views.by_kind(reasons, dict.fromkeys("abc", "a hat"))
    assert [row[:2] for row in rows] == [["2", reasons["a"]], ["1", reasons["b"]]]
    assert len(views.by_kind({"a": "v1 is silent", "b": "v2 is silent"}, dict.fromkeys("ab", "a hat"))[1]) == 2


def test_steps_are_read_in_plain_words(root):
    s, rows = look(root, "steps")
    assert len(rows) == 30
    assert "loss 0.700 at first, 0.455 in the last epoch (10 steps), where the policy orders 74% of pairs as the " in said(s)
    assert "winners up and losers down, as meant" in said(s)


@pytest.mark.parametrize(("winner", "loser", "words"), [
    (0.2, -0.1, "winners up and losers down"), (-0.1, -0.2, "both down, losers further"),
    (0.2, 0.1, "both up, winners further"), (0.0, 0.0, "does not tell them apart"), (-0.2, -0.1, "does not tell them apart"),
])
def test_the_direction_of_winner_and_loser_is_named(winner, loser, words):
    steps = pa.table({"epoch": [0], "loss": [0.6], "accuracy": [0.6], "winner": [winner], "loser": [loser]})
    assert words in views.in_words(steps)


# -- filters, order, limits

def test_a_group_is_found_by_part_of_its_key_or_prompt_in_any_case(root):
    assert {row["group"] for row in look(root, "candidates", groups=("NAVY b",))[1]} == {NAVY}
    assert {row["group"] for row in look(root, "candidates", groups=("grey-",))[1]} == {GREY}
    assert {row["group"] for row in look(root, "pairs", groups=("boot", "dress"))[1]} == {NAVY, DRESS}


def test_bounds_are_inclusive_and_leave_missing_scores_out(root):
    _, rows = look(root, "scores", expert="truth", least=3.0, most=4.0)
    assert keys(rows) == [(NAVY, 3), (NAVY, 2), (DRESS, 3), (GREY, 3)]
    assert list(rows[0]) == ["group", "candidate", "prompt", "truth", "mixed", "rank", "missing"]
    assert keys(look(root, "scores", least=0.7)[1]) == [(NAVY, 3), (DRESS, 0), (GREY, 3)]
    _, pairs = look(root, "pairs", groups=("boot",), least=1.0, most=2.0)
    assert {(row["winner"], row["loser"]) for row in pairs} == {(2, 0), (3, 1)}


def test_only_candidates_without_a_score_are_shown_with_the_reason(root):
    s, rows = look(root, "scores", missing=True)
    assert [row["missing"] for row in sorted(rows, key=lambda row: row["candidate"])] == [
        "the latent is not finite", "truth: too grey", "truth: too grey"
    ]
    assert {row["group"] for row in rows} == {GREY}
    assert keys(look(root, "candidates", missing=True, expert="judge")[1]) == [(GREY, 0)]
    assert "lack a score" not in said(s)


def test_it_says_how_many_lack_a_score(root):
    assert "3 candidates lack a score" in said(look(root, "scores")[0])
    assert "lack" not in said(look(root, "scores", groups=("boot",))[0])


def test_a_watched_expert_has_a_gap_too(root):
    _, rows = look(root, "pairs", expert="judge", most=0.0, groups=("boot", "dress"))
    gaps = [row["gap_judge"] for row in rows if row["group"] == NAVY]
    assert gaps == pytest.approx([-6 * Z, -4 * Z, -4 * Z, -2 * Z, -2 * Z, -2 * Z])
    assert [(row["winner"], row["loser"]) for row in rows if row["group"] == DRESS] == [(0, 1), (0, 2), (0, 3)]
    assert not any(name.startswith("gap_t") for name in rows[0])


def test_the_gap_of_a_watched_expert_is_reckoned_as_the_stored_ones_are(root):
    s = session(root)
    shelf = inspecting.Shelf(s, Question("pairs"), s.chain(1).rounds[1], Rule(**s.config.pair.rule))
    stored = shelf.pairs().table()
    again = views.with_gap(stored.drop_columns(["gap_taste"]), shelf.opinions, "taste")
    assert again["gap_taste"].equals(stored["gap_taste"])


def test_sorting_puts_what_is_missing_last_both_ways(root):
    up = [row["truth"] for row in look(root, "candidates", sort="truth")[1]]
    down = [row["truth"] for row in look(root, "candidates", sort="truth:desc")[1]]
    assert up == [0, 0, 0, 1, 2, 3, 3, 4, 4, 5, 5, 5, 5, None, None, None]
    assert down == [5, 5, 5, 5, 4, 4, 3, 3, 2, 1, 0, 0, 0, None, None, None]
    assert [row["candidate"] for row in look(root, "candidates", sort="truth", groups=("dress",))[1]] == [0, 1, 2, 3]


def test_a_limit_cuts_what_is_shown_and_says_so(root, capsys):
    s, rows = look(root, "candidates", limit=3)
    assert keys(rows) == [(NAVY, 0), (NAVY, 1), (NAVY, 2)]
    assert "3 of 16 shown, --limit 0 shows all" in said(s)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_files_hold_every_row_where_no_limit_is_given(root, capsys):
    s, rows = look(root, "steps")
    assert len(rows) == 30
    assert "20 of 30 shown" in said(s)
    shown = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()[2:]]
    assert (len(shown), shown[0], shown[-1]) == (20, 0, 29)


def test_a_prompt_cannot_command_the_terminal(capsys):
    """Prompts files with such letters are refused; an imported or older table may hold them."""
    rows = pa.table({"group": ["a"], "candidate": [0]})
    terminal.show("", *views.cells(rows, {"a": "a grey\x1b[2J coat"}, 80))
    assert "\x1b" not in capsys.readouterr().out


def test_in_a_narrow_terminal_the_prompt_gives_way_and_no_figure_does(capsys):
    rows = pa.table({"group": ["a", "b"], "candidate": [0, 1], "winner_score": [0.123456, -1.0], "loser_score": [2.0, None]})
    prompts = {"a": "a photo of a long grey coat with many buttons", "b": "a hat"}
    wide, narrow = views.cells(rows, prompts, 80), views.cells(rows, prompts, 40)
    assert wide == (["prompt", "candidate", "winner_score", "loser_score"],
                    [["a photo of a long grey coat with many but…", "0", "0.123", "2.000"], ["a hat", "1", "-1.000", "-"]])
    assert narrow == (["prompt", "candidate", "winner_\nscore", "loser_\nscore"],
                      [["a photo of a lo…", "0", "0.123", "2.000"], ["a hat", "1", "-1.000", "-"]])
    terminal.show("too wide for any terminal", ["text", "figure"], [["x" * 300, "1.234567"]])
    assert "x" * 300 + "  1.234567" in capsys.readouterr().out


def test_small_figures_keep_their_digits():
    _, (row,) = views.cells(pa.table({"large": [12.3456], "small": [-0.0026], "tiny": [4.9e-5], "none": [0.0]}), {})
    assert row == ["12.346", "-0.00260", "4.90e-05", "0.000"]


# -- which round, which pairs, which draws

def test_the_last_round_that_has_the_table_is_the_default(root):
    assert {row["round"] for row in look(root, "candidates", number=None)[1]} == {2}
    assert look(root, "scores", number=None)[1] == look(root, "scores", number=1)[1]


def test_candidates_that_nobody_scored_are_shown_all_the_same(root):
    s, rows = look(root, "candidates", number=2)
    assert list(rows[0])[-2:] == ["fault", "missing"]
    assert "not scored yet by taste, truth, judge: `fdpo score --round 2` does it" in said(s)


def test_held_out_draws_of_the_base_can_be_inspected(root):
    _, rows = look(root, "scores", number=0, held_out=True)
    assert keys(rows) == [(HELD, 3), (HELD, 2), (HELD, 1), (HELD, 0)]
    assert [row["mixed"] for row in rows] == pytest.approx([3 * Z, Z, -Z, -3 * Z])


def test_a_saved_pair_set_is_found_by_its_id_alone(root):
    s = session(root)
    rescoring.run(s, lambda number: Pair.model_validate(s.config.pair.model_dump() | {"select": "best_worst"}), None, 1)
    saved = re.search(r"saved as pairs (\w+)", said(s)).group(1)
    _, rows = look(root, "pairs", number=None, pairs=saved)
    assert [(row["group"], row["winner"], row["loser"]) for row in rows] == [(DRESS, 0, 2), (NAVY, 3, 0)]


# -- mistakes

@pytest.mark.parametrize(("asked", "number", "sentence"), [
    ({"table": "pear"}, 1, "there is no table 'pear' to inspect; did you mean 'pairs'?"),
    ({"table": "scores", "expert": "trooth"}, 1, "no expert called 'trooth'; did you mean 'truth'?"),
    ({"table": "scores", "sort": "mixd:desc"}, 1, "--sort mixd:desc: no column 'mixd'; did you mean 'mixed'?"),
    ({"table": "scores", "sort": "rank:down"}, 1, "--sort rank:down: write rank or rank:desc"),
    ({"table": "pairs", "groups": ("nvy bot",)}, 1,
     "--group 'nvy bot': no group and no prompt has that in it; did you mean 'navy boot'?"),
    ({"table": "pairs", "groups": ("qqq",)}, 1,
     "--group 'qqq': no group and no prompt has that in it; `fdpo inspect candidates` shows what there is"),
    ({"table": "steps", "missing": True}, 1, "--missing means nothing for steps, only for candidates, scores: leave it out"),
    ({"table": "pairs", "held_out": True}, 1, "--held-out means nothing for pairs, only for candidates, scores: leave it out"),
    ({"table": "candidates", "least": 0.0}, 1,
     "--min and --max need --expert NAME for candidates (taste, truth, judge); `fdpo inspect scores` has their mix"),
    ({"table": "scores"}, 0, "round 0 is the base, which has held-out draws only: add --held-out, or name another round"),
    ({"table": "candidates", "expert": "judge"}, 2,
     "round 2: 'judge' has not scored these yet; `fdpo score --round 2` asks it"),
    ({"table": "pairs"}, 2, "round 2: pair has not been run with these settings; `fdpo round` makes it"),
])
def test_a_mistake_is_answered_in_one_sentence(root, asked, number, sentence):
    with pytest.raises(UserError) as caught:
        inspecting.run(session(root), Question(**asked), number, None, {})
    assert str(caught.value) == sentence


def test_an_unknown_pair_set_names_those_there_are(root):
    for number in (1, None):
        with pytest.raises(UserError, match=r"round \d has no pairs 00000000; there are: "):
            inspecting.run(session(root), Question("pairs"), number, "00000000", {})
    with pytest.raises(UserError, match="round 0 has no pairs 00000000; there are: none"):
        inspecting.run(session(root), Question("scores", held_out=True), 0, "00000000", {})


def test_pairs_of_other_settings_are_not_shown_as_if_they_were_of_these(root):
    s = session(root)
    old = s.chain(1).rounds[1].pair.fingerprint
    other = Session(s.config.model_copy(update={"seed": 8}), s.run.root, say=list[str]().append)
    with pytest.raises(UserError, match="made of other candidates or scores than these settings give"):
        inspecting.run(other, Question("pairs"), 1, old, {})


def test_pairs_of_an_expert_that_is_no_more_name_it(root):
    s = session(root)
    experts = {name: expert for name, expert in s.config.experts.items() if name != "truth"}
    pair = s.config.pair.model_copy(update={"weights": {"taste": 1.0}})
    fewer = Session(s.config.model_copy(update={"experts": experts, "pair": pair}), s.run.root)
    with pytest.raises(UserError, match="reward the expert 'truth', which these settings do not have"):
        inspecting.run(fewer, Question("pairs"), 1, s.chain(1).rounds[1].pair.fingerprint, {})


def test_a_file_without_a_folder_is_refused_before_anything_is_read(root, tmp_path):
    with pytest.raises(UserError, match=r"--csv .*/absent/a.csv: there is no folder .*/absent; name a file to write"):
        inspecting.run(session(root), Question("pairs"), 1, None, {"csv": tmp_path / "absent" / "a.csv"})
    with pytest.raises(UserError, match="that is a folder"):
        inspecting.run(session(root), Question("pairs"), 1, None, {"html": tmp_path})


# -- files

def test_every_file_holds_the_same_rows(root, tmp_path):
    files = {"csv": tmp_path / "a.csv", "parquet": tmp_path / "a.parquet"}
    _, rows = look(root, "scores", least=-1.0, sort="mixed", files=files)
    table = pq.read_table(files["parquet"])
    assert table.to_pylist() == rows
    assert table.schema.field("mixed").metadata[b"about"].startswith(b"mixed normalised score")
    frame = pandas.read_csv(files["csv"], converters=dict.fromkeys(("group", "prompt"), lambda text: text.removeprefix("'")))
    assert frame.drop(columns="missing").to_dict("records") == table.drop_columns("missing").to_pylist()


def test_missing_scores_are_empty_in_csv_null_in_json_nan_in_parquet(root, tmp_path):
    files = {"csv": tmp_path / "a.csv", "parquet": tmp_path / "a.parquet"}
    _, rows = look(root, "candidates", groups=("grey",), limit=1, files=files)
    assert rows[0]["taste"] is None
    assert np.isnan(pq.read_table(files["parquet"])["taste"][0].as_py())
    assert dict(zip(*cells(files["csv"]), strict=True))["taste"] == ""


def test_a_spreadsheet_finds_no_formula_in_a_csv(root, tmp_path):
    path = tmp_path / "a.csv"
    look(root, "candidates", groups=("hat",), files={"csv": path})
    head, *rows = cells(path)
    found = [[row[head.index(name)] for name in ("group", "prompt", "taste")] for row in rows]
    assert found == [["'=hat", "'=SUM(A1) hat", "5"]] * 4


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\tx", "\rx"])
def test_text_that_could_be_a_formula_is_disarmed_and_figures_are_not(text, tmp_path):
    from fashiondpo_pipeline.exchange import write_csv

    write_csv(tmp_path / "a.csv", pa.table({"text": [text, "a = b", None], "number": [-1.5, float("nan"), 2.0]}))
    assert cells(tmp_path / "a.csv") == [["text", "number"], ["'" + text, "-1.5"], ["a = b", ""], ["", "2"]]


def test_exported_candidates_keep_schema_and_pictures(root, tmp_path):
    path = tmp_path / "a.parquet"
    look(root, "candidates", sort="truth:desc", groups=("boot", "hat"), files={"parquet": path})
    table = pq.read_table(path)
    assert [table.schema.field(name) for name in schemas.CANDIDATES.names] == list(schemas.CANDIDATES)
    assert [row["picture"]["bytes"] for row in table.to_pylist()] == [picture(*key) for key in keys(table.to_pylist())]
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names
    assert features["picture"] == {"_type": "Image"}
    assert features["truth"] == {"dtype": "float64", "_type": "Value"}


def test_no_row_is_a_file_without_rows(root, tmp_path):
    files = {kind: tmp_path / f"a.{kind}" for kind in ("csv", "parquet", "html")}
    _, rows = look(root, "candidates", expert="taste", least=99.0, files=files)
    assert rows == []
    assert pq.read_table(files["parquet"]).num_rows == 0
    assert len(files["csv"].read_text().splitlines()) == 1
    assert "0 of 0 groups" in files["html"].read_text()


# -- contact sheets

def sheet(root: Path, tmp_path: Path, table: str, **asked) -> str:
    look(root, table, files={"html": tmp_path / "a.html"}, **asked)
    return (tmp_path / "a.html").read_text()


def images(page: str) -> list[int]:
    """The grey level of each picture on the page: which candidate it is."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(b64decode(data))).getpixel((0, 0))[0] for data in found]


@pytest.mark.parametrize("table", ["candidates", "scores", "pairs"])
def test_a_sheet_escapes_prompts_and_reaches_for_nothing_outside(root, tmp_path, table):
    page = sheet(root, tmp_path, table)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert page.lower().count("<script") == 1
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in page, "a browser runs this script and no other"
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; dress" in page
    assert not re.search(r"https?:|//\w|@import|url\(|<link|<iframe|<object|\son\w+=", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert all(target.startswith("#group-") for target in re.findall(r'href="([^"]*)"', page))
    assert "default-src 'none'" in page


def test_a_sheet_shows_a_group_from_best_to_worst_with_its_pairs(root, tmp_path):
    page = sheet(root, tmp_path, "scores", groups=("boot",))
    assert images(page) == [3, 2, 1, 0]
    assert re.findall(r"<li>(\d) &gt; (\d) <b>([\d.]+)</b>", page)[0] == ("3", "0", f"{6 * Z:.2f}")
    assert len(re.findall(r"<li>\d &gt;", page)) == 6
    # the best: taste +3Z of at most 3Z to the right, judge as far to the left
    first = page[: page.index("#2</span>")]
    bars = re.findall(r'<i class="(\w+)" style="width:([\d.]+)%">', first)
    assert bars == [("for", "50.0"), ("for", "50.0"), ("against", "50.0")]


def test_a_sheet_says_why_a_group_has_no_pair_and_a_candidate_no_score(root, tmp_path):
    page = sheet(root, tmp_path, "scores", groups=("hat", "coat"))
    assert "No pair: all scores are equal" in page
    assert "No pair: taste gave no score for 1 of 4; truth gave no score for 3 of 4" in page
    assert page.count("truth: too grey") == 2
    assert "the latent is not finite" in page


def test_a_sheet_says_why_two_candidates_make_no_pair(root, tmp_path):
    """Neighbours of the boots are 2Z = 0.89 apart; of the coats only candidate 3 has every score."""
    page = sheet(root, tmp_path, "scores", groups=("dress", "coat"))
    assert "why 6 more are none" in page and "<li>1 and 2: no score by truth</li>" in page
    assert "<li>1 and 2: a tie</li>" in page


def test_held_out_draws_are_not_blamed_for_having_no_pair(root, tmp_path):
    page = sheet(root, tmp_path, "scores", number=0, held_out=True)
    assert len(images(page)) == 4
    assert "No pair" not in page


def test_a_sheet_of_pairs_goes_by_margin_and_shows_who_disagrees(root, tmp_path):
    page = sheet(root, tmp_path, "pairs", groups=("boot", "dress", "hat"))
    margins = [float(x) for x in re.findall(r"<span>margin</span><b>([-\d.]+)</b>", page)]
    assert margins == sorted(margins, reverse=True)
    assert len(margins) == 11
    assert images(page)[:2] == [3, 0]
    duel = page[page.index("<article") : page.index("</article")]
    assert re.findall(r'class="figures">([-+\d.]+)<', duel) == [f"{6 * Z:+.2f}", f"{6 * Z:+.2f}", f"{-6 * Z:+.2f}"]
    assert "No pair: all scores are equal" in page  # the group that was asked for and gave none


def test_a_sheet_of_unscored_candidates_shows_the_pictures(root, tmp_path):
    page = sheet(root, tmp_path, "candidates", number=2, groups=("boot",))
    assert images(page) == [0, 1, 2, 3]
    assert "no mix" in page


def test_a_sheet_too_big_for_a_browser_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(inspecting, "MOST_PICTURES", 8)
    assert "2 of 4 groups" in sheet(root, tmp_path, "scores", limit=2)
    with pytest.raises(UserError, match="4 of 4 groups are 16 pictures, a browser bears 8: lower --limit"):
        sheet(root, tmp_path, "scores", limit=0)


def test_large_pictures_are_shrunk_and_broken_ones_named():
    from fashiondpo_pipeline.sheets import _embed

    noise = np.random.default_rng(0).integers(0, 256, (512, 400, 3), dtype=np.uint8)
    image, small, problem = _embed({"bytes": codecs.encode_png(noise)}, "a/0")
    assert image.startswith("data:image/jpeg;base64,")
    assert len(image) < len(codecs.encode_png(noise)) / 4
    assert (small, problem) == (False, None)
    assert _embed({"bytes": b"rubbish"}, "a/0")[0] is None
    assert "a/0: the picture cannot be read" in _embed({"bytes": b"rubbish"}, "a/0")[2]
    assert _embed({"bytes": picture(NAVY, 1)}, "a/0")[1] is True


# -- the rest

def test_an_expert_named_like_a_column_keeps_its_own():
    drawn = pa.table({"group": ["a", "a"], "candidate": pa.array([0, 1], pa.int16()), "prompt": ["x", "x"], "seed": [7, 8]})
    scores = pa.table([["a", "a"], [0, 1], [0.5, 0.25], [None, None]], schema=schemas.SCORES)
    opinions, fields = Opinions(drawn, {"seed": scores}, Rule({"seed": 1.0})), views.sayings(["seed"], ranked=False)
    assert list(fields) == ["score_seed", "missing"]
    said = views.said(opinions, np.array([1, 0]), ["seed"], "score_seed")
    rows = views.table(drawn.take([1, 0]), {"score_seed": (fields["score_seed"], said)}, ["seed", "score_seed"])
    assert rows.to_pydict() == {"seed": [8, 7], "score_seed": [0.25, 0.5]}


def test_the_command_answers_without_torch_and_pandas(root, tmp_path):
    (root / "pipeline.yaml").write_text(json.dumps(configuration(root)))
    words = f"inspect pairs -r 1 -g boot --sort margin --html {tmp_path}/a.html --parquet {tmp_path}/a.parquet".split()
    call = f"from fashiondpo_pipeline.cli import app; app({words}, standalone_mode=False)"
    script = f"import sys; {call}; assert not {'torch', 'pandas'} & sys.modules.keys()"
    paths = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False, env=paths)
    assert done.returncode == 0, done.stderr
    margins = pq.read_table(tmp_path / "a.parquet")["margin"].to_pylist()
    assert margins == sorted(margins)
    assert "a photo of a Navy boot" in done.stdout
    assert "6 of 6 pairs" in done.stderr


def test_a_csv_writes_lists_as_words():
    rows = pa.table({"a": [1, 2], "interval": pa.array([[0.25, 0.75], None], pa.list_(pa.float32()))})
    assert views.without_lists(rows).to_pydict() == {"a": [1, 2], "interval": ["0.25 0.75", None]}


def test_only_rows_that_are_shown_are_read(root, monkeypatch):
    asked, rows = [], Output.rows

    def watched(self, name, columns, numbers):
        asked.append((columns, len(numbers)))
        return rows(self, name, columns, numbers)

    monkeypatch.setattr(Output, "rows", watched)
    inspecting.run(session(root), Question("candidates", sort="seed:desc", limit=2), 1, None, {})
    light = [name for name in schemas.CANDIDATES.names if name != "picture"]
    assert asked == [(["seed"], 16), (light, 2), (["prompt"], 1)]  # what is sorted by, what is shown, the prompt of its group
