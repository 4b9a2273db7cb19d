"""The studio in a real browser: what is clicked is on disk, what is killed goes on, and a prompt is never more than text."""

import http.client
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from made_runs import GROUPS, PROMPTS, ROOT, K, colour, made, session_of  # noqa: F401 - a fixture
from whole_runs import refused

from fashiondpo_pipeline import albums, annotations, pairsets, schemas, sheets
from fashiondpo_pipeline.agreement import Agreement
from fashiondpo_pipeline.albums import Desk
from fashiondpo_pipeline.annotations import Duel, Notebook
from fashiondpo_pipeline.codecs import encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.guard import Guard
from fashiondpo_pipeline.pairsets import PairSet
from stages.studio import of_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def unavailable() -> str | None:
    """Why there can be no browser test here."""
    try:
        import gradio  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as problem:
        return f"{problem}: pip install '.[test]'"
    return None if CHROMIUM else "there is no chromium: apt-get install chromium"


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. Without one the tests are skipped, but where FDPO_BROWSER is set they fail."""
    why = unavailable()
    if why:
        (pytest.fail if os.environ.get("FDPO_BROWSER") else pytest.skip)(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def pictures(count: int) -> list[dict]:
    """Rows of a pair set's pictures, so many a group."""
    return [{"group": g, "candidate": n, "prompt": PROMPTS[g], "picture": {"bytes": encode_png(colour(g, n)), "path": None}}
            for g in GROUPS for n in range(count)]


class Served:
    """`fdpo studio ...` in a process of its own, listening on a free port."""

    def __init__(self, folder: Path, *args: str, most: int | None = None, left: Path | None = None):
        """most: bytes that a file can have, as on a disk that is nearly full. left: the folder for what clients leave."""
        self._log = folder / "studio.log"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment |= {"GRADIO_TEMP_DIR": str(left), "TMPDIR": str(left)} if left else {}
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "fashiondpo_pipeline", "studio", "--port", "0", *args]
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=log, stdout=log)
            if most:
                resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (most, most))
        end = time.monotonic() + 300
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", self.told)):
            assert self.process.poll() is None and time.monotonic() < end, self.told
            time.sleep(0.1)
        self.url = found[0]

    @property
    def told(self) -> str:
        return self._log.read_text()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Page:
    """The studio as a person uses it; what the browser asked for and complained of is kept."""

    def __init__(self, browser, url: str, width: int = 1400, height: int = 1000):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(120_000)
        self.asked: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.page.wait_for_selector("#group .cards section")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def begin(self, name: str, queue: str | None = None) -> None:
        self.tab("Annotate")
        self.page.fill("#name input, #name textarea", name)
        self.page.click("#start")
        self.page.wait_for_selector("#question .question figure")

    def done(self) -> int:
        return int(self.page.inner_text("#tally .done"))

    def wait_done(self, count: int) -> None:
        self.page.wait_for_function(f"document.querySelector('#tally .done')?.textContent == '{count}'")

    def press(self, key: str) -> None:
        self.page.evaluate("document.activeElement.blur()")
        self.page.keyboard.press(key)

    def close(self) -> None:
        self.page.close()


def unlabelled_set(folder):
    """A pair set of one pair a group, to which nobody has said anything."""
    pairsets.write(folder, pictures(2), [{"group": g, "first": 0, "second": 1} for g in GROUPS], {"source": "test", "lineage": {}, "dropped": {}})
    return folder


