"""Names to classes: built-ins, plug-ins and module:Class by one door, and every wrong name answered with the right one."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from fashiondpo_pipeline import registry
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.registry import EXPERTS, GENERATORS, OBJECTIVES, Registry, did_you_mean

SHAPES = Registry("shape", "some.group", {"circle": "math:tau", "square": "math:sqrt"})


def refused(registry, name):
    with pytest.raises(UserError) as problem:
        registry.find(name)
    return str(problem.value)


@pytest.fixture
def plugin(monkeypatch):
    """Installs an entry point."""

    def install(name, value):
        monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint(name, value, group)])

    return install


def test_every_built_in_is_where_it_is_said_to_be():
    for table in (EXPERTS, GENERATORS, OBJECTIVES):
        assert all(table.find(name) for name in table)


def test_a_known_name_is_found_and_so_is_a_module_with_an_attribute():
    import math

    import whole_runs

    assert SHAPES.find("circle") == math.tau
    assert SHAPES.find("whole_runs:Mood") is whole_runs.Mood


def test_an_unknown_name_is_answered_with_the_nearest_or_with_all():
    assert refused(SHAPES, "circel") == "no shape called 'circel'; did you mean 'circle'?"
    assert refused(SHAPES, "zzz") == "no shape called 'zzz'; known: circle, square"


def test_a_module_or_attribute_that_is_not_there_is_named():
    assert refused(SHAPES, "nowhere:Thing") == (
        "the shape 'nowhere:Thing' cannot be imported (No module named 'nowhere'): install the package it lives in, or go to its folder"
    )
    assert refused(SHAPES, "whole_runs:Thing") == "the shape 'whole_runs:Thing': whole_runs has no 'Thing'"


def test_checking_a_name_imports_nothing():
    assert SHAPES.check("nowhere:Thing") == "nowhere:Thing"
    told = subprocess.run(
        [sys.executable, "-c", "import sys; from fashiondpo_pipeline.registry import *; GENERATORS.check('text2img'); "
         "EXPERTS.check('clip_text'); OBJECTIVES.check('step_dpo'); print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert told.stdout == "False\n"


def test_a_plug_in_comes_in_beside_the_built_ins(plugin):
    plugin("triangle", "math:e")
    assert set(SHAPES) == {"circle", "square", "triangle"}
    assert SHAPES.find("triangle") == 2.718281828459045


def test_a_plug_in_may_not_take_a_built_ins_name(plugin):
    plugin("circle", "math:e")
    assert refused(SHAPES, "circle") == (
        "the shape 'circle' is defined twice, by math:tau and math:e: "
        "uninstall one of the packages, or write module:Class in the configuration"
    )


def test_the_same_plug_in_installed_twice_is_one(plugin):
    plugin("circle", "math:tau")
    assert len(SHAPES.names()) == 2


def test_did_you_mean_suggests_only_what_is_near():
    assert did_you_mean("gidance", ["guidance", "steps"]) == "did you mean 'guidance'?"
    assert did_you_mean("x", ["b", "a"]) == "known: a, b"
