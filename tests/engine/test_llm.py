"""The facade over real files: a tiny `.taper` and a tiny Hugging Face folder with random weights."""

from __future__ import annotations

import pytest
import tokenizers

import taper
from taper.engine import Request, embedded_model
from taper.errors import DoesNotFitError, ModelNotFoundError, UsageError
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.precision import Fixed
from taper.testing.tiny import tiny_hf_dir, tiny_taper, tiny_tokenizer_json

PROMPT = "the cat and the hat"
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def taper_path(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", chat=True)


@pytest.fixture(scope="module")
def llm(taper_path):
    llm = taper.load(taper_path)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny_hf_dir(tmp_path_factory.mktemp("hf") / "model")


def test_stream_and_generate_agree(llm):
    options = {"max_tokens": 12, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    with llm.stream(PROMPT, policy="phase:6/3", **options) as stream:
        text = "".join(str(piece) for piece in stream)
    completion = llm.generate(PROMPT, policy="phase:6/3", **options)
    assert text == completion.text == stream.completion().text
    assert completion.bits == (6, *[3] * 11)
    assert completion.usage.average_bits == 3


def test_greedy_output_is_the_argmax_of_the_decoder(llm, taper_path):
    """Against the decoder alone, the whole sequence in one pass each time."""
    decoder = Decoder.from_taper(TaperFile.open(taper_path))
    ids = llm.tokenizer.encode(PROMPT)
    completion = llm.generate(PROMPT, policy="fixed:4", max_tokens=6, ignore_eos=True)
    for token_id in completion.token_ids:
        logits = decoder.forward(ids, decoder.new_cache(len(ids)), 4)
        assert token_id == int(logits[0].argmax())
        ids.append(token_id)


def test_result_does_not_depend_on_prefill_chunks(llm):
    request = Request(PROMPT * 3, Fixed(3), max_tokens=8, ignore_eos=True)
    expected = llm.engine.generate(request).token_ids
    engine = type(llm.engine)(llm.engine.model, llm.tokenizer, prefill_chunk_tokens=5)
    assert engine.generate(request).token_ids == expected


def test_bytes_per_token_are_the_decoders(llm):
    completion = llm.generate(PROMPT, policy="fixed:3", max_tokens=2, ignore_eos=True)
    model = llm.engine.model
    entries = len(completion.prompt_ids) + 1
    kv_bytes = model.new_cache(1).bytes_read(entries)
    assert completion.usage.bytes_per_token == model.bytes_per_pass(3) + kv_bytes


def test_fewer_bits_read_fewer_bytes(llm):
    usage = {
        b: llm.generate(PROMPT, policy=f"fixed:{b}", max_tokens=3, ignore_eos=True).usage for b in (2, 8)
    }
    assert usage[2].bytes_per_token < usage[8].bytes_per_token


def test_default_policy_is_progressive(llm):
    completion = llm.generate(PROMPT, max_tokens=9, ignore_eos=True)
    assert completion.policy == "progressive"
    assert completion.bits == (8, 5, 5, 4, 4, 4, 3, 3, 3)


def test_a_policy_may_be_an_object_or_a_name_from_the_file(llm):
    assert llm.policy(Fixed(5)) == Fixed(5)
    named = taper.LLM(llm.engine.model, None, policies={"default": "fixed:6", "short": "phase:8/2"})
    assert (named.policy().name, named.policy("short").name) == ("fixed:6", "phase:8/2")
    assert named.policy("fixed:3").name == "fixed:3"


def test_bits_outside_the_file_are_refused(llm):
    with pytest.raises(UsageError, match="2 to 8 bits"):
        llm.stream(PROMPT, policy="fixed:9")


def test_hugging_face_folder_runs_in_float(hf_dir):
    llm = taper.load(hf_dir)
    completion = llm.generate(PROMPT, max_tokens=4, ignore_eos=True)
    assert completion.bits == (32, 32, 32, 32)
    with pytest.raises(UsageError, match="this model holds 32 bits"):
        llm.generate(PROMPT, policy="fixed:4")


def test_chat_renders_without_doubled_special_tokens(llm):
    assert llm.render_chat(CHAT) == "<|user|>Hi\n<|assistant|>"
    completion = llm.chat(CHAT, max_tokens=3, ignore_eos=True)
    assert llm.tokenizer.decode(completion.prompt_ids) == "<|user|>Hi\n<|assistant|>"
    with llm.stream_chat(CHAT, max_tokens=3, ignore_eos=True) as stream:
        assert "".join(map(str, stream)) == completion.text


def test_chat_takes_special_tokens_from_the_template_alone(llm):
    """The tokenizer adds <|bos|> to a text, and the template writes it: a chat has it once."""
    tokenizer = tokenizers.Tokenizer.from_str(tiny_tokenizer_json())
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<|bos|> $A", None, [("<|bos|>", 0)])
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    chatty = taper.LLM(llm.engine.model, tokenizer.to_str(), template)
    assert chatty.render_chat(CHAT) == "<|bos|>Hi<|eos|>"
    expected = (0, *llm.tokenizer.encode("Hi"), 1)
    assert chatty.chat(CHAT, max_tokens=1).prompt_ids == expected
    with chatty.stream_chat(CHAT, max_tokens=1) as stream:
        assert stream.completion().prompt_ids == expected
    assert chatty.generate("Hi", max_tokens=1).prompt_ids == expected[:-1]
    chatty.close()


def test_without_a_template_chat_is_refused(hf_dir):
    with pytest.raises(UsageError, match="no chat template") as error:
        taper.load(hf_dir).chat(CHAT)
    assert "prompt" in error.value.hint


def test_sampling_may_be_given_whole_and_in_part(llm):
    params = taper.SamplingParams(temperature=0.5, seed=9)
    request = llm.request(PROMPT, sampling=params, top_k=4, max_tokens=7, stop="x")
    assert request.sampling == taper.SamplingParams(temperature=0.5, seed=9, top_k=4)
    assert (request.max_tokens, request.stop) == (7, ("x",))


@pytest.mark.parametrize("name", ["temperatur", "_cancelled", "prompt_ids"])
def test_unknown_option_is_refused_and_the_known_ones_listed(llm, name):
    with pytest.raises(UsageError, match=f"no option '{name}'") as error:
        llm.stream(PROMPT, **{name: 1})
    assert "temperature" in error.value.hint


def test_context_is_the_models(llm):
    with pytest.raises(DoesNotFitError, match="context of 256"):
        llm.stream(PROMPT, max_tokens=256)


def test_widths_and_notice_of_a_cut_file(taper_path, tmp_path):
    data = taper_path.read_bytes()
    cut = tmp_path / "cut.taper"
    cut.write_bytes(data[: len(data) // 2])
    llm = taper.load(cut)
    assert llm.min_bits == 2
    assert llm.max_bits < 8
    assert llm.notice
    assert set(llm.generate(PROMPT, max_tokens=2, ignore_eos=True).bits) <= set(range(2, llm.max_bits + 1))


def test_missing_model(tmp_path):
    with pytest.raises(ModelNotFoundError):
        taper.load(tmp_path / "nothing.taper")


def test_package_without_a_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ModelNotFoundError, match="package holds no model"):
        embedded_model()
