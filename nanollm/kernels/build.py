"""Compiles a C++ file of this folder on first use and binds its functions to Python.

It is compiled on this machine, for its processor, when it is needed for the first time (some seconds), and kept under a
name made of the source, the options and everything the compiler knows about the processor. PyTorch's copy of the OpenMP
library is the one that serves it, so that both share one set of threads.
"""

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

HEADER = Path(__file__).with_name("vectors.h")
OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")


class NoCompilerError(Exception):
    """This machine cannot compile C++."""


def load(source: Path, options: tuple[str, ...] = OPTIONS) -> ctypes.CDLL:
    """The library made of one C++ file; NoCompilerError with the reason where that fails."""
    compiler = find_compiler()
    if not compiler:
        raise NoCompilerError("no C++ compiler was found (on Debian and Ubuntu: sudo apt install g++)")
    # What the compiler predefines names its version and every feature of the processor.
    known = _run([*compiler, *options, "-dM", "-E", "-x", "c++", os.devnull])
    made_of = (source.read_bytes(), HEADER.read_bytes(), known, " ".join(options).encode())
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    try:
        path = cache_folder() / f"{source.stem}-{key}.so"
        if not path.exists():
            draft = path.with_name(f"{path.name}.{os.getpid()}")  # others may be compiling it as well
            _run([*compiler, *options, f"-I{HEADER.parent}", str(source), "-o", str(draft)])
            draft.replace(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompilerError(f"the compiled library cannot be kept or loaded: {error}") from error


def find_compiler() -> list[str]:
    """The command of this machine's C++ compiler, with the options that CXX may give it; empty where there is none."""
    names = filter(None, map(shutil.which, ("c++", "g++", "clang++")))
    return shlex.split(os.environ.get("CXX", "")) or list(names)[:1]


def cache_folder() -> Path:
    """Where libraries are kept: ~/.cache/nanollm, or a folder of this process's own where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanollm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="nanollm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()
        raise NoCompilerError(f"{command[0]} failed: {said[0] if said else error}") from error
