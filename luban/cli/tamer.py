"""`luban tamer`: teach an agent in a gridworld by feedback."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from luban.core.arguments import parse
from luban.core.log import print_result

ABOUT = """Teach an agent to find the goal of a gridworld by saying whether its steps are good (TAMER, Knox and Stone 2009).

The agent learns a model of your feedback, credits it to the steps that you may have meant, and takes the action that the model
likes best; no reward is computed. You are at the keyboard (+ good, - bad, q ends), or --oracle trains in your place."""
EXAMPLES = """
luban tamer
luban tamer --size 8 --step-seconds 1.2 --out runs/taught
luban tamer --oracle --errors 0.1 --attention 0.7
luban tamer --oracle --step-seconds 0.3 --delay none      # what credit assignment is for
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    size: int = 6  # rows and columns of the grid
    walls: float = 0.2  # fraction of the cells that are walls
    starts: Literal["farthest", "drawn"] = "farthest"  # episodes begin in the cell farthest from the goal, or in any
    episodes: int = 10  # from a start to the goal
    most_steps: int = 60  # of an episode
    step_seconds: float = 0.8  # that a step takes
    rate: float = 0.1  # step size of the model of feedback
    # how feedback is credited to steps: delays of 0.2 to 0.8 s, a gamma distribution, or to the step it was given in
    delay: Literal["uniform", "gamma", "none"] = "uniform"
    oracle: bool = False  # train by shortest paths instead of a person
    attention: float = 1.0  # fraction of the steps that the oracle says something about
    errors: float = 0.0  # fraction of the oracle's feedback that has the wrong sign
    seed: int = 0  # of grid, starts and oracle
    out: Path | None = None  # directory for the feedback, the episodes and what was learned


def run(argv: Sequence[str]) -> int:
    args = parse(Arguments, argv, verb="tamer", about=ABOUT, examples=EXAMPLES)
    import sys

    from luban.align.tamer.delay import Delay
    from luban.align.tamer.gridworld import Gridworld
    from luban.align.tamer.keyboard import Keyboard, keys_of_terminal
    from luban.align.tamer.learning import Oracle, Tamer, TamerConfig, save, teach
    from luban.core.errors import UsageError
    from luban.core.whole_directory import require_vacant

    if args.out:
        require_vacant(args.out)
    if args.episodes < 1:
        raise UsageError(f"--episodes must be at least 1, {args.episodes} given")
    world = Gridworld(args.size, args.walls, args.seed)
    same = ("rate", "step_seconds", "most_steps", "starts", "seed")
    config = TamerConfig(**{name: getattr(args, name) for name in same})
    tamer = Tamer(world, Delay.registry[args.delay](), config)
    with ExitStack() as stack:
        if args.oracle:
            trainer = Oracle(world, attention=args.attention, errors=args.errors, seed=args.seed)
        else:
            trainer = Keyboard(world, stack.enter_context(keys_of_terminal()), sys.stdout)
        found = teach(tamer, trainer, args.episodes)
    print(world.drawn(world.starts[-1]))
    for number, (episode, rate) in enumerate(found, 1):
        end = "goal" if episode.reached else "gave up"
        alone = f"alone it reaches the goal from {rate:.0%} of the {len(world.starts)} cells"
        if args.starts == "farthest":
            alone = f"alone it {'reaches' if rate else 'misses'} the goal"
        print(f"episode {number:>2}: {end} after {episode.steps} steps, feedback {episode.feedback} times; {alone}")
    print(f"a shortest path from @ has {world.distance[world.starts[-1]]} steps")
    if args.out:
        save(tamer, found, args.out, {key: value for key, value in asdict(args).items() if key != "out"})
        print_result(args.out)
    return 0
