"""The studio: a page in the browser to browse groups, weigh experts and say which picture is better. Gradio; nothing comes from elsewhere."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fashiondpo_pipeline import annotations, preferences, sheets
from fashiondpo_pipeline.albums import KINDS, ORDERS, Album, Desk, in_words
from fashiondpo_pipeline.annotations import Duel, Notebook
from fashiondpo_pipeline.crowd import Crowd
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.guard import LOOPBACK, Guard

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

SHOWN = 12  # pairs of each kind that a rule flips, loses or makes
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of what a click does


def serve(album: Album, host: str, port: int, say: Callable[[str], None], listed: Path | None = None) -> None:
    """Show the album until the person ends it. Port 0 takes a free one. Raises UserError."""
    try:
        import fastapi
        import gradio
        import uvicorn
    except ImportError as problem:
        raise UserError(f"the studio needs Gradio ({problem}): pip install 'fashiondpo_pipeline[studio]' (in a checkout: "
                        ".venv/bin/pip install -e '.[studio]' -c constraints.txt)") from problem
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as problem:
        raise UserError(f"cannot listen on {host}, port {port} ({problem.strerror}): take another --host or --port, 0 finds a free one") from problem
    books = Books(album, say, listed)
    page = build(album, books)
    pages = sheets.pages()
    css = f"{pages.get_template('studio.css').render()}\n.cards {{\n{pages.get_template('cards.css').render()}}}"
    head = f"<style>{css}</style><script>{pages.get_template('studio.js').render()}</script>"  # gradio's own css= is rewritten by it
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app: Any = gradio.mount_gradio_app(fastapi.FastAPI(openapi_url=None), page, "/", footer_links=[], allowed_paths=[], head=head, theme=theme,
                                       ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, show_error=False)
    name = f"[{host}]" if ":" in host else host
    say(f"studio  http://{name}:{listener.getsockname()[1]} · {album.store.title} · ctrl-c ends it")
    if host not in LOOPBACK:
        say(f"whoever reaches {host}, by that name or an address, sees these pictures and can annotate: there is no password")
    threading.Thread(target=books.read_ahead, daemon=True).start()
    server = uvicorn.Server(uvicorn.Config(Guard(app, host), log_level="warning", timeout_graceful_shutdown=1))
    server.run(sockets=[listener])


class Books:
    """The notebooks that are open, one a person, the desks they sit at, and what everybody has said."""

    def __init__(self, album: Album, say: Callable[[str], None], listed: Path | None):
        self.album, self.say, self.listed = album, say, listed
        self.crowd = Crowd(album.folder, album.store.of)
        self._books: dict[str, Notebook] = {}
        self._desks: dict[tuple[str, str], Desk] = {}
        self._lock = threading.Lock()

    def desk(self, name: str, kind: str) -> Desk:
        """Raises UserError for a name that names no file, or one that is in use."""
        if not name:
            raise UserError("write your name above first: what you say is kept in a file of that name")
        with self._lock:
            if name not in self._books:
                self._books[name] = Notebook(self.album.folder, name, self.album.store.of, self.say)
            if (name, kind) not in self._desks:
                self._desks[name, kind] = Desk(self.album, self._books[name], self.album.queue(kind, self.listed))
            return self._desks[name, kind]

    def read_ahead(self) -> None:
        """Read what was said before anybody clicks; what cannot be read is said at the first click."""
        with contextlib.suppress(UserError):
            self.crowd.look()

    def turn(self, name: str, kind: str, act: Callable[[Desk], str | None]) -> "Turn":
        """What a click does, and what is to be seen after it. Raises UserError where there is no desk to sit at."""
        desk = self.desk(name, kind)
        with desk.notebook.turn:
            try:
                said = act(desk) or ""
            except UserError as problem:
                said = str(problem)  # the pair stays on the screen, to be judged again
            duel, done = desk.asked, desk.done
            token = desk.token(duel)
        self.crowd.look()
        return Turn(desk, duel, token, said or ("" if duel else ended(desk)), done)


@dataclass(frozen=True)
class Turn:
    """What a person sees: the pair that is asked and what names it, what is said to them, and how many of the queue are done."""

    desk: Desk
    duel: Duel | None
    token: str
    said: str
    done: int


def answer(verdict: str, shown: str) -> Callable[[Desk], str | None]:
    """Keep a verdict on the pair on the screen, which `shown` names; what to say."""
    def act(desk: Desk) -> str | None:
        if desk.answer(shown, verdict) or not desk.asked:
            return None  # with nothing on the screen there is nothing to judge
        return "that was not the pair on the screen"

    return act


def take_back(desk: Desk) -> str:
    found = desk.undo()
    return f"taken back: {found.verdict.replace('_', ' ')}" if found else "there is nothing to take back"


def ended(desk: Desk) -> str:
    """What is said when nothing is left to ask."""
    if not desk.queue:
        return "there is nothing to judge in this queue: choose other pairs above"
    return f"all {len(desk.queue):,} pairs of this queue are judged: choose other pairs above, or u takes the last answer back"


def build(album: Album, books: Books) -> Any:
    """The page, not served."""
    import gradio as gr

    with gr.Blocks(title="fdpo studio", analytics_enabled=False) as page:
        gr.HTML(_html("facts", album.store.title, _facts(album)))
        with gr.Tabs():
            with gr.Tab("Browse"):
                _browse(gr, page, album)
            if album.held_out:
                with gr.Tab("Rounds"):
                    _rounds(gr, page, album)
            if album.experts and not album.opinions.unheard:
                with gr.Tab("Re-weight"):
                    _weigh(gr, page, album)
            with gr.Tab("Annotate"):
                _annotate(gr, album, books, ["list", *album.queues] if books.listed else album.queues)
    return page


def _facts(album: Album) -> list[str]:
    pairs, experts = sum(map(len, album.pairs.values())), ", ".join(album.experts) or "none"
    return [f"{len(album.prompts):,} groups · {len(album.opinions.candidates):,} pictures · {pairs:,} pairs · experts: {experts}"]


def _html(macro: str, *values: Any) -> str:
    """A piece of the page; braces and dollars are written so that gradio's own templates leave them alone."""
    module: Any = sheets.pages().get_template("studio.html.j2").module
    return str(getattr(module, macro)(*values)).replace("{", "&#123;").replace("$", "&#36;")


