"""fdpo: parses, calls, prints. Nothing heavy is imported until a command needs it."""

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from fashiondpo_pipeline import __version__
from fashiondpo_pipeline.errors import UserError, disk_is_full, no_such_place, not_allowed
from fashiondpo_pipeline.processes import first_to_fail


class Commands(typer.core.TyperGroup):
    """A mistake of the user's is one sentence and exit code 1; a bug shows its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as problem:
            _fail(str(problem))
        except KeyboardInterrupt:  # here, as typer would end without a word
            _fail("interrupted: what was finished is kept; the same command goes on from there", code=130)
        except MemoryError:
            _fail("the memory is full: what was finished is kept; lower machine.batch or finetune.micro_batch, or end other programs, and run "
                  "the same command again")
        except Exception as problem:
            if not_allowed(problem):
                _fail(f"{problem.filename} is not ours to read or write ({problem.strerror}): work in a folder of your own, or mend its permissions")  # type: ignore[attr-defined]
            if no_such_place(problem):
                place = str(problem.filename)  # type: ignore[attr-defined]
                _fail(f"{place if len(place) < 200 else place[:60] + '…'}: {problem.strerror}: name another place")  # type: ignore[attr-defined]
            if not disk_is_full(problem):
                first_to_fail()  # so that the others end without a word
                raise
            file = getattr(problem, "filename2", None) or getattr(problem, "filename", None)  # of a copy, the copy
            where = f" ({file})" if file else ""
            _fail(f"the disk is full{where}: what was finished is kept; make room and run the same command again")


def _fail(message: str, code: int = 1) -> None:
    if first_to_fail():
        from fashiondpo_pipeline.terminal import say

        say(f"fdpo: {message}")
    sys.exit(code)


app = typer.Typer(
    cls=Commands,
    help="Preference tuning for fashion image generators: sample, score, pair, finetune, evaluate; every stage resumes from disk.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="configuration; default: pipeline.yaml here, else the embedded default")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="override one knob; may be repeated")]
RunName = Annotated[str | None, typer.Option("--name", help="name of the run; its folder is runs/NAME")]
RoundNumber = Annotated[int | None, typer.Option("--round", "-r", min=1, help="which round; default: the last one there is")]


def _not_n(rounds: int | None) -> None:
    if rounds is not None:
        raise UserError(f"--rounds is called --n: write --n {rounds}")


NotN = Annotated[int | None, typer.Option("--rounds", hidden=True, callback=_not_n)]


def main() -> None:
    """The command `fdpo`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal has not is shown by its number
    app()


def _config(config: Path | None, sets: list[str] | None, name: str | None) -> Any:
    from fashiondpo_pipeline import trust
    from fashiondpo_pipeline.config import load

    here = Path("pipeline.yaml")
    path = config or (here if here.is_file() else None)
    trust.look_beside(config)
    return load(path, [*(sets or []), *([f"name={json.dumps(name)}"] if name is not None else [])])


def _session(config: Path | None, sets: list[str] | None, name: str | None, reading: bool = False) -> Any:
    from fashiondpo_pipeline.terminal import say, track
    from stages import Session

    return Session(_config(config, sets, name), say=say, track=track, options=_options(config, sets, name), reading=reading)


def _options(config: Path | None, sets: list[str] | None, name: str | None) -> list[str]:
    """What says which run is meant, as it was given."""
    given = [("--config", str(config) if config else None), *(("--set", text) for text in sets or []), ("--name", name)]
    return [word for option, value in given if value is not None for word in (option, value)]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def round(
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="rounds the run has when this returns; default: as configured")] = None,
    no_rounds: NotN = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Bring the run to N rounds: sample, score, pair, finetune, evaluate, each from the last adapter, then report.

    Run it again to continue after an interruption; when everything is there it does nothing and says so.
    """
    from stages import rounds as recipe

    recipe.run(_session(config, sets, name), n)


PairsId = Annotated[str | None, typer.Option("--pairs", metavar="ID", help="a pair set that `fdpo rescore` saved for this round")]
PairsFrom = Annotated[str | None, typer.Option("--pairs", metavar="ID|PATH", help="what `fdpo rescore` saved, or an imported pair set or its files")]


def _stage(stage: str, round: int | None, pairs: str | None, config: Path | None, sets: list[str] | None, name: str | None) -> None:
    from stages import single

    single.run(_session(config, sets, name, reading=stage == "report"), stage, round, pairs)


@app.command()
def sample(round: RoundNumber = None, config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """Draw one round's candidates, with the trajectories that finetuning needs."""
    _stage("sample", round, None, config, sets, name)