def test_ten_pairs_are_judged_the_server_is_killed_and_the_eleventh_follows(made, browser):  # noqa: F811
    folder = made / "runs/made/annotations"
    with Served(made) as served:
        page = Page(browser, served.url)
        page.begin("ann")
        asked = []
        for number in range(10):
            asked.append(page.page.input_value("#shown input, #shown textarea"))
            if number % 2:
                page.press(["ArrowLeft", "t", "b", "ArrowRight", "s"][number // 2])
            else:
                page.page.click(("#left", "#tie", "#bad", "#right", "#skip")[number // 2 % 5])
            page.wait_done(number + 1)
            assert len((folder / "ann.jsonl").read_text().splitlines()) == number + 1, "on disk before the next picture shows"
        eleventh = page.page.input_value("#shown input, #shown textarea")
        served.kill()
        page.close()
    verdicts = [answer.verdict for answer in annotations.read(folder / "ann.jsonl")]
    assert verdicts == ["left", "left", "tie", "tie", "both_bad", "both_bad", "right", "right", "skip", "skip"]
    assert len(set(asked)) == 10
    with Served(made) as served:
        page = Page(browser, served.url)
        page.begin("ann")
        assert page.page.input_value("#shown input, #shown textarea") == eleventh and page.done() == 10
        page.press("u")
        page.wait_done(9)
        page.press("ArrowRight")
        page.wait_done(10)
        assert [a.verdict for a in annotations.read(folder / "ann.jsonl")][-1] == "right"
        page.page.locator("#name input, #name textarea").fill("bob")
        page.page.click("#start")
        page.wait_done(0)
        page.press("ArrowLeft")
        page.wait_done(1)
        assert re.search(r"ann and bob: Cohen's kappa on 1", page.page.inner_text("#tally"))
        page.close()


def test_a_click_that_a_full_disk_refuses_is_told_and_the_pair_stays(made, browser):  # noqa: F811
    path, most = made / "runs/made/annotations/ann.jsonl", 1 << 20
    path.parent.mkdir()
    before = json.dumps({"of": "elsewhere", "group": "g" * most, "left": 0, "right": 1, "verdict": "tie", "pictures": [None, None]})
    path.write_text(before + "\n")
    with Served(made, most=path.stat().st_size + 20) as served:
        page = Page(browser, served.url)
        page.begin("ann")
        asked = page.page.input_value("#shown input, #shown textarea")
        page.page.click("#left")
        page.page.wait_for_function("document.querySelector('#told').textContent.includes('that was not kept')")
        assert page.page.input_value("#shown input, #shown textarea") == asked and page.done() == 0
        assert page.page.locator("#question .question figure").count() == 2
        page.close()
    assert path.read_text() == before + "\n"


def test_a_weight_is_dragged_and_pairs_flip(made, browser):  # noqa: F811
    with Served(made) as served:
        page = Page(browser, served.url)
        page.tab("Re-weight")
        page.page.wait_for_selector("#change .flips")
        assert page.page.inner_text("#change .flips") == "0"
        handle = page.page.locator("#weight-other input[type=range]").bounding_box()
        middle = handle["y"] + handle["height"] / 2
        page.page.mouse.move(handle["x"] + 2, middle)
        page.page.mouse.down()
        for part in (0.3, 0.6, 0.9, 1.0):
            page.page.mouse.move(handle["x"] + part * handle["width"], middle)
        page.page.mouse.up()
        page.page.wait_for_function("Number(document.querySelector('#change .flips')?.textContent) > 0")
        page.page.click("#save")
        page.page.wait_for_function("/saved as pairs [0-9a-f]{8}/.test(document.querySelector('#saved').textContent)")
        name = re.search(r"saved as pairs ([0-9a-f]{8})", page.page.inner_text("#saved"))[1]
        claim = json.loads((made / f"runs/made/round-01/pair-{name}/manifest.json").read_text())["claim"]
        assert claim["config"]["weights"]["other"] > 0.9
        page.close()


def test_a_prompt_that_holds_html_is_text_and_nothing_comes_from_elsewhere(made, browser):  # noqa: F811
    with Served(made) as served:
        page = Page(browser, served.url)
        for _ in range(len(GROUPS)):
            page.press("ArrowRight")
            page.page.wait_for_timeout(300)
        for text, wanted in (("onerror", "evil"), ("script", "worse"), ("braces", "odd")):
            page.page.fill("#find input, #find textarea", text)
            page.page.wait_for_function(f"document.querySelector('#group section p')?.textContent == '{wanted}'")
            assert page.page.inner_text("#group section h2") == PROMPTS[wanted]
        page.begin("ann")
        assert page.dialogs == [] and page.page.evaluate("window.broken") is None
        assert page.page.locator("#group script, #group img:not([src^='data:'])").count() == 0
        outside = [url for url in page.asked if not url.startswith((served.url, "data:", "blob:"))]
        assert outside == []
        page.close()


def test_a_phone_shows_both_pictures_and_every_button_without_scrolling_sideways(made, browser):  # noqa: F811
    with Served(made) as served:
        page = Page(browser, served.url, 390, 844)
        for tab in ("Browse", "Rounds", "Re-weight", "Annotate"):
            page.tab(tab)
            page.page.wait_for_timeout(300)
            assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
        page.begin("ann")
        boxes = [box.bounding_box() for box in page.page.locator("#question figure, #answers button").all()]
        assert len(boxes) == 8
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        assert boxes[0]["y"] == boxes[1]["y"], "side by side"
        page.close()


def test_after_the_last_pair_keys_judge_nothing_more_and_the_last_answer_can_be_taken_back(made, browser):  # noqa: F811
    folder = unlabelled_set(made / "sets")
    with Served(made, str(folder)) as served:
        page = Page(browser, served.url)
        page.tab("Annotate")
        page.page.click("#start")
        page.page.wait_for_function("document.querySelector('#told').textContent.includes('write your name above first')")
        page.begin("ann")
        for number in range(3):
            page.press("ArrowLeft")
            page.wait_done(number + 1)
        page.page.wait_for_function("document.querySelector('#told').textContent.includes('all 3 pairs of this queue are judged')")
        assert [page.page.is_visible(f"#{name}") for name in ("left", "tie", "bad", "right", "skip", "undo")] == [False] * 5 + [True]
        for key in ("ArrowLeft", "t", "b", "ArrowRight", "s"):
            page.press(key)
        page.press("u")
        page.wait_done(2)
        page.page.wait_for_selector("#left")
        assert page.page.locator("#question .question figure").count() == 2
        page.close()
    assert len(annotations.read(folder / "annotations/ann.jsonl")) == 2


def test_rounds_lists_prompts_and_breaks_every_round_alike_within_the_page(made, browser):  # noqa: F811
    with Served(made) as served:
        for width in (1400, 390):
            page = Page(browser, served.url, width, 900)
            page.tab("Rounds")
            page.page.wait_for_selector("#rounds section figure")
            assert page.page.input_value("#held-out input") == PROMPTS["held"]
            rows = [[figure.bounding_box() for figure in section.locator("figure").all()] for section in page.page.locator("#rounds section").all()]
            assert len(rows) == 2 and len(rows[0]) == K
            assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for row in rows for box in row)
            assert [box["x"] for box in rows[0]] == [box["x"] for box in rows[1]], "a seed stands at the same place in each round"
            page.close()


def test_lost_pairs_are_shown_where_a_margin_grows(made, browser):  # noqa: F811
    with Served(made) as served:
        page = Page(browser, served.url)
        page.tab("Re-weight")
        page.page.wait_for_selector("#change .lost")
        page.page.fill("#margin input[type=number]", "2.5")
        page.page.keyboard.press("Tab")
        page.page.wait_for_function("Number(document.querySelector('#change .lost')?.textContent) > 0")
        assert page.page.locator("#change [data-kind=lost] article").count() == min(int(page.page.inner_text("#change .lost")), 12)
        assert "is within the margin 2.5" in page.page.inner_text("#change [data-kind=lost] article >> nth=0")
        page.close()


def test_a_pair_set_is_annotated_and_saved_as_another(made, browser):  # noqa: F811
    folder = unlabelled_set(made / "sets")
    with Served(made, str(folder)) as served:
        page = Page(browser, served.url)
        page.begin("ann")
        for number, key in enumerate(("ArrowLeft", "s", "t")):
            page.press(key)
            page.wait_done(number + 1)
        page.page.get_by_role("button", name="Save what people said").click()
        page.page.click("#save-labels")
        page.page.wait_for_function("document.querySelector('#told').textContent.includes('saved 2 answers of 2 groups')")
        page.close()
    labelled = PairSet.open(made / "labels")
    pairs = pa.concat_tables(labelled.pairs()).to_pylist()
    assert [(p["label"], p["annotator"]) for p in pairs] == [(1.0, "ann"), (0.5, "ann")]
    first = Duel(pairs[0]["group"], 0, 1).sides("ann")
    assert (pairs[0]["first"], pairs[0]["second"]) == first, "the left picture comes first"
    assert labelled.manifest["dropped"] == {"skipped": 1} and labelled.manifest["lineage"]["set"] == PairSet.open(folder).identity


@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://example.com",
                                  "/gradio_api/file/etc/passwd", "/monitoring", "/assets/../config.py"])
def test_no_file_and_no_proxy_is_served(path):
    assert Guard(None, "localhost").refuses({"path": path, "headers": [(b"host", b"localhost:7860")]}) == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 0), ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 0), ({"host": "evil.example:7860"}, 403),
        ({"host": "192.168.0.7:7860"}, 403), ({"host": "["}, 403), ({"host": "localhost:7860", "origin": "http://["}, 403),
        ({}, 403), ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403), ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
    ],
)
def test_only_the_page_itself_is_answered(headers, status):
    scope = {"path": "/gradio_api/queue/data", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    assert Guard(None, "127.0.0.1").refuses(scope) == status


@pytest.mark.parametrize("host", ["0.0.0.0", "Studio.local"])
def test_an_open_studio_answers_to_addresses_and_its_own_name_alone(host):
    """A page elsewhere can make its own name lead here, but no address."""
    def status(name: str) -> int:
        return Guard(None, host).refuses({"path": "/config", "headers": [(b"host", name.encode())]})

    assert [status(name) for name in ("192.168.0.7:7860", "[fe80::1]:7860", "localhost:7860", f"{host.lower()}:7860")] == [0, 0, 0, 0]
    assert [status(name) for name in ("evil.example:7860", "192.168.0.7.evil.example", "", "[")] == [403, 403, 403, 403]


def test_a_served_run_answers_no_path_outside_the_page(made, browser):  # noqa: F811
    secret = made / "runs/made/round-01/secret.txt"
    secret.write_text("secret")
    asked = browser.new_context().request
    with Served(made) as served:
        for path in (f"/gradio_api/file={secret}", f"/file={secret}", "/gradio_api/upload", "/runs/made/round-01/secret.txt"):
            assert asked.get(served.url + path).status == 404
        assert asked.get(served.url + "/").status == 200


def test_a_served_run_takes_neither_a_file_nor_a_long_message(made):  # noqa: F811
    pytest.importorskip("gradio")
    (made / "left").mkdir()
    with Served(made, left=made / "left") as served:
        host = served.url.removeprefix("http://")

        def post(body, headers: dict[str, str]) -> int:
            connection = http.client.HTTPConnection(host, timeout=120)
            try:
                connection.request("POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"} | headers)
                return connection.getresponse().status
            except (BrokenPipeError, ConnectionResetError):  # it has answered and no longer reads
                return 413
            finally:
                connection.close()

        ours = {"Origin": served.url}
        body = json.dumps({"data": [None, {"path": str(made / "pipeline.yaml"), "meta": {"_type": "gradio.FileData"}}], "fn_index": 0,
                           "session_hash": "s"})
        assert post(body, {}) == post(body, {"Origin": "http://evil.example"}) == 403
        assert post(body, ours) == 400
        assert post(b"x" * (8 << 20), ours) == post((b"x" * (1 << 16) for _ in range(512)), ours) == 413
        assert post(json.dumps({"event_id": "x", "data": [], "fn_index": 0, "session_hash": "s"}), ours) == 200, "a plain one is heard"
    assert not list((made / "left").rglob("*.yaml"))


