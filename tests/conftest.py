"""What every test stands on: tiny models built once, one torch thread, no network, and hypothesis without chance."""

import contextlib
import os
import socket
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads round sums differently
os.environ.setdefault("FDPO_CACHE", tempfile.mkdtemp(prefix="fdpo"))  # what is remembered of files is not the user's
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub id is refused at once instead of after five retries

os.environ.pop("COLUMNS", None)  # what starts the tests may say how wide its terminal is; sentences are then wrapped

import pytest
import torch
from hypothesis import settings
from whole_runs import curves_drawn, finished, finished_place, place  # noqa: F401 - fixtures of whole runs

from fashiondpo_pipeline import testing

torch.set_num_threads(1)
settings.register_profile("seeded", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("seeded")


os.environ["FDPO_TRUST"] = "whole_runs,broken_expert,test_bad_input,test_processes,test_reliability"  # what the tests' own runs name
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="fdpo-config-")  # nobody's own list of trusted modules


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """Nobody says how wide a terminal is, so that a sentence is a line; pytest-xdist's workers are told by it."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True, scope="module")
def _curves(request):
    """Tests of pages and of what is on them (test_report.py, test_..._charts.py) draw the curves, which takes others too long."""
    about_pages = {"report", "charts"} & set(request.module.__name__.split("_"))
    with curves_drawn() if about_pages else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """Every connection to another machine fails loudly; sockets of this machine's own processes still work."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"):
            return connect(self, address)
        raise RuntimeError(f"a test tried to reach the network: {address}")

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A Stable Diffusion folder with random weights that predicts the noise."""
    return testing.tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory) -> Path:
    """The same, predicting v."""
    return testing.tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "sd_v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """A Stable Diffusion XL folder with random weights."""
    return testing.tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> Path:
    """A Stable Diffusion 3.5 folder with random weights."""
    return testing.tiny_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory) -> Path:
    """A FLUX folder with random weights, guidance embedded."""
    return testing.tiny_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """An open_clip folder with random weights, for `local-dir:`."""
    return testing.tiny_clip(tmp_path_factory.mktemp("models") / "clip")
