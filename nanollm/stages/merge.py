"""Makes one bundle of a bundle and an adapter that was trained on it."""

from dataclasses import dataclass
from pathlib import Path

from nanollm.bundle import FILES, is_bundle, save_merged
from nanollm.durable import check_replaceable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Add a LoRA adapter to the weights of the bundle it was trained on, and write the sum as a bundle."""

    bundle: Path
    """The bundle that the adapter was trained on."""
    adapter: Path
    """Folder of the adapter, such as runs/demo/sft/adapter."""
    out: Path
    """Folder of the merged bundle."""
    force: bool = False
    """Replace an existing bundle at --out."""


def run(c: Config) -> Path:
    """The folder of the merged bundle."""
    for given in (c.bundle, c.adapter):
        if given.resolve().is_relative_to(c.out.resolve()):
            raise ValueError(f"{c.out} contains {given}; choose another --out")
    check_replaceable(c.out, FILES if is_bundle(c.out) else (), force=c.force, what="a bundle")
    return save_merged(c.out, c.bundle, c.adapter)
