"""Small language models from raw text to replies: latent attention, mixture of experts, one command per step.

The command line is the front door (`nanollm --help`). Notebooks find the names they need here, each imported when it
is first used, so that `import nanollm` costs nothing; every verb is a Config and a run(Config) in `nanollm.stages`. How
both are used: examples/. Import it before torch: it chooses how waiting threads behave beside other programs.
"""

import importlib
from typing import Any

from nanollm.threads import choose_waiting

__version__ = "0.1.0"

choose_waiting()  # before torch is imported

_HOMES = {
    "load": "nanollm.generate.model",
    "Tokenizer": "nanollm.text.tokenizer",
    "ModelConfig": "nanollm.model.config",
    "Transformer": "nanollm.model.transformer",
    "load_bundle": "nanollm.bundle",
    "save_bundle": "nanollm.bundle",
    "Engine": "nanollm.generate.engine",
    "Request": "nanollm.generate.request",
    "SamplingConfig": "nanollm.generate.sampling",
}
# Not `generate`: after the first import from it, nanollm.generate is the package of that name.


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nanollm' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