# -- without a browser

def album(folder: Path) -> albums.Album:
    pairs = [{"group": GROUPS[0], "first": 2, "second": 0, "label": 0.0}]
    pairsets.write(folder, pictures(3), pairs, {"source": "test", "lineage": {}, "dropped": {}})
    return albums.of_set(folder)


def test_an_answer_to_another_pair_than_is_shown_is_not_taken(tmp_path):
    found = album(tmp_path / "set")
    desk = Desk(found, Notebook(found.folder, "ann", "set"), found.queue("random"))
    shown = desk.token(desk.asked)
    assert desk.answer(shown, "left")
    assert not desk.answer(shown, "right"), "a second click on the same picture"
    assert [a.verdict for a in desk.notebook.answers] == ["left"]


def test_an_undone_pair_is_asked_again(tmp_path):
    found = album(tmp_path / "set")
    desk = Desk(found, Notebook(found.folder, "ann", "set"), found.queue("random"))
    first = desk.asked
    desk.answer(desk.token(first), "left")
    assert desk.asked != first
    assert desk.undo().duel == first and desk.asked == first


def test_a_set_of_pictures_is_found_by_words_and_kinds(tmp_path):
    found = album(tmp_path / "set")
    assert found.find("BRACES", "every group", "as drawn") == ["odd"]
    assert found.find("", "with pairs", "as drawn") == [GROUPS[0]]
    assert found.find("", "every group", "widest margin first")[0] == GROUPS[0]
    assert found.find("nothing like it", "every group", "as drawn") == []
    assert found.pairs[GROUPS[0]] == [{"group": GROUPS[0], "winner": 0, "loser": 2, "margin": 1.0}]
    assert found.queue("pairs") == [Duel(GROUPS[0], 0, 2)]
    with pytest.raises(UserError, match="a dispute takes two"):
        found.queue("disputed")


