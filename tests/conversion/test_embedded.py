"""The embedded model: real language out of a package index, with the right tokenizer."""

from __future__ import annotations

import math

import pytest
from support.tiny import TEXTS

from ov_afm.conversion import sources
from ov_afm.conversion.sources import Source

pytestmark = pytest.mark.network
PROSE = (
    "The lighthouse keeper had lived alone on the rock for eleven years, and in that time he had learned to read "
    "the weather as other men read the newspaper. When the wind came from the west it brought rain, and when it "
    "came from the north it brought silence. On the morning that the boat arrived, there was no wind at all, and "
    "he knew before he saw the sail that somebody was coming to tell him that the war was over."
)


@pytest.fixture(scope="module")
def source() -> Source:
    return sources.resolve("smollm2-135m-instruct")


def test_provenance_is_the_wheel_of_the_package_index(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (source.kind, source.id, source.license) == ("embedded", "smollm2-135m-instruct", "apache-2.0")
    assert [path.name for path in source.license_files] == ["LICENSE"]
    assert "Apache License" in source.license_files[0].read_text()
    assert source.describe()["weights"] == {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    }
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert sources.resolve("smollm2-135m-instruct") == source


def test_token_ids_are_those_of_an_independent_reader(source: Source) -> None:
    import openvino_genai
    from transformers import AutoTokenizer

    judge = openvino_genai.Tokenizer(str(source.weights[0]))
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    for text in [*TEXTS, PROSE]:
        wanted = judge.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        assert tokenizer(text, add_special_tokens=False).input_ids == wanted
        assert tokenizer.decode(wanted) == text


@pytest.mark.slow
def test_weights_are_those_of_transformers_own_reader(source: Source) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    file = source.weights[0]
    wanted = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    found = load_file(source.path / "model.safetensors")
    assert set(wanted) - set(found) <= {"lm_head.weight"}
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.slow
def test_model_speaks_english_and_knows_paris(source: Source) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    ids = tokenizer(PROSE, return_tensors="pt").input_ids
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss) < 40
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(answer[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert said == "The capital of France is Paris."
