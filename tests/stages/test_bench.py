"""How fast a model answers, as people and programs read it."""

import json

import pytest

from nanollm.cli import main

QUICK = ["--rows", "1", "2", "--context", "16", "--prompt", "20", "--tokens", "1"]


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_preset_is_measured_and_told_as_json(capsys, quantize):
    assert main(["bench", "nano-1m", *QUICK, "--quantize", quantize, "--dtype", "bfloat16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [decode["rows"] for decode in facts["decode"]] == [1, 2]
    assert facts["prefill"]["prompt_tokens"] == 20
    assert facts["decode"][0]["cache_bytes_per_token"] == 4 * 80 * 2
    assert all(decode["tokens_per_s"]["least"] > 0 for decode in facts["decode"])


def test_a_bundle_is_measured_and_told_as_a_table(capsys, bundle):
    assert main(["bench", str(bundle), *QUICK, "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["decode, 1 x 16", "decode, 2 x 16", "prompt of 20", "cache"]
    assert "of what memory gives" in lines[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano-1x"], "no model preset is called 'nano-1x'; did you mean nano-1m?"),
        (["nano-1m", "--rows", "0"], "rows must be numbers of at least 1, got [0]"),
        (["nano-1m", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["nano-1m", "--tokens", "90"], "tokens x repeats must stay below the context of 256, got 90 x 5"),
        (["nano-1m", "--quantize", "int8", "--kernels", "torch"], "quantize int8 needs kernels native, got torch"),
        (["nano-1m", "--quantize", "int4", "--kernels", "torch"], "quantize int4 needs kernels native, got torch"),
        (["nano-1m", "--quantize", "int9"], "quantize: expected none|int8|int4, got int9"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, message):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
