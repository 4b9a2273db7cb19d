"""pipeline.yaml: every mistake answered in its own sentence, all at once, and a template that says what is in force."""

import itertools
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fashiondpo_pipeline import cli, config
from fashiondpo_pipeline.config import Config, Expert, Section, load, template
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign import oddity

ROOT = Path(__file__).parent.parent
A_NAME = "should be text of at most 100 letters, digits, '.', '_' and '-', beginning with a letter or digit"
SAVED = "should be all, a count from 1, or a list of step numbers from 0"
SECTIONS = "by_round, evaluate, experts, finetune, generator, machine, name, pair, prompts, report, rounds, sample, score, seed"


def written(folder, text):
    path = folder / "pipeline.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path, *overrides):
    with pytest.raises(UserError) as problem:
        load(path, list(overrides))
    return str(problem.value)


# -- what is in force


def test_nothing_given_is_the_defaults():
    assert load(None) == Config()


def test_the_template_is_the_defaults(tmp_path):
    assert load(written(tmp_path, template())) == Config()


def test_the_repositorys_pipeline_yaml_is_the_template():
    """Made by: python -c 'from fashiondpo_pipeline.config import template; print(template(), end="")' > pipeline.yaml"""
    assert (ROOT / "pipeline.yaml").read_text(encoding="utf-8") == template()


def test_any_configuration_survives_its_template(tmp_path):
    changed = load(None, ["name='1e5'", "seed=3", "finetune.learning_rate=1e-5", "sample.save=[0,3]", "generator.revision='12e4'",
                          "sample.negative='ugly: # \"blurred\"'", "experts.odd.use=my.module:Class",
                          "experts.odd.options={a: [1, null, 'x: y'], b: {c: true}}", "pair.weights.odd=0.1", "evaluate.judge=null"])
    assert load(written(tmp_path, template(changed))) == changed


@given(st.text(max_size=20).filter(lambda text: oddity(text) is None))
def test_any_text_survives_its_template(text):
    wanted = Config(sample={"negative": text})
    try:
        found = load(None, text=template(wanted))
    except UserError as problem:  # YAML itself has no way to hold some characters unescaped; they must not vanish silently
        raise AssertionError(text) from problem
    assert found == wanted


def test_every_knob_has_a_comment_of_its_own():
    lines = template().splitlines()
    sections = {"": Config, **{name: type(getattr(Config(), name)) for name in Config.model_fields if isinstance(getattr(Config(), name), Section)}}
    for section, model in sections.items():
        for name, field in model.model_fields.items():
            if name in sections or name == "experts":
                continue  # has a comment on its own line
            assert field.description, f"{section}.{name} has no description"
            knob = f"{'  ' if section else ''}{name}: "
            assert any(line.startswith(knob) and before.strip().startswith("#") for before, line in itertools.pairwise(lines)), (section, name)
    assert max(map(len, lines)) <= 128


def test_a_file_may_leave_out_what_it_does_not_change_even_all_of_a_section(tmp_path):
    found = load(written(tmp_path, "sample:\n  eta: 0.5\npair:\n# nothing left\nexperts:\n"))
    assert found == Config(sample={"eta": 0.5})


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load(written(tmp_path, "")) == load(written(tmp_path, "# only a comment\n")) == Config()


def test_a_section_can_be_reused_with_an_anchor(tmp_path):
    found = load(written(tmp_path, "sample: &drawn {eta: 0.5, steps: 7}\nevaluate: {<<: *drawn, steps: 9}"))
    assert (found.evaluate.eta, found.evaluate.steps) == (0.5, 9)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Config().sample.eta = 0.0


# -- numbers and text


@pytest.mark.parametrize(("text", "number"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("2E3", 2000.0), ("3.e+2", 300.0), ("7", 7.0), (".5", 0.5)])
def test_numbers_are_read_as_people_write_them(tmp_path, text, number):
    assert load(written(tmp_path, f"finetune: {{learning_rate: {text}}}")).finetune.learning_rate == number
    assert load(None, [f"finetune.learning_rate={text}"]).finetune.learning_rate == number


