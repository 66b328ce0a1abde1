"""Every field that a request may carry is honoured; the routes beside."""

from __future__ import annotations

import json
import math

import pytest
from calls import HELLO, LOOK, ROUTES, chat, events, good, metrics, post, refused, text

from taper.server.fields import ChatRequest


def test_a_chat_is_the_models_own_answer(server):
    reply = good(chat(server, seed=1))
    llm = server[1].engine
    [choice] = reply["choices"]
    request = server[1].requests[-1]
    assert llm.tokenizer.decode(request.prompt) == "<|user|>hello\n<|assistant|>"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == llm.generate(request).text
    assert reply["usage"] == {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": 6,
        "total_tokens": len(request.prompt) + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert reply["taper"]["bits"] == pytest.approx(sum(llm.generate(request).bits) / 6)
    assert reply["taper"]["deadline_met"] is None
    assert reply["taper"]["queue_ms"] >= 0
    assert choice["taper"]["token_bits"] == list(llm.generate(request).bits)
    assert choice["finish_reason"] == "length"


def test_sampling_fields_reach_the_engine(server):
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"17": -100, "18": 3},
        "seed": 11,
    }
    for send in (chat, text):
        good(send(server, **given, stop=["zzz", "yyy"], ignore_eos=True))
        request = server[1].requests[-1]
        for name, value in given.items():
            expected = {17: -100, 18: 3} if name == "logit_bias" else value
            assert getattr(request.sampling, name) == expected
        assert request.stop == ("zzz", "yyy")
        assert request.ignore_eos
        assert request.max_tokens == 6


def test_openais_default_temperature_is_one(server):
    good(chat(server, temperature=...))
    assert server[1].requests[-1].sampling.temperature == 1


def test_choices_differ_and_a_seed_repeats_them(server):
    first = good(chat(server, n=3, temperature=1, seed=5))
    again = good(chat(server, n=3, temperature=1, seed=5))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert first["usage"]["completion_tokens"] == 18
    # The prompt is read once as far as the client is concerned.
    assert first["usage"]["prompt_tokens"] == good(chat(server))["usage"]["prompt_tokens"]


def test_stop_ends_the_text(server):
    whole = good(text(server, max_tokens=20))["choices"][0]["text"]
    stop = whole[3:5]
    cut = good(text(server, max_tokens=20, stop=stop))["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_log_probabilities_of_a_chat(server):
    reply = good(chat(server, logprobs=True, top_logprobs=3))
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0  # greedy
        assert entry["token"] == entry["top_logprobs"][0]["token"]
    spelled = bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="replace")
    assert spelled == reply["choices"][0]["message"]["content"]


def test_echo_scores_the_prompt_as_lm_eval_reads_it(server):
    """Each token's log-probability is that of the model after the tokens before it."""
    ids = server[1].engine.tokenizer.encode("the cat in the hat")
    reply = good(text(server, prompt=[ids], echo=True, logprobs=1, max_tokens=1))
    lists = reply["choices"][0]["logprobs"]
    assert all(len(part) == len(ids) + 1 for part in lists.values())
    assert lists["token_logprobs"][0] is None
    for cut in (1, 4, len(ids)):
        next_token = good(text(server, prompt=[ids[:cut]], max_tokens=1, logprobs=20, bits=8))["choices"][0][
            "logprobs"
        ]
        top = next_token["top_logprobs"][0]
        assert max(top.values()) == max(lists["top_logprobs"][cut].values())
        if lists["tokens"][cut] in top:
            assert lists["token_logprobs"][cut] == top[lists["tokens"][cut]]
    whole = reply["choices"][0]["text"]
    assert whole.startswith("the cat in the hat")
    assert [whole[at] for at in lists["text_offset"][:-1]] == [token[0] for token in lists["tokens"][:-1]]


def test_echo_without_new_tokens(server):
    reply = good(text(server, prompt="the cat", echo=True, logprobs=0, max_tokens=0))
    assert reply["choices"][0]["text"] == "the cat"
    count = len(server[1].engine.tokenizer.encode("the cat"))
    assert reply["usage"] == {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}


