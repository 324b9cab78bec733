"""Messages are rendered as SFT rendered them, or refused by their line."""

from __future__ import annotations

import json

import pytest

from lightning_rejuv.checkpoints.dialogues import tokenize
from lightning_rejuv.checkpoints.models import load_tokenizer
from tests.checkpoints.directories import write_tokenizer
from tests.checkpoints.test_dialogues import TALK, read

TOOLS = [{"type": "function", "function": {"name": "w8", "parameters": {"default": None}}}]
TOOL_TEMPLATE = (
    "{% if tools %}w9 {{ tools[0]['function']['name'] }} {% endif %}{% if documents %}{{ documents[0]['text'] }} "
    "{% endif %}{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' and thinking_on "
    "is defined and thinking_on %}w7 {% endif %}{% if m['content'] %}{{ m['content'] }} {% endif %}"
    "{% if m['tool_calls'] is defined %}{{ m['tool_calls'][0]['function']['name'] }} {% endif %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
PARTS = [{"type": "text", "text": "w1"}]


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def test_messages_are_rendered_with_the_models_own_template(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ]
    (batch,) = tokenize(read(tmp_path, tokenizer, {"messages": messages}), tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert batch["input_ids"][0].tolist() == whole
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "w5 w6 </s>"
    assert bool((labels[labels != -100] == batch["input_ids"][0][labels != -100]).all())


def test_messages_without_a_template_or_with_one_that_rewrites(tmp_path, tokenizer):
    messages = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    tokenizer.chat_template = "{% if add_generation_prompt %}A{% else %}B{% endif %}"
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        read(tmp_path, tokenizer, messages)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        read(tmp_path, tokenizer, messages)
    with pytest.raises(ValueError, match="Expected a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_what_else_the_template_reads_are_given_to_it(tools, tmp_path, tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATE
    line = {"messages": TALK, "tools": tools, "documents": [{"text": "w5"}], "id": 3, "namespace": "x"}
    (found,) = read(tmp_path, tokenizer, line)
    assert (found.prompt, found.response) == ("w9 w8 w5 <|user|> w1 <|assistant|> ", "w3 </s>")
    for more in ({"thinking_on": True}, {"chat_template_kwargs": {"thinking_on": True}}):
        (found,) = read(tmp_path, tokenizer, {"messages": TALK, **more})
        assert (found.prompt, found.response) == ("<|user|> w1 <|assistant|> ", "w7 w3 </s>")
    for nothing in (None, [], ""):
        assert read(tmp_path, tokenizer, {"messages": TALK, "tools": nothing})[0].prompt.startswith(
            "<|user|>"
        )


def test_a_call_of_a_tool_is_a_response(tmp_path, tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATE
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w8"}}]}
    plain = {"role": "user", "content": "w1", "tool_calls": None}  # a table's null
    (found,) = read(tmp_path, tokenizer, {"messages": [plain, call], "tools": TOOLS})
    assert (found.prompt, found.response) == ("w9 w8 <|user|> w1 <|assistant|> ", "w8 </s>")
    result = {"role": "tool", "content": "w2"}
    (found,) = read(tmp_path, tokenizer, {"messages": [plain, call, result, TALK[1]], "tools": TOOLS})
    assert found.prompt.endswith("<|assistant|> w8 </s><|tool|> w2 <|assistant|> ")
    with pytest.raises(ValueError, match="to end with the assistant's"):
        read(tmp_path, tokenizer, {"messages": [plain, call, result], "tools": TOOLS})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": "["}, "Expected `tools` in line 1 .* JSON of one"),
        ({"tools": {"type": "function"}}, "Expected `tools` in line 1 .* list of objects"),
        ({"tools": ["f"]}, "Expected `tools` in line 1 .* list of objects"),
        ({"chat_template_kwargs": [1]}, "Expected `chat_template_kwargs` in line 1"),
        ({"chat_template_kwargs": {"tokenize": True}}, "cannot render line 1"),
    ],
)
def test_what_a_template_cannot_be_given_is_refused_by_its_line(more, message, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, tokenizer, {"messages": TALK, **more})


@pytest.mark.parametrize("key", ["tools", "tool_calls"])
def test_tools_that_the_template_does_not_read_are_refused(key, tmp_path, tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w8"}}]}
    line = {"messages": TALK, "tools": TOOLS} if key == "tools" else {"messages": [TALK[0], call]}
    with pytest.raises(
        ValueError, match=f"line 1 .* holds `{key}`, which the SFT model's chat template does not"
    ):
        read(tmp_path, tokenizer, line)


def test_a_template_that_raises_or_forgets_is_refused_by_its_line(tmp_path, tokenizer):
    first = json.dumps({"prompt": "w1", "response": "w2"})
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match="cannot render line 2 .* roles must alternate. .* or bring it rendered, as"
    ):
        read(tmp_path, tokenizer, first, {"messages": TALK})
    # As templates that leave earlier thinking out: the last turn is rendered in another way than it is prompted.
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> w7 {% endif %}"
    )
    with pytest.raises(ValueError, match="line 2 .* does not begin with its prompt"):
        read(tmp_path, tokenizer, first, {"messages": TALK})


def test_a_dialogue_that_does_not_begin_with_its_prompt_is_shown_where_they_part(tmp_path, tokenizer):
    """As of templates that open a thought for the model and leave it out of the dialogue, after a long prompt."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> w7 {% endif %}"
    )
    messages = [{"role": "user", "content": "w1 " * 100 + "w5"}, {"role": "assistant", "content": "w9"}]
    with pytest.raises(
        ValueError,
        match=r"line 1 .* after '.* w5 <\|assistant\|> w' the prompt has '7 ', the dialogue '9 '\. Bring it",
    ):
        read(tmp_path, tokenizer, {"messages": messages})


@pytest.mark.parametrize(
    ("content", "shown"), [(PARTS, r"\[\{'type': 'text'"), (PARTS[0], r"\{'type': 'text'")]
)
@pytest.mark.parametrize("place", [0, 1])
def test_content_that_a_template_writes_as_python_would_is_refused_by_its_line(
    place, content, shown, tmp_path, tokenizer
):
    messages = [dict(message) for message in TALK]
    messages[place]["content"] = content
    with pytest.raises(
        ValueError, match=f"line 2 of .* `content` .* writes out as {shown}.* Bring it as text in the line"
    ):
        read(tmp_path, tokenizer, {"messages": TALK}, {"messages": messages})


def test_content_that_a_template_reads_in_another_form_is_rendered(tmp_path, tokenizer):
    """Parts and null, where the template is made for them; and a text that looks like parts."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {% if m['content'] is string %}{{ m['content'] }}"
        "{% elif m['content'] %}{{ m['content'][0]['text'] }}{% endif %} </s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    for content, text in ((PARTS, "w1"), (None, ""), ("[{'type': 'text'}]", "[{'type': 'text'}]")):
        line = {
            "messages": [{"role": "user", "content": content}, {"role": "user", "content": None}, TALK[1]]
        }
        (found,) = read(tmp_path, tokenizer, line)
        assert found.prompt == f"<|user|> {text} </s><|user|>  </s><|assistant|> "


def test_tools_that_are_nested_too_deeply_are_refused_with_the_line(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`tools` in line 1 of"):
        read(tmp_path, tokenizer, {"messages": TALK, "tools": "[" * 100_000})