# -- mistakes in a file


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        # unknown keys
        ("finetune: {bta: 1}", "finetune.bta: unknown key; did you mean 'beta'?"),
        ("sampel: {eta: 1}", "sampel: unknown key; did you mean 'sample'?"),
        ("zzz: 1", f"zzz: unknown key; known: {SECTIONS}"),
        ("experts: {a: {use: x, optins: {}}}", "experts.a.optins: unknown key; did you mean 'options'?"),
        ("sample: {true: 2}", "sample.true: a key must be text; put it in quotes"),
        ("sample: {1: 2}", "sample.1: a key must be text; put it in quotes"),
        # wrong types
        ("sample: {candidates: '8'}", "sample.candidates: should be a whole number, not '8'"),
        ("sample: {candidates: 8.0}", "sample.candidates: should be a whole number, not 8.0"),
        ("sample: {candidates: true}", "sample.candidates: should be a whole number, not true"),
        ("sample: {candidates: null}", "sample.candidates: should be a whole number, not null"),
        ("sample: {eta: high}", "sample.eta: should be a number, not 'high'"),
        ("sample: {negative: 3}", "sample.negative: should be text, not 3"),
        *((f"finetune: {{targets: {shown}}}", f"finetune.targets: should be attention, attention+mlp, or a list of module names, not {shown}")
          for shown in ("['to_q', 1]", "3")),
        *((f"finetune: {{objective: {shown}}}", "finetune.objective: should be an objective's name, or a mix of them with weights above 0, such "
           f"as {{step_dpo: 1, sft: 100}}, not {shown}") for shown in ("{'step_dpo': 0}", "['step_dpo']", "{}")),
        ("sample: 3", "sample: should be a section with keys, not 3"),
        ("experts: [a]", "experts: should be a section with keys, not ['a']"),
        ("experts: {a: clip_text}", "experts.a: should be a section with keys, not 'clip_text'"),
        ("pair: {weights: [a]}", "pair.weights: should be a section with keys, not ['a']"),
        # out of range
        ("sample: {candidates: 0}", "sample.candidates: should be greater than or equal to 1, not 0"),
        ("sample: {eta: 1.5}", "sample.eta: should be less than or equal to 1, not 1.5"),
        ("finetune: {beta: 0}", "finetune.beta: should be greater than 0, not 0"),
        ("finetune: {beta: .inf}", "finetune.beta: should be a finite number, not inf"),
        ("prompts: {held_out: 1}", "prompts.held_out: should be less than 1, not 1"),
        ("seed: -1", "seed: should be greater than or equal to 0, not -1"),
        (f"finetune: {{epochs: {10**29}}}", f"finetune.epochs: should be at most 1,000,000, not {10**29}"),
        ("sample: {height: 1000000}", "sample.height: should be at most 16,384, not 1000000"),
        # choices
        ("generator: {dtype: half}", "generator.dtype: should be 'float32', 'float16' or 'bfloat16', not 'half'"),
        ("pair: {normalise: z}", "pair.normalise: should be 'zscore', 'minmax', 'rank', 'winrate' or 'raw', not 'z'"),
        ("machine: {device: gpu}", "machine.device: should be auto, cpu, mps, cuda or cuda:N, not 'gpu'"),
        ("machine: {device: 0}", "machine.device: should be auto, cpu, mps, cuda or cuda:N, not 0"),
        ("sample: {save: [1, x]}", f"sample.save: {SAVED}, not [1, 'x']"),
        ("sample: {save: 0}", f"sample.save: {SAVED}, not 0"),
        ("sample: {save: [-1]}", f"sample.save: {SAVED}, not [-1]"),
        ("sample: {save: some}", f"sample.save: {SAVED}, not 'some'"),
        *((f"finetune: {{window: {window}}}", f"finetune.window: should be two numbers from 0 to 1, the lower first, not {window}")
          for window in ("[0.9, 0.1]", "[0.1]", "[0, 2]", "7")),
        ("sample: {save: true}", f"sample.save: {SAVED}, not true"),
        ("name: ../elsewhere", f"name: {A_NAME}, not '../elsewhere'"),
        (f"name: {'a' * 101}", f"name: {A_NAME}, not '{'a' * 78}…"),
        ("name: 3", f"name: {A_NAME}, not 3"),
        ("experts: {a b: {use: x}}", f"experts.a b: {A_NAME}, not 'a b'"),
        # what belongs together
        ("experts: {a: {}}", "experts.a.use: missing; add it"),
        ("experts: {list: {use: 3}}", "experts.list.use: should be text, not 3"),
        ("pair: {weights: {clipt: 1}}", "pair.weights: no expert called 'clipt'; did you mean 'clip_t'?"),
        ("evaluate: {judge: jugde}", "evaluate.judge: no expert called 'jugde'; did you mean 'judge'?"),
        ("pair: {weights: {clip_i: 0, clip_t: 0.0}}", "pair: at least one expert needs a weight above 0"),
        ("pair: {weights: {}}", "pair: at least one expert needs a weight above 0"),
        ("pair: {weights: {clip_i: -1}}", "pair.weights.clip_i: should be greater than or equal to 0, not -1"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(tmp_path, text, sentence):
    path = written(tmp_path, text)
    assert refused(path) == f"{path}: this does not fit\n  {sentence}"


def test_all_mistakes_are_told_at_once(tmp_path):
    path = written(tmp_path, "seed: x\nrounds: 0\nsample: {stps: 1, save: some}\nfinetune:\n  epochs: 1.5\n  bta: 3\n")
    assert refused(path).splitlines() == [
        f"{path}: these 6 things do not fit",
        "  seed: should be a whole number, not 'x'",
        "  rounds: should be greater than or equal to 1, not 0",
        f"  sample.save: {SAVED}, not 'some'",
        "  sample.stps: unknown key; did you mean 'steps'?",
        "  finetune.epochs: should be a whole number, not 1.5",
        "  finetune.bta: unknown key; did you mean 'beta'?",
    ]


def test_all_experts_that_are_missing_are_told_at_once(tmp_path):
    path = written(tmp_path, "experts: {taste: {use: x}}\nevaluate: {judge: tase}\n")
    assert refused(path).splitlines() == [
        f"{path}: these 3 things do not fit",
        "  pair.weights: no expert called 'clip_i'; known: taste",
        "  pair.weights: no expert called 'clip_t'; known: taste",
        "  evaluate.judge: no expert called 'tase'; did you mean 'taste'?",
    ]


# -- files that are no configuration


def test_a_key_given_twice_is_named_with_its_line(tmp_path):
    path = written(tmp_path, "sample:\n  eta: 1\n  steps: 3\n  eta: 0\n")
    assert refused(path) == f"{path}: line 4: the key 'eta' is given twice; keep one of them"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sample:\n  eta: [1\n", "line 3, column 1 is not YAML (expected ',' or ']', but got '<stream end>')"),
        ("sample:\n\teta: 1\n", "line 2, column 1 is not YAML (found character '\\t' that cannot start any token)"),
        ("sample: {eta: *x}", "line 1, column 15 is not YAML (found undefined alias 'x')"),
        ("? [a]\n: 1", "line 1, column 3 is not YAML (found unhashable key)"),
        ("a: \x01", " is not YAML (unacceptable character #x0001: special characters are not allowed)"),
        ("a: !!python/name:os.system", "line 1: the tag !!python/name:os.system is not read here; write the value without it"),
    ],
)
def test_what_is_not_yaml_is_named_with_its_line(tmp_path, text, sentence):
    path = written(tmp_path, text)
    assert refused(path) == f"{path}: {sentence.strip()}"


