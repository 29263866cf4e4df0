"""Which prompts are sampled when; and how that goes on while the policy is trained: --max_staleness S.

    step     t                          t + 1
    here     train on generation t      train on generation t + 1     ...     send the weights after each
    servers  sample generation t + 1 ......| sample generation t + 2 ......|

A generation is asked for up to S steps before it is trained on. Each request names the oldest step whose weights it may
begin with: a server that has older ones refuses, and what comes from older ones nevertheless is dropped, counted, and
asked for again. New weights are put in place between two tokens; what a server is at work on goes on with them.

A place in the data is taken once, in order, whatever happens to a server. A checkpoint knows the next one; what was on
its way then is asked for again after a resume, and sampled from the weights of that step. So weights, optimizer, data
order and seeds go on to the bit. Completions that were on their way may differ, as they may between two runs: it is the
clock that says amid which of them the weights change.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from . import data, experience
from .training import total


def asked(rows, cursor: int, config: experience.RolloutOptions) -> tuple[list, list[int], dict]:
    """(rows, seeds, sampling options) of the `prompts_per_step` prompts at place `cursor` and behind it."""
    places = range(cursor, cursor + config.prompts_per_step)
    sampling = {name: getattr(config, name) for name in experience.SAMPLING_OPTIONS}
    chosen = [rows[i] for i in data.order(len(rows), places.start, len(places), config.seed)]
    sampling["max_tokens"] = config.max_completion_length
    return chosen, [data.seed_of(config.seed, place) for place in places], sampling


def generate(
    engine, rows, cursor: int, functions, config, run, step: int, number: int = 0, sampled=None
) -> experience.Rollouts:
    """Rollouts of the `prompts_per_step` prompts at place `cursor` and behind it, with rewards, advantages left at 0.

    number: generations that came before this one in the same step.
    sampled: gives this process's completions, where they were asked for before (`Ahead.take`).
    """
    rows, seeds, sampling = asked(rows, cursor, config)
    return experience.generate_and_score(
        engine,
        rows,
        seeds,
        functions,
        torch.tensor(config.reward_weights or (1.0,) * len(functions)),
        run.world,
        num_generations=config.num_generations,
        step=step,
        timeout_s=config.reward_timeout,
        sampling=sampling,
        overlong=config.overlong_cache and (config.max_completion_length, config.overlong_cache),
        first_index=number * config.prompts_per_step * config.num_generations,
        sampled=sampled,
    )


class Ahead(AbstractContextManager):
    """The generations that are on their way; with --max_staleness 0 there are none, and nothing is done here.

    A context manager: leaving it ends what is still being sampled. All ranks call all of it at the same places.
    """

    def __init__(self, engine, rows: list[dict], config, run):
        self.engine, self.rows, self.config, self.run = engine, rows, config, run
        self.asked = {}  # place of the first prompt -> completions to come

    def __exit__(self, *_) -> None:
        if self.config.max_staleness:
            self.engine.close(list(self.asked.values()))

    def still(self):
        """Inside, no weights are being sent."""
        return self.engine.still if self.config.max_staleness else nullcontext()

    def updating(self, step: int):
        """Inside, the policy's weights become those of `step`. Entering it waits until those before are sent."""
        return self.engine.updating(step) if self.config.max_staleness else nullcontext()

    def ask(self, cursor: int, step: int) -> None:
        """Have sampled what may be by now, when `step` steps are done and the next place in the data is `cursor`."""
        config, each, bound = self.config, self.config.num_iterations, self.config.max_staleness
        if bound and not self.engine.weights.known:  # the first time
            with self.updating(step):
                pass
        last = min(step + bound, self.run.total_steps - 1)
        for use in range(-(-step // each) * each, last + 1, each) if bound else ():  # the step to train on it first
            if cursor not in self.asked:
                rows, seeds, sampling = asked(self.rows, cursor, config)
                part = experience.share(len(rows), self.run.world, self.engine)
                options = {"n": config.num_generations, "seed": seeds[part], **sampling}
                prompts = [row["prompt_ids"] for row in rows[part]]
                self.asked[cursor] = self.engine.ask(max(0, use - bound), prompts, **options)
            cursor += config.prompts_per_step

    def take(self, cursor: int, step: int):
        """A function that waits for this process's completions of the generation at `cursor`; None: sample them now.

        It is called within `distributed.together`, so that an error on one rank is one on all.
        """
        self.ask(cursor, step)
        return partial(self._wait, cursor, step) if self.config.max_staleness else None

    def _wait(self, cursor: int, step: int) -> list:
        groups = self.asked[cursor].result()
        del self.asked[cursor]
        oldest = min((completion.versions[0][0] for group in groups for completion in group), default=step)
        assert step - oldest <= self.config.max_staleness, f"a sample of step {oldest} at step {step}"
        return groups

    def metrics(self, rollouts, step: int) -> dict[str, float]:
        """How old the samples of a step are, and how many were too old and asked for again."""
        if not self.config.max_staleness:
            return {}
        ages_PG = (step - rollouts.versions_PG).double()
        dropped, self.engine.too_old = self.engine.too_old, 0
        ages = {"sampling/staleness/mean": ages_PG.mean().item(), "sampling/staleness/max": ages_PG.max().item()}
        return ages | total({"sampling/too_old": float(dropped)}, self.run.world)
