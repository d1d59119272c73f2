"""Recurrent bodies against the equations, written out step by step."""

from __future__ import annotations

import math
import random

import pytest
import torch

from luban import build_model, describe
from luban.core.errors import ConfigError, DataError
from luban.models.elmo import ElmoBody, Mix
from luban.models.head.rows import Classes
from luban.models.presets import preset
from luban.models.recurrent import RecurrentBody
from luban.models.spec import uniform
from luban.nn.character import CharacterCNN
from luban.nn.init import FanInInit
from luban.nn.recurrent.plain import LSTM, RNN
from luban.nn.recurrent.stack import StackRNN
from luban.nn.recurrent.tape import TapeRNN

CELLS = [RNN(), LSTM(), LSTM(cells=23), StackRNN(depth=5, cell_width=3), TapeRNN(cells=7, cell_width=3)]


def model(cell, *, layers: int = 1, **changes):
    spec = uniform(
        vocab_size=19, width=11, body=RecurrentBody(layers=layers, cell=cell), init=FanInInit(embedding=1.0), **changes
    )
    made = build_model(spec, seed=random.SystemRandom().randrange(2**31)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # biases too
    return made


def layer_state(made):
    return {name: p.detach() for name, p in made.layers[0].named_parameters()}


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def rnn_by_hand(x, p):
    h, out = torch.zeros(11).double(), []
    for x_t in x:
        h = torch.tanh(p["weight_ih_l0"] @ x_t + p["bias_ih_l0"] + p["weight_hh_l0"] @ h + p["bias_hh_l0"])
        out.append(h)
    return torch.stack(out)


def lstm_by_hand(x, p):
    """Input, forget, candidate, output: torch's order of rows."""
    size = p["weight_ih_l0"].shape[0] // 4
    h, c, out = torch.zeros(11).double(), torch.zeros(size).double(), []
    for x_t in x:
        all_gates = p["weight_ih_l0"] @ x_t + p["bias_ih_l0"] + p["weight_hh_l0"] @ h + p["bias_hh_l0"]
        i, f, g, o = (all_gates[k * size : (k + 1) * size] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        h = sigmoid(o) * torch.tanh(c)
        if "weight_hr_l0" in p:
            h = p["weight_hr_l0"] @ h
        out.append(h)
    return torch.stack(out)


def controller(p, x_t, read, h):
    joined = torch.cat((x_t, read))
    return torch.tanh(p["cell.weight_ih"] @ joined + p["cell.bias_ih"] + p["cell.weight_hh"] @ h + p["cell.bias_hh"])


def stack_by_hand(x, p):
    depth, width = 5, 3
    h, out = torch.zeros(11).double(), []
    stack = [torch.zeros(width).double() for _ in range(depth)]
    for x_t in x:
        h = controller(p, x_t, stack[0], h)
        scores = torch.exp(p["actions.weight"] @ h + p["actions.bias"])
        push, pop, stay = scores / scores.sum()
        value = p["pushed.weight"] @ h + p["pushed.bias"]
        new = []
        for row in range(depth):
            above = value if row == 0 else stack[row - 1]
            below = stack[row + 1] if row + 1 < depth else torch.zeros(width).double()
            new.append(push * above + pop * below + stay * stack[row])
        stack = new
        out.append(h)
    return torch.stack(out)


def tape_by_hand(x, p):
    cells, jump = 7, len(x)
    h, out = torch.zeros(11).double(), []
    tape = [torch.zeros(3).double() for _ in range(cells)]
    for x_t in x:
        h = controller(p, x_t, tape[0], h)
        tape = [p["written.weight"] @ h + p["written.bias"], *tape[1:]]
        scores = torch.exp(p["moves.weight"] @ h + p["moves.bias"])
        probabilities = scores / scores.sum()
        new = []
        for row in range(cells):
            places = [row, row + 1, row - 1, row + jump, row - jump]
            new.append(sum(q * tape[place % cells] for q, place in zip(probabilities, places, strict=True)))
        tape = new
        out.append(h)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("cell", "by_hand"),
    [
        (RNN(), rnn_by_hand),
        (LSTM(), lstm_by_hand),
        (LSTM(cells=23), lstm_by_hand),
        (CELLS[3], stack_by_hand),
        (CELLS[4], tape_by_hand),
    ],
)
def test_equals_the_equations(cell, by_hand):
    made = model(cell)
    tokens = torch.randint(0, 19, (3, 9))
    hidden = made(tokens, output="hidden")
    for row in range(3):
        x = made.embedding.weight.detach()[tokens[row]]
        torch.testing.assert_close(hidden[row], by_hand(x, layer_state(made)), atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(made(tokens), hidden @ made.head.weight.T, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: type(c).__name__)
def test_packed_and_padded_rows_equal_the_documents_alone(cell):
    made = model(cell, layers=2)
    one, two, three = (torch.randint(0, 19, (1, n)) for n in (4, 7, 11))
    packed = torch.cat((torch.cat((one, two), dim=1), three))
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    got = made(packed, documents=documents)
    torch.testing.assert_close(got[:1, :4], made(one))
    torch.testing.assert_close(got[:1, 4:], made(two))
    torch.testing.assert_close(got[1:], made(three))
    padded, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.bool)
    padded[0, 4:], mask[0, 4:], padded[1, :4], mask[1, :4] = two[0], True, one[0], True
    got = made(padded, mask)
    torch.testing.assert_close(got[0, 4:], made(two)[0])
    torch.testing.assert_close(got[1, :4], made(one)[0])


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: type(c).__name__)
def test_parameters_by_arithmetic_and_causality(cell):
    made = model(cell, layers=2)
    assert made.spec.parameters == sum(p.numel() for p in made.parameters())
    tokens = torch.randint(0, 19, (2, 8))
    later = tokens.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 19
    tape = isinstance(cell, TapeRNN)
    segments = torch.zeros_like(tokens) if tape else None  # so that the jump's length is the same
    torch.testing.assert_close(
        made(later, segments=segments)[:, :5], made(tokens, segments=segments)[:, :5], atol=0, rtol=0
    )