def test_a_pair_without_a_winner_is_not_shown_as_won(tmp_path):
    labels = {"evil": None, "worse": 0.5, "odd": 0.0}
    pairs = [{"group": g, "first": 0, "second": 1, "label": label, "gap": 0.0} for g, label in labels.items()]
    pairsets.write(tmp_path / "set", pictures(2), pairs, {"source": "test", "lineage": {}, "dropped": {}})
    found = albums.of_set(tmp_path / "set")
    cards = sheets.pages().get_template("cards.html.j2").module
    chips = {g: " ".join(str(cards.chip(pair)).split()) for g in GROUPS for pair in found.section(g).pairs}
    assert chips == {"evil": "<li>0 and 1: not labelled</li>", "worse": "<li>0 and 1: tie</li>", "odd": "<li>1 &gt; 0 <b>0.00</b></li>"}


def test_a_picture_beside_itself_is_not_asked_about(tmp_path):
    pairs = [{"group": GROUPS[0], "first": 1, "second": 1}, {"group": GROUPS[0], "first": 1, "second": 0}]
    pairsets.write(tmp_path / "set", pictures(2), pairs, {"source": "test", "lineage": {}, "dropped": {}})
    assert albums.of_set(tmp_path / "set").queue("pairs") == [Duel(GROUPS[0], 0, 1)]