def _browse(gr: Any, page: Any, album: Album) -> None:
    with gr.Row():
        text = gr.Textbox(label="words of a prompt, or a group's key", elem_id="find", scale=2)
        kind = gr.Dropdown(list(KINDS), value=KINDS[0], label="groups", elem_id="kind")
        order = gr.Dropdown(list(ORDERS if album.experts else ORDERS[:2]), value=ORDERS[0], label="order", elem_id="order")
    with gr.Row(elem_id="step"):
        earlier = gr.Button("← earlier", elem_id="earlier")
        later = gr.Button("later →", elem_id="later")
    place = gr.State(0)
    shown = gr.HTML(elem_id="group")

    def show(text: str, kind: str, order: str, at: int) -> tuple[int, str]:
        groups = album.find(text, kind, order)
        if not groups:
            return 0, _html("said", "no group fits")
        at = min(max(at, 0), len(groups) - 1)
        count = _html("said", f"{at + 1:,} of {len(groups):,}")
        return at, count + _html("groups", [album.section(groups[at])], album.paired)

    def step(by: int) -> Callable[[str, str, str, int], tuple[int, str]]:
        return lambda text, kind, order, at: show(text, kind, order, at + by)

    asked = [text, kind, order]
    for part in asked:
        part.change(lambda text, kind, order: show(text, kind, order, 0), asked, [place, shown], trigger_mode="always_last", **QUIET)
    earlier.click(step(-1), [*asked, place], [place, shown], **QUIET)
    later.click(step(1), [*asked, place], [place, shown], **QUIET)
    page.load(lambda: show("", KINDS[0], ORDERS[0], 0), None, [place, shown], **QUIET)


def _rounds(gr: Any, page: Any, album: Album) -> None:
    label = "held-out prompt, drawn in every round from the same seeds"
    first, choices = next(iter(album.held_out)), [(prompt, group) for group, prompt in album.held_out.items()]
    prompt = gr.Dropdown(choices, value=first, label=label, elem_id="held-out")
    shown = gr.HTML(elem_id="rounds")

    def show(group: str) -> str:
        assert album.side_by_side is not None
        rows = album.side_by_side(group) if group in album.held_out else []
        return _html("rounds", rows[0][1].prompt, rows) if rows else _html("said", "no round has drawn it")

    prompt.change(show, prompt, shown, **QUIET)
    page.load(lambda: show(first), None, shown, **QUIET)


