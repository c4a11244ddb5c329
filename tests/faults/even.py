"""A task that a model solves half the time before it has learned anything, so that each step has something to teach."""

from nanollm.sources.gsm8k import Problem


class Even:
    """A reply is right if it has an even number of characters."""

    def problems(self, split):
        return [Problem(f"Say {number}!", "#### 1") for number in range(20)]

    def grade(self, problem, reply):
        return len(reply) % 2 == 0
