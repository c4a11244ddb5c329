"""A program in a reply is run, within limits."""

import socket
import time

import pytest

from nanollm.sources.python_tool import MAX_OUTPUT, python, run_python


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("2**10\n", "1024"),
        ("print(sum(range(11)))\n", "55"),
        ("import math, fractions\nprint(math.comb(5, 2), fractions.Fraction(1, 3))\n", "10 1/3"),
        ("1/0\n", "ZeroDivisionError: division by zero"),
        ("def\n", "SyntaxError"),
        ("x = 1\n", ""),
    ],
)
def test_a_block_gets_its_output(program, output):
    given = python(f"Let me calculate.\n```python\n{program}```\n")
    assert given.startswith(f"```output\n{output}")
    assert given.endswith("```\n")


@pytest.mark.parametrize("reply", ["", "```python\n1+1", "```python\n1+1\n```", "```\n1+1\n```\n", "```python\n```\n"])
def test_other_text_gets_nothing(reply):
    assert python(reply) == ""


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()",
        "import os\nos.system('touch evil')",
        "import subprocess\nsubprocess.run(['ls'])",
        "import socket\nsocket.socket()",
        "open('evil', 'w')",
        "open('/etc/passwd').read()",
        "import os\nos.mkdir('evil')",
        "import ctypes",
        "import os\nos.kill(1, 9)",
        "import _posixsubprocess",
        "import multiprocessing",
    ],
)
def test_files_processes_and_network_are_refused(program):
    assert "PermissionError" in run_python(program)


def test_the_network_is_out_of_reach_by_the_lower_module_too():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "PermissionError" in run_python(f"import _socket\n_socket.socket().connect(('127.0.0.1', {port}))")


def test_memory_and_output_are_limited():
    assert "MemoryError" in run_python("x = bytearray(10**10)")
    assert len(run_python("print('a' * 10**8)")) <= MAX_OUTPUT + 3
    assert len(run_python("while True: print('a' * 1000)")) <= MAX_OUTPUT + 40


def test_a_program_that_does_not_end_is_stopped():
    begin = time.monotonic()
    assert "stopped" in run_python("while True: pass")
    assert time.monotonic() - begin < 10


def test_a_program_that_fails_to_run_or_ends_its_process_is_told(monkeypatch):
    assert run_python("import os\nos._exit(3)") == "\nended with exit code 3"
    monkeypatch.setattr("nanollm.sources.python_tool.subprocess.Popen", fails)
    assert "could not be run: no more processes" in python("```python\n1+1\n```\n")


def fails(*words, **options):
    raise OSError("no more processes")
