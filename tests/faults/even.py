"""A task that a model solves half the time before it has learned anything, so that each step has something to teach."""

from nanollm.sources.gsm8k import Problem


class Even:
    """A reply is right if it has an even number of characters."""

    def problems(self, split):
        return [Problem(f"Say {number}!", "#### 1") for number in range(20)]

    def grade(self, problem, reply):
        return len(reply) % 2 == 0


class EvenTwice(Even):
    """The same in conversations: a first message of at most four characters is answered, and a second is asked for."""

    def environment(self, problem):
        return Twice()


class Twice:
    turns = 0

    def step(self, reply):
        self.turns += 1
        return "again" if self.turns == 1 and len(reply) <= 4 else float(len(reply) % 2 == 0)


def brief(problem, reply):
    return 1 / (1 + len(reply))
