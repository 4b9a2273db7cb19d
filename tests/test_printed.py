"""Nothing printed is wider than the terminal, crashes on one that has few letters, or names a mistake by its traceback."""

import os
import subprocess
import sys

import pytest
from whole_runs import fdpo, refused, works

from fashiondpo_pipeline import config, terminal
from stages.naming import written

LETTERS = 80


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 80 letters."""
    monkeypatch.setenv("COLUMNS", str(LETTERS))
    for console in (terminal.stdout, terminal.stderr):
        monkeypatch.setattr(console, "_width", LETTERS)


def overlong(text: str) -> list[str]:
    """The lines that do not fit, but for a single word, such as a path, which must stay whole."""
    return [line for line in text.splitlines() if len(line) > LETTERS and len(line.split()) > 1]


COMMANDS = [
    ("round", "-n", "3"), ("round", "-n", "3", "--set", "evaluate.bootstrap=150"), ("status",), ("status", "--verify"), ("plan",),
    ("experts",), ("config",),
    ("status", "--set", "finetune.beta=7", "--set", "sample.guidance_rescale=0.25", "--set", "pair.margin=0.125", "--set", "seed=8",
     "--set", "finetune.learning_rate=0.1", "--set", "finetune.weight_decay=0.3", "--set", "finetune.objective={step_dpo: 1, sft: 100}"),
    ("inspect", "candidates"), ("inspect", "scores"), ("inspect", "pairs"), ("inspect", "steps"), ("report",),
    ("rescore", "--weights", "clip_t=1,bright=1"),
    ("sample", "-r", "1"), ("score", "-r", "1"), ("pair", "-r", "1"), ("evaluate", "-r", "1"), ("experts", "--set", "experts.mood.use=nowhere:Mood"),
    ("fit-weights",), ("init", "new"), ("generate", "a hat", "-k", "1"), ("export", "out"), ("export-pairs", "csv", "sheet"),
    ("import", "csv", "prompts.txt"), ("round", "--set", "finetune.bta=5"), ("plan", "--set", "generator.model=./models/sd/of/a/rather/long/name"),
    ("plan", "--set", "prompts.file=" + "long/" * 12 + "prompts.txt"),
    ("sample", "--set", "finetune.window=[0, 2]", "--set", "pair.weights={a: 1, b: 2, c: 3}"),
    ("generate",), ("generate", "a hat", "--round", "9"), ("inspect", "nothing"), ("round", "--rounds", "2"), ("round", "--nothing"), ("nothing",),
    ("finetune", "--pairs", "nowhere"), ("generate-sets", "--prompts", "prompts.txt", "--out", "out"), ("status", "--name", "x" * 300), ("--help",),
    *((name, "--help") for name in ("round", "inspect", "export-pairs", "studio", "generate")),
]


@pytest.mark.slow
def test_no_line_of_any_command_is_wider_than_the_terminal(finished, narrow, monkeypatch):
    wide = {" ".join(args): lines for args in COMMANDS if (told := fdpo(*args)) and (lines := overlong(told.out + "\n" + told.err))}
    assert wide == {}
    monkeypatch.delenv("COLUMNS")
    assert all(overlong(works(*args).out) for args in COMMANDS if args[:2] == ("status", "--set")), "the situation is one that needs it"


def test_a_wide_table_wraps_its_texts_and_puts_figures_in_blocks(narrow, capsys):
    terminal.show("t", ["", "state", "why"], [["round 1", "stale", "beta: 1 -> 2; " * 20]], right=False)
    told = capsys.readouterr().out
    assert not overlong(told) and told.count("beta:") == 20 and told.count("round 1") == 1
    heads = ["", *(f"expert_{n}" for n in range(12))]
    terminal.show("t", heads, [["base", *(f"{n}.125" for n in range(12))]])
    told = capsys.readouterr().out
    assert not overlong(told) and all(f" {n}.125" in told for n in range(12)) and told.count("base") == 2


def test_a_table_that_is_piped_has_a_line_a_row(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal.show("", ["", "why"], [["round 1", "beta: 1 -> 2; " * 40]], right=False)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_experts_are_told_with_what_they_measure(place, narrow):
    told = works("experts").out
    assert "  sharpness: " in told and "    built in · version 1 · needs picture · range" in told and not overlong(told)


@pytest.mark.parametrize(("args", "sentence"), [
    (("generate", "a hat", "--round", "9"), "there is no round 9: runs/t has 3 rounds; `fdpo round --n 9` makes more"),
    (("inspect", "pairs", "--round", "9"), "there is no round 9: runs/t has 3 rounds; `fdpo round --n 9` makes more"),
    (("export", "out", "--round", "9"), "there is no round 9: runs/t has 3 rounds; `fdpo round --n 9` makes more"),
    (("round", "--rounds", "2"), "--rounds is called --n: write --n 2"), (("plan", "--rounds", "2"), "--rounds is called --n: write --n 2"),
    (("plan", "--set", "finetune.objective=dpo"), "no objective called 'dpo'; write step_dpo (log-probabilities of the steps taken) or "
     "diffusion_dpo (errors)"),
    (("generate", "a \udcff hat"), "the prompt holds half a character (U+DCFF): take it out"),
])
def test_a_stumble_has_its_helpful_sentence(finished, args, sentence):
    assert refused(*args) == sentence


@pytest.mark.parametrize(("args", "sentence"), [
    (("init", "x" * 300), f"{'x' * 60}…: File name too long: name another place"),
    (("init", "prompts.txt/new"), "prompts.txt/new: Not a directory: name another place"),
    (("config", "-c", "x" * 300), f"{'x' * 300} cannot be read (File name too long): --config names a file"),
    (("generate", "--prompts", "x" * 300), f"{'x' * 60}…: File name too long: name another place"),
])
def test_a_name_that_no_file_can_have_is_a_sentence(place, args, sentence):
    assert refused(*args) == sentence


def test_a_report_may_show_no_pair(finished):
    works("report", "--set", "report.pairs=0")
    assert "data:image" in (finished / "runs/t/report.html").read_text(encoding="utf-8"), "pictures before and after are shown all the same"


def test_memory_that_is_full_is_a_sentence(place, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(config, "load", full)
    assert refused("config") == ("the memory is full: what was finished is kept; lower machine.batch or finetune.micro_batch, or end other "
                                 "programs, and run the same command again")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_nothing_printed_crashes_a_terminal_of_few_letters(tmp_path, encoding):
    (tmp_path / "pipeline.yaml").write_text("name: x\nsample: {negative: 'ein grünes Hemd, 花'}\nfinetune: {beta: grün}\n", encoding="utf-8")
    (tmp_path / "fine.yaml").write_text("sample: {negative: 'ein grünes Hemd, 花'}\n", encoding="utf-8")
    told = {}
    for words in (["config", "-c", "fine.yaml"], ["plan"], ["config", "-c", "grün-\udcff.yaml"], ["round", "--help"], ["experts", "-c", "fine.yaml"]):
        told[words[0]] = subprocess.run([sys.executable, "-m", "fashiondpo_pipeline", *words], cwd=tmp_path, capture_output=True, check=False,
                                        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)})
        assert b"Traceback" not in told[words[0]].stderr, words
    assert b"gr" in told["plan"].stderr and told["experts"].returncode == 0




PROMPTS = ["a red dress", "-r 9", "--help", "$(touch x)", "`id`", "a 'b' \"c\"", "a\nb", "!!", "a; rm x", "\\", "~", "*", "#", "ü", "=x",
           "a | b", "", "a red, a blue and a green dress, each of its own kind"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_command_that_is_advised_means_to_a_shell_what_it_says(tmp_path, prompt):
    told = written(["generate", prompt, "--round", 3, "--set", "name=$HOME"])
    for line in (told, terminal.fitted(f"next: {told}", 30).removeprefix("next: ")):
        script = "fdpo() { for word in \"$@\"; do printf '%s\\0' \"$word\"; done; }\n" + line
        found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
        options = ["--round", "3", "--set", "name=$HOME"]
        assert found == ["generate", *([*options, "--", prompt] if prompt.startswith("-") else [prompt, *options])]
    assert not list(tmp_path.iterdir())
