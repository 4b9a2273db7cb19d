"""A configuration that comes from somebody runs nothing of theirs until a person has said so, outside of it."""

import py_compile
import subprocess
import sys

import pytest
from whole_runs import fdpo, refused, works

from fashiondpo_pipeline import trust
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.registry import EXPERTS, GENERATORS, OBJECTIVES

READING = ("status", "plan", "inspect candidates", "experts", "status --verify", "report")
TEN_LINES = '''
class Redness:
    """Share of red in a picture."""

    version, range, needs = 1, (0.0, 1.0), ("picture",)

    def load(self, device, prepared):
        pass

    def __call__(self, rows):
        return [sum(row["picture"].resize((1, 1)).getpixel((0, 0))[:1]) / 255 for row in rows]
'''
NAMED = ("--set", "experts.red.use=own_redness:Redness")


@pytest.fixture(autouse=True)
def _nobody_trusts_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv(trust.VARIABLE, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_redness", None)


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("knob", [
    'experts.x={use: "os:system", options: {command: "touch MARKER"}}', 'experts.x={use: "subprocess:Popen", options: {args: [touch, MARKER]}}',
    'experts.x={use: "stranger:Expert"}', 'experts.x={use: "fashiondpo_pipeline.workspace:Path"}', "generator.use=stranger:Expert",
    "finetune.objective=stranger:LOSS", "finetune.objective={step_dpo: 1, \"stranger:LOSS\": 1}",
])
def test_no_command_imports_or_calls_what_a_strangers_configuration_names(place, command, knob):
    (place / "stranger.py").write_text("open('MARKER', 'w')\nclass Expert: pass\nLOSS = Expert()")
    told = fdpo(*command.split(), "--set", knob)
    assert not (place / "MARKER").exists() and "stranger" not in sys.modules
    if command != "experts" and "experts" in knob:  # `fdpo experts` lists each with its fault; what only reads a run needs no objective
        assert "experts.x" in told.err or "the expert" in told.err


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "fashiondpo_pipeline.workspace:Path", "fashiondpo_pipeline.trust:trust",
                                  "fashiondpo_pipeline.registry:Registry"])
@pytest.mark.parametrize("table", [EXPERTS, GENERATORS, OBJECTIVES])
def test_a_function_or_a_class_of_another_kind_is_never_taken(table, name):
    with pytest.raises(UserError):
        table.find(name)


def test_an_expert_of_ten_lines_beside_the_configuration_scores_once_trusted(place):
    (place / "own_redness.py").write_text(TEN_LINES)
    works("sample", "--round", "1")
    told = refused("score", "--round", "1", *NAMED)
    assert str(place / "own_redness.py") in told and told.endswith("if you trust it: fdpo trust own_redness")
    assert "own_redness" not in sys.modules
    assert f"trusted: {place / 'own_redness.py'}" in works("trust", "own_redness").out
    works("score", "--round", "1", *NAMED)
    assert list(place.glob("runs/t/round-01/score-red-*/manifest.json"))
    assert sys.path[-1] == str(place) and sys.path[0] != str(place)


