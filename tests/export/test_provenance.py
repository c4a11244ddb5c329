"""Where a model comes from can be told without telling whose machine it was."""

import pytest

from nanollm.export.provenance import check, name_of, public, stages


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/ada lovelace/tokens", "tokens"),
        ("runs/demo/sft/bundle", "bundle"),
        ("../../ada lovelace/tokens/", "tokens"),
        ("~/tokens", "tokens"),
        ("//server/share", "share"),
        (r"C:\ada lovelace\tokens", "tokens"),
        (r"\\server\ada\tokens", "tokens"),
        (r"runs\demo", "demo"),
        (" /srv/ada/notes.txt, document 2", "notes.txt, document 2"),
        ("Anna has 3/4 of a cake", "Anna has 3/4 of a cake"),
        ("mine:Doubles", "mine:Doubles"),
        ("nanollm 0.1.0 sft, torch 2.13.0+cpu", "nanollm 0.1.0 sft, torch 2.13.0+cpu"),
        ("", ""),
    ],
)
def test_of_a_path_the_last_name_is_shown_and_any_other_text_as_it_is(text, shown):
    assert name_of(text) == shown


def test_paths_are_found_wherever_they_stand():
    record = {"config": {"data": {"/a/x": 1.0}, "input": ["/a/y", "z"], "seed": 0, "reference": None}, "made_by": "us"}
    assert public(record) == {
        "config": {"data": {"x": 1.0}, "input": ["y", "z"], "seed": 0, "reference": None},
        "made_by": "us",
    }
    assert public(public(record)) == public(record)


def test_two_folders_of_one_name_stay_two_and_keep_their_fingerprints():
    shown = public({"config": {"data": {"/b/x": 0.5, "/a/x": 1.0}}, "inputs": {"data": {"/a/x": "aa", "/b/x": "bb"}}})
    weights, digests = shown["config"]["data"], shown["inputs"]["data"]
    assert len(weights) == len(digests) == 2
    assert {digests[name]: weight for name, weight in weights.items()} == {"aa": 1.0, "bb": 0.5}


def test_the_first_stage_comes_first():
    provenance = {"made_by": "c", "parent": {"made_by": "b", "parent": {"made_by": "a"}}}
    assert [step["made_by"] for step in stages(provenance)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "record",
    [{"imports": 5}, {"parent": 3}, {"config": "lr"}, {"parent": {"inputs": []}}, {"made_by": ["a"]}],
)
def test_what_is_no_history_is_refused(record):
    with pytest.raises(ValueError, match=r"provenance.json: \w+ must be a \w+; delete it"):
        check(record)


def test_settings_that_are_paths_are_shortened_whatever_they_look_like():
    config = {"out": "client files/acme corp/tokens", "data": {"my data/alice/a": 1.0}, "input": ["x y/z.txt"]}
    assert public(config) == {"out": "tokens", "data": {"a": 1.0}, "input": ["z.txt"]}
    assert public({"note": "see /srv/alice/x and C:\\alice\\y, 3/4 of it, https://a.b/c"}) == {
        "note": "see x and y, 3/4 of it, https://a.b/c"
    }
