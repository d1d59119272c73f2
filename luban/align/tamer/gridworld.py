"""A grid with walls and one goal. Pure Python and numpy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from luban.core.errors import UsageError
from luban.core.seeding import generator

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # (rows, columns) of up, right, down, left
ARROWS = "↑→↓←"
Cell = tuple[int, int]  # row, column


class Gridworld:
    """Cells, some of them walls, and a goal that can be reached from every free cell.

    Args:
        size: rows and columns.
        walls: fraction of the cells that are walls.
        seed: of walls and goal.

    Raises UsageError for a grid that leaves no free cell beside the goal.
    """

    def __init__(self, size: int = 6, walls: float = 0.2, seed: int = 0):
        if not 2 <= size <= 40 or not 0 <= walls <= 0.5:
            raise UsageError(f"a grid has 2 to 40 rows and walls on 0 to 0.5 of it, {size} and {walls} given")
        self.size, rng = size, generator(seed, "gridworld")
        cells = [(row, column) for row in range(size) for column in range(size)]
        order = [cells[int(i)] for i in rng.permutation(len(cells))]
        self.goal, self.walls = order[0], frozenset[Cell]()
        for cell in order[1:]:  # a wall that would cut cells off is left out
            if len(self.walls) >= round(walls * len(cells)):
                break
            walled = self.walls | {cell}
            if len(self._distances(walled)) == len(cells) - len(walled):
                self.walls = walled
        self.distance = self._distances(self.walls)  # free cell → steps to the goal
        self._places = {cell: self._describe(cell) for cell in cells}
        # nearest first; the last one is the farthest from the goal
        self.starts = sorted((c for c in self.distance if c != self.goal), key=lambda c: (self.distance[c], c))

    def _distances(self, walls: frozenset[Cell]) -> dict[Cell, int]:
        found, queue = {self.goal: 0}, deque([self.goal])
        while queue:
            here = queue.popleft()
            for row, column in ((here[0] + r, here[1] + c) for r, c in MOVES):
                inside = 0 <= row < self.size and 0 <= column < self.size
                if inside and (row, column) not in walls and (row, column) not in found:
                    found[row, column] = found[here] + 1
                    queue.append((row, column))
        return found

    def step(self, cell: Cell, action: int) -> Cell:
        """Where an action leads; walls and borders leave the agent where it is."""
        there = (cell[0] + MOVES[action][0], cell[1] + MOVES[action][1])
        return there if there in self.distance else cell

    @property
    def features(self) -> int:
        """Number of features of a cell and an action."""
        return len(MOVES) * (self.size**2 + 9 + 9 * 16)

    def active(self, cell: Cell, action: int) -> list[int]:
        """The three features that are 1, all others being 0: the action in this cell; the action with the goal in this of nine
        directions; the same with walls on these of the four sides. By the last two what is learned in a cell counts in others."""
        return [place * len(MOVES) + action for place in self._places[cell]]

    def _describe(self, cell: Cell) -> tuple[int, int, int]:
        down, right = (int(np.sign(g - c)) + 1 for g, c in zip(self.goal, cell, strict=True))
        towards = 3 * down + right
        blocked = sum((self.step(cell, side) == cell) << side for side in range(len(MOVES)))
        return cell[0] * self.size + cell[1], self.size**2 + towards, self.size**2 + 9 + 16 * towards + blocked

    def drawn(self, agent: Cell, last: int | None = None) -> str:
        """The grid as text: # wall, * goal, the agent as the arrow of its last action."""
        return "\n".join(
            " ".join(self._symbol((row, column), agent, last) for column in range(self.size))
            for row in range(self.size)
        )

    def _symbol(self, cell: Cell, agent: Cell, last: int | None) -> str:
        if cell == agent:
            return "@" if last is None else ARROWS[last]
        return "#" if cell in self.walls else "*" if cell == self.goal else "·"


def success_rate(
    world: Gridworld, policy: Sequence[Sequence[float]] | np.ndarray, starts: Sequence[Cell], most: int
) -> float:
    """The fraction of starts from which acting greedily reaches the goal within `most` steps.

    Args:
        policy: (cells, actions) values of actions, cells row by row; of equal ones the first is taken.
    """
    choice, reached = np.asarray(policy).argmax(1), 0
    for start in starts:
        cell = start
        for _ in range(most):
            cell = world.step(cell, int(choice[cell[0] * world.size + cell[1]]))
            if cell == world.goal:
                reached += 1
                break
    return reached / len(starts)
