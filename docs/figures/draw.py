"""Draw every picture of the docs: `python docs/figures/draw.py` (with --check: compare instead of writing).

Sizes are those of the presets, figures those of docs/figures/measured/ and benchmarks/results/: from the same files the
same bytes. measure.py writes the former from a model and its runs; screenshots.py makes the PNG files.
"""

import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from docs.figures import diagrams, of_architecture, of_attention, of_experts, of_grpo  # noqa: E402
from docs.figures.picture import Picture  # noqa: E402

PICTURES: dict[str, Callable[[], Picture]] = {
    "architecture": diagrams.architecture,
    "flow": diagrams.flow,
    "parameters": of_architecture.parameters,
    "residual": of_architecture.residual,
    "cache": of_attention.cache,
    "trade": of_attention.trade,
    "heads": of_attention.heads,
    "patterns": of_attention.patterns,
    "expert-load": of_experts.expert_load,
    "expert-tokens": of_experts.expert_tokens,
    "expert-choice": of_experts.expert_choice,
    "grpo-group": of_grpo.grpo_group,
    "grpo-clip": of_grpo.grpo_clip,
    "grpo-steps": of_grpo.grpo_steps,
}


def main(words: list[str]) -> int:
    """Exit status: 0 all pictures are as they should be, 1 some are not."""
    stale = []
    for name, draw in PICTURES.items():
        file, drawn = HERE / f"{name}.svg", draw().svg()
        if "--check" not in words:
            file.write_text(drawn, encoding="utf-8", newline="\n")
        elif not file.exists() or file.read_text(encoding="utf-8") != drawn:
            stale.append(file.name)
    if stale:
        print(f"{', '.join(stale)}: not what the script draws; run python docs/figures/draw.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
