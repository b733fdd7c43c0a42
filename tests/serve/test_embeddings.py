"""Embeddings and reranking over HTTP, from models of their own beside one that writes text."""

from __future__ import annotations

import base64
import concurrent.futures
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import openai
import psutil
import pytest
from support import encoders, serving
from support.exact import EXACT_OPTIONS

from ov_afm import export
from ov_afm.model_dir.text_encoder import EMBEDDING, RERANKING

pytestmark = pytest.mark.slow
LONG = "the cat sat on the mat " * 30


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    sources, models = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("models")
    reader = encoders.write_encoder(sources / "reader", matryoshka_dimensions=[16, 32])
    prompts = {"prompts": {"query": "hello ", "title": "paris "}, "default_prompt_name": None}
    encoders.write_sentence_files(reader, config_sentence_transformers=prompts)
    judge = encoders.write_encoder(sources / "judge", "BertForSequenceClassification", num_labels=1)
    served = ["--model", f"tiny={tiny_model}"]
    for name, folder, task in (("reader", reader, EMBEDDING), ("judge", judge, RERANKING)):
        # Proofs have their own tests.
        made = export(folder, models / name, recipe="fp32", task=task, verify=False).path
        served += ["--model", f"{name}={made}"]
    with serving.server(*served, "--cache-size-gb", "0.05", *EXACT_OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: serving.Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def vectors(server: serving.Server, texts: Any, **fields: Any) -> Any:
    response = server.post("/v1/embeddings", model="reader", input=texts, **fields)
    assert response.status_code == 200, response.text
    return np.array([each["embedding"] for each in response.json()["data"]])


def refusal(server: serving.Server, route: str = "/v1/embeddings", **body: Any) -> str:
    response = server.post(route, **body)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert "\n" not in message
    return str(message)


def test_official_client_gets_the_same_as_numbers_and_as_base64(client: openai.OpenAI) -> None:
    texts = ["hello world", "the cat", ""]
    one, other = (
        client.embeddings.create(model="reader", input=texts, encoding_format=each) for each in ("float", "base64")
    )
    assert [each.index for each in one.data] == [0, 1, 2]
    packed = np.frombuffer(base64.b64decode(str(other.data[1].embedding)), "<f4")
    assert np.array_equal(packed, np.array(one.data[1].embedding, np.float32))
    assert np.linalg.norm(packed) == pytest.approx(1)
    assert one.usage.prompt_tokens == one.usage.total_tokens == 4 + 4 + 2


def test_a_text_has_the_same_embedding_alone_and_among_others(server: serving.Server) -> None:
    alone = vectors(server, "hello world")[0]
    many = vectors(server, [*(f"{'cat ' * (index % 20)}mat" for index in range(150)), "hello world"])[-1]
    assert np.abs(alone - many).max() < 1e-5
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda index: vectors(server, ["hello world", "a " * index])[0], range(1, 40)))
    assert max(np.abs(alone - each).max() for each in together) < 1e-5


def test_tokens_are_their_text(server: serving.Server) -> None:
    text = "The Cat, unhappily: paris"
    tokens = server.post("/tokenize", model="reader", prompt=text).json()["tokens"]
    expected = vectors(server, text)[0]
    # With and without the tokens around a text, alone and in a list.
    for given in (tokens, tokens[1:-1], [tokens, tokens[1:-1]]):
        for row in vectors(server, given):
            assert np.array_equal(row, expected)
    assert "send the text itself" in refusal(server, model="reader", input=[60, 3, 70, 2])
    assert "send the text itself" in refusal(server, model="reader", input=[[100_000]])


def test_dimensions_are_those_that_the_model_was_trained_for(server: serving.Server) -> None:
    whole, short = vectors(server, "hello")[0], vectors(server, "hello", dimensions=16)[0]
    assert np.allclose(short, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-6)
    assert np.array_equal(vectors(server, "hello", dimensions=64)[0], whole)
    assert "16, 32, found 20" in refusal(server, model="reader", input="hello", dimensions=20)


def test_prompts_of_the_model_go_in_front(server: serving.Server) -> None:
    plain, asked = vectors(server, "world"), vectors(server, "world", input_type="search_query")
    assert not np.allclose(plain, asked)
    assert np.allclose(asked, vectors(server, "hello world"), atol=1e-6)
    assert np.allclose(vectors(server, "world", prompt_name="title"), vectors(server, "paris world"), atol=1e-6)
    assert np.array_equal(vectors(server, "world", input_type="passage"), plain)
    assert "query, title" in refusal(server, model="reader", input="x", prompt_name="nothing")


