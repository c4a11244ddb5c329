"""Pushes an exported folder to the Hugging Face hub, and says in one line why it could not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanollm import __version__
from nanollm.bundle import WEIGHTS
from nanollm.export.hf import INDEX
from nanollm.progress import say

OLD_WEIGHTS = [WEIGHTS, "model-*-of-*.safetensors", INDEX]
"""What an earlier push may have left and new weights do not overwrite. GGUFs of several types may lie together."""


def check_name(name: str) -> None:
    """Refuse what is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if "/" not in name:
        raise ValueError(f"--push must be USER/NAME, as in the address of a model on the hub, got {name!r}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push: {error}") from error


def check_access() -> None:
    """Refuse what cannot work before anything is exported."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push needs the network, but HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it")
    if get_token() is None:
        raise ValueError("--push needs a token of the hub that may write; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, *, private: bool = True) -> str:
    """Put the files of a folder into the hub's model repository `name`, which is made if need be; its address.

    Files of a repository that is already there are replaced, its other files stay, and so does who may read it: where
    that is everybody, only private=False is taken for an answer.
    """
    check_name(name)
    check_access()
    from huggingface_hub import HfApi

    hub = HfApi(library_name="nanollm", library_version=__version__)
    with explaining(name, hub.endpoint):
        address = str(hub.create_repo(name, private=private, exist_ok=True))
        is_public = not hub.model_info(name).private
    if private and is_public:
        raise ValueError(f"{address} is there already, and public; choose another name, or give --private false")
    files = [file for file in folder.rglob("*") if file.is_file()]
    say(f"pushing {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:,.1f} MB, to {address}")
    replaced = OLD_WEIGHTS if any(file.suffix == ".safetensors" for file in files) else None
    with explaining(name, hub.endpoint):
        message = f"nanollm {__version__} export"
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=replaced)
    return address


@contextmanager
def explaining(name: str, endpoint: str) -> Iterator[None]:
    """Say in one line what went wrong. The texts of network errors stay out of it: some hold the token."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # the latter is httpx's

    try:
        yield
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, error.server_message or error.response.reason_phrase
        if status == 401:
            raise ValueError("the hub does not accept the token; run `hf auth login` again, or set HF_TOKEN") from error
        if status in (403, 404):
            why = f"the token may not write to {name} on the hub"
            raise ValueError(f"{why}; choose a name of your own, or give the token the right to write") from error
        raise OSError(f"the hub answered {status} for {name}: {reason}") from error
    except (HTTPError, RuntimeError) as error:
        what = type(error.__cause__ or error).__name__
        raise OSError(f"the hub at {endpoint} is out of reach, or broke off ({what}); try again later") from error
    except ValueError as error:  # metadata that the hub does not know, such as a licence
        raise ValueError(f"the hub refuses {name}: {error}") from error
