"""Recurrent models by name."""

from __future__ import annotations

from luban.models.elmo import ElmoBody
from luban.models.head.language_model import LanguageModel
from luban.models.spec import ModelSpec
from luban.nn.character import CharacterCNN
from luban.nn.init import FanInInit
from luban.nn.recurrent.plain import LSTM

RECURRENT: dict[str, ModelSpec] = {
    # ELMo (Peters et al. 2018, section 3.2 and the released configuration: 93.6 M parameters below the softmax)
    "elmo": ModelSpec(
        vocab_size=793_471,
        width=512,
        layers=(),
        context=512,
        head=LanguageModel(bias=True),
        body=ElmoBody(layers=2, cell=LSTM(cells=4096), words=CharacterCNN()),
        init=FanInInit(),
    ),
}
