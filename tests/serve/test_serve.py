"""A server over a tiny model, asked by the official client."""

import base64
import json
import math
import threading

import numpy as np
import openai
import pytest
import serve_fuzz
from serving import CONTEXT, TOKENIZER, USER, make_model, open_tiny, run_server, wait_until

from jaxgpt.config import SampleConfig
from jaxgpt.serve.jobs import make_sample
from jaxgpt.serve.metrics import count_compiles
from jaxgpt.serve.schema import COMPLETION
from jaxgpt.serve.served import OPENAI_DEFAULTS, Served, serve_model
from jaxgpt.serve.service import Service

# A model writes it one byte at a time, so that characters and stop strings come in pieces.
FIXED = "né 🎉世界! END 👩‍👩‍👧 of it"


@pytest.fixture(scope="module")
def address():
    with open_tiny() as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def chat(client, **more):
    return client.chat.completions.create(model="tiny", messages=USER, **more)


def complete(client, prompt="hello", **more):
    return client.completions.create(model="tiny", prompt=prompt, **more)


def generate(address, prompt, **rules):
    """Return what the engine makes of a prompt."""
    sample = SampleConfig(**({"temperature": 0, "top_p": 1.0} | rules))
    return address.service.engine.submit(prompt, sample).result()


# --- models and answers ---


def test_the_model_and_its_adapters_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny", "a", "b"]
    assert client.models.retrieve("a").id == "a"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'"):
        client.models.retrieve("tinny")
    with pytest.raises(openai.NotFoundError, match="Known: tiny, a, b"):
        client.completions.create(model="nobody", prompt="a")


def test_an_answer_is_what_the_engine_generates(client, address):
    ids = address.service.served.model.tokenizer.encode_chat(USER, add_generation_prompt=True)
    found = chat(client, temperature=0, max_completion_tokens=9)
    expected = generate(address, ids.tolist(), tokens=9)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == {"tokens": "length"}.get(expected.ending, "stop")
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.usage.total_tokens == len(ids) + len(expected.tokens)
    whole = chat(client, temperature=0)  # as many tokens as fit
    assert whole.usage.total_tokens == CONTEXT or whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.content.startswith(expected.text[:-1])


def test_a_prompt_is_a_text_or_tokens_and_several_are_one_request(client, address):
    ids = [TOKENIZER.bos, *TOKENIZER.encode("hello").tolist()]
    texts = {
        complete(client, prompt, temperature=0, max_tokens=6).choices[0].text
        for prompt in ("hello", ids, ["hello"], [ids])
    }
    assert texts == {generate(address, "hello", tokens=6).text}
    several = complete(client, ["hello", ""], n=2, temperature=0, max_tokens=6)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    expected = [generate(address, prompt, tokens=6).text for prompt in ("hello", "")]
    assert [choice.text for choice in several.choices] == [expected[i] for i in (0, 0, 1, 1)]
    assert several.usage.prompt_tokens == len(ids) + 1
    assert len(complete(client, temperature=0).choices[0].text.encode("utf-8", "replace")) >= 1
    assert complete(client, temperature=0).usage.completion_tokens <= 16


