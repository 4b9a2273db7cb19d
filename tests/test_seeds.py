"""Randomness by key: the same key gives the same numbers in every process and order."""

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import seeds

PARTS = st.lists(st.one_of(st.text(max_size=8), st.integers(-(2**53), 2**53)), min_size=1, max_size=4)


@given(PARTS, PARTS)
def test_two_keys_agree_only_where_their_parts_do(first, second):
    assert (seeds.key(*first) == seeds.key(*second)) == (first == second)


@given(PARTS)
def test_a_key_fits_a_torch_seed(parts):
    assert 0 <= seeds.key(*parts) < 2**63


def test_a_number_and_its_text_are_different_keys():
    assert seeds.key(1) != seeds.key("1")


def test_keys_do_not_change_between_releases_or_processes():
    told = subprocess.run(
        [sys.executable, "-c", "from fashiondpo_pipeline.seeds import key; print(key(7, 'round 1', 'navy boot', 0))"],
        capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(sys.path)},
    )
    assert int(told.stdout) == seeds.key(7, "round 1", "navy boot", 0) == 9026690051761562714


def test_a_generator_repeats_its_noise_and_leaves_torch_alone():
    before = torch.random.get_rng_state()
    first, second, other = (torch.randn(8, generator=seeds.generator(*k)) for k in ((1, "a"), (1, "a"), (2, "a")))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())