@pytest.mark.parametrize("text", ["name: 2024-13-45", "name: 2024-01-02", "name: e-1.5", "name: 12e", "name: y", "name: 08"])
def test_a_word_that_means_nothing_else_is_text(tmp_path, text):
    assert load(written(tmp_path, text)).name == text.removeprefix("name: ")


@pytest.mark.parametrize(("word", "kind"), [(word, "true or false") for word in ("yes", "No", "ON", "off")]
                         + [(word, "a number") for word in ("010", "0b_", "0b101", "1_000", "1:30", "190:20:30.15", "1_0.5")])
def test_a_word_that_programs_read_differently_is_refused_and_not_guessed_at(tmp_path, word, kind):
    path = written(tmp_path, f"seed: 1\nname: {word}\n")
    wanted = "true or false" if kind == "true or false" else "the number in plain decimal digits"
    assert refused(path) == (f"{path}, line 2: '{word}' is {kind} to some programs and something else to others; write {wanted}, or put it in quotes")
    if ":" not in word:
        assert load(written(tmp_path, f"name: '{word}'")).name == word


@pytest.mark.parametrize(("text", "sentence"), [
    ("seed: !!timestamp x", "line 1: the tag !!timestamp is not read here; write the value without it"),
    ("seed: !!binary x", "line 1: the tag !!binary is not read here; write the value without it"),
    ("seed: !mine {a: 1}", "line 1: the tag !mine is not read here; write the value without it"),
    ("seed: !!map 3", "line 1: the tag !!map is not read here; write the value without it"),
    ("finetune: {options: &a {b: *a}}", "line 1: an anchor holds itself; write out what is meant"),
    ("finetune: &a\n  <<: *a", "line 2: an anchor holds itself; write out what is meant"),
    ("seed: " + "[" * 40 + "]" * 40, "line 1: this is nested more than 32 deep; flatten it"),
    ("seed: " + "[" * 100_000, "line 1: this is nested more than 32 deep; flatten it"),
    ("a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL")),
     "line 31: this is more than 100,000 values or 32 deep once aliases are written out; make it smaller"),
    ('name: "\\U00110000"', "is not YAML (chr() arg not in range(0x110000))"),
    ("a: 1\n" * 10_000, "line 2: the key 'a' is given twice; keep one of them"),
    ("x" * 300_000, "longer than 256 KiB, which no configuration is; put tables into files"),
])
def test_yaml_that_grows_or_makes_objects_is_refused_at_once(tmp_path, text, sentence):
    path = written(tmp_path, text)
    assert refused(path) == f"{path}: {sentence}"


