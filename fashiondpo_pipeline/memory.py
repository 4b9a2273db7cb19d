"""The most memory that was in use: the GPU's where there is one, else this process's own; and when Python looks for garbage in it."""

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def on_gpu() -> bool:
    """Whether what is counted is a GPU's memory; without importing torch for it."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available() and torch.cuda.is_initialized())


def forget() -> None:
    """Count the peak from now on."""
    if on_gpu():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    elif os.access(_FORGET, os.W_OK):
        _FORGET.write_text("5")  # Linux: the peak of what is resident starts anew


def peak() -> int:
    """Bytes at the peak since `forget`: what torch held of the GPU, else what was resident of this process; 0 where neither is known."""
    if on_gpu():
        return sys.modules["torch"].cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", _MEMORY.read_text()) if _MEMORY.exists() else None
    return 1024 * int(found[1]) if found else 0


@contextmanager
def keeping() -> Iterator[None]:
    """Python looks for no garbage meanwhile: where tens of thousands of objects are made that all stay, that is a fifth of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
