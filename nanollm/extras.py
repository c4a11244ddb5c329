"""Optional packages: a verb that lacks one says the one line that brings it.

An extra is a group of packages in pyproject.toml. Package indexes know NanoLLM as nanollm-lab; the name nanollm there
is another project's.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "nanollm-lab"
ROOT = Path(__file__).resolve().parent.parent


def how_to_install(*extras: str) -> str:
    """The line to type; in a checkout it installs from there."""
    names = ",".join(extras)
    if (ROOT / "pyproject.toml").is_file():
        return f'in the folder of NanoLLM: pip install -e ".[{names}]"'
    return f'pip install "{DISTRIBUTION}[{names}]"'


def require(who: str, packages: Iterable[str], *extras: str) -> None:
    """ValueError where a verb or an option lacks one of the packages of its extras."""
    for package in packages:
        if find_spec(package) is None:
            raise missing_package(who, package, *extras)


def missing_package(who: str, package: str | None, *extras: str) -> ValueError:
    """The error to raise where a verb or an option lacks a package of an extra."""
    return ValueError(f"{who} needs the package {package}; {how_to_install(*extras)}")