def test_a_module_of_the_same_name_in_another_folder_is_another_one(place, monkeypatch):
    (place / "own_redness.py").write_text(TEN_LINES)
    works("trust", "own_redness")
    assert trust.trusted("own_redness")
    (place / "other").mkdir()
    (place / "other/own_redness.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(place / "other")
    assert not trust.trusted("own_redness")
    with pytest.raises(UserError, match="was never trusted on this machine"):
        EXPERTS.find("own_redness:Redness")


def test_what_is_installed_comes_before_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pandas.py").write_text("")
    assert trust.place("pandas").name == "__init__.py"


def test_one_process_may_trust_by_its_environment(place, monkeypatch):
    (place / "own_redness.py").write_text(TEN_LINES)
    monkeypatch.setenv(trust.VARIABLE, "a,own_redness")
    assert EXPERTS.find("own_redness:Redness").range == (0.0, 1.0)


def test_a_module_that_has_changed_is_asked_for_again(place):
    (place / "own_redness.py").write_text(TEN_LINES)
    works("trust", "own_redness")
    assert trust.trusted("own_redness")
    (place / "own_redness.py").write_text(TEN_LINES + "open('MARKER', 'w')")
    with pytest.raises(UserError, match=r"has changed since it was trusted: read it again, and .* fdpo trust own_redness$"):
        EXPERTS.find("own_redness:Redness")
    assert not (place / "MARKER").exists()
    works("trust", "own_redness")
    assert trust.trusted("own_redness") and len(trust.file().read_text().splitlines()) == 1


def test_of_a_package_every_file_counts(place):
    package = place / "own_package"
    (package / "deeper").mkdir(parents=True)
    for name in ("__init__.py", "deeper/__init__.py", "deeper/more.py"):
        (package / name).write_text("")
    works("trust", "own_package")
    assert trust.trusted("own_package.deeper.more")
    (package / "deeper/more.py").write_text("1")
    assert not trust.trusted("own_package.deeper.more")


@pytest.mark.parametrize("layout", ["own_redness.py", "own_redness/__init__.py", "own_redness/deeper.py"])
def test_what_runs_is_what_was_read_and_no_bytecode_beside_it(place, layout):
    """Python believes bytecode that is marked as not to be checked, whatever the source says."""
    source, name = place / layout, layout.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    source.parent.mkdir(exist_ok=True)
    source.with_name("__init__.py").touch()
    source.write_text("open('MARKER', 'w')\n")
    py_compile.compile(source, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    source.write_text(TEN_LINES)
    works("trust", "own_redness")
    assert EXPERTS.find(f"{name}:Redness").range == (0.0, 1.0) and not (place / "MARKER").exists()
    sys.modules.pop(name)


def test_a_module_beside_the_configuration_comes_before_one_in_the_working_folder(place):
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (place / "own_redness.py").write_text("raise SystemExit('the wrong one')")
    (elsewhere / "own_redness.py").write_text(TEN_LINES)
    (place / "pipeline.yaml").rename(elsewhere / "p.yaml")
    told = refused("plan", "-c", "elsewhere/p.yaml", *NAMED)
    assert str(elsewhere / "own_redness.py") in told and told.endswith("fdpo trust own_redness --config elsewhere/p.yaml")
    assert f"trusted: {elsewhere / 'own_redness.py'}" in works("trust", "own_redness", "--config", "elsewhere/p.yaml").out
    works("plan", "-c", "elsewhere/p.yaml", *NAMED)
    sys.modules.pop("own_redness", None)
    sys.path.remove(str(elsewhere))  # as in another process
    assert str(place / "own_redness.py") in refused("plan", *NAMED), "another configuration, another place"


# -- reading


@pytest.fixture
def scored(place):
    """A run of which a plug-in scored the first round, and in which nothing is imported yet."""
    (place / "own_redness.py").write_text(TEN_LINES)
    works("trust", "own_redness")
    for command in ("sample", "score"):
        works(command, "--round", "1", *NAMED)
    del sys.modules["own_redness"]
    return place


def states(out: str) -> dict[str, str]:
    """Step -> state, of what `fdpo status` says of round 1."""
    return {words[2]: words[3] for line in out.splitlines() if (words := line.split())[:2] == ["round", "1"]}


READERS = (["status"], ["status", "--verify"], ["inspect", "scores"], ["inspect", "candidates"], ["rescore", "--weights", "clip_t=1,red=1"])


@pytest.mark.parametrize("command", READERS)
def test_what_reads_a_run_imports_no_plug_in_even_if_it_is_trusted(scored, command):
    told = works(*command, *NAMED)
    assert "own_redness" not in sys.modules and "experts.red is shown" not in told.err
    if command == ["status"]:
        assert states(told.out)["score-red"] == "done"


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("harm", ["changed", "forgotten", "gone"])
def test_without_trust_a_run_is_read_as_its_manifests_have_it(scored, command, harm):
    if harm == "changed":
        (scored / "own_redness.py").write_text("open('MARKER', 'w')")
    elif harm == "gone":
        (scored / "own_redness.py").unlink()
    else:
        (scored / "own_redness.py").write_text(TEN_LINES + "# more\n")
        trust.file().unlink()
    told = works(*command, *NAMED)
    assert "experts.red is shown as it last scored: the " in told.err and not (scored / "MARKER").exists()
    if command == ["status"]:
        assert states(told.out)["score-red"] == "done"


def test_a_trusted_plug_in_that_has_changed_is_asked_who_it_is(scored):
    (scored / "own_redness.py").write_text(TEN_LINES.replace("needs = 1,", "needs = 2,"))
    works("trust", "own_redness")
    told = works("status", *NAMED)
    assert states(told.out)["score-red"] == "stale" and "version: 1 -> 2" in told.out


def test_a_plug_in_that_nobody_trusts_and_that_has_scored_nothing_is_a_step_to_come(place):
    (place / "own_redness.py").write_text(TEN_LINES)
    works("sample", "--round", "1")
    told = works("status", *NAMED)
    assert "experts.red is shown as one that has not scored yet: the expert 'own_redness:Redness' runs the code of" in told.err
    assert (found := states(told.out))["sample"] == "done" and found["score-red"] == "missing"


@pytest.mark.parametrize(("module", "why"), [
    ("os", "os needs no trust"), ("fashiondpo_pipeline.x", "fashiondpo_pipeline needs no trust"), ("nowhere_at_all", "there is no module"),
])
def test_what_cannot_be_trusted_is_a_sentence(place, module, why):
    assert refused("trust", module).startswith(why)


def test_a_list_that_cannot_be_read_is_a_sentence(place):
    (place / "own_redness.py").write_text(TEN_LINES)
    trust.file().parent.mkdir(parents=True)
    trust.file().mkdir()
    assert "cannot be read" in refused("trust", "own_redness")


def test_a_package_that_lies_in_the_working_folder_brings_no_plug_in(place):
    """`python -m` looks in the working folder first; what a stranger's folder holds there was not installed."""
    (place / "strange-1.0.dist-info").mkdir()
    (place / "strange-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (place / "strange-1.0.dist-info/entry_points.txt").write_text("[fashiondpo_pipeline.experts]\nstrange = stranger:Expert\n")
    (place / "stranger.py").write_text("open('MARKER', 'w')")
    told = subprocess.run([sys.executable, "-m", "fashiondpo_pipeline", "experts", "--set", "experts.x={use: strange}"],
                          capture_output=True, text=True)
    assert "no expert called 'strange'" in told.stdout + told.stderr and not (place / "MARKER").exists()
    elsewhere = subprocess.run([sys.executable, "-c", "from fashiondpo_pipeline.registry import EXPERTS; print('strange' in EXPERTS.names())"],
                               capture_output=True, text=True, cwd=place.parent, env={"PYTHONPATH": f"{place}:{':'.join(sys.path)}"})
    assert elsewhere.stdout == "True\n", elsewhere.stderr


def test_no_configuration_lets_a_models_own_code_run(place):
    (place / "judge").mkdir()
    told = refused("plan", "--set", "experts.x={use: vlm, options: {model: judge, trust_remote_code: true}}")
    assert told.startswith("experts.x.options.trust_remote_code: unknown key")
