"""Everybody's answers to the same candidates, read on from where they were left: a look costs what was said since the last one."""

import os
import threading
from pathlib import Path

from fashiondpo_pipeline.agreement import Agreement
from fashiondpo_pipeline.annotations import UNFIT, Answer, Duel, Standing
from fashiondpo_pipeline.errors import UserError


class Crowd:
    """A folder of people's files, as it stands at the last `look`. of: which candidates the answers are to.

    agreement: of everybody's labels. counts: person -> duels they answered, those that they skipped too. complaints: what of the files
    cannot be read, in words; what they say elsewhere counts.
    """

    def __init__(self, folder: Path, of: str):
        self.folder, self.of = folder, of
        self.agreement = Agreement()
        self._files: dict[str, _Followed] = {}
        self._lock = threading.Lock()

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(file.said) for name, file in sorted(self._files.items()) if file.said}

    @property
    def complaints(self) -> list[str]:
        return [complaint for _, file in sorted(self._files.items()) for complaint in file.complaints]

    def look(self) -> None:
        """Take in what was said since the last look, by whoever writes in the folder. Raises UserError where that cannot be read."""
        with self._lock:
            try:
                there = {Path(entry.name).stem: entry.stat() for entry in os.scandir(self.folder) if entry.name.endswith(".jsonl")}
                for name in self._files.keys() - there.keys():
                    self._forget(name)
                for name, stat in there.items():
                    self._read_on(name, stat)
            except FileNotFoundError:  # nobody has said anything yet, or a file has just gone: the next look knows
                return
            except OSError as problem:
                raise UserError(f"{self.folder}: what people said cannot be read ({problem.strerror}): see to the folder") from problem

    def _read_on(self, name: str, stat: os.stat_result) -> None:
        file = self._files.get(name)
        if file and (file.inode != stat.st_ino or file.end > stat.st_size):  # it was mended or cut: another file
            self._forget(name)
            file = None
        if file is None:
            file = self._files[name] = _Followed(self.folder / f"{name}.jsonl", self.of, stat.st_ino)
        if file.end < stat.st_size:
            for duel in file.read_on():
                self.agreement.put(name, duel, file.label(duel))

    def _forget(self, name: str) -> None:
        for duel in self._files.pop(name).said:
            self.agreement.put(name, duel, None)


class _Followed:
    """One person's file. said: duel -> the answers to it that stand, of which the last counts. end: bytes read."""

    def __init__(self, path: Path, of: str, inode: int):
        self.path, self.of, self.inode, self.end = path, of, inode, 0
        self.said: dict[Duel, list[Answer]] = {}
        self.complaints: list[str] = []
        self._standing = Standing(path)

    def label(self, duel: Duel) -> str | None:
        return self.said[duel][-1].label if duel in self.said else None

    def read_on(self) -> set[Duel]:
        """Read the whole lines that have come; the duels of which something was said or taken back."""
        with self.path.open("rb") as file:
            file.seek(self.end)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.end += len(whole)
        changed = set()
        for line in whole.split(b"\n")[:-1]:
            try:
                answer, stands = self._standing.take(line)
            except UNFIT as problem:
                self.complaints.append(f"{self.path}, line {self._standing.lines}: this is no answer ({problem})")
                continue
            if answer is not None and answer.of == self.of:
                self._note(answer, stands)
                changed.add(answer.duel)
        return changed

    def _note(self, answer: Answer, stands: bool) -> None:
        if stands:
            self.said.setdefault(answer.duel, []).append(answer)
            return
        self.said[answer.duel].remove(answer)  # of the few to one duel
        if not self.said[answer.duel]:
            del self.said[answer.duel]