@app.command()
def score(round: RoundNumber = None, config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """Ask every expert about one round's candidates."""
    _stage("score", round, None, config, sets, name)


@app.command()
def pair(round: RoundNumber = None, config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """Make preference pairs of one round's scores."""
    _stage("pair", round, None, config, sets, name)


@app.command()
def finetune(round: RoundNumber = None, pairs: PairsFrom = None, config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """Train the LoRA on one round's pairs, or on imported ones (--pairs PATH), without drawing anything."""
    _stage("finetune", round, pairs, config, sets, name)


@app.command()
def evaluate(round: RoundNumber = None, pairs: PairsFrom = None, config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """Compare one round with the base and the round before, on held-out prompts from the same seeds."""
    _stage("evaluate", round, pairs, config, sets, name)


@app.command()
def report(round: RoundNumber = None, config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """Write the HTML report of a run's rounds (up to --round) again, from its tables."""
    _stage("report", round, None, config, sets, name)


@app.command()
def rescore(
    weights: Annotated[str | None, typer.Option("--weights", "-w", metavar="EXPERT=WEIGHT,...", help="such as clip_i=0.7,clip_t=0.3")] = None,
    round: RoundNumber = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """New pairs from cached scores, under other weights or other `--set pair.…` rules; no model is loaded.

    Prints how many pairs are kept, flipped, lost and new, and the rank correlation with the old mix.
    """
    from stages import rescoring

    rules = [text for text in sets or [] if text.startswith("pair.")]
    session = _session(config, [text for text in sets or [] if not text.startswith("pair.")], name, reading=True)
    _config(config, sets, name)  # what is wrong with the rules, before anything is read

    def section_of(number: int) -> Any:  # a rule that is given here comes before what the configuration says of the round
        return _config(config, [*(sets or []), *(f"by_round.{number}.{text}" for text in rules)], name).of_round(number).pair

    rescoring.run(session, section_of, weights, round)


@app.command()
def studio(
    what: Annotated[Path | None, typer.Argument(metavar="[RUN|PAIRSET]", help="name or folder; default: the run as configured")] = None,
    round: RoundNumber = None,
    pairs: PairsId = None,
    listed: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="pairs to judge: group, first, second")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; another than the default opens it to others")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 7860,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Browse a run or a pair set in the browser, weigh its experts live, and say which of two pictures is better."""
    from stages import studio as stage

    stage.run(lambda named: _session(config, sets, named if named is not None else name, reading=True), what, round, pairs, listed, host, port,
              {"--config": config, "--set": sets, "--name": name})


@app.command("fit-weights")
def fit_weights(
    experts: Annotated[str | None, typer.Option("--experts", metavar="NAME,...", help="whose weights; default: those in pair.weights")] = None,
    annotators: Annotated[str | None, typer.Option("--annotators", metavar="NAME,...", help="whose answers; default: everybody's")] = None,
    round: RoundNumber = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Fit expert weights to what people said in the studio; prints the YAML to paste, with intervals and the held-out agreement."""
    from stages import fitting

    fitting.run(_session(config, sets, name, reading=True), experts, annotators, round)


@app.command()
def inspect(
    table: Annotated[str, typer.Argument(metavar="candidates|scores|pairs|steps", help="what to look at")],
    round: Annotated[int | None, typer.Option("--round", "-r", min=0, help="default: the last that has it; 0: the base")] = None,
    pairs: PairsFrom = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="the held-out draws instead of the training ones")] = False,
    group: Annotated[list[str] | None, typer.Option("--group", "-g", metavar="TEXT", help="in its key or prompt; repeatable")] = None,
    expert: Annotated[str | None, typer.Option("--expert", "-e", metavar="NAME", help="only this expert's column")] = None,
    least: Annotated[float | None, typer.Option("--min", help="of the mix (pairs: margin), or of the --expert")] = None,
    most: Annotated[float | None, typer.Option("--max", help="of the mix (pairs: margin), or of the --expert")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="only candidates that lack a score, with the reason")] = False,
    sort: Annotated[str | None, typer.Option("--sort", metavar="COLUMN[:desc]", help="what is missing comes last")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="rows (sheet: groups or pairs); 0: all; default: 20, files: all")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="contact sheet of whole groups, with bars, pairs, reasons")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="the rows as comma-separated text")] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="the rows as Parquet, candidates with pictures")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="the rows as JSON lines, one object a line")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Look into a round: candidates, scores, pairs (and groups without one, and why), or the steps of finetuning."""
    from stages import inspecting

    asked = inspecting.Question(table, tuple(group or ()), expert, least, most, missing, held_out, sort, limit)
    files = {kind: path for kind, path in {"html": html, "csv": csv, "parquet": parquet, "json": json}.items() if path}
    inspecting.run(_session(config, sets, name, reading=True), asked, round, pairs, files)


@app.command()
def status(
    verify: Annotated[bool, typer.Option("--verify", help="re-hash every file, and name those that are missing, cut short or altered")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="with --verify: drop what is damaged, so that `fdpo round` makes it again")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """What is done, what is stale and why, what is missing, and how big it is."""
    from stages import status as stage

    stage.run(_session(config, sets, name, reading=True), verify or repair, repair)


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do it; without, it only says what would go")] = False,
    keep: Annotated[list[Path] | None, typer.Option("--keep", metavar="FILE", help="another configuration whose results stay; repeatable")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Free the room of results that the present settings need no more: what `fdpo status` calls results of other settings.

    What people said, labels, imported and saved pairs and what was trained on those stay.
    """
    from stages import clean as stage

    session = _session(config, sets, name)
    stage.run(session, [_session(path, None, session.config.name) for path in keep or ()], yes)


@app.command()
def plan(n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="rounds; default: as configured")] = None,
         no_rounds: NotN = None,
         probe: Annotated[bool, typer.Option("--probe", help="do a little of each kind of work first: seconds, memory, pictures' bytes")] = False,
         config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """What a run will cost before anything runs: rows, bytes and denoiser forwards of each step; with --probe hours and memory too."""
    from stages import plan as stage

    session = _session(config, sets, name)
    stage.show_plan(session, n or session.config.rounds, probe)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="what to draw")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="draw every prompt of a file, as for prompts.file")] = None,
    round: Annotated[int | None, typer.Option("--round", "-r", min=0, help="whose adapter; 0 is the base; default: the last finished round")] = None,
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="pictures a prompt; picture i is drawn from seed + i")] = 4,
    seed: Annotated[int, typer.Option(help="as torch.Generator().manual_seed(seed + i) in diffusers")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps; default: as in sample")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="guidance; default: as in sample")] = None,
    eta: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="DDIM noise; default: as in sample")] = None,
    negative: Annotated[bool, typer.Option("--negative", help="guide away from the round's negative LoRA (finetune.negative)")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder for the pictures; default: generated/ in the run's folder")] = None,
    pairs: PairsFrom = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Draw pictures with a round's adapter."""
    from stages import generate as stage

    wish = stage.Wish(stage.prompts_of(prompt, prompts), count, seed, steps, guidance, eta, negative)
    stage.run(_session(config, sets, name, reading=True), wish, round, pairs, out)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to put the LoRA")],
    round: RoundNumber = None,
    format: Annotated[str, typer.Option("--format", "-f", metavar="diffusers|kohya", help="kohya: for ComfyUI, A1111, sd-scripts")] = "diffusers",
    merge: Annotated[bool, typer.Option("--merge", help="one file of the LoRA the run started from (generator.lora) and the round's")] = False,
    negative: Annotated[bool, typer.Option("--negative", help="the round's negative LoRA (finetune.negative) instead")] = False,
    pairs: PairsFrom = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Write a round's LoRA (or fully tuned denoiser) for diffusers or for kohya's readers, with where it comes from beside it."""
    from stages import export as stage

    stage.run(_session(config, sets, name, reading=True), folder, round, pairs, format, merge, negative)


@app.command("experts")
def list_experts(
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object: kinds, and the experts of the configuration")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Every kind of expert with its options, and whether the weights of those in the configuration are here. Loads no model."""
    from stages import catalogue

    catalogue.run(_config(config, sets, name), as_json)


@app.command("import")
def import_pairs(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="pickapic, invoke, captions, huggingface, folders, kto, csv, json")],
    path: Annotated[str, typer.Argument(metavar="PATH", help="the file, or the folder it lies in; or hf://OWNER/NAME@COMMIT, a data set of the hub")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="the pair set's folder; default: pairs/NAME here")] = None,
    columns: Annotated[str | None, typer.Option("--columns", metavar="OURS=THEIRS,...", help="which columns hold what: "
                                                "winner=preferred,loser=unpreferred,prompt=text")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME|all", help="the part that is read where there are several; "
                                              "default: train")] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, metavar="N", help="take N rows, and look at nothing more")] = None,
) -> None:
    """Make a pair set of another program's preferences; every row left out is counted with its reason. Then: `fdpo finetune --pairs DIR`."""
    from fashiondpo_pipeline.terminal import say
    from stages import exchanging

    exchanging.bring_in(format, path, out, say, columns, split, most)


@app.command("export-pairs")
def export_pairs(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help="pickapic, invoke, captions, huggingface, folders, kto, csv, json")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to put them; whole or not at all")],
    round: RoundNumber = None,
    source: Annotated[Path | None, typer.Option("--from", metavar="DIR", help="a pair set, instead of a round's pairs")] = None,
    pairs: PairsId = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Write a round's pictures and pairs, or a pair set, as other programs read them."""
    from fashiondpo_pipeline.terminal import say
    from stages import exchanging

    exchanging.take_out(format, folder, lambda: _session(config, sets, name, reading=True), round, pairs, source, say)


@app.command("generate-sets")
def generate_sets(
    prompts: Annotated[Path, typer.Option("--prompts", metavar="FILE", help="a .txt, .csv, .tsv, .jsonl or .parquet, as for prompts.file")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="the pair set's folder")],
    size: Annotated[int, typer.Option("--set-size", min=2, max=100, help="pictures a prompt; each two are a pair")] = 2,
    lora: Annotated[str | None, typer.Option("--lora", metavar="FILE", help="a style LoRA to draw with; as generator.lora")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Draw a few pictures of every prompt as a pair set that waits for labels. The same command goes on where it was stopped."""
    from stages import exchanging

    style = [f"generator.lora={json.dumps(lora)}"] if lora else []
    exchanging.generate_sets(_session(config, [*(sets or []), *style], name), prompts, size, out)


@app.command("config")
def show_config(config: ConfigFile = None, sets: Sets = None, name: RunName = None) -> None:
    """Print the configuration in force, every knob explained."""
    from fashiondpo_pipeline.config import template
    from fashiondpo_pipeline.terminal import room

    print(template(_config(config, sets, name), room()), end="")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="where to write pipeline.yaml")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="write over an existing pipeline.yaml")] = False,
    preset: Annotated[str | None, typer.Option("--preset", metavar="sd15|sdxl|sd35|flux", help="for a real model; default: the embedded one")] = None,
) -> None:
    """Write a pipeline.yaml with every knob explained; it runs as it is on the embedded default."""
    from fashiondpo_pipeline.config import template, validate
    from fashiondpo_pipeline.presets import PRESETS
    from fashiondpo_pipeline.registry import did_you_mean
    from fashiondpo_pipeline.terminal import tell
    from fashiondpo_pipeline.workspace import replace_text

    if preset is not None and preset not in PRESETS:
        raise UserError(f"no preset called '{preset}'; {did_you_mean(preset, list(PRESETS))}")
    path = folder / "pipeline.yaml"
    if path.exists() and not force:
        raise UserError(f"{path} is there already: name another folder (fdpo init DIR), or --force writes over it")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, template(validate(PRESETS[preset], f"preset {preset}") if preset else None))
    tell(f"wrote {path}; next: " + ("your prompts into prompts.txt, then " if preset else "") + "fdpo plan, then fdpo round")


@app.command()
def trust(
    module: Annotated[str, typer.Argument(metavar="MODULE", help="the name before the colon in `use: module:Class`")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="look beside this configuration first; default: here")] = None,
) -> None:
    """Let configurations run the code of a module as it is now: an expert or a generator of yours, or of somebody you know."""
    from fashiondpo_pipeline import trust as trusting

    trusting.look_beside(config)
    lies = trusting.trust(module)
    print(f"trusted: {lies}; to undo it, delete its line in {trusting.file()}")


demo = typer.Typer(help="The embedded default.", no_args_is_help=True)
app.add_typer(demo, name="demo")


@demo.command("build")
def demo_build(
    images: Annotated[Path, typer.Option("--images", help="folder with Fashion-MNIST's four idx .gz files")],
    out: Annotated[Path, typer.Option("--out", help="folder to write; default: fashion_mini here")] = Path("fashion_mini"),
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Remake the embedded default from its source images: generator, CLIP, judge, catalogue, prompts, outfits. Resumes."""
    from fashiondpo_pipeline.demo import garments, outfits

    garments.check(images)
    from fashiondpo_pipeline.demo.build import build  # now, as it imports torch

    build(images, out, seed=seed, device=device)
    print(outfits.make(out, seed))


expert = typer.Typer(help="Experts that are trained.", no_args_is_help=True)
app.add_typer(expert, name="expert")


@expert.command("train")
def expert_train(
    kind: Annotated[str, typer.Argument(metavar="compatibility", help="which expert")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("compatibility"),
    model: Annotated[str, typer.Option(help="CLIP tower whose features it reads, as open_clip names it or local-dir:FOLDER")]
    = "local-dir:embedded:fashion_mini/clip",
    pretrained: Annotated[str | None, typer.Option(help="the tower's weights, as open_clip names them")] = None,
    outfits: Annotated[str, typer.Option(help="table of outfits: `items`, `split` (train, test)")] = "embedded:fashion_mini/outfits/outfits.parquet",
    items: Annotated[str, typer.Option(help="table of garments: `item`, `picture`, `category`")] = "embedded:fashion_mini/catalog.parquet",
    epochs: Annotated[int, typer.Option(min=1, help="at most; it stops before when a validation share gets no better")] = 60,
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
    device: Annotated[str, typer.Option(help="where the tower runs: cpu, cuda")] = "cpu",
) -> None:
    """Train a compatibility expert (VBPR) on outfits, and measure it on held-out ones."""
    from stages import train_expert

    train_expert.run(kind, out, model, pretrained, outfits, items, epochs=epochs, seed=seed, device=device)
