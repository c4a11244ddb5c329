"""How much better than its neighbours is a reply?

Group-relative advantages, DeepSeekMath, arXiv:2402.03300, section 4.1.2.
Letters: P prompts, G replies per prompt.
"""

from typing import Literal

from torch import Tensor

AdvantageName = Literal["mean_only", "std", "batch_std"]

EPSILON = 1e-6  # keeps a division finite; a group whose rewards are all equal is never divided, it is left out


def group_advantages(rewards: Tensor, kind: AdvantageName) -> Tensor:
    """rewards (P, G) to advantages (P, G); each group's sum to zero.

    mean_only: reward - mean of the group; dividing by its deviation would favour very easy and very hard problems
    (Dr. GRPO, arXiv:2503.20783). std: divided by the group's standard deviation (GRPO, arXiv:2402.03300, equation 3).
    batch_std: divided by the standard deviation of all rewards of the step (arXiv:2508.08221).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    match kind:
        case "mean_only":
            return centred
        case "std":
            return centred / (rewards.std(1, keepdim=True, correction=0) + EPSILON)
        case "batch_std":
            return centred / (rewards.std(correction=0) + EPSILON)
