"""Messages of a line rendered to text with the SFT model's own chat template."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

# What Jinja and transformers define for every template; a key of a line never stands for one of these.
_DEFINED = {"messages", "range", "dict", "namespace", "cycler", "joiner", "raise_exception", "strftime_now"}


def render(content: dict[str, Any], tokenizer: Any, where: str) -> tuple[str, str]:
    """Return the text of all messages of a line but the last, and that of the last one, the response.

    Args:
        content: the line: ``messages``, and what else the template reads.
        tokenizer: of the SFT model.
        where: how messages name the line.

    Raises:
        ValueError: the line is not of this form, or the template does not render it as SFT would have seen it.
    """
    messages = content["messages"]
    fine = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not fine or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"Expected the messages in {where} to end with the assistant's but got {messages!r:.200}."
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} holds messages but the SFT model's tokenizer has no chat template to render them with. "
            'Bring plain text as {"prompt", "response"}, or save the template with the tokenizer.'
        )
    # A table that holds all messages writes null for what one of them lacks; `content` may be null on purpose.
    messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
    given = _template_arguments(content, tokenizer, where)
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True, **given
        )
    except Exception as error:  # a template may raise anything, and so may Jinja with a missing key
        raise ValueError(
            f"The SFT model's chat template cannot render {where}: {type(error).__name__}: {error}. Write the messages "
            'as SFT had them, or bring it rendered, as {"prompt", "response"}.'
        ) from error
    _check_written(messages, whole, tokenizer, given, where)
    if not whole.startswith(prompt):
        shorter = min(len(whole), len(prompt))
        at = next((n for n in range(shorter) if whole[n] != prompt[n]), shorter)
        raise ValueError(
            f"The SFT model's chat template renders {where} so that the dialogue does not begin with its prompt: after "
            f"{whole[max(0, at - 40) : at]!r} the prompt has {prompt[at : at + 40]!r}, the dialogue "
            f'{whole[at : at + 40]!r}. Bring it rendered, as {{"prompt", "response"}}.'
        )
    return prompt, whole[len(prompt) :]


def _check_written(
    messages: list[dict[str, Any]], whole: str, tokenizer: Any, given: dict[str, Any], where: str
) -> None:
    """Refuse content that is no text, such as a list of parts, if the template writes it out as Python does."""
    for place, message in enumerate(messages):
        written = str(content := message.get("content"))
        if not isinstance(content, (list, dict)) or written not in whole:
            continue
        others = [*messages[:place], {**message, "content": ""}, *messages[place + 1 :]]
        try:
            elsewhere = tokenizer.apply_chat_template(others, tokenize=False, **given).count(written)
        except Exception:  # a template may refuse a message that is empty
            elsewhere = 0
        if whole.count(written) > elsewhere:
            raise ValueError(
                f"{where} holds `content` that is no text, and that the SFT model's chat template writes out as "
                f'{written:.120}. Bring it as text in the line, or rendered, as {{"prompt", "response"}}.'
            )


def _template_arguments(content: dict[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
    """Return what the chat template gets beside the messages; keys of the line that it does not read are left out."""
    more = content.get("chat_template_kwargs") or {}
    if not isinstance(more, dict):
        raise ValueError(f"Expected `chat_template_kwargs` in {where} to be an object but got {more!r:.200}.")
    tools = {**content, **more}.get("tools")
    if isinstance(tools, str):  # tables hold it as JSON text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Expected `tools` in {where} to be a list or JSON of one: {error}.") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"Expected `tools` in {where} to be a list of objects but got {tools!r:.200}.")
    tools = tools or None
    template = str(tokenizer.get_chat_template(tools=tools))
    calls = [m["tool_calls"] for m in content["messages"] if m.get("tool_calls")]
    for key, value in (("tools", tools), ("tool_calls", calls)):
        if value and not re.search(rf"\b{key}\b", template):
            raise ValueError(
                f"{where} holds `{key}`, which the SFT model's chat template does not read: they would be lost "
                "without a word. Save the template that SFT rendered them with beside the tokenizer, or leave "
                "them out."
            )
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, *_DEFINED} - {"documents"}
    read = {
        key: value
        for key, value in content.items()
        if value is not None and key not in own and re.search(rf"(?<![\w.'\"]){re.escape(key)}\b", template)
    }
    return {**read, **more, "tools": tools}
