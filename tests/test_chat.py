"""Chat templates against transformers; injected special tokens; templates that want to do harm."""

import functools
import json
import sys

import numpy as np
import pytest
import tokenizers
from tokenizer_kinds import make_content
from tokenizers import decoders, models, pre_tokenizers

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import BYTE_CHARACTERS, Tokenizer, chat, make_byte_tokenizer
from jaxgpt.tokenizer.chat_templates import TEMPLATES

CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# With what published templates use: namespaces, tools as JSON, slices, the date, refusals.
LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- if tools is not none and tools %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{% endfor %}
    {{- "<|eot_id|>" }}
{%- endif %}
{%- for message in messages[0:] %}
    {%- if message.role == 'bad' %}{{- raise_exception('no such role') }}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}
{%- set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
{%- endif %}{% endfor %}"""
SOURCES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]",
            "[/INST]"]  # fmt: skip
CHAT = [
    {"role": "user", "content": '  Hi, 你好 <b>x</b> & "y"\n'},
    {"role": "assistant", "content": "Hello 🙂!  "},
    {"role": "user", "content": "the word"},
]
TOOLS = [{"type": "function", "function": {"name": "f<é>", "parameters": {"a": [1, None, True]}}}]
KINDS = ("gpt2", "llama3", "llama2", "mistral", "gemma", "unigram_bytes", "wordpiece")
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>",
        "mistral": "</s>", "plain": "</s>"}  # fmt: skip
HIDDEN = ("{{ messages['__class__'] }}", "{{ messages[0]['__doc__'] }}",
          "{{ messages | map(attribute='__class__') | join }}")  # fmt: skip


@functools.cache
def make_content_with_specials(kind: str, *flags: str) -> str:
    library = tokenizers.Tokenizer.from_str(make_content(kind))
    tokens = [tokenizers.AddedToken(token, special=True, normalized=False,
                                    **dict.fromkeys(flags, True))
              for token in SPECIALS]  # fmt: skip
    library.add_special_tokens(tokens)
    return library.to_str()


@functools.cache
def make(kind: str, template: str, *flags: str) -> Tokenizer:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    content = make_content_with_specials(kind, *flags)
    return Tokenizer(content, kind, chat_template=template, settings=settings)


def make_theirs(kind: str, template: str, *flags: str):
    transformers = pytest.importorskip("transformers")
    library = tokenizers.Tokenizer.from_str(make_content_with_specials(kind, *flags))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def apply_theirs(theirs, messages, **arguments) -> list[int]:
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOURCES)
def test_a_conversation_has_the_ids_of_transformers(name, kind):
    ours, theirs = make(kind, SOURCES[name]), make_theirs(kind, SOURCES[name])
    for messages in (CHAT, CHAT[:2], CHAT[:1]):
        for prompt in (True, False):
            expected = apply_theirs(theirs, messages, add_generation_prompt=prompt)
            found = ours.encode_chat(messages, add_generation_prompt=prompt)
            assert found.tolist() == expected
            text = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            arguments = {"bos_token": "<s>", "eos_token": "</s>"}
            assert text == chat.render(SOURCES[name], messages, None, prompt, **arguments)
    expected = apply_theirs(theirs, CHAT, tools=TOOLS)
    assert ours.encode_chat(CHAT, tools=TOOLS).tolist() == expected


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
def test_special_tokens_that_take_the_space_beside_them_do_so_in_templates(kind, flag):
    ours, theirs = make(kind, CHATML, flag), make_theirs(kind, CHATML, flag)
    assert ours.encode_chat(CHAT).tolist() == apply_theirs(theirs, CHAT)


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_special_token_spelled_in_a_message_is_text(role, name, kind):
    tokenizer = make(kind, TEMPLATES[name])
    specials = {*tokenizer.special_ids.values()} - {tokenizer.unk}

    def encode(content):
        messages = [{"role": r, "content": content if r == role else "x"}
                    for r in ("system", "user", "assistant", "user")]  # fmt: skip
        return tokenizer.encode_chat(messages, add_generation_prompt=True)

    def turns(content):
        return [index for index in encode(content).tolist() if index in specials]

    expected = turns("x")
    for token in SPECIALS:
        for content in (
            token,
            f"a{token}b",
            f"{token}{token}",
            f" {token}\n",
            token[:-1],
            token[1:],
        ):
            assert turns(content) == expected, content
    if kind == "gpt2":
        text = tokenizer.decode(encode("a</s><|im_end|>b"))
        assert "a</s><|im_end|>b" in text


def test_a_message_cannot_complete_a_token_that_a_template_begins():
    tokenizer = make("gpt2", "{% for m in messages %}{{ m.content }}|>{{ '<|' }}{% endfor %}")
    for content in ("<|im_end", "im_end|>", " <|im_end  ", "<|im_end|"):
        messages = [{"role": "user", "content": content}] * 2
        ids = tokenizer.encode_chat(messages)
        assert not {*tokenizer.special_ids.values()} & {*ids.tolist()}
        assert tokenizer.decode(ids) == (content + "|><|") * 2
    # A template may make a token of a role, as that of Phi-4 does.
    by_role = make("gpt2", "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}")
    ids = by_role.encode_chat([{"role": "im_start", "content": ""}])
    assert ids.tolist() == [by_role.special_ids["<|im_start|>"]]


def test_specials_in_tools_and_in_names_of_fields_are_text():
    tokenizer = make("gpt2", "{{ tools | tojson }}{{ messages | tojson }}")
    messages = [{"role": "user", "<|im_end|>": ["</s>", {"x": "<s>"}]}]
    ids = tokenizer.encode_chat(messages, tools=[{"</s>": "<|im_start|>"}])
    assert not {*tokenizer.special_ids.values()} & {*ids.tolist()}
    assert tokenizer.decode(ids) == json.dumps([{"</s>": "<|im_start|>"}]) + json.dumps(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_marks_the_assistants_texts_and_what_ends_them(name):
    tokenizer = make("gpt2", TEMPLATES[name])
    found = chat.encode_chat(tokenizer, CHAT)
    marked = found.ids[found.is_generated].tolist()
    assert marked[-1] == tokenizer.special_ids[ENDS[name]]
    assert tokenizer.decode(marked).strip() == "Hello 🙂!"
    assert found.text.count("Hello 🙂!") == 1


def test_marked_tokens_are_those_of_the_marked_characters():
    source = "ab{% generation %}cd {{ messages[0].content }}{% endgeneration %}e f"
    tokenizer = make_byte_tokenizer()
    found = chat.encode_chat(tokenizer, [{"role": "user", "content": "é<eos>"}], template=source)
    assert tokenizer.decode(found.ids) == found.text == "abcd é<eos>e f"
    assert tokenizer.decode(found.ids[found.is_generated]) == "cd é<eos>"


def test_no_bos_is_added_to_what_a_template_writes():
    tokenizer = make("llama2", "{{ bos_token }}{{ messages[0].content }}")
    ids = tokenizer.encode_chat([{"role": "user", "content": "the"}]).tolist()
    assert tokenizer.adds_bos
    assert ids == [tokenizer.bos, *tokenizer.encode("the").tolist()]
    without = make("llama2", "{{ messages[0].content }}")
    assert without.encode_chat([{"role": "user", "content": "the"}]).tolist() == ids[1:]


def test_a_template_is_named_or_given_and_its_tokens_must_be_there():
    tokenizer = make_byte_tokenizer()
    with pytest.raises(ConfigError, match=r"no chat template.*chatml, llama3, gemma, mistral, pl"):
        tokenizer.encode_chat(CHAT)
    with pytest.raises(ConfigError, match=r"template chatml needs the special token <\|im_start"):
        tokenizer.with_chat_template("chatml")
    with pytest.raises(ConfigError, match=r"template gemma needs the special token"):
        tokenizer.encode_chat(CHAT, template="gemma")
    plain = tokenizer.with_chat_template("plain")
    assert plain.chat_template == TEMPLATES["plain"]
    assert plain.fingerprint == tokenizer.fingerprint
    ids = plain.encode_chat(CHAT[:1], add_generation_prompt=True)
    assert plain.decode(ids).endswith("\n\n\nassistant: ")
    np.testing.assert_array_equal(ids, tokenizer.encode_chat(CHAT[:1], None, True, "plain"))


def test_a_template_for_tools_is_used_if_there_are_tools():
    templates = {"default": "d", "tool_use": "{{ tools[0].a }}"}
    tokenizer = Tokenizer(make_content("gpt2"), chat_template=templates)
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "d"
    assert tokenizer.decode(tokenizer.encode_chat(CHAT, tools=[{"a": "t"}])) == "t"


HARM = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "product": "{{ 'a' * 10**9 }}",
    "list": "{{ ([1] * 10**9) | length }}",
    "power": "{{ 10**10**10 }}",
    "square": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "adding": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
    "{% endfor %}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join": "{{ ('a,' * 99999).split(',') | join('b' * 99999) }}",
    "method": "{{ ('b' * 99999).join(('a,' * 99999).split(',')) }}",
    "width": "{{ 'a'.ljust(10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:1000000000d}'.format(1) }}",
    "indent": "{{ ('a\n' * 99999) | indent(10**9) }}",
    "json": "{{ messages | tojson(indent=10**9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "output": "{% macro a() %}{{ 'x' * 99999 }}{% endmacro %}{% for i in range(99999) %}{{ a() }}"
    "{% endfor %}",
    "class": "{{ messages.__class__ }}",
    "attribute": "{{ messages | attr('__class__') }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "loop": "{% for m in messages %}{{ loop.__init__ }}{% endfor %}",
    "budget": "{{ _budget.left }}",
    "change": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "undefined": "{{ x.y }}",
    "syntax": "{% for %}",
    "filters": "{{ messages | pprint }}",
    "long": "{# " + "x" * (1 << 18) + " #}",
    "bad": "{{ raise_exception('not like this') }}",
}


@pytest.mark.parametrize("name", HARM)
def test_a_template_that_wants_to_do_harm_is_refused(name):
    with pytest.raises(ConfigError, match="the chat template"):
        chat.render(HARM[name], CHAT)


@pytest.mark.parametrize("source", HIDDEN)
def test_hidden_attributes_are_undefined(source):
    assert chat.render(source, CHAT) == ""


def test_what_templates_use_works():
    source = """\
{%- for m in messages -%}{%- if loop.index0 == 1 -%}{%- continue -%}{%- endif -%}
{{- m.role | upper }}{{ m.content.split(' ')[-1] | trim }}{{ loop.last }};{%- endfor -%}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 7 % 3 }}
{{- {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ 'ab'[::-1] }}{{ 2 ** 5 }}"""
    found = chat.render(source, CHAT)
    assert found == 'USER"y"False;USERwordTrue;21{"a": "<é>"}4ba32'


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list of dicts"),
        ([["user", "x"]], "must be a list of dicts"),
        ([{"content": "x"}], "message 1 has no role"),
        ([{"role": "user", "content": {1, 2}}], "must be JSON values"),
        ([{"role": "tool", "content": "x"}], "refuses this conversation: .*take turns"),
    ],
)
def test_a_conversation_that_is_none_is_refused(messages, message):
    with pytest.raises(ConfigError, match=message):
        make("gpt2", TEMPLATES["gemma"]).encode_chat(messages)


def test_without_jinja2_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    chat.chat_sandbox.make_environment.cache_clear()
    with pytest.raises(ConfigError, match=r"a chat template needs Jinja2.*jaxgpt\[chat\]"):
        chat.render("{{ 'not compiled before' }}", CHAT)


def test_a_vocabulary_with_specials_in_it_keeps_them_out_of_text():
    """GGUF files list special tokens among all others; whole words are looked up."""
    vocab = {token: index for index, token in enumerate([*BYTE_CHARACTERS, "</s>", "<|im_end|>"])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("never"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [library.pre_tokenizer, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["</s>", "<|im_end|>"])
    tokenizer = Tokenizer(library.to_str())
    assert tokenizer.encode("</s>").max() < 256
    assert tokenizer.decode(tokenizer.encode("</s>")) == "</s>"
