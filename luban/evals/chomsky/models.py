"""The models that are compared: recurrent networks with different memories, Transformers with different positions.

Sizes are the paper's by default (section 4): one recurrent layer of width 256, memory cells of width 8; five Transformer layers of
width 64 with 8 heads.
"""

from __future__ import annotations

from collections.abc import Callable

from luban.core.errors import ConfigError, nearest
from luban.evals.chomsky.tasks import ChomskyTask
from luban.models.arrangement.post import PostNorm
from luban.models.encoder import EncoderBody
from luban.models.recurrent import RecurrentBody
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.plain import ReLU
from luban.nn.init import FanInInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.base import Position
from luban.nn.position.learned import Learned
from luban.nn.position.none import NoPosition
from luban.nn.position.randomised import Randomised
from luban.nn.position.rope import Rope
from luban.nn.position.sinusoidal import Sinusoidal
from luban.nn.position.t5 import RelativeBias
from luban.nn.recurrent.base import Cell
from luban.nn.recurrent.plain import LSTM, RNN
from luban.nn.recurrent.stack import StackRNN
from luban.nn.recurrent.tape import TapeRNN

RANDOM_RANGE = 2048  # positions that randomised ones are drawn from (Ruoss et al. 2023, section 4)
# A memory for rows of so many tokens; it has no parameters of its own, so that a trained model reads longer rows with a larger one.
CELLS: dict[str, Callable[[int], Cell]] = {
    "rnn": lambda tokens: RNN(),
    "lstm": lambda tokens: LSTM(),
    "stack_rnn": lambda tokens: StackRNN(depth=tokens),
    "tape_rnn": lambda tokens: TapeRNN(cells=2 * tokens),
}
POSITIONS: dict[str, Position] = {
    "none": NoPosition(),
    "learned": Learned(),
    "sinusoidal": Sinusoidal(),
    "relative": RelativeBias(),
    "alibi": Alibi(),
    "rope": Rope(),
}
MODELS = (
    *CELLS,
    "transformer",  # with sinusoidal positions
    *(f"transformer_{name}" for name in POSITIONS),
    *(f"transformer_random_{name}" for name in POSITIONS if name != "none"),
)


def model_spec(
    name: str,
    task: ChomskyTask,
    tokens: int,
    width: int | None = None,
    *,
    layers: int | None = None,
    position_range: int = RANDOM_RANGE,
    computes: bool = False,
) -> ModelSpec:
    """The model of this name for a task.

    Args:
        tokens: inputs, computation steps and answer of the longest row.
        width, layers: None: the paper's; layers are those of Transformers.
        position_range: positions that randomised ones are drawn from, at least `tokens`.
        computes: there are steps between input and answer, with a token of their own.

    Raises:
        ConfigError: an unknown model.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model '{name}'{nearest(name, MODELS)}")
    vocabulary = max(task.inputs, task.outputs) + 1 + computes  # behind them what stands in the answer's place
    init = FanInInit(embedding=1.0)
    if name in CELLS:
        body = RecurrentBody(layers=1, cell=CELLS[name](tokens))
        return uniform(vocab_size=vocabulary, width=width or 256, context=tokens, body=body, init=init)
    kind = name.removeprefix("transformer").removeprefix("_") or "sinusoidal"
    position = POSITIONS[kind.removeprefix("random_")]
    if kind.startswith("random_"):
        position = Randomised(inner=position, longest=max(position_range, tokens))
    width = width or 64
    return uniform(
        vocab_size=vocabulary,
        width=width,
        layers=layers or 5,
        context=tokens,
        position=position,
        norm=LayerNorm(),
        mixer=Grouped(heads=8),
        feedforward=ReLU(width=4 * width, bias=True),
        arrangement=PostNorm(),
        body=EncoderBody(),
        init=init,
    )