def test_texts_of_one_seed_are_the_same_again_and_differ_from_each_other(client):
    rules = dict(n=3, temperature=1.5, max_tokens=12)
    first, second = (complete(client, seed=7, **rules) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3
    assert [x.text for x in complete(client, seed=-8, **rules).choices] != texts
    unseeded = [complete(client, **rules).choices[0].text for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_an_adapter_is_chosen_by_the_model_of_a_request(client, address):
    model = address.service.served.model
    texts = [
        client.completions.create(model=name, prompt="hello", temperature=0, max_tokens=8)
        .choices[0].text
        for name in ("tiny", "a", "b", "a")
    ]  # fmt: skip
    sample = SampleConfig(temperature=0, tokens=8)
    expected = model.generate(["hello"] * 3, sample, adapter=["", "a", "b"])
    assert texts == [expected[i].text for i in (0, 1, 2, 1)]
    assert len(set(texts)) == 3


def test_a_prompt_that_was_read_by_one_adapter_is_not_reused_for_another(client):
    prompt = "a prompt of more than sixteen tokens, and of more than thirty-two"
    ask = dict(prompt=prompt, temperature=0, max_tokens=8)
    found = [client.completions.create(model=name, **ask) for name in ("a", "tiny", "a", "tiny")]
    assert found[0].choices[0].text == found[2].choices[0].text
    assert found[1].choices[0].text == found[3].choices[0].text
    assert found[0].choices[0].text != found[1].choices[0].text
    cached = [each.usage.prompt_tokens_details.cached_tokens for each in found]
    assert cached[2:] == [64, 64]
    assert cached[1] == 0


def test_answers_have_the_same_bits_alone_and_among_others(client):
    def ask(prompt):
        found = complete(client, prompt, temperature=0, max_tokens=10, logprobs=2)
        return found.choices[0].text, tuple(found.choices[0].logprobs.token_logprobs)

    prompts = ["hello", "", "x" * 20, "a text of thirty-seven characters, ok"]
    alone = {prompt: ask(prompt) for prompt in prompts}
    found: list = []
    threads = [
        threading.Thread(target=lambda n=n: found.append((n, ask(prompts[n % 4]))))
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 16
    for n, answer in found:
        assert answer == alone[prompts[n % 4]]


def test_requests_compile_nothing(client, address):
    before = count_compiles()[0]
    for rules in (
        dict(seed=1),
        dict(temperature=0),
        dict(n=2, logprobs=3),
        dict(stop="a", top_p=0.5),
    ):
        complete(client, "x" * 33, max_tokens=6, **rules)
    chat(client, max_tokens=3, response_format={"type": "json_object"}, frequency_penalty=1)
    assert count_compiles()[0] == before


# --- streams ---


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joins_to_the_whole_answer(client, n):
    rules = dict(n=n, seed=5, temperature=1, max_tokens=10, logprobs=True, top_logprobs=2)
    whole = chat(client, **rules)
    chunks = list(chat(client, **rules, stream=True, stream_options={"include_usage": True}))
    usage = chunks.pop()
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    for index, choice in enumerate(whole.choices):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [
            choice.finish_reason
        ]
        assert parts[-1].finish_reason
        places = [x for part in parts if part.logprobs for x in part.logprobs.content]
        assert places == choice.logprobs.content


STOPS = ["END", "🎉", "世界", "n", "é 🎉", "D 👩‍", "‍👧", " of it", "zzz", "it?"]


@pytest.mark.parametrize("stop", STOPS)
def test_characters_and_stop_strings_in_pieces_are_whole_in_the_text(client, stop):
    rules = dict(extra_body={"regex": FIXED}, max_tokens=100, stop=[stop, "!!"])
    expected = FIXED.partition(stop)[0]
    whole = complete(client, **rules).choices[0]
    assert whole.text == expected
    assert whole.finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in complete(client, **rules, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == expected
    scored = complete(client, **rules, logprobs=1).choices[0].logprobs
    data = b"".join(
        bytes.fromhex(x[6:].replace("\\x", "")) if x.startswith("bytes:") else x.encode()
        for x in scored.tokens
    )
    assert data == expected.encode()
    chunks = [chunk.choices[0] for chunk in complete(client, **rules, logprobs=1, stream=True)]
    tokens = [x for chunk in chunks if chunk.logprobs for x in chunk.logprobs.tokens]
    assert tokens == scored.tokens


def test_texts_of_clients_that_leave_are_cancelled_and_every_row_serves_again(address):
    serve_fuzz.leave_streams(address, 12)


def test_a_client_may_leave_a_stream(client, address):
    with complete(client, stream=True, max_tokens=100) as stream:
        next(iter(stream))
    wait_until(lambda: address.service.engine.running == 0)


# --- rules ---


def test_log_probabilities_are_those_of_the_model(client):
    found = chat(client, temperature=0, max_tokens=8, logprobs=True, top_logprobs=20)
    places = found.choices[0].logprobs.content
    assert b"".join(bytes(place.bytes) for place in places).decode("utf-8", "replace") == (
        found.choices[0].message.content
    )
    for place in places:
        assert len(place.top_logprobs) == 20
        values = [each.logprob for each in place.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0001
        assert place.bytes in [each.bytes for each in place.top_logprobs]
    assert (
        chat(client, max_tokens=2, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    )
    assert chat(client, max_tokens=2).choices[0].logprobs is None


def test_an_echo_has_the_log_probabilities_that_generation_has(client):
    rules = dict(temperature=0, logprobs=3, seed=1)
    first = complete(client, "hello", max_tokens=8, **rules).choices[0]
    ids = [TOKENIZER.bos, *TOKENIZER.encode("hello").tolist()]
    drawn = [TOKENIZER.encode(x).tolist() for x in first.logprobs.tokens if "bytes" not in x]
    if len(drawn) == len(first.logprobs.tokens):  # whole characters
        ids += [token for each in drawn for token in each]
    echoed = complete(client, ids, max_tokens=0, echo=True, **rules).choices[0]
    assert echoed.finish_reason == "length"
    assert echoed.text == TOKENIZER.decode(ids)
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.top_logprobs[0] is None
    new = echoed.logprobs.token_logprobs[6:]
    np.testing.assert_allclose(new, first.logprobs.token_logprobs[: len(new)], atol=1e-4)
    text = complete(client, "hello", max_tokens=2, echo=True, **rules).choices[0]
    assert text.text.startswith("hello")
    assert text.logprobs.tokens[:5] == list("hello")
    assert text.logprobs.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(
        text.logprobs.token_logprobs[:5], echoed.logprobs.token_logprobs[1:6], atol=1e-4
    )
    assert all(3 <= len(top) <= 4 for top in text.logprobs.top_logprobs)
    chunks = [x.choices[0] for x in complete(client, "hi", max_tokens=2, echo=True, stream=True)]
    assert chunks[0].text == "hi"


def test_rules_reach_the_engine(client, address):
    token = TOKENIZER.encode("q").tolist()[0]
    found = complete(client, max_tokens=4, logit_bias={str(token): 100}).choices[0]
    assert (found.text, found.finish_reason) == ("qqqq", "length")
    penalized = complete(
        client, max_tokens=4, temperature=0, presence_penalty=2, frequency_penalty=2,
        logit_bias={str(token): 20},
    ).choices[0].text  # fmt: skip
    assert penalized == generate_with_bias(address, token)
    top = complete(client, temperature=2, max_tokens=8, extra_body={"top_k": 1}).choices[0].text
    assert top == generate(address, "hello", tokens=8).text
    assert complete(client, temperature=2, top_p=0, max_tokens=8).choices[0].text == top
    assert complete(client, temperature=1e-9, max_tokens=8).choices[0].text == top


def generate_with_bias(address, token):
    rules = SampleConfig(
        temperature=0, top_p=1.0, tokens=4, presence_penalty=2.0, frequency_penalty=2.0
    )
    return address.service.engine.submit("hello", rules, bias={token: 20}).result().text


def test_an_answer_follows_a_json_schema(client):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["kind", "n"],
        "properties": {"kind": {"enum": ["x", "y"]}, "n": {"type": "integer", "maximum": 9,
                                                             "minimum": 0}},
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}}
    found = json.loads(chat(client, response_format=wanted).choices[0].message.content)
    assert found["kind"] in ("x", "y")
    assert 0 <= found["n"] <= 9
    text = chat(client, response_format={"type": "json_object"}, max_tokens=90)
    assert text.choices[0].message.content.startswith("{")
    assert chat(client, response_format={"type": "text"}, max_tokens=1).choices
    wrong = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        chat(client, response_format=wrong)


# --- embeddings ---


def test_embeddings_are_the_pooled_states_of_an_encoder():
    model = make_model(objective="masked", family="encoder")
    service = Service()
    service.open(serve_model(model, "encoder"))
    with (
        run_server(service) as address,
        openai.OpenAI(base_url=f"{address.url}/v1", api_key="-", max_retries=0) as client,
    ):
        texts = ["hello", "", "世界"]
        found = client.embeddings.create(model="encoder", input=texts)  # in base64
        expected = model.embed(texts)
        for row, each in zip(found.data, expected, strict=True):
            np.testing.assert_array_equal(np.float32(row.embedding), each.vectors)
        assert found.usage.prompt_tokens == sum(len(each.tokens) for each in expected)
        one = address.ask("/v1/embeddings", {"input": "hello"})[2]["data"]
        assert len(one) == 1
        np.testing.assert_array_equal(np.float32(one[0]["embedding"]), expected[0].vectors)
        coded = address.ask("/v1/embeddings", {"input": "hello", "encoding_format": "base64"})[2]
        data = base64.b64decode(coded["data"][0]["embedding"])
        np.testing.assert_array_equal(np.frombuffer(data, "<f4"), expected[0].vectors)
        ids = expected[0].tokens.tolist()
        tokens = client.embeddings.create(model="encoder", input=[ids, ids])
        np.testing.assert_array_equal(np.float32(tokens.data[1].embedding), expected[0].vectors)
        with pytest.raises(openai.BadRequestError, match="have 16"):
            client.embeddings.create(model="encoder", input="a", dimensions=8)
        with pytest.raises(openai.BadRequestError, match="202 tokens") as error:
            client.embeddings.create(model="encoder", input=["a", "x" * 200])
        assert error.value.code == "context_length_exceeded"
        assert error.value.param == "input[1]"
        with pytest.raises(openai.BadRequestError, match="generates no text: it can"):
            client.completions.create(model="encoder", prompt="a")


# --- errors ---


def test_a_prompt_as_long_as_the_context_is_refused_and_max_tokens_is_clamped(client):
    fits = "x" * (CONTEXT - 2)  # with bos, and room for one
    found = complete(client, fits, max_tokens=10**9, temperature=0)
    assert found.usage.completion_tokens <= 1
    for n in (1, 2):
        with pytest.raises(openai.BadRequestError, match="128 must hold it") as error:
            complete(client, "x" * (CONTEXT - 1), n=n)
        assert error.value.code == "context_length_exceeded"
        assert error.value.param == "prompt"
        assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * CONTEXT}]
        )
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        (dict(extra_body={"temprature": 1}), "temprature", "Did you mean 'temperature'"),
        (dict(tools=[{"type": "function", "function": {"name": "f"}}]), "tools", "calls no tools"),
        (dict(max_tokens=-5), "max_tokens", "at least 1"),
        (dict(max_tokens=3, max_completion_tokens=4), "max_tokens", "differ"),
        (dict(top_logprobs=2), "top_logprobs", "logprobs=true"),
        (dict(logprobs=True, top_logprobs=21), "top_logprobs", "0 to 20"),
        (dict(logit_bias={"270": 1}), "logit_bias", "0 to 269"),
        (dict(stop=["a"] * 5), "stop", "up to 4"),
        (dict(temperature=2.5), "temperature", "0 to 2"),
        (dict(n=0), "n", "1 to 128"),
        (dict(stream_options={"include_usage": True}), "stream_options", "stream=true"),
        (dict(response_format={"type": "json_schema"}), "response_format.json_schema", "belongs"),
        (dict(extra_body={"regex": "("}), None, "regex"),
        (dict(extra_body={"regex": "a", "grammar": 'start: "a"'}), None, "give one of them"),
    ],
)
def test_a_field_that_is_wrong_is_named(client, more, param, message):
    for stream in (False, True):
        if "stream_options" in more and stream:
            continue
        with pytest.raises(openai.BadRequestError, match=message) as error:
            chat(client, stream=stream, **more)
        assert error.value.param == param


