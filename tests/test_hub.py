"""A hub that does not answer: one sentence within seconds, nothing of its client's, and the counts that need no model."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from whole_runs import fdpo, works

ARGUMENTS = ("plan", "-n", "1", "--set", "generator.model=someone/else")


class Silent(BaseHTTPRequestHandler):
    """A server that hangs up on whoever asks, and counts."""

    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.close_connection = True

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def silent():
    """Its address."""
    Silent.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_hub_that_hangs_up_is_asked_once_and_told_of_in_one_sentence(place, silent):
    environment = {**os.environ, "HF_ENDPOINT": silent, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "hf"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "fashiondpo_pipeline", *ARGUMENTS], cwd=place, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("fdpo: generator.model: 'someone/else' cannot be loaded (the hub does not answer (")
    assert sentence.endswith("; above is what can be counted without the model")
    assert 0 < Silent.asked <= 2  # once, knocking twice; the client alone asks six times, in half a minute
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["round", "1", "sample", "to", "do", "24"] in lines and ["round", "1", "finetune", "to", "do", "12"] in lines


def test_a_pinned_model_that_is_away_is_counted_with_what_is_done(place):
    told = fdpo(*ARGUMENTS, "--set", "generator.revision=" + "a" * 40)
    assert told.code == 1 and "above is what can be counted" in told.err and "round 1" in told.out


def test_what_is_in_the_cache_needs_no_answer(place, tiny_sd, silent):
    import shutil

    shutil.copytree(tiny_sd, Path("hf/hub/models--someone--else/snapshots") / ("1" * 40))
    (Path("hf/hub/models--someone--else/refs")).mkdir()
    Path("hf/hub/models--someone--else/refs/main").write_text("1" * 40)
    environment = {**os.environ, "HF_ENDPOINT": silent, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "hf"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "fashiondpo_pipeline", "status", *ARGUMENTS[3:], "--name", "x"], cwd=place, env=environment,
                          capture_output=True, text=True, check=False)
    assert "there is no run at runs/x" in done.stderr
    done = subprocess.run([sys.executable, "-c", "from fashiondpo_pipeline import hub; print(hub.fetch('someone/else', 'model_index.json', None))"],
                          cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("1" * 40 + "/model_index.json"), done.stderr


def test_plan_of_a_model_that_is_here_is_what_it_was(place):
    assert "denoiser rows" in works("plan").out
