"""The examples of OpenAI's documentation against `fewbit serve`, by the official package.

    openai_client.py FEWBIT MODEL
"""

import json
import sys

import openai
from pydantic import BaseModel

from common import Server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class Answer(BaseModel):
    """What a structured answer is parsed into."""

    capital: str
    population: int
    is_large: bool


def models(client):
    (model,) = client.models.list().data
    assert model.id and model.owned_by == "fewbit", model
    assert client.models.retrieve(model.id).id == model.id
    return model.id


def chat(client, model):
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.message.content, reply
    assert choice.finish_reason in ("stop", "length")
    assert 0 < reply.usage.completion_tokens <= 24
    again = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    assert again.choices[0].message.content == choice.message.content
    return choice.message.content


def streaming(client, model, whole):
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert content == whole, (content, whole)
    assert len(chunks) > 10, "it came in pieces"
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices
    # The package's own reader of streams puts it together again; it wants texts that are not cut.
    stop = whole[len(whole) // 2]
    with client.chat.completions.stream(model=model, messages=QUESTION, temperature=0, stop=[stop]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole[: whole.index(stop)], final


def options(client, model):
    drawn = [
        client.chat.completions.create(
            model=model, messages=QUESTION, temperature=1.2, max_tokens=16, seed=7, n=3, stop=["\n\n"],
            presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"100": -100}, user="someone",
        )
        for _ in range(2)
    ]
    texts = [[choice.message.content for choice in reply.choices] for reply in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1, texts
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    for token in reply.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3, token
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]}]
    assert client.chat.completions.create(model=model, messages=parts, max_tokens=4).choices


def completions(client, model):
    reply = client.completions.create(model=model, prompt="The capital of France is", temperature=0, max_tokens=4)
    stream = client.completions.create(
        model=model, prompt="The capital of France is", temperature=0, max_tokens=4, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == reply.choices[0].text != ""


def structured(client, model):
    messages = [{"role": "user", "content": "Describe Paris as JSON with capital, population and is_large."}]
    schema = Answer.model_json_schema() | {"additionalProperties": False}
    schema["properties"]["capital"]["maxLength"] = 30
    for temperature in (0, 1):
        reply = client.chat.completions.create(
            model=model, messages=messages, temperature=temperature, max_tokens=200, seed=1,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
        )
        Answer.model_validate_json(reply.choices[0].message.content)
    parsed = client.chat.completions.parse(
        model=model, messages=messages, response_format=Answer, temperature=0, max_tokens=400, stop=None
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer), parsed
    reply = client.chat.completions.create(
        model=model, messages=messages, max_tokens=300, temperature=0, response_format={"type": "json_object"}
    )
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    digits = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=40, extra_body={"regex": "[0-9]{3}-[0-9]{2}"}
    )
    assert len(digits.choices[0].message.content) == 6, digits
    grammar = 'root ::= ("yes" | "no") "."'
    vote = client.chat.completions.create(model=model, messages=QUESTION, extra_body={"grammar": grammar})
    assert vote.choices[0].message.content in ("yes.", "no."), vote


def tools(client, model):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    ask = dict(model=model, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=200)
    reply = client.chat.completions.create(messages=messages, **ask)
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls", choice
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}, arguments
    # The result goes back, and the conversation on.
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'},
    ]
    final = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=30
    )
    assert final.choices[0].message.content and not final.choices[0].message.tool_calls
    with client.chat.completions.stream(messages=messages[:1], **ask) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


def embeddings(client, model):
    texts = ["A cat sat on the mat.", "A kitten lay on the rug.", "Interest rates rose in March."]
    vectors = [item.embedding for item in client.embeddings.create(model=model, input=texts).data]
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    assert all(abs(dot(vector, vector) - 1) < 1e-4 for vector in vectors)
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2])


def errors(client, model):
    for wrong, kind in [
        (dict(messages=QUESTION, temperature=-1), openai.BadRequestError),
        (dict(messages=[{"role": "user", "content": "word " * 20000}]), openai.BadRequestError),
    ]:
        try:
            client.chat.completions.create(model=model, **wrong)
        except kind as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"{wrong} was accepted")
    try:
        client.with_options(api_key="wrong").models.list()
    except openai.AuthenticationError:
        pass
    else:
        raise AssertionError("a wrong key was accepted")


def main(binary, model_file):
    with Server(binary, model_file, "--api-key", "secret") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        model = models(client)
        whole = chat(client, model)
        streaming(client, model, whole)
        passed = 3
        for test in (options, completions, structured, tools, embeddings, errors):
            test(client, model)
            passed += 1
            print(f"{test.__name__}: ok", flush=True)
    print(f"{passed} passed, 0 failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
