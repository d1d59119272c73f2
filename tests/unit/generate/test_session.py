"""Only models that predict the next token step by step generate."""

from __future__ import annotations

import pytest

from luban import build_model
from luban.core.errors import UnsupportedError
from luban.generate.session import Session
from luban.models.encoder import EncoderBody
from luban.models.head.rows import Value
from luban.models.recurrent import RecurrentBody
from luban.models.spec import changed, uniform

TINY = uniform(vocab_size=20, width=16, layers=1)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (changed(TINY, body=EncoderBody()), "this model has body encoder and head language_model"),
        (uniform(vocab_size=20, width=16, body=RecurrentBody()), "this model has body recurrent"),
        (changed(TINY, head=Value()), "this model has body decoder and head value"),
    ],
)
def test_other_models_are_refused_by_name(spec, reason):
    with pytest.raises(UnsupportedError, match=f"generating text needs a decoder with a language_model head; {reason}"):
        Session(build_model(spec))
    Session(build_model(TINY))
