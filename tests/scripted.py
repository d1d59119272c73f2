"""An engine whose model writes what a script says, as far as the request's structure allows it."""

from __future__ import annotations

from types import SimpleNamespace

from luban.generate.cache import PromptTooLong
from luban.generate.token_mask import StructureCompiler
from luban.load.generation import Generation
from luban.tokenizer.chat import render


class ScriptedEngine:
    """Answers each prompt with the next text of `script`; a callable is given the prompt's text.

    `refused` collects answers that the structure didn't allow, with what of them it did: those are what is said.
    """

    def __init__(self, tokenizer, script, context=1 << 30):
        self.tokenizer, self.script, self.context = tokenizer, list(script), context
        self.model = SimpleNamespace(need_tokenizer=lambda: tokenizer, generation=Generation(), name="scripted")
        self.compiler = StructureCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
        self.prompts, self.refused = [], []

    def tokens_of(self, prompt):
        """As the engine's, of text, messages and ids."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt[0], dict):
            ids = render(prompt, self.tokenizer, add_generation_prompt=True).token_ids
        else:
            ids = list(prompt)
        if len(ids) >= self.context:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens, the context is {self.context}")
        return ids

    def stream(self, prompt, sampling=None, kept=frozenset()):
        """The next text, a character a delta."""
        text = self.tokenizer.decode(self.tokens_of(prompt), skip_special=False)
        self.prompts.append(text)
        said = self.script.pop(0)
        said = said(text) if callable(said) else said
        structure = None if sampling is None else sampling.structure
        if structure is not None:
            matcher = self.compiler.matcher(structure)
            ids = self.tokenizer.encode_marked(said)[0]
            fine = next((i for i, token in enumerate(ids) if not matcher.consume(token)), len(ids))
            if fine < len(ids):
                said = self.tokenizer.decode(ids[:fine], skip_special=False)
                self.refused.append(said)
        for character in said:
            yield SimpleNamespace(text=character, finish_reason=None)
        yield SimpleNamespace(text="", finish_reason="stop")

    def generate(self, prompts, sampling=None):
        """One result."""
        text = "".join(delta.text for delta in self.stream(prompts, sampling))
        return [
            SimpleNamespace(text=text, finish_reason="stop", choices=[SimpleNamespace(text=text, finish_reason="stop")])
        ]