def test_heads_read_the_last_real_token():
    made = model(LSTM(), head=Classes(count=3, pooling="last", dense=False))
    tokens = torch.randint(0, 19, (1, 6))
    mask = torch.arange(6)[None] < 4
    torch.testing.assert_close(made(tokens, mask), made(tokens[:, :4]))
    with pytest.raises(DataError, match="it has no cache"):
        made(tokens, cache=object())


def elmo(words=None, **changes):
    spec = uniform(
        vocab_size=19,
        width=6,
        body=ElmoBody(layers=2, cell=LSTM(cells=9), words=words),
        init=FanInInit(embedding=1.0),
        **changes,
    )
    return build_model(spec, seed=random.SystemRandom().randrange(2**31)).double()


def test_elmo_equals_two_lstms_by_hand():
    made = elmo()
    tokens = torch.randint(0, 19, (1, 8))
    words = made.embedding.weight.detach()[tokens[0]]
    both = []
    for side, x in ((made.forwards, words), (made.backwards, words.flip(0))):
        for depth, layer in enumerate(side):
            p = {name: q.detach() for name, q in layer.named_parameters()}
            size, h, c, out = 9, torch.zeros(6).double(), torch.zeros(9).double(), []
            for x_t in x:
                gates = p["weight_ih_l0"] @ x_t + p["bias_ih_l0"] + p["weight_hh_l0"] @ h + p["bias_hh_l0"]
                i, f, g, o = (gates[k * size : (k + 1) * size] for k in range(4))
                c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
                h = p["weight_hr_l0"] @ (sigmoid(o) * torch.tanh(c))
                out.append(h)
            x = torch.stack(out) + (x if depth else 0)
        both.append(x)
    want = torch.stack((both[0], both[1].flip(0)), dim=1)
    torch.testing.assert_close(made(tokens, output="hidden")[0], want, atol=1e-10, rtol=1e-9)
    assert made(tokens).shape == (1, 8, 2, 19)


def test_elmo_directions_see_their_own_side_only_and_stay_in_their_document():
    made = elmo()
    tokens = torch.randint(0, 19, (1, 8))
    other = tokens.clone()
    other[0, 4] = (other[0, 4] + 1) % 19
    one, two = made(tokens), made(other)
    torch.testing.assert_close(one[:, :4, 0], two[:, :4, 0], atol=0, rtol=0)
    torch.testing.assert_close(one[:, 5:, 1], two[:, 5:, 1], atol=0, rtol=0)
    packed = made(torch.cat((tokens, other), dim=1), documents=torch.tensor([[0] * 8 + [1] * 8]))
    torch.testing.assert_close(packed[:, :8], one)
    torch.testing.assert_close(packed[:, 8:], two)


def test_character_words_by_hand():
    config = CharacterCNN(characters=30, width=4, filters=(3, 2, 5), highways=1)
    made = elmo(words=config)
    assert made.spec.parameters == sum(p.numel() for p in made.parameters())
    tokens = torch.randint(1, 30, (2, 3, 7))
    cnn = made.embedding
    got = cnn(tokens)
    for b in range(2):
        for t in range(3):
            letters = cnn.characters.weight[tokens[b, t]]
            found = []
            for filters in cnn.filters:
                n = filters.kernel_size[0]
                answers = [
                    torch.einsum("owk,kw->o", filters.weight, letters[i : i + n]) + filters.bias for i in range(8 - n)
                ]
                found.append(torch.stack(answers).max(dim=0).values)
            word = torch.relu(torch.cat(found))
            first, second = (cnn.highways[0].weight @ word + cnn.highways[0].bias).chunk(2)
            gate = sigmoid(second)
            word = gate * word + (1 - gate) * torch.relu(first)
            want = cnn.projection.weight @ word + cnn.projection.bias
            torch.testing.assert_close(got[b, t], want, atol=1e-10, rtol=1e-9)
    assert made(tokens).shape == (2, 3, 2, 19)
    with pytest.raises(ConfigError, match="no embedding table to tie"):
        elmo(words=config, tied_head=True)


def test_elmo_layers_are_mixed_by_softmax_and_scale():
    made = elmo()
    layers = made.representations(torch.randint(0, 19, (2, 5)))
    assert len(layers) == 3 and all(layer.shape == (2, 5, 12) for layer in layers)
    mix = Mix(3).double()
    with torch.no_grad():
        mix.scores.copy_(torch.tensor([0.0, math.log(2), math.log(5)]))
        mix.scale.fill_(3.0)
    torch.testing.assert_close(mix(layers), 3 * (layers[0] + 2 * layers[1] + 5 * layers[2]) / 8)


def test_elmos_published_size_below_the_softmax():
    spec = preset("elmo")
    body = describe(spec, batch=1, seq=1).parameters - spec.vocab_size * 513
    second_biases = 4 * 4 * 4096  # torch's LSTM has two biases where the release has one
    assert body - second_biases == 93_600_864
    assert spec.parameters == sum(p.numel() for p in build_model(spec, device="meta").parameters())
