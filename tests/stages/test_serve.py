"""`nanollm serve` starts where it is safe, says where it is, and leaves when it is told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from nanollm import cli
from nanollm.bundle import load_bundle, save_adapter
from nanollm.config import parse_options
from nanollm.model.lora import LoraConfig
from nanollm.stages import serve
from nanollm.stages.serve import Config
from tests.generate.test_adapters import trained
from tests.stages.conftest import MODEL, untrained


@pytest.mark.parametrize(
    ("key", "host", "message"),
    [
        *[("", host, "so a key is needed: set NANOLLM_API_KEY") for host in ("0.0.0.0", "::", "a.b", "10.0.0.7", "")],
        *[(key, "127.0.0.1", "printable ASCII without spaces") for key in ("with space", "line\nbreak", "ümlaut")],
        *[("", host, None) for host in ("127.0.0.1", "127.8.9.1", "localhost", "::1")],
        ("secret", "0.0.0.0", None),
    ],
)
def test_a_host_that_others_can_reach_needs_a_key_and_a_key_fits_into_a_header(key, host, message):
    pytest.importorskip("fastapi", reason='fastapi is not installed: pip install -e ".[serve]"')
    from nanollm.serve.server import checked_key

    if message is None:
        assert checked_key(key, host) == key
    else:
        with pytest.raises(ValueError, match=message):
            checked_key(key, host)


def test_the_command_line_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NANOLLM_API_KEY", raising=False)
    assert cli.main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nanollm serve: host 0.0.0.0 can be reached from other machines")
    assert captured.err.count("\n") == 1


def test_the_key_of_the_environment_counts_and_is_not_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOLLM_API_KEY", "very-secret")
    assert cli.main(["serve", str(tmp_path / "nothing"), "--host", "0.0.0.0"]) == 2
    assert "is not a bundle" in capsys.readouterr().err
    assert cli.main(["serve", "--help"]) == 0
    assert cli.main(["serve", "--print_config"]) == 0
    assert "very-secret" not in "".join(capsys.readouterr())
    assert "very-secret" not in repr(Config(bundle=tmp_path, api_key="very-secret"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 65_536}, "port must be from 0 to 65,535"),
        ({"model_name": "a/b"}, "model_name must be printable text without /, got 'a/b'"),
        ({"adapter": {"a/b": "x"}}, "names in adapter must be printable text without /, got 'a/b'"),
        ({"adapter": {"nanollm": "x"}}, "adapter: 'nanollm' is the bundle's own name"),
        ({"max_running": 0}, "max_running must be at least 1, got 0"),
        ({"deadline_s": 0.0}, "deadline_s must be above 0 seconds"),
        ({"deadline_s": float("nan")}, "deadline_s must be above 0 seconds"),
        ({"cors_origins": ["*"]}, r"must list origins one by one"),
    ],
)
def test_senseless_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Config(bundle=tmp_path, **settings)


def adapter_in(folder, bundle, *targets):
    base = load_bundle(bundle)
    c = LoraConfig(rank=2, targets=[*targets])
    facts = {"parent": base.provenance, "tools": ["calculator"]}
    return save_adapter(folder, c, trained(base.model, 0, 2, *targets), facts)


def test_adapters_are_options_and_what_cannot_be_served_is_refused(bundle, tokenizer, tmp_path, capsys):
    pytest.importorskip("fastapi", reason='fastapi is not installed: pip install -e ".[serve]"')
    other = untrained(tmp_path / "other", MODEL, tokenizer, seed=1)
    routers = adapter_in(tmp_path / "routers", bundle, "centroids", "o_proj")
    good = adapter_in(tmp_path / "good", bundle, "o_proj")
    c, _ = parse_options("serve", serve, [str(bundle), "--adapter", f"{{math: {good}, style: b}}"])
    assert c.adapter == {"math": good, "style": Path("b")}
    for base, folder, said in [
        (bundle, routers, "centroids, which only a merged model can; make one with nanollm merge"),
        (other, good, "this bundle has"),
        (bundle, tmp_path, "holds no adapter.json"),
        (bundle, "~/nothing", f"{Path.home()}/nothing holds no adapter.json"),
    ]:
        assert cli.main(["serve", str(base), "--adapter", f"{{math: {folder}}}"]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_an_adapter_brings_its_tools_and_its_name(bundle, tmp_path, capsys, monkeypatch):
    pytest.importorskip("fastapi", reason='fastapi is not installed: pip install -e ".[serve]"')
    good, apps = adapter_in(tmp_path / "good", bundle, "o_proj"), []
    monkeypatch.setattr("nanollm.serve.server.run", lambda app, *_: apps.append(app))
    assert cli.main(["serve", str(bundle), "--dtype", "float32", "--adapter", f"{{math: {good}}}"]) == 0
    assert "in float32, adapters math, 16 replies at once" in capsys.readouterr().err
    service = apps[0].state.service
    assert {name: each.tools for name, each in service.models.items()} == {"nanollm": [], "math": ["calculator"]}
    assert service.make_tools["nanollm"] is None
    assert service.make_tools["math"] is not None


def test_a_port_in_use_is_a_mistake_of_the_user(bundle, capsys):
    pytest.importorskip("fastapi", reason='fastapi is not installed: pip install -e ".[serve]"')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(bundle), "--port", port, "--dtype", "float32"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"cannot listen on 127.0.0.1:{port} (" in captured.err
    assert captured.err.endswith("choose another --port or --host\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_it_prints_its_address_answers_and_stops_in_good_order(bundle, number, code):
    pytest.importorskip("fastapi", reason='fastapi is not installed: pip install -e ".[serve]"')
    command = [sys.executable, "-m", "nanollm", "serve", str(bundle), "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        body = {"model": "nanollm", "messages": [{"role": "user", "content": "Hm?"}], "stream": True, "max_tokens": 20}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            first = response.readline()
            process.send_signal(number)  # what is being written is written to its end
            rest = response.read()
        output, errors = process.communicate(timeout=30)
    assert first.startswith(b"data: ")
    assert rest.endswith(b"data: [DONE]\n\n")
    assert (process.returncode, output) == (code, "")
    assert "Traceback" not in errors
