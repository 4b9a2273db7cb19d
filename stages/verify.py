"""`fdpo status --verify` and `--repair`: every file of a run against what was written, what people said and the report among them."""

from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fashiondpo_pipeline import annotations, lines
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.identity import hash_file
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.workspace import Output, agrees, hash_in_page, is_sealed, is_whole_page, read_json, read_sealed
from stages import Session
from stages.plan import FILE as PLAN


def run(session: Session, repair: bool) -> None:
    """Name what is damaged; with `repair` drop it, so that it is made again, or set it aside where it cannot be. Raises UserError if
    something is damaged still."""
    if not repair:
        return _Check(session, False).run()
    with session.run.lock():
        _Check(session, True).run()


def _agrees(path: Path) -> bool:
    try:
        return agrees(read_json(path)) is not False
    except (UserError, AttributeError):
        return False


class _Check:
    def __init__(self, session: Session, repair: bool):
        self.session, self.root, self.repair, self.say = session, session.run.root, repair, session.say
        self.files = self.sets = self.said = 0  # how many are damaged
        self.notes: list[str] = []

    def run(self) -> None:
        self._steps()
        self._people()
        self._sets()
        self._pages()
        for note in self.notes:
            self.say(note)
        self._end()

    def _end(self) -> None:
        files = "1 damaged file" if self.files == 1 else f"{self.files} damaged files"
        if not self.files and not self.sets and not self.said:
            self.say(f"every file {'that carries a hash ' if self.notes else ''}is as it was written")
        if self.files and self.repair:
            self.say(f"{files} dropped: `{self.session.command('round')}` makes what is missing again")
        told, again = [], self.session.command("status", "--repair")
        if self.files and not self.repair:
            told.append(f"{files}: `{again}` drops what is damaged, `{self.session.command('round')}` then makes it again")
        if self.said and not self.repair:
            told.append(f"answers that cannot be made again: `{again}` sets broken lines aside and keeps all others")
        if self.sets:
            told.append("damaged pair sets: take them away, then import them, or save what people said, again")
        if told:
            raise UserError("\n".join(told))

    def _steps(self) -> None:
        earlier = 0
        for folder in sorted(self.root.glob("round-*/*-*")):
            out = Output(folder, {}, {})
            for complaint, where in out.verify():
                self.files += 1
                self.say(complaint)
                if self.repair:
                    out.mend(where)
                    if where is None:
                        break
            if self.repair and folder.is_dir():
                out.clear_half()
            manifest = folder / "manifest.json"
            earlier += bool(not self.files and manifest.is_file() and not is_sealed(manifest))
        if earlier:
            self.notes.append(f"{earlier} manifests are of an earlier version: nothing shows whether their numbers are as they were written")

    def _people(self) -> None:
        for path in lines.every(self.root / "annotations"):
            found = lines.check(path, annotations.understand)
            for complaint in found.complaints:
                self.said += 1
                self.say(complaint)
            if found.complaints and self.repair:
                self._set_aside(path)
            if found.bare:
                self.notes.append(f"{path}: {found.bare:,} lines are of an earlier version, and carry nothing that shows them whole")

    def _set_aside(self, path: Path) -> None:
        lock = FileLock(path.parent.parent / f".{path.parent.name}-{path.stem}.lock", timeout=0)
        try:
            with lock:
                aside = lines.mend(path, annotations.understand)
        except Timeout:
            raise UserError(f"{path} is in use by a studio: close that, then repair again") from None
        kept = len(lines.check(path).whole)
        self.say(f"{path}: {f'what was broken is in {aside}, ' if aside else ''}the other {kept:,} lines are kept")

    def _sets(self) -> None:
        for name in ("imported", "labels"):
            for folder in sorted(path for path in self.root.glob(f"{name}/*") if path.is_dir() and not path.name.startswith(".")):
                try:
                    wrong = PairSet.open(folder).altered()
                except UserError as problem:
                    wrong = [str(problem)]
                self.sets += len(wrong)
                for complaint in wrong:
                    self.say(complaint)

    def _pages(self) -> None:
        made = (path for path in self.root.glob("round-*/evaluate-*/manifest.json") if any(path.parent.parent.glob("sample-*")))
        if not (self.root / "report.html").exists() and not (self.root / "numbers.json").exists() and any(made):
            self.notes.append(f"{self.root / 'report.html'}: not there, nor are its numbers: `{self.session.command('report')}` writes them")
            if self.repair:
                self._make_anew(["report.html"])
        wrong = list(self._wrong_pages())
        for path, complaint in wrong:
            self.say(complaint)
            if self.repair:
                path.unlink(missing_ok=True)
        if self.repair and wrong:
            self._make_anew([path.name for path, _ in wrong])
        elif wrong:
            self.files += len(wrong)

    def _wrong_pages(self) -> Iterator[tuple[Path, str]]:
        page, numbers = self.root / "report.html", self.root / "numbers.json"
        if page.is_file() or numbers.is_file():
            whole = is_whole_page(page) if page.is_file() else None
            if whole is None and page.is_file():
                self.notes.append(f"{page}: of an earlier version, which carries no hash: `fdpo report` writes it anew")
            if not page.is_file():
                yield page, f"{page}: missing"
            elif whole is False:
                yield page, f"{page}: altered"
            elif not numbers.is_file():
                yield numbers, f"{numbers}: missing"
            elif whole and hash_in_page(page) != hash_file(numbers):
                yield numbers, f"{numbers}: altered"
        plan = self.root / PLAN
        if plan.is_file() and not _agrees(plan):
            yield plan, f"{plan}: altered; `fdpo plan --probe` makes it anew"
        for path in self._imported_pages():
            if not path.is_file():
                yield path, f"{path}: missing"
            elif is_whole_page(path) is False:
                yield path, f"{path}: altered"

    def _imported_pages(self) -> list[Path]:
        """The pages that rounds on imported pairs have."""
        found = set(self.root.glob("imported-*.html"))
        for folder in self.root.glob("round-*/finetune-*"):
            manifest = folder / "manifest.json"
            try:
                if manifest.is_file() and "sampled" in read_sealed(manifest)["claim"]["config"]:
                    found.add(self.root / f"imported-{folder.name[-8:]}.html")
            except UserError:
                continue  # named already
        return sorted(found)

    def _make_anew(self, names: list[str]) -> None:
        """The report, where every step that it reads is there still."""
        from stages import report  # here, as its charts take longer to import than `fdpo status` runs
        from stages.single import choose

        if any(name.startswith("imported-") for name in names):
            self.say("the same `fdpo finetune --pairs` makes the page of imported pairs anew")
        if not {"report.html", "numbers.json"} & set(names):
            return
        try:
            chain, _ = choose(self.session, "report", None)
            self.say(f"made anew: {report.write(self.session, chain)}, numbers.json")
        except UserError:
            self.say("`fdpo round` makes the report anew")