def _weigh(gr: Any, page: Any, album: Album) -> None:
    rule = album.opinions.rule
    most = max(1.0, *rule.weights.values())
    with gr.Row():
        sliders = [gr.Slider(0, most, rule.weights.get(name, 0.0), step=0.01, label=name, elem_id=f"weight-{name}") for name in album.experts]
    with gr.Row():
        margin = gr.Slider(0, max(3.0, rule.margin), rule.margin, step=0.05, label="margin", elem_id="margin")
        agree = gr.Slider(-0.05, max(2.0, rule.agree or 0), -0.05 if rule.agree is None else rule.agree, step=0.05,
                          label="agree: each expert's least gap (below 0: only the mix counts)", elem_id="agree")
    with gr.Row():
        normalise = gr.Dropdown(["zscore", "minmax", "rank", "winrate", "raw"], value=rule.normalise, label="normalise", elem_id="normalise")
        over = gr.Dropdown(["group", "all"], value=rule.over, label="over", elem_id="over")
        select = gr.Dropdown(["all", "best_worst", "mirror", "median_split", "pareto"], value=rule.select, label="select", elem_id="select")
        save = gr.Button("Save as a new pair set", elem_id="save", variant="primary")
    told, shown = gr.HTML(elem_id="saved"), gr.HTML(elem_id="change")

    def ruled(*values: Any) -> preferences.Rule:
        *weights, margin, agree, normalise, over, select = values
        named = {name: float(weight) for name, weight in zip(album.experts, weights, strict=True)}
        if not sum(named.values()) > 0:
            raise UserError("at least one expert needs a weight above 0")
        least = None if agree < 0 else float(agree)
        return replace(rule, weights=named, margin=float(margin), agree=least, normalise=normalise, over=over, select=select)

    def show(*values: Any) -> str:
        try:
            wanted = ruled(*values)
        except UserError as problem:
            return _html("said", str(problem))
        started = time.perf_counter()
        found = album.reweigh(wanted)
        seconds = time.perf_counter() - started
        correlation = preferences.rank_correlation(album.opinions.mixed, found.chooser.mixed)
        change = found.change | {"before": len(album.before), "after": len(found.pairs)}
        return _html("reweighed", change, seconds, f"{correlation:.2f}", album.turned(found, wanted, SHOWN))

    def keep(*values: Any) -> str:
        try:
            return _html("said", album.store.save_rule(ruled(*values)))
        except (UserError, OSError) as problem:
            return _html("said", str(problem))

    knobs = [*sliders, margin, agree, normalise, over, select]
    for part in knobs:
        part.change(show, knobs, shown, trigger_mode="always_last", **QUIET)
    save.click(keep, knobs, told, **QUIET)
    page.load(show, knobs, shown, **QUIET)


def _annotate(gr: Any, album: Album, books: Books, kinds: list[str]) -> None:
    with gr.Row():
        name = gr.Textbox(label="your name", elem_id="name", max_lines=1)
        kind = gr.Dropdown(kinds, value=kinds[0], label="pairs to judge", elem_id="queue")
        start = gr.Button("Begin, or go on", elem_id="start", variant="primary")
    told = gr.HTML(elem_id="told")
    question = gr.HTML(elem_id="question")
    shown = gr.Textbox(visible="hidden", elem_id="shown", label="shown")
    with gr.Row(elem_id="answers", visible=False) as answers:
        buttons = {verdict: gr.Button(label, elem_id=key) for verdict, label, key in (
            ("left", "← left", "left"), ("tie", "tie (t)", "tie"), ("both_bad", "both bad (b)", "bad"), ("right", "right →", "right"),
            ("skip", "skip (s)", "skip"))}
        undo = gr.Button("undo (u)", elem_id="undo")
    tally = gr.HTML(elem_id="tally")
    with gr.Accordion("Save what people said as a pair set", open=False):
        label = gr.Textbox(label="its folder's name", value="labels", elem_id="label-name", max_lines=1)
        save = gr.Button("Save", elem_id="save-labels")

    def turn(name: str, kind: str, act: Callable[[Desk], str | None]) -> tuple:
        try:
            found = books.turn((name or "").strip(), kind, act)
        except UserError as problem:
            return _html("said", str(problem)), "", "", gr.update(visible=False), "", *judging(False)
        desk, duel, crowd = found.desk, found.duel, books.crowd
        below = _html("tally", list(crowd.counts.items()), in_words(crowd.agreement), f"{found.done:,}", f"{len(desk.queue):,}",
                      [*crowd.complaints, *counted])
        said, seen = _html("said", found.said), gr.update(visible=True)
        if duel is None:
            return said, "", "", seen, below, *judging(False)
        cards = {card.number: card for card in album.section(duel.group).cards}
        left, right = duel.sides(desk.notebook.annotator)
        return said, _html("question", album.prompts[duel.group], cards[left], cards[right]), found.token, seen, below, *judging(True)

    def judging(there: bool) -> list:
        """The buttons that judge, to be seen while there is something to judge: a key presses what is seen."""
        return [gr.update(visible=there) for _ in buttons]

    def judge(verdict: str) -> Callable[[str, str, str], tuple]:
        return lambda name, kind, shown: turn(name, kind, answer(verdict, shown))

    def keep(label: str) -> str:
        try:
            if not label:
                raise UserError("write the new folder's name first")
            annotations.check_name(label)
            return _html("said", album.store.save_labels(label, annotations.read_all(album.folder, album.store.of)))
        except (UserError, OSError) as problem:
            return _html("said", str(problem))

    counted = [album.counted] if album.counted else []
    parts = [told, question, shown, answers, tally, *buttons.values()]
    for event in (start.click, name.submit):
        event(lambda name, kind: turn(name, kind, lambda desk: None), [name, kind], parts, **QUIET)
    for verdict, button in buttons.items():
        button.click(judge(verdict), [name, kind, shown], parts, trigger_mode="once", **QUIET)
    undo.click(lambda name, kind: turn(name, kind, take_back), [name, kind], parts, trigger_mode="once", **QUIET)
    save.click(keep, label, told, **QUIET)