@pytest.mark.parametrize(("text", "sentence"), [
    ("seed: !!bool x", "'x' is no bool; write the value without !!bool"), ("seed: !!int 1.5", "'1.5' is no int; write the value without !!int"),
    ("seed: " + "9" * 5_000, "a number of 5,000 digits; write one of at most 100"),
    ('name: "a\\x1b"', r"'a\\x1b' holds the control character U+001B; take it out"),
    ('name: "a\\ud800"', r"'a\\ud800' holds half a character (U+D800); take it out"),
])
def test_a_scalar_that_is_none_is_named_with_its_line(tmp_path, text, sentence):
    path = written(tmp_path, text)
    assert refused(path) == f"{path}, line 1: {sentence}"


def test_a_bomb_is_refused_at_once_whatever_value_it_is_in(tmp_path):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    path = written(tmp_path, "\n".join([*lines, "seed: *a9"]))
    assert refused(path) == f"{path}: line 6: this is more than 100,000 values or 32 deep once aliases are written out; make it smaller"


@pytest.mark.parametrize(("options", "sentence"), [
    ("{a: {1: x, b: y}}", "a key must be text, not 1; put it in quotes"), ("{a: [.nan]}", "should be finite numbers, not nan"),
    ("{a: {b: -.inf}}", "should be finite numbers, not -inf"),
])
def test_options_that_could_not_be_written_down_are_refused(options, sentence):
    assert refused(None, f"finetune.options={options}") == f"the defaults: this does not fit\n  finetune.options: {sentence}"
    assert refused(None, f"experts.judge.options={options}") == f"the defaults: this does not fit\n  experts.judge.options: {sentence}"


def test_a_value_that_does_not_fit_is_shown_short():
    assert refused(None, f"seed=[{', '.join(['word'] * 500)}]") == (
        "the defaults: this does not fit\n  seed: should be a whole number, not [" + "'word', " * 9 + "'word'…")


def numbers_of(model=Config, place=""):
    """Every knob that takes a number with a fraction, as --set would name it."""
    for name, field in model.model_fields.items():
        inner = [kind for kind in (field.annotation, *typing.get_args(field.annotation)) if isinstance(kind, type)]
        section = next((kind for kind in inner if issubclass(kind, Section)), None)
        if section and name not in ("by_round", "experts"):
            yield from numbers_of(section, f"{place}{name}.")
        elif float in inner:
            yield place + name


NUMBERS = [*numbers_of(), "pair.weights.clip_t", "finetune.objective", "by_round.2.finetune.beta", "sample.guidance_interval"]


