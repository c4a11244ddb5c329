"""Pushes an exported folder to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanollm import __version__
from nanollm.bundle import WEIGHTS
from nanollm.export.hf import INDEX
from nanollm.progress import say

OLD_WEIGHTS = [WEIGHTS, "model-*-of-*.safetensors", INDEX]
"""What an earlier push may have left and new weights do not overwrite. GGUFs of several types may lie together."""


def check_push(name: str) -> None:
    """ValueError for what is no name of a repository, and where a push cannot work: no network, no token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if "/" not in name:
        raise ValueError(f"--push must be USER/NAME, as in the address of a model on the hub, got {name!r}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push needs the network, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it")
    if get_token() is None:
        raise ValueError("--push needs a token of the hub that may write; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload the files of a folder to the hub's model repository `name`, created if need be; returns its address.

    Files that are there already are replaced, others stay. private=True is refused for a repository that is public.
    """
    from huggingface_hub import HfApi

    hub = HfApi(library_name="nanollm", library_version=__version__)
    with _in_one_line(name, hub.endpoint):
        address = str(hub.create_repo(name, private=private, exist_ok=True))
        is_public = not hub.model_info(name).private
    if private and is_public:
        raise ValueError(f"{address} is there already, and public; choose another name, or give --private false")
    replaced = OLD_WEIGHTS if any(folder.rglob("*.safetensors")) else None
    say(f"pushing {folder} to {address}")
    with _in_one_line(name, hub.endpoint):
        message = f"nanollm {__version__} export"
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=replaced)
    return address


@contextmanager
def _in_one_line(name: str, endpoint: str) -> Iterator[None]:
    """Say in one line what went wrong. The texts of network errors stay out of it: some hold the token."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # the latter is httpx's

    try:
        yield
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, error.server_message or error.response.reason_phrase
        advice = (
            "run `hf auth login` again, or set HF_TOKEN, with the right to write" if status in (401, 403, 404) else ""
        )
        raise OSError(f"the hub answered {status} for {name}: {advice or reason}") from error
    except (HTTPError, RuntimeError) as error:
        what = type(error.__cause__ or error).__name__
        raise OSError(f"the hub at {endpoint} is out of reach, or broke off ({what}); try again later") from error
    except ValueError as error:  # metadata that the hub does not know
        raise ValueError(f"the hub refuses {name}: {error}") from error
