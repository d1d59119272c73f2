"""The cheapest way to run a program on a mesh: one strategy a node, resharding between them (Zheng et al. 2022, Alpa, section 4.2).

    minimise  Σ_v s_v · c_v  +  Σ_(v,u) e_vu · R_vu
    with      Σ_v s_v · weights_v ≤ what a device may hold,
              Σ_k s_v[k] = 1,   Σ_j e_vu[k, j] = s_v[k],   Σ_k e_vu[k, j] = s_u[j],   s binary

e_vu stands for the product s_v · s_u, which the two sums make it equal to. Solved by HiGHS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from luban.core.errors import ConfigError, MissingExtra
from luban.planner.machine import MachineTable
from luban.planner.sharding.ir import Program, Spec
from luban.planner.sharding.mesh import Mesh
from luban.planner.sharding.strategies import Strategy, strategies

DATA = ("b", "n")  # labels that axis 0 divides where it stands for data and experts


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Strategies of every node and the costs between them.

    `edges`: (producer, consumer) → seconds by (producer's strategy, consumer's strategy); numbers are those of nodes.
    """

    program: Program
    options: Sequence[Sequence[Strategy]]
    edges: Mapping[tuple[int, int], Sequence[Sequence[float]]]

    def cost(self, choice: Sequence[int]) -> float:
        """Seconds of one choice."""
        own = sum(options[k].seconds for options, k in zip(self.options, choice, strict=True))
        return own + sum(costs[choice[v]][choice[u]] for (v, u), costs in self.edges.items())


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The strategy of each node."""

    program: Program
    chosen: tuple[Strategy, ...]
    seconds: float  # of one micro-batch forward and backward, with the weights' gradients' share

    @property
    def weight_bytes(self) -> float:
        """Of a device."""
        return sum(strategy.weight_bytes for strategy in self.chosen)

    def lines(self) -> list[str]:
        """A line a node."""
        pairs = zip(self.program.nodes, self.chosen, strict=True)
        width = max(len(node.name) for node in self.program.nodes)
        return [f"  {node.name:<{width}}  {strategy}" for node, strategy in pairs]


def problem_of(
    program: Program,
    mesh: Mesh,
    table: MachineTable,
    micro_batches: int,
    *,
    outer: tuple[str, ...] | None = DATA,
    boundary: Mapping[str, Spec] | None = None,
) -> Problem:
    """The costs of a program on a mesh.

    Args:
        outer: labels that axis 0 may divide; None: any.
        boundary: specs of tensors that come from outside or go there: they are resharded from and to these.

    Raises:
        ConfigError: a node has no strategy on this mesh.
    """
    options = [strategies(program, node, mesh, table, micro_batches, outer) for node in program.nodes]
    number = {node.name: index for index, node in enumerate(program.nodes)}
    edges: dict[tuple[int, int], list[list[float]]] = {}
    for maker, reader, name, _ in program.edges():
        v, u, value = number[maker.name], number[reader.name], program.values[name]
        at = next(i for i, pair in enumerate(reader.inputs) if pair[0] == name)
        costs = [[mesh.reshard(value, a.output, b.inputs[at]) for b in options[u]] for a in options[v]]
        known = edges.get((v, u))
        edges[v, u] = costs if known is None else _added(known, costs)
    extra = [_outside(program, index, options[index], mesh, boundary or {}) for index in range(len(options))]
    if not all(options):
        raise ConfigError(f"{program.nodes[[bool(o) for o in options].index(False)].name} can't run on this mesh")
    charged = [
        [_charged(strategy, more) for strategy, more in zip(each, costs, strict=True)]
        for each, costs in zip(options, extra, strict=True)
    ]
    return Problem(program=program, options=charged, edges=edges)


def _added(one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(one, other, strict=True)]


def solve(problem: Problem, weight_bytes: float | None = None) -> Solution:
    """The optimum, by HiGHS.

    Args:
        weight_bytes: most bytes of weights that a device may hold; None: any number.

    Raises:
        MissingExtra: highspy isn't installed. ConfigError: no choice holds so few weights.
    """
    try:
        import highspy
    except ModuleNotFoundError:
        raise MissingExtra("highspy", "plan", "The search of shardings") from None

    class Silent(highspy.Highs):
        def enableCallbacks(
            self,
        ) -> None:  # called when it is made, and prints the solver's version unless it is silent by then
            self.silent()
            super().enableCallbacks()

    model = Silent()
    model.setOptionValue("mip_rel_gap", 0.0)
    scale = 1e6  # microseconds, so that tolerances are small against costs
    nodes = []
    for options in problem.options:
        variables = [model.addBinary(obj=scale * strategy.seconds) for strategy in options]
        model.addConstr(sum(variables[1:], variables[0] + 0.0) == 1)
        nodes.append(variables)
    for (v, u), costs in problem.edges.items():
        if not any(map(any, costs)):
            continue
        pairs = [[model.addVariable(lb=0.0, ub=1.0, obj=scale * cost) for cost in row] for row in costs]
        for row, variable in zip(pairs, nodes[v], strict=True):
            model.addConstr(sum(row[1:], row[0] + 0.0) == variable)
        for column, variable in zip(zip(*pairs, strict=True), nodes[u], strict=True):
            model.addConstr(sum(column[1:], column[0] + 0.0) == variable)
    if weight_bytes is not None:
        held = [
            variable * (strategy.weight_bytes / weight_bytes)
            for variables, options in zip(nodes, problem.options, strict=True)
            for variable, strategy in zip(variables, options, strict=True)
            if strategy.weight_bytes
        ]
        if held:
            model.addConstr(sum(held[1:], held[0] + 0.0) <= 1.0)
    model.run()
    if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise ConfigError(f"the search of shardings ended with {model.getModelStatus()}")
    values = model.getSolution().col_value
    choice = [max(range(len(each)), key=lambda k, each=each: values[each[k].index]) for each in nodes]
    return _solution(problem, choice)


def brute_force(problem: Problem) -> Solution:
    """The optimum, by trying everything: for tests, and for a handful of nodes."""
    best = min(product(*(range(len(options)) for options in problem.options)), key=problem.cost)
    return _solution(problem, best)


def _solution(problem: Problem, choice: Sequence[int]) -> Solution:
    chosen = tuple(options[k] for options, k in zip(problem.options, choice, strict=True))
    return Solution(program=problem.program, chosen=chosen, seconds=problem.cost(choice))


def _outside(
    program: Program, index: int, options: Sequence[Strategy], mesh: Mesh, boundary: Mapping[str, Spec]
) -> list[float]:
    """Resharding from and to tensors outside, for each strategy of a node."""
    node, made = program.nodes[index], program.producers()
    read = {name for other in program.nodes for name, _ in other.inputs}
    found = []
    for strategy in options:
        seconds = 0.0
        for (name, _), spec in zip(node.inputs, strategy.inputs, strict=True):
            if name in boundary and name not in made:
                seconds += mesh.reshard(program.values[name], boundary[name], spec)
        name = node.output[0]
        if name in boundary and name not in read:
            seconds += mesh.reshard(program.values[name], strategy.output, boundary[name])
        found.append(seconds)
    return found


def _charged(strategy: Strategy, seconds: float) -> Strategy:
    return strategy if not seconds else Strategy(**{**vars(strategy), "messages": strategy.messages + seconds})