def test_errors_are_the_classes_of_the_client(client, address):
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        complete(client, suffix="x")
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content is missing"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user"}])
    service = address.service
    service._texts += service.rows + service.queue
    with pytest.raises(openai.RateLimitError) as busy:
        complete(client)
    service._texts -= service.rows + service.queue
    assert int(busy.value.response.headers["retry-after"]) >= 1
    service.state = "draining"
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        complete(client)
    service.state = "ready"
    assert complete(client, max_tokens=1).choices


def test_bodies_at_random_are_answered_and_never_by_a_failure(address):
    counts = serve_fuzz.run(address, 120)
    assert counts[200] > 20
    assert counts[400] > 20
    wait_until(lambda: address.service.engine.running == 0)


def test_a_look_inside_page_is_of_the_conversation(address):
    status, headers, page = address.ask("/look", {"messages": USER})
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert b"<html" in page.lower()
    assert address.ask("/look", {})[0] == 400
    assert address.ask("/look", {"messages": USER, "prompt": "a"})[0] == 400


def test_settings_of_the_server_are_the_rules_of_requests_that_give_none():
    rules = OPENAI_DEFAULTS | {"temperature": 0.3, "tokens": 7, "seed": 5}
    served = Served(make_model(), {"m": ""}, None, rules, 1, CONTEXT, 0)
    body = {name: field.default for name, field in COMPLETION.items()}
    found = make_sample(served, body, 7)
    assert (found.temperature, found.top_p, found.seed) == (0.3, 1.0, 5)
    found = make_sample(served, body | {"temperature": 1.5, "seed": 6}, 7)
    assert (found.temperature, found.seed) == (1.5, 6)
