"""Every file arrives as it is, for its owner alone, and what goes wrong is told in one line without the token."""

import pytest
from huggingface_hub import constants

from nanollm.cli import is_users_mistake, one_line
from nanollm.export.hub import check_metadata, check_push, push
from tests.export.fake_hub import TOKEN, running_hub

# huggingface_hub's own way to send a file by LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

NAME = "ada/tiny-1m"
README = b"---\nlicense: mit\n---\n\n# tiny\n"


@pytest.fixture
def hub(monkeypatch):
    """A hub that huggingface_hub is pointed to, as by HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def folder(tmp_path):
    """An exported model: small files, empty ones and large ones."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_bytes(README)
    (folder / "config.json").write_bytes(b'{"\xc3\xa9": 1}\n')
    (folder / "empty.txt").write_bytes(b"")
    for part in (1, 2):
        (folder / f"model-0000{part}-of-00002.safetensors").write_bytes(bytes(range(256)) * 40 * part)
    (folder / "model.safetensors.index.json").write_bytes(b"{}" * 600)
    return folder


def on_disk(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def message_of(error):
    """What the command line would print; it must be the user's to solve."""
    assert is_users_mistake(error.value), repr(error.value)
    said = one_line(error.value)
    assert "aSecret" not in said
    return said


def test_every_file_arrives_byte_by_byte_and_is_private(hub, folder, capfd):
    assert push(folder, NAME, private=True) == f"{hub.url}/{NAME}"
    assert hub.files == on_disk(folder)
    assert len(hub.store) == 3  # the large ones went by LFS
    assert (hub.repo, hub.private) == (NAME, True)
    said = capfd.readouterr()
    assert f"pushing {folder} to {hub.url}/{NAME}" in said.err
    assert "aSecret" not in said.out + said.err


def test_a_second_push_replaces_the_weights_and_leaves_other_files(hub, folder):
    push(folder, NAME, private=True)
    hub.files["notes.txt"] = b"mine"
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "model.safetensors").write_bytes(b"new" * 1000)
    push(folder, NAME, private=True)
    assert hub.files == on_disk(folder) | {"notes.txt": b"mine"}
    assert len(hub.commits) == 2


def test_ggufs_of_several_types_may_lie_together(hub, folder):
    hub.files["tiny-q8_0.gguf"] = b"older"
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "tiny-f16.gguf").write_bytes(b"GGUF" * 1000)
    push(folder, NAME, private=True)
    assert hub.files["tiny-q8_0.gguf"] == b"older"


def test_a_private_model_does_not_go_into_a_public_repository(hub, folder):
    push(folder, NAME, private=False)
    assert hub.private is False
    before = dict(hub.files)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is there already, and public; choose another name") as error:
        push(folder, NAME, private=True)
    assert NAME in message_of(error)
    assert hub.files == before


# --- mistakes ---


@pytest.mark.parametrize(
    "name", ["tiny", "ada/tiny/1", "ada/", "/tiny", "ada/ti ny", "../tiny", "ada/-tiny", "ada/a..b"]
)
def test_a_name_that_the_hub_does_not_take_is_refused(hub, name):
    with pytest.raises(ValueError, match="--push") as error:
        check_push(name)
    assert repr(name) in message_of(error)


def test_without_a_token_it_says_how_to_get_one(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(ValueError, match=r"hf auth login.*HF_TOKEN") as error:
        check_push(NAME)
    message_of(error)


@pytest.mark.parametrize("token", ["hf_aSecretOfAnother", "hf_aSecret\u00e9"])
def test_a_token_that_is_not_taken_is_told_and_not_shown(hub, folder, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises((OSError, ValueError), match=r"the hub (answered 401|refuses)") as error:
        push(folder, NAME, private=True)
    message_of(error)


@pytest.mark.parametrize(("status", "why"), [(403, "with the right to write"), (500, "")])
def test_a_hub_that_takes_nothing_is_told(hub, folder, status, why):
    hub.denies = status
    with pytest.raises(OSError, match=f"the hub answered {status} for {NAME}: .*{why}") as error:
        push(folder, NAME, private=True)
    message_of(error)


@pytest.mark.parametrize(("license", "language"), [("my own", None), ("", None), ("mit", "klingon"), ("mit", "EN")])
def test_a_licence_or_language_that_the_hub_refuses_is_refused_first(license, language):
    check_metadata("apache-2.0", "de")
    with pytest.raises(ValueError, match=r"--license must be one|--language must be a code"):
        check_metadata(license, language)


def test_a_licence_that_the_hub_does_not_know_is_told(hub, folder):
    (folder / "README.md").write_bytes(README.replace(b"mit", b"mine"))
    with pytest.raises(ValueError, match=r'(?s)the hub refuses .*"license" must be one of mit') as error:
        push(folder, NAME, private=True)
    message_of(error)
    assert hub.files == {}


def test_an_upload_that_breaks_off_is_told(hub, folder):
    hub.is_full = True
    with pytest.raises(OSError, match=r"is out of reach, or broke off \(HfHubHTTPError\)") as error:
        push(folder, NAME, private=True)
    message_of(error)


def test_a_hub_out_of_reach_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OSError, match=r"http://127.0.0.1:9 is out of reach, or broke off \(ConnectError\)") as error:
        push(folder, NAME, private=True)
    message_of(error)


def test_offline_mode_is_told_before_anything_is_written(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it") as error:
        check_push(NAME)
    message_of(error)
