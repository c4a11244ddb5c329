"""A Python interpreter for replies: the program in a ```python block is run, and an ```output block follows it.

Each program has a process of its own, with limits on time, memory and output, and no files, processes or network. These
limits stop accidents and simple mischief. They are no wall against an attacker: serve strangers from a container.
"""

import os
import re
import signal
import subprocess
import sys
from tempfile import TemporaryDirectory, TemporaryFile

if os.name != "posix":
    raise ValueError("the tool python needs the process limits of Linux or macOS; leave it out of --tools")

PROGRAM = re.compile(r"```python\n((?:(?!```)[\s\S]){1,4000})```\n\Z")
TIMEOUT_S = 2.0
MAX_OUTPUT = 500
"""Characters of output that are shown."""

# Runs in the other process, whose stdin holds the program. Audit hooks cannot be removed (PEP 578).
GUARD = f"""
import ast, os, resource, sys
source = sys.stdin.read()
for kind, limit in (("CPU", {TIMEOUT_S:.0f}), ("AS", 2**29), ("FSIZE", {8 * MAX_OUTPUT}), ("NPROC", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{{kind}}"), (limit, limit))
libraries = tuple({{os.path.realpath(path) + os.sep for path in sys.path if path}})
modules = ("ctypes", "_ctypes", "_posixsubprocess", "multiprocessing")
refused = ("socket", "subprocess", "os", "shutil", "ctypes", "mmap", "signal", "pty", "fcntl", "resource", "syslog")
read_only = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
def guard(event, words):
    if event == "open":
        path, mode, flags = words
        is_library = isinstance(path, str) and os.path.realpath(path).startswith(libraries)
        if not is_library or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(f"no files here: {{path}}")
    elif event == "import" and words[0].partition(".")[0] in modules:
        raise PermissionError(f"no {{words[0]}} here")
    elif event.partition(".")[0] in refused and event not in read_only:
        raise PermissionError(f"no {{event}} here")
try:
    tree = ast.parse(source)
    sys.addaudithook(guard)
    names = {{"__name__": "__main__"}}
    if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr):
        value = eval(compile(ast.Expression(tree.body[0].value), "program", "eval"), names)
        if value is not None:
            print(value)
    else:
        exec(compile(tree, "program", "exec"), names)
except BaseException as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def python(reply: str) -> str:
    """What follows a reply that has just closed a ```python block: the output of its program; else "".

    A program that takes longer than TIMEOUT_S is ended, and the output says so. Never raises.
    """
    if not reply.endswith("```\n") or not (program := PROGRAM.search(reply[-4096:])):
        return ""
    try:
        output = run_python(program[1]).strip("\n")
    except OSError as error:
        output = f"the program could not be run: {error}"
    return f"```output\n{output}\n```\n" if output else "```output\n```\n"


def run_python(source: str) -> str:
    """The first MAX_OUTPUT characters that a program prints; of an expression its value, of an error its message."""
    with TemporaryDirectory() as folder, TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", GUARD],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(source.encode(errors="replace"), timeout=TIMEOUT_S + 1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        output.seek(0)
        text = output.read(8 * MAX_OUTPUT).decode(errors="replace")
    if process.returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        text += f"\nstopped after {TIMEOUT_S:.0f} s"
    elif process.returncode:
        text += f"\nended with exit code {process.returncode}"
    return text if len(text) <= MAX_OUTPUT else f"{text[:MAX_OUTPUT]}..."
