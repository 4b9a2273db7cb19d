"""The command line: what it imports, what it answers, what it leaves alone."""

import json
import subprocess
import sys

import pytest
from whole_runs import fdpo, session, works

from fashiondpo_pipeline import __version__, config

LIGHT = ["torch", "torchvision", "diffusers", "transformers", "open_clip", "peft"]
PARSING = [*LIGHT, "numpy", "pandas", "pyarrow", "PIL", "yaml", "jinja2"]


def imported(commands: list[list[str]], modules: list[str], folder) -> dict[str, list[str]]:
    """Which of `modules` have been imported after each command, run one after another in one fresh process."""
    script = (
        "import contextlib, io, json, sys\n"
        "from fashiondpo_pipeline.cli import main\n"
        f"commands, modules, found = {commands!r}, {modules!r}, {{}}\n"
        "for command in commands:\n"
        "    sys.argv = ['fdpo', *command]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    found[' '.join(command)] = [name for name in modules if name in sys.modules]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder,
                          env={"PYTHONPATH": ":".join(sys.path), "PATH": ""}, check=True)
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_imports_nothing_but_the_parser(tmp_path):
    commands = [["--help"], ["--version"], ["round", "--help"], ["demo", "build", "--help"]]
    assert imported(commands, PARSING, tmp_path) == {" ".join(command): [] for command in commands}


def test_what_only_reads_tables_loads_no_model(finished):
    commands = [["config"], ["plan"], ["status", "--verify"], ["pair", "--round", "1", "--set", "pair.margin=0.2"],
                ["rescore", "--weights", "clip_t=0.5,bright=0.5"], ["inspect", "pairs"], ["init", "elsewhere"]]
    assert imported(commands, LIGHT, finished) == {" ".join(command): [] for command in commands}
    assert (finished / "elsewhere/pipeline.yaml").is_file()


def test_a_round_that_is_there_loads_no_model(finished):
    found = imported([["round"]], ["torch", "diffusers", "transformers", "open_clip"], finished)
    assert found == {"round": []}


def test_every_command_is_in_the_help_with_a_sentence():
    told = works("--help")
    described = {line.split()[1] for line in told.out.splitlines() if line.startswith("│") and len(line.split()) > 5}
    assert described >= {"round", "sample", "score", "pair", "finetune", "evaluate", "report", "rescore", "inspect", "status",
                         "plan", "generate", "export", "config", "init", "demo"}


def test_without_a_command_it_shows_the_help():
    assert "Usage" in fdpo().out + fdpo().err


def test_the_version():
    assert works("--version").out == f"{__version__}\n"


def test_an_unknown_command_is_a_usage_error():
    told = fdpo("rund")
    assert told.code == 2
    assert "round" in told.err


def test_init_writes_what_config_reads_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert works("init").out == "wrote pipeline.yaml; next: fdpo plan, then fdpo round\n"
    text = (tmp_path / "pipeline.yaml").read_text()
    assert config.load(tmp_path / "pipeline.yaml") == config.Config()
    assert works("config").out == text
    assert fdpo("init").err == "fdpo: pipeline.yaml is there already: name another folder (fdpo init DIR), or --force writes over it\n"
    (tmp_path / "pipeline.yaml").write_text("seed: 3\n")
    works("init", "--force")
    assert (tmp_path / "pipeline.yaml").read_text() == text


def test_config_prints_the_knobs_in_force(place):
    shown = works("config", "--set", "finetune.beta=500", "--name", "mine").out
    (place / "shown.yaml").write_text(shown)
    assert config.load(place / "shown.yaml") == config.load(place / "pipeline.yaml", ["finetune.beta=500", "name=mine"])
    assert "  # sharpness of the preference" in shown


def test_an_override_keeps_its_neighbours_and_a_name_its_own_folder(place):
    made = session("sample.steps=5")
    assert (made.config.sample.steps, made.config.sample.candidates) == (5, 4)
    assert "runs/mine" in works("plan", "--name", "mine").out


def test_plan_counts_exactly_what_a_run_then_makes(finished):
    lines = {tuple(line.split()[:3]): line.split() for line in works("plan", "--n", "1", "--name", "new").out.splitlines()[2:]}
    assert lines["round", "1", "sample"][3:6] == ["to", "do", "24"]
    assert lines["round", "0", "held-out-sample"][3:6] == ["to", "do", "12"]
    assert lines["round", "1", "finetune"][3:6] == ["to", "do", "12"]
    made = session()
    done = made.chain(1).rounds[1]
    assert made.output(done.sample).manifest["numbers"]["candidates"] == 24
    assert made.output(done.finetune).manifest["numbers"]["steps"] == 12
    assert "done" in works("plan").out
    assert not (finished / "runs/new").exists()


def test_status_says_what_is_done_stale_and_why(finished):
    assert {line.split()[3] for line in works("status").out.splitlines()[2:]} == {"done"}
    told = works("status", "--set", "finetune.beta=7").out
    assert "beta: 100.0 -> 7.0" in told
    stale = {tuple(line.split()[:4]) for line in told.splitlines()[2:]}
    assert ("round", "1", "finetune", "stale") in stale
    assert ("round", "1", "pair", "done") in stale
    assert ("round", "2", "sample", "stale") in stale


def test_a_bug_is_a_traceback_and_not_a_sentence(place, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("stages.plan.estimate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        fdpo("plan")


def test_an_empty_name_is_no_run_of_another_name(place):
    assert "name: should be text of at most 100 letters" in fdpo("status", "--name", "").err
    assert "name: should be text of at most 100 letters" in fdpo("studio", "--name", "").err


@pytest.mark.parametrize(("said", "make"), [
    ("is a file, where a run's folder should be", lambda path: path.write_text("")),
    ("is a link to x, where nothing is", lambda path: path.symlink_to("x")),
])
def test_a_run_whose_folder_is_none_is_told(place, said, make):
    (place / "runs").mkdir()
    make(place / "runs/t")
    for command in ("round", "status", "plan"):
        assert fdpo(command).err.startswith(f"fdpo: runs/t {said}: ")


def test_sample_says_beforehand_what_it_will_write(finished):
    assert "round 1 sample: 24 candidates, about " in works("sample", "--round", "1", "--name", "new").err
    assert "candidates, about" not in works("sample", "--round", "1", "--name", "new").err


def test_a_place_that_is_not_ours_is_a_sentence_and_a_bug_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for problem, said in ((PermissionError(13, "Permission denied", "runs/demo"), "fdpo: runs/demo is not ours to read or write (Permission denied): "
                           "work in a folder of your own, or mend its permissions\n"), (PermissionError("of ours"), None)):
        def refuse(*arguments, problem=problem, **options):
            raise problem

        monkeypatch.setattr(config, "load", refuse)
        if said is None:
            with pytest.raises(PermissionError):
                fdpo("config")
        else:
            told = fdpo("config")
            assert told.err == said and told.code == 1
