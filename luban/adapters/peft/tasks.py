"""PEFT's task types, which say what head an adapter stands under: a language model's own, or one that is saved with it."""

from __future__ import annotations

from dataclasses import replace

from luban.adapters.peft.layout import PeftFiles, module_tensors
from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.convert.base import Format, Pair
from luban.models.head.language_model import LanguageModel
from luban.models.spec import ModelSpec

HEADED = {  # task type → how the class of transformers ends whose head is saved with the adapter
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
OTHERS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration", "Model")


def task_of(spec: ModelSpec, form: Format) -> str | None:
    """The task type of an adapter over a model of this specification; None: PEFT has none that changes how it is loaded."""
    if spec.head == LanguageModel() and (spec.body.causal or spec.body.two_sided):
        return "CAUSAL_LM" if spec.body.causal else "SEQ_2_SEQ_LM"
    name = _architecture(spec, form)
    return next((task for task, end in HEADED.items() if name.endswith(end)), None)


def spec_under(spec: ModelSpec, form: Format, files: PeftFiles) -> ModelSpec:
    """The specification of the model that an adapter is for: that of the base, under the head of the adapter's task.

    Raises:
        UnsupportedError: the format has no such head.
        ArtifactError: the adapter doesn't hold the head's weights.
    """
    task = files.config.get("task_type")
    name, end = _architecture(spec, form), HEADED.get(str(task), "")
    if not end or name.endswith(end):
        return spec
    body = next((name.removesuffix(known) for known in (*HEADED.values(), *OTHERS) if name.endswith(known)), name)

    def headed(labels: int) -> ModelSpec:
        named = {str(label): f"LABEL_{label}" for label in range(labels)}
        found = form.spec({**(form.config(spec) or {}), "architectures": [body + end], "id2label": named})
        return replace(spec, head=found.head, tied_head=found.tied_head)

    try:
        one = headed(1)
    except UnsupportedError as error:
        raise UnsupportedError(f"the adapter's task_type is {task}, and {body}{end} isn't read: {error}") from None
    ours = {"head.output.weight", "head.output.bias"}
    wanted = [p.theirs for p in form.pairs(one) if isinstance(p, Pair) and p.ours in ours]
    held = module_tensors(files)
    if lost := [name for name in wanted if name not in held]:
        raise ArtifactError(
            f"the adapter's task_type is {task}, and adapter_model.safetensors lacks the tensor {lost[0]} of its head: give "
            f"a base that is a {body}{end}"
        )
    return headed(held[wanted[0]].shape[0])


def _architecture(spec: ModelSpec, form: Format) -> str:
    """The class of transformers that a model of this specification is; empty: none."""
    return next(iter((form.config(spec) or {}).get("architectures", ())), "")