def test_a_list_of_prompts(server):
    reply = good(text(server, prompt=["the cat", "in", [5, 6]], n=2, seed=1, temperature=1))
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    alone = good(text(server, prompt=[5, 6], n=2, seed=1, temperature=1))
    assert [c["text"] for c in alone["choices"]] == [c["text"] for c in reply["choices"][4:]]


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_what_the_whole_reply_says(server, n):
    whole = good(chat(server, n=n, seed=2, temperature=1, logprobs=True))
    chunks = events(
        chat(
            server,
            n=n,
            seed=2,
            temperature=1,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine][-1] == choice["finish_reason"]
        assert mine[0]["delta"]["role"] == "assistant"
        logprobs = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
    firsts = [c["taper"]["bits"] for c in chunks[:-1] if c["choices"][0]["index"] == 0]
    assert firsts[:-1] == whole["choices"][0]["taper"]["token_bits"]


def test_a_text_stream(server):
    whole = good(text(server, echo=True, logprobs=...))
    chunks = events(text(server, echo=True, stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["taper"]["token_bits"] == whole["choices"][0]["taper"]["token_bits"]
    assert chunks[-1]["taper"]["bits"] == whole["taper"]["bits"]


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        (4, 4, 4),
        ({"min": 3, "max": 5}, 3, 5),
        ({"min": 3}, 3, math.inf),
        ("auto", 0, math.inf),
        (None, 0, math.inf),
    ],
)
def test_bits(server, given, low, high):
    for path in ROUTES:
        reply = good(post(server, path, bits=given))
        terms = server[1].terms[-1]
        assert (terms.min_bits, terms.max_bits) == (low, high)
        assert reply["taper"]["bits"] is not None


def test_max_loss_goes_through_the_card(server):
    """Loss of b bits in the fixture's card: 0.5 / b^2."""
    good(chat(server, max_loss=0.03125))
    assert server[1].terms[-1].min_bits == 4
    good(chat(server, max_loss=0.03))
    assert server[1].terms[-1].min_bits == 5
    refused(chat(server, max_loss=0.001), "max_loss")
    refused(chat(server, max_loss=0.03, bits={"max": 4}), "max_loss")


def test_deadline_priority_and_on_miss(server):
    reply = good(chat(server, deadline_ms=60_000, priority=3, on_miss="truncate"))
    terms = server[1].terms[-1]
    assert 59 < terms.deadline_s <= 60
    assert (terms.priority, terms.on_miss) == (3, "truncate")
    assert reply["taper"]["deadline_met"] is True


def test_audit(server):
    reply = good(chat(server, audit=True, bits=3))
    audit = reply["choices"][0]["taper"]["audit"]
    assert audit["bits"] == 8
    assert len(audit["kl"]) == 6
    assert audit["mean_kl"] > 0


def test_json_schema_holds_a_random_model(server):
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer"}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        reply = good(chat(server, response_format=form, max_tokens=200, temperature=0.5, seed=seed))
        if reply["choices"][0]["finish_reason"] == "stop":
            made = json.loads(reply["choices"][0]["message"]["content"])
            assert made["size"] in ("small", "large")
            assert isinstance(made["count"], int)
        else:
            assert reply["choices"][0]["message"]["content"].startswith('{"size": "')
    assert (
        good(chat(server, response_format={"type": "json_object"}))["choices"][0]["message"]["content"][0]
        == "{"
    )


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_required_call_comes_from_a_random_model(server, choice):
    reply = good(chat(server, tools=[LOOK], tool_choice=choice, max_tokens=100))
    [made] = reply["choices"]
    assert made["finish_reason"] == "tool_calls"
    [call] = made["message"]["tool_calls"]
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"])["where"] in ("here", "there")
    assert made["message"]["content"] is None
    chunks = events(chat(server, tools=[LOOK], tool_choice=choice, max_tokens=100, stream=True))
    streamed = [c["choices"][0]["delta"].get("tool_calls") for c in chunks]
    [[streamed_call]] = [calls for calls in streamed if calls]
    assert streamed_call["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_are_in_the_prompt_of_a_template_that_knows_none(server):
    conversation = [
        {"role": "system", "content": "Be short."},
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"where":"here"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a hat"},
    ]
    good(chat(server, messages=conversation, tools=[LOOK]))
    prompt = server[1].engine.tokenizer.decode(server[1].requests[-1].prompt)
    assert prompt.startswith("<|system|>Be short.\n\nYou may call these functions:")
    assert '"name": "look"' in prompt
    assert '{"name":"look","arguments":{"where":"here"}}' in prompt
    assert "Result of c1: a hat" in prompt
    good(chat(server, tools=[LOOK], tool_choice="none"))
    assert "look" not in server[1].engine.tokenizer.decode(server[1].requests[-1].prompt)


def test_a_response(server):
    reply = good(post(server, "/v1/responses", instructions="Be short."))
    plain = good(chat(server, messages=[{"role": "developer", "content": "Be short."}, *HELLO]))
    [item] = reply["output"]
    assert item["content"][0]["text"] == plain["choices"][0]["message"]["content"]
    assert reply["status"] == "incomplete"
    assert reply["usage"]["output_tokens"] == 6
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "a hat"},
    ]
    good(post(server, "/v1/responses", input=items))
    prompt = server[1].engine.tokenizer.decode(server[1].requests[-1].prompt)
    assert prompt.endswith("Result of a: a hat\n<|assistant|>")
    tool = {"type": "function", **LOOK["function"]}
    forced = good(post(server, "/v1/responses", tools=[tool], tool_choice="required", max_output_tokens=100))
    assert forced["output"][0]["type"] == "function_call"


def test_models_health_ready_metrics_monitor(server):
    client = server[0]
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["taper"]["max_bits"] == 8
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/no").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 200
    good(chat(server))
    found = metrics(server)
    for name in ("vllm:num_requests_running", "vllm:generation_tokens_total", "taper:precision_bits_bucket"):
        assert f"{name}{{" in found
    assert client.get("/monitor").json()["models"]["tiny"]["kv_blocks"] == 1


def test_the_description_is_of_the_structs(server):
    described = server[0].get("/openapi.json").json()
    fields = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert set(ChatRequest.__struct_fields__) <= set(fields)
    assert fields["store"] == {"enum": [None, False]}
    assert described["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    for path in ROUTES:
        assert "post" in described["paths"][path]


def test_errors_of_unknown_routes_have_openais_shape(server):
    for response in (server[0].get("/nothing"), server[0].get("/v1/completions")):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["type"] == "invalid_request_error"
