"""Pushes an exported folder to the Hugging Face hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanollm import __version__
from nanollm.bundle import WEIGHTS
from nanollm.export.hf import INDEX
from nanollm.progress import say

OLD_WEIGHTS = [WEIGHTS, "model-*-of-*.safetensors", INDEX]
"""What an earlier push may have left and new weights do not overwrite. GGUFs of several types may lie together."""
LICENSES = (  # https://huggingface.co/docs/hub/repositories-licenses
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 "
    "cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 "
    "lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl "
    "openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other"
)


def check_metadata(license: str, language: str | None) -> None:
    """ValueError for a licence or a language that the hub would refuse after the upload."""
    if license not in LICENSES.split():
        raise ValueError(f"--license must be one that the hub knows, such as mit, apache-2.0 or other, got {license!r}")
    if language is not None and not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
        raise ValueError(f"--language must be a code of ISO 639, such as en or de, got {language!r}")


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