def test_long_texts_are_refused_unless_they_may_be_cut(server: serving.Server) -> None:
    message = refusal(server, model="reader", input=["short", LONG])
    assert message.startswith("text 1 has 182 tokens and this model reads 64")
    cut = vectors(server, LONG, truncate_prompt_tokens=-1)
    assert np.array_equal(cut, vectors(server, LONG, truncate="END"))
    assert np.allclose(cut, vectors(server, LONG[: len(LONG) // 2], truncate=True), atol=1e-6)
    assert "START" in refusal(server, model="reader", input="x", truncate="START")
    assert "reads 64" in refusal(server, "/v1/rerank", model="judge", query="cat", documents=[LONG])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": []}, "1 to 2048 texts, found 0"),
        ({"input": ["x"] * 2049}, "found 2049"),
        ({"input": ["x", [1]]}, "not both"),
        ({"input": {"text": "x"}}, "texts are needed"),
        ({"input": "x", "normalize": False}, "normalize"),
        ({"input": "x", "late_chunking": True}, "late_chunking"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ],
    ids=["none", "many", "mixed", "object", "normalize", "unknown", "format"],
)
def test_wrong_input_is_named(server: serving.Server, fields: dict[str, Any], named: str) -> None:
    assert named in refusal(server, model="reader", **fields)


@pytest.mark.parametrize(
    ("route", "body", "able"),
    [
        ("/v1/embeddings", {"model": "tiny", "input": "x"}, "reader"),
        ("/v1/embeddings", {"model": "judge", "input": "x"}, "reader"),
        ("/v1/rerank", {"model": "reader", "query": "x", "documents": ["y"]}, "judge"),
        ("/v1/chat/completions", {"model": "reader", "messages": [{"role": "user", "content": "x"}]}, "tiny"),
        ("/v1/completions", {"model": "judge", "prompt": "x"}, "tiny"),
        ("/tokenize", {"model": "reader", "messages": [{"role": "user", "content": "x"}]}, "tiny"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_models_task_is_refused_with_the_models_that_can(
    server: serving.Server, route: str, body: dict[str, Any], able: str
) -> None:
    assert refusal(server, route, **body).endswith(f"there are: {able}")


@pytest.mark.parametrize("route", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_come_in_the_order_of_their_scores(server: serving.Server, route: str) -> None:
    documents = ["rain", "paris is the capital", {"text": "the cat"}, "hello hello", "rain"]
    fields = {"model": "judge", "query": "the capital of france", "documents": documents}
    response = server.post(route, **fields)
    assert response.status_code == 200, response.text
    every = response.json()
    scores = {each["index"]: each["relevance_score"] for each in every["results"]}
    assert sorted(scores) == [0, 1, 2, 3, 4]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert scores[0] == pytest.approx(scores[4], abs=1e-6)
    assert "document" not in every["results"][0]
    assert every["usage"]["total_tokens"] > 5
    best = server.post(route, **fields, top_n=2, return_documents=True).json()["results"]
    assert [each["index"] for each in best] == list(scores)[:2]
    first = documents[best[0]["index"]]
    assert best[0]["document"] == {"text": first["text"] if isinstance(first, dict) else first}


def test_models_tell_what_they_can_before_they_are_loaded(tiny_model: Path, server: serving.Server) -> None:
    listed = {each["id"]: each for each in server.http.get("/v1/models").json()["data"]}
    assert set(listed) == {"tiny", "reader", "judge"}
    for name, model in listed.items():
        assert server.http.get(f"/v1/models/{name}").json() == model
        assert model["max_model_len"] == model["context_length"]
    tiny, reader, judge = listed["tiny"], listed["reader"], listed["judge"]
    assert (tiny["max_model_len"], tiny["recipe"], tiny["device"]) == (2560, "int8", "CPU")
    assert tiny["meta"]["n_ctx_train"] == 2560
    assert tiny["meta"]["size"] == (tiny_model / "openvino_model.bin").stat().st_size
    assert tiny["capabilities"]["tools"] and tiny["capabilities"]["json_schema"] and tiny["capabilities"]["logprobs"]
    assert not tiny["capabilities"]["embeddings"]
    assert {"tools", "response_format", "temperature"} <= set(tiny["supported_parameters"])
    assert [name for name, on in reader["capabilities"].items() if on] == ["embeddings"]
    assert [name for name, on in judge["capabilities"].items() if on] == ["rerank"]
    assert (reader["meta"]["n_embd"], reader["max_model_len"], reader["recipe"]) == (64, 64, "fp32")


def test_a_killed_engine_is_back(server: serving.Server) -> None:
    expected = vectors(server, "hello world")
    parent = psutil.Process(server.process.pid)
    before = {child.pid for child in parent.children()}
    for child in parent.children():
        child.send_signal(signal.SIGKILL)
    server.wait(lambda: before.isdisjoint(child.pid for child in parent.children()), why="not restarted")
    server.wait(lambda: server.post("/v1/embeddings", model="reader", input="x").status_code == 200, 60, "not back")
    assert np.array_equal(vectors(server, "hello world"), expected)


def test_ollama_s_client_gets_the_same_embeddings(server: serving.Server) -> None:
    client, texts = ollama.Client(host=server.url), ["hello world", "the cat"]
    expected = vectors(server, texts)
    answer = client.embed(model="reader:latest", input=texts)
    assert np.abs(np.array(answer.embeddings) - expected).max() < 1e-5
    assert answer.prompt_eval_count == 4 + 4
    assert len(client.embed(model="reader", input="the cat", dimensions=16).embeddings[0]) == 16
    one = np.array(client.embeddings(model="reader", prompt="the cat").embedding)
    assert np.abs(one / np.linalg.norm(one) - expected[1]).max() < 1e-5
    assert client.show("reader").capabilities == ["embedding"]
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        client.embed(model="reader", input="the cat", dimensions=17)
    with pytest.raises(ollama.ResponseError, match="cannot do"):
        client.embed(model="tiny", input="the cat")
