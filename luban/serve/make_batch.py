"""The batch that fits a model and what is asked of it, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from luban.core.errors import UnsupportedError
from luban.core.plan import ParallelPlan
from luban.generate.paged_cache import paging_refusal
from luban.load.model import LoadedModel
from luban.serve.adapters import AdapterPool
from luban.serve.batch import Batch
from luban.serve.contiguous import ContiguousBatch
from luban.serve.paged import PagedBatch
from luban.serve.speculation import DRAFT_TOKENS


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What is asked of a batch; as `luban.Engine`'s arguments of these names."""

    max_batch: int | None = None
    cache_bytes: int | None = None
    cache_dtype: str = "auto"
    paged: bool | None = None
    draft: LoadedModel | None = None
    ngram: bool = False
    draft_tokens: int = DRAFT_TOKENS
    swap_bytes: int = 0
    batch_invariant: bool = False
    plan: ParallelPlan | None = None
    device: str | None = None

    @property
    def divided(self) -> bool:
        """Whether several processes hold the model together."""
        return self.plan is not None and self.plan.processes > 1


def make_batch(model: LoadedModel, options: BatchOptions, adapters: AdapterPool | None) -> tuple[LoadedModel, Batch]:
    """The model as this process runs it, and its batch.

    Raises:
        UnsupportedError: options that the model, or each other, rules out; the message says which.
        ConfigError, UsageError, LostProcess: as `luban.serve.tensor.leader.Leader`.
    """
    refusal = paging_refusal(model.module)
    if options.paged and refusal:
        raise UnsupportedError(f"{model.name} can't keep keys and values in blocks: {refusal}")
    if options.draft is not None and options.ngram:
        raise UnsupportedError("tokens are guessed by a draft model or from n-grams: use one")
    drafts = None if options.draft is None else options.draft.tokenizer
    if drafts is not None and model.tokenizer is not None and not drafts.same_vocabulary(model.tokenizer):
        raise UnsupportedError("the draft model's vocabulary isn't the model's: both must read the same tokens")
    if options.divided:
        return _divided(model, options, adapters)
    if refusal or options.paged is False:
        for asked, what in (
            (options.draft is not None or options.ngram, "speculation"),
            (options.swap_bytes > 0, "swapping"),
            (options.cache_dtype != "auto", "a cache in fp8"),
            (options.batch_invariant, "batch invariance"),
            (adapters is not None, "serving adapters by name"),
        ):
            if asked:
                raise UnsupportedError(f"{what} needs keys and values in blocks: {refusal or 'paged is False'}")
        contiguous = ContiguousBatch(model.module, max_batch=options.max_batch, cache_bytes=options.cache_bytes)
        return model, contiguous
    return model, PagedBatch(
        model.module,
        max_batch=options.max_batch,
        cache_bytes=options.cache_bytes,
        cache_dtype=options.cache_dtype,
        draft=None if options.draft is None else options.draft.module,
        ngram=options.ngram,
        draft_tokens=options.draft_tokens,
        swap_bytes=options.swap_bytes,
        batch_invariant=options.batch_invariant,
        adapters=adapters,
    )


def _divided(model: LoadedModel, options: BatchOptions, adapters: AdapterPool | None) -> tuple[LoadedModel, Batch]:
    """This process's part of the model, and a batch that leads the other processes."""
    from luban.serve.tensor.leader import Leader

    for asked, what in (
        (options.paged is False, "a contiguous cache"),
        (options.batch_invariant, "batch invariance: sums over processes round as the batch is"),
        (adapters is not None, "adapters by name"),
    ):
        if asked:
            raise UnsupportedError(f"plan.tensor does not go with {what}")
    assert options.plan is not None
    leader = Leader(model, options.plan, options.device)
    try:
        batch = PagedBatch(
            leader.module,
            max_batch=options.max_batch,
            cache_bytes=options.cache_bytes,
            cache_dtype=options.cache_dtype,
            draft=None if options.draft is None else options.draft.module,
            ngram=options.ngram,
            draft_tokens=options.draft_tokens,
            swap_bytes=options.swap_bytes,
            leader=leader,
        )
    except BaseException:
        leader.close()
        raise
    return replace(model, module=leader.module), batch
