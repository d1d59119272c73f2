"""Chat templates with the structure of published families, each written anew in a few lines, and vocabularies for them.

`{% generation %}` marks what the assistant writes; `plain` takes the marks away, as published templates are.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """A template and the special tokens that it needs."""

    template: str
    specials: tuple[str, ...]  # the first begins a text, the second ends one
    stops: tuple[str, ...] = ()  # further tokens that end a generation (generation_config.json)
    calls: bool = False  # whether it has tool calls and results

    @property
    def plain(self) -> str:
        """The template without marks."""
        return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.template)

    def write(self, folder: Path, template: str) -> Path:
        """A byte-level vocabulary with this template in the Hugging Face layout."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {
            token: i
            for i, token in enumerate(dict.fromkeys((*self.specials, *sorted(pre_tokenizers.ByteLevel.alphabet()))))
        }
        merges = [("Ċ", "Ċ"), ("Ġ", "a"), ("o", "k")]  # so that a token can hold two line ends, or a space and a letter
        vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.specials])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.specials[0],
            "eos_token": self.specials[1],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        stops = [vocabulary[token] for token in (self.specials[1], *self.stops)]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        (folder / "chat_template.jinja").write_text(template)
        return folder


ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Trims, and writes the date, as LLaMA 3.1 does.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if loop.first %}{{ 'Today: ' + strftime_now('%d %b %Y') + '\n\n' }}{% endif %}"
    "{% if m.role != 'assistant' %}{{ m.content | trim + '<|eot_id|>' }}"
    '{% elif m.tool_calls %}{% generation %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The system's words go into the first user turn; the prompt is what ends the user's turn.
LLAMA2 = (
    SYSTEM_FIRST + "{% for m in rest %}" + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content | trim + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
# The system's words go into the last user turn, so that no prefix with them is a prefix of the whole.
MISTRAL = (
    SYSTEM_FIRST
    + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    + "{% if rest | selectattr('role', 'equalto', 'user') | list | last == m and system %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.tool_calls %}{% generation %}"
    "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}"
    "{{ ']' + eos_token }}{% endgeneration %}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}"
    "{% else %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}" + SYSTEM_FIRST + "{% for m in rest %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '<start_of_turn>user\n' }}{% if loop.first and system %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% else %}{{ '<start_of_turn>model\n' }}"
    "{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Thinking of earlier turns is dropped, the last turn always has some; tool results stand in the user's turn.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}{% for c in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' + c.function.arguments | tojson + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt opens a thought that no turn of the history holds.
DEEPSEEK = (
    SYSTEM_FIRST + "{{ bos_token + system }}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'tool' %}{{ '<｜tool▁output｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' }}{% generation %}{% if m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    "{{ '<｜tool▁call｜>' + c.function.name + '\n' + c.function.arguments | tojson + '<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
# Ends with the end of the text where no answer is to follow.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Thoughts and answers are turns of their own, ended by other tokens in the middle than at the end; a result names its call.
GPT_OSS = (
    "{% set ns = namespace(name='') %}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}"
    "{% if m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}{% generation %}"
    "{{ ' to=functions.' + ns.name + '<|channel|>commentary<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% endgeneration %}{% else %}{% generation %}{% if m.thinking and loop.last %}"
    "{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% endgeneration %}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + ns.name + '<|message|>' + m.content | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{% set content = m.content.strip() %}"
    "{% if m.role == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% generation %}"
    "{{ '<|START_RESPONSE|>' + content + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}{% endgeneration %}"
    "{% else %}{{ '<|START_OF_TURN_TOKEN|><|' + m.role.upper() + '_TOKEN|>' + content + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
# Roles in plain text.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    SYSTEM_FIRST + "{{ bos_token + (system or 'A chat.') }}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ ' USER: ' + m.content.strip() }}{% else %}{{ ' ASSISTANT:' }}{% generation %}{{ ' ' + m.content.strip() + eos_token }}"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<|tool_call|>' + [c.function] | tojson }}{% endfor %}"
    "{{ '<|end_of_text|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end_of_text|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
# Behind a tool's result the model goes on in the same turn, and the prompt is empty there.
GEMMA4 = (
    "{{ bos_token }}{% set ns = namespace(before='') %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|tool_response>' + m.content + '<tool_response|>' }}{% else %}"
    "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% for c in m.tool_calls or [] %}{{ '<|tool_call>call:' + c.function.name + c.function.arguments | tojson + '<tool_call|>' }}"
    "{% endfor %}{% if not m.tool_calls %}{{ m.content | trim + '<turn|>' }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<turn|>' }}{% endif %}{% if not m.tool_calls %}{{ '\n' }}{% endif %}{% endif %}"
    "{% set ns.before = m.role %}{% endfor %}"
    "{% if add_generation_prompt and ns.before != 'tool' %}{{ '<|turn>model\n' }}{% endif %}"
)
# A turn ends where the token of the next role stands, at which generations stop. It can't mark that token itself.
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "chatml": Family(CHATML, CHATML_TOKENS),
    "llama3": Family(
        LLAMA3, ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), calls=True
    ),
    "llama2": Family(LLAMA2, ("<s>", "</s>")),
    "mistral": Family(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), calls=True
    ),
    "gemma": Family(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",)),
    "gemma4": Family(
        GEMMA4,
        ("<bos>", "<turn|>", "<|turn>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
        calls=True,
    ),
    "qwen3": Family(QWEN3, CHATML_TOKENS, calls=True),
    "deepseek": Family(
        DEEPSEEK,
        (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁call｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁output｜>",
        ),
        calls=True,
    ),
    "phi3": Family(PHI3, ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), ("<|end|>",)),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|startoftext|>", "<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
        ("<|call|>",),
        calls=True,
    ),
    "command-r": Family(
        COMMAND_R,
        (
            "<BOS>",
            "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
    ),
    "zephyr": Family(ZEPHYR, ("<s>", "</s>")),
    "vicuna": Family(VICUNA, ("<s>", "</s>")),
    "granite": Family(
        GRANITE,
        ("<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        calls=True,
    ),
}
GLM = Family(
    GLM4,
    ("<sop>", "<|endoftext|>", "[gMASK]", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
    ("<|user|>", "<|observation|>"),
)