def test_a_picture_that_is_not_there_is_neither_asked_about_nor_named_by_a_saved_label(made):  # noqa: F811
    session = session_of(made)
    sample = session.output(session.chain(1).rounds[1].sample)
    rows = sample.table("candidates").to_pylist()
    book = Notebook(made / "runs/made/annotations", "ann", f"round-01/{sample.folder.name}")
    for left, right in ((0, 1), (1, 2)):
        book.add("evil", left, right, "left")
    book.close()
    sample.open()
    sample.write(0, candidates=pa.Table.from_pylist(
        [row | ({"fault": "black", "picture": None} if (row["group"], row["candidate"]) == ("evil", 0) else {}) for row in rows], schemas.CANDIDATES))
    sample.finish()
    found = of_run(session_of(made), 1)
    assert Duel("evil", 0, 1) not in found.queue("random") and len(found.queue("random")) == 3 * 6 - 3
    (made / "list.csv").write_text("group,first,second\nevil,0,1\n")
    with pytest.raises(UserError, match="line 2: 'evil' has no candidates 0 and 1 to compare"):
        found.queue("list", made / "list.csv")
    told = found.store.save_labels("labels", annotations.read_all(found.folder, found.store.of))
    assert told == f"saved 1 answers of 1 groups as {made}/runs/made/labels/labels; 1 left out, as a picture is not there"
    labelled = PairSet.open(made / "runs/made/labels/labels")
    (pair,) = pa.concat_tables(labelled.pairs()).to_pylist()
    assert (pair["first"], pair["second"]) == (1, 2) and labelled.manifest["dropped"] == {"a picture of it is not there": 1}


def test_nothing_said_is_nothing_saved(tmp_path):
    found = album(tmp_path / "set")
    with pytest.raises(UserError, match="nobody has preferred anything yet"):
        found.store.save_labels("labels", [])
    assert not (tmp_path / "labels").exists()


def test_agreement_in_words():
    words = {"ann": "left right left right", "bob": "left right right right"}
    lines = albums.in_words(Agreement.of({name: dict(enumerate(said.split())) for name, said in words.items()}))
    assert lines[0] == ("ann and bob: Cohen's kappa on 4", "0.50"), "p_o 3/4, p_e 1/4 * 1/2 + 3/4 * 1/2 = 1/2"
    assert lines[1][0] == "all: Krippendorff's alpha"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("nonsense",), "nonsense is neither a run (a name, or a folder in runs/) nor a pair set (a folder with manifest.json)"),
        (("--list", "none.csv"), "none.csv: a list of pairs is a .csv, .tsv, .jsonl or .parquet file with the columns group, first and second"),
        (("--host", "256.0.0.1"), "cannot listen on 256.0.0.1, port 7860"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(made, args, why):  # noqa: F811
    if "--host" in args:
        pytest.importorskip("gradio")
    assert refused("studio", *args).startswith(why)


@pytest.mark.parametrize("option", [("--round", "1"), ("--pairs", "12345678"), ("--config", "pipeline.yaml"), ("--set", "seed=1"), ("--name", "t")])
def test_a_pair_set_takes_no_options_of_runs(made, option):  # noqa: F811
    album(made / "set")
    assert refused("studio", "set", *option) == f"set is a pair set, of which {option[0]} says nothing: leave it out"


def test_a_run_is_named_once(made):  # noqa: F811
    assert refused("studio", "made", "--name", "other") == "--name other and made both name a run: leave one out"


def test_a_missing_gradio_is_one_sentence(made, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "gradio", None)
    told = refused("studio")
    assert "pip install 'fashiondpo_pipeline[studio]' (in a checkout: .venv/bin/pip install -e '.[studio]' -c constraints.txt)" in told
