"""Every preset is a whole configuration that `fdpo init` writes and `fdpo config` reads back."""

import pytest
from whole_runs import refused, works

from fashiondpo_pipeline.config import load, validate
from fashiondpo_pipeline.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_and_read_back_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "prompts.txt" in works("init", "--preset", name).out
    assert load(tmp_path / "pipeline.yaml") == validate(PRESETS[name], name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_pins_the_commit_of_its_model_and_judges_with_a_stranger(name):
    config = validate(PRESETS[name], name)
    assert len(config.generator.revision) == 40 and int(config.generator.revision, 16) >= 0
    assert config.evaluate.judge not in config.pair.weights
    assert config.sample.eta > 0 and config.sample.path  # what step_dpo needs


def test_an_unknown_preset_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("init", "--preset", "sdlx") == "no preset called 'sdlx'; did you mean 'sdxl'?"
    assert not (tmp_path / "pipeline.yaml").exists()