@pytest.mark.parametrize("knob", NUMBERS)
@pytest.mark.parametrize("number", ["1.0e+39", "1.0e+300", "1.0e-40", "-1.0e+39"])
def test_a_number_that_nobody_means_is_refused_for_every_knob(knob, number):
    """torch has no such number in fp32, and says so in a traceback or not at all."""
    value = {"sample.guidance_interval": f"[0, {number}]", "finetune.objective": f"{{step_dpo: {number}}}"}.get(knob, number)
    with pytest.raises(UserError) as problem:
        load(None, [f"{knob}={value}"])
    assert len(NUMBERS) > 20 and f" {knob.removesuffix('.clip_t')}" in str(problem.value) and "should be" in str(problem.value)


def test_a_round_of_absurd_number_is_named():
    assert refused(None, f"by_round.{'9' * 5_000}.finetune.beta=3").startswith("the defaults: this does not fit\n  by_round")


def test_a_device_without_end_is_no_configuration():
    assert refused(Path("/dev/zero")) == "/dev/zero: longer than 256 KiB, which no configuration is; put tables into files"


def test_what_is_not_utf8_is_named(tmp_path):
    path = written(tmp_path, "name: grün".encode("latin-1"))
    assert refused(path) == f"{path} is not UTF-8 (byte 8): save it as UTF-8"


@pytest.mark.parametrize(("text", "kind"), [("- sample", "list"), ("3", "int"), ("just words", "str")])
def test_what_has_no_sections_is_named(tmp_path, text, kind):
    path = written(tmp_path, text)
    assert refused(path) == f"{path}: expected sections such as `sample:`, found {kind}"


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    assert refused(path) == f"there is no {path}: `fdpo init` writes one, --config names another"


def test_a_folder_is_no_configuration(tmp_path):
    assert refused(tmp_path) == f"{tmp_path} cannot be read (Is a directory): --config names a file"


# -- overrides


def test_an_override_changes_one_knob_and_keeps_its_neighbours(tmp_path):
    path = written(tmp_path, "pair: {margin: 0.25}")
    found = load(path, ["pair.weights.clip_i=2", "sample.save=[1, 2]", "finetune.min_snr=5", "evaluate.judge=null", "name=x=y"[:6]])
    assert found.pair.weights == {"clip_i": 2, "clip_t": 0.4} and found.pair.margin == 0.25
    assert found.sample == Config(sample={"save": [1, 2]}).sample
    assert found.finetune.min_snr == 5 and found.evaluate.judge is None and found.name == "x"


@pytest.mark.parametrize("name", ["2024", "1e5", "null", "t.1"])
def test_a_run_may_be_called_what_yaml_would_take_for_a_number(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert cli._config(None, None, name).name == name


def test_the_last_of_two_overrides_counts_and_one_may_empty_what_another_filled():
    assert load(None, ["seed=1", "seed=2"]).seed == 2
    assert load(None, ["finetune.min_snr=5", "finetune.min_snr="]).finetune.min_snr is None


def test_an_override_reaches_into_an_experts_options():
    found = load(None, ["experts.clip_t.options.model=local-dir:there", "experts.new.use=mine:Expert"])
    assert found.experts["clip_t"] == Expert(use="clip_text", options={"model": "local-dir:there"})
    assert found.experts["new"] == Expert(use="mine:Expert") and "judge" in found.experts


@pytest.mark.parametrize("text", ["finetune.beta", "=3", ".beta=3", "finetune..beta=3", "finetune.=3", ""])
def test_an_override_of_another_form_is_answered_with_the_form(text):
    assert refused(None, text) == f"--set {text}: write section.key=value, such as --set finetune.beta=500"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sample.eta.x=3", "--set sample.eta.x=3: sample.eta is not a section"),
        ("finetune.beta=[", "--set finetune.beta=[: line 1, column 2 is not YAML (expected the node content, but found '<stream end>')"),
        ("finetune.bta=3", "the defaults: this does not fit\n  finetune.bta: unknown key; did you mean 'beta'?"),
        ("finetune.beta=high", "the defaults: this does not fit\n  finetune.beta: should be a number, not 'high'"),
    ],
)
def test_a_wrong_override_is_named(text, sentence):
    assert refused(None, text) == sentence


# -- the models themselves


def test_every_section_says_in_its_first_line_what_it_is():
    for field in Config.model_fields.values():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Section):
            assert config._first_line(type(default)).endswith(".")
