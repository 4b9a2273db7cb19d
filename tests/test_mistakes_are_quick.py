"""A mistake is told before anything heavy is imported: which takes seconds, while the sentence takes none."""

import json
import subprocess
import sys

import pytest
from whole_runs import refused, works

HEAVY = ["torch", "torchvision", "diffusers", "transformers", "open_clip", "peft", "gradio", "pandas", "matplotlib"]
# A mistake that any command which reads the configuration can be given -> what its sentence holds.
OF_ALL = {
    "--set finetune.betta=1": "did you mean 'beta'",
    "--set nonsense": "section.key=value",
    "--config nowhere.yaml": "nowhere.yaml",
    "--name ../x": "name:",
    "--set pair.weights={nobody: 1}": "no expert called 'nobody'",
    "--set by_round.2.finetune.epoch=1": "did you mean 'epochs'",
}
OF_CHAINS = {  # and those that only a command can find which knows the steps
    "--set prompts.file=nowhere.txt": "nowhere.txt",
    "--set generator.model=./nowhere": "nowhere",
    "--set generator.model=someone/else": "the hub does not answer",
    "--set generator.lora=nowhere.safetensors": "nowhere.safetensors",
    "--set experts.clip_t=null": "no rewarded expert",
    "--set experts.mine={use: nobody}": "no expert called 'nobody'",
    "--set experts.mine={use: classifier, options: {model: x, label: '{colur}'}}": "colur",
    "--set finetune.objective=nobody": "no objective called 'nobody'",
    "--set sample.candidates=1": "candidates",
}
OF_TRAINING = {  # what the chosen objective does not take
    "--set finetune.options={tua: 1}": "no such option",
    "--set finetune.objective=cdpo --set finetune.options={label_smoothing: 0.9}": "from 0 to below 0.5",
    "--set finetune.guard=0.9": "finetune.guard",
    "--set sample.eta=0": "log-probabilities",
    f"--set generator.model=someone/else --set generator.revision={'a' * 40}": "the hub does not answer",
    "--set by_round.2.finetune.guard=0.9": "finetune.guard",
}
OF_ROUNDS = {"--round 9": "round", "--round 9 --pairs 0123abcd": "0123abcd"}
OF_MADE = {"--pairs nowhere": "nowhere", **OF_ROUNDS}
COMMANDS = {  # how it is called -> its mistakes
    "round": OF_ALL | OF_CHAINS | OF_TRAINING,
    "sample --name new": OF_ALL | OF_CHAINS | {key: told for key, told in OF_TRAINING.items() if "generator.model" in key},
    "score": OF_ALL | OF_CHAINS | {"--round 9": "sample"},
    "pair": OF_ALL | OF_CHAINS | {"--round 9": "sample"},
    "finetune": OF_ALL | OF_CHAINS | OF_TRAINING | OF_MADE | {"--pairs set": "needs the steps that a sampler took"},
    "evaluate": OF_ALL | OF_CHAINS | OF_MADE,
    "report": OF_ALL | OF_CHAINS | {"--round 9": "round"},
    "rescore": OF_ALL | OF_CHAINS | {"--weights nobody=1": "no expert called", "--weights clip_t=x": "a number", "--round 9": "no round 9"},
    "inspect pairs": OF_ALL | OF_CHAINS | {"--pairs nowhere": "nowhere", "--round 9": "round", "--expert nobody": "nobody",
                                               "--sort nothing": "nothing"},
    "inspect nothing": {"": "no table 'nothing'"},
    "status": OF_ALL | OF_CHAINS | {"--name new": "there is no run"},
    "plan": OF_ALL | OF_CHAINS | OF_TRAINING,
    "clean": OF_ALL | OF_CHAINS | {"--name new": "there is no run"},
    "studio --port 0": OF_ALL | OF_CHAINS | {"nowhere": "neither a run", "--round 9": "round", "--list nowhere": "nowhere"},
    "fit-weights": OF_ALL | OF_CHAINS | {"": "nobody has judged", "--round 9": "round"},
    "generate": {"": "say what to draw"},
    "generate a": OF_ALL | OF_CHAINS | OF_MADE | {"--prompts nowhere.txt": "not both", "--negative": "guidance 1",
                                                  "--negative --guidance 5": "no negative LoRA", "--out prompts.txt": "is a file"},
    "export out": OF_ALL | OF_CHAINS | OF_MADE | {"--format nothing": "--format", "--merge": "--merge", "--negative": "no negative LoRA"},
    "export prompts.txt": {"": "is a file"},
    "experts": OF_ALL,
    "config": OF_ALL,
    "import": {"nothing prompts.txt": "nothing", "csv nowhere.csv": "nowhere.csv", "csv prompts.txt --out set": "set"},
    "export-pairs": {"nothing out": "nothing", "csv out --from nowhere": "nowhere", "csv out --from set --round 1": "--from"},
    "export-pairs csv out": OF_ALL | OF_CHAINS | {"--round 9": "round"},
    "generate-sets --out sets": {"--prompts nowhere.txt": "nowhere.txt"},
    "generate-sets --prompts prompts.txt --out set": {"": "set"},
    "trust": {"nowhere_at_all": "there is no module", "os": "needs no trust"},
    "init": {"": "there already", "--preset nothing": "no preset"},
    "expert train": {"nothing": "nothing", "compatibility --outfits nowhere.parquet": "nowhere.parquet"},
    "demo build --images nowhere": {"": "nowhere"},
}
SCRIPT = """
import contextlib, io, json, sys
from fashiondpo_pipeline.cli import main
told = []
for command in json.load(sys.stdin):
    sys.argv, err = ["fdpo", *command], io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main()
    told.append([err.getvalue(), [name for name in HEAVY if name in sys.modules]])
    if told[-1][1]:
        break
print(json.dumps(told))
"""


def words(text: str) -> list[str]:
    """The words of a call; what a --set takes is one, blanks and all."""
    first, *sets = text.split("--set ")
    return [*first.split(), *(word for value in sets for word in ("--set", value.strip()))]


@pytest.fixture(scope="module")
def there(finished_place, tmp_path_factory):
    """A folder with a finished run and a small pair set; nothing in it is changed by a mistake."""
    import shutil

    from test_formats import pickapic

    folder = tmp_path_factory.mktemp("mistakes") / "there"
    shutil.copytree(finished_place, folder)
    pickapic(folder / "p.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        works("import", "pickapic", "p.parquet", "--out", "set")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_told_before_anything_heavy_is_imported(there, command):
    calls = [[*command.split(), *words(mistake)] for mistake in COMMANDS[command]]
    script = SCRIPT.replace("HEAVY", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(calls), capture_output=True, text=True, cwd=there,
                          env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "HOME": str(there), "HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for (err, heavy), (mistake, sentence) in zip(told, COMMANDS[command].items(), strict=False):
        assert not heavy, (mistake, err)
        assert "fdpo: " in err and sentence in err and "Traceback" not in err, (mistake, err)
    assert len(told) == len(calls)


def test_every_command_is_in_that_table():
    from typer.main import get_command

    from fashiondpo_pipeline.cli import app

    found = get_command(app).commands
    names = {name if not hasattr(command, "commands") else f"{name} {inner}" for name, command in found.items()
             for inner in getattr(command, "commands", [""])}
    missing = {name for name in names if not any(call.split()[: len(name.split())] == name.split() for call in COMMANDS)}
    assert not missing


def test_a_negative_lora_that_is_not_there_is_told_with_the_command_that_makes_it(finished):
    assert "`fdpo finetune --round 3`" in refused("export", "out", "--negative")
