"""A vocabulary without some scripts: the same logits for what stays, and every text can still be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

from ov_afm.cli.prune import main
from ov_afm.errors import CompressionError, ConfigError
from ov_afm.pruning.prune import prune
from ov_afm.pruning.vocabulary import choose, plan_cut, renumber_config, renumber_tokenizer, select_rows

MIXED = (
    "The quick brown fox jumps over the lazy dog. 0123456789 ünïcödé naïve café 🙂 "
    "Съешь же ещё этих мягких французских булок, да выпей чаю. "
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. 我能吞下玻璃而不伤身体。 いろはにほへと ちりぬるを "
)
KEPT = "The lazy fox, naïve 🙂, jumps 42 times:\n\tcafé & μικρό ψάρι\n"
DROPPED = "Съешь ещё 玻璃 и いろは; mixed: fox чай 体\n"
# Rows that no token has, as checkpoints have them to make a round number.
ROWS = 576


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens are of five scripts. Read-only."""
    path = tmp_path_factory.mktemp("checkpoints") / "mixed"
    tiny.write_arcee(path, vocab_size=ROWS)
    tiny.write_tokenizer(path, MIXED)
    tiny.edit_json(path / "generation_config.json", eos_token_id=[2, 0])
    return path


@pytest.fixture(scope="module")
def cut(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with Latin and Greek alone. Read-only."""
    return prune(mixed, tmp_path_factory.mktemp("pruned") / "cut", keep_scripts=["latin", "Greek"])


def loaded(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def old_rows(mixed: Path) -> torch.Tensor:
    config = json.loads((mixed / "config.json").read_text())
    return torch.tensor(plan_cut(mixed, config, ["latin", "greek"]).rows)


# -- The result


def test_tokens_that_stay_have_the_logits_that_they_had(mixed: Path, cut: Any) -> None:
    (before, old), (after, new) = loaded(mixed), loaded(cut.path)
    rows = old_rows(mixed)
    ids = torch.tensor([new(KEPT)["input_ids"]])
    assert rows[ids].tolist() == [old(KEPT)["input_ids"]]
    with torch.no_grad():
        expected = before(rows[ids]).logits[..., rows]
        found = after(ids).logits
    assert found.shape[-1] == len(rows) == after.config.vocab_size < 512
    assert torch.allclose(found, expected, atol=1e-5)


def test_rows_of_one_matrix_for_both_ends_stay_one_matrix(tmp_path: Path) -> None:
    from transformers import ArceeConfig, ArceeForCausalLM

    rows = [0, 2, *range(100, 300)]
    model = ArceeForCausalLM(ArceeConfig(**{**tiny.ARCEE, "tie_word_embeddings": True})).eval()
    with torch.no_grad():
        expected = model(torch.tensor([rows])).logits[..., rows]
    select_rows(model, rows)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "tied")
    again = ArceeForCausalLM.from_pretrained(tmp_path / "tied").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        found = again(torch.arange(len(rows))[None]).logits
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("text", [KEPT, DROPPED, MIXED], ids=["kept", "dropped", "both"])
def test_every_text_comes_back_from_its_tokens(cut: Any, text: str) -> None:
    _, new = loaded(cut.path)
    assert new.decode(new(text)["input_ids"]) == text


def test_dropped_letters_are_no_tokens_and_merge_no_more(mixed: Path, cut: Any) -> None:
    _, new = loaded(cut.path)
    for token in new.get_vocab().values():
        assert not set(new.decode([token])) & set("еёчай玻璃体いろは")
    fields = json.loads((cut.path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = fields["model"]["vocab"]
    assert all("".join(merge) in vocabulary for merge in fields["model"]["merges"])
    assert sorted(new.get_vocab().values()) == list(range(len(vocabulary)))
    assert set(cut.report["vocabulary"]["tokens_dropped"]) == {"CYRILLIC", "CJK", "HIRAGANA"}
    before = json.loads((mixed / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sum(cut.report["vocabulary"]["tokens_dropped"].values()) == len(before) - len(vocabulary)


def test_special_tokens_and_chat_template_stay(mixed: Path, cut: Any) -> None:
    (model, new), (_, old) = loaded(cut.path), loaded(mixed)
    messages = [{"role": "user", "content": "Hello"}]
    assert new.apply_chat_template(messages, tokenize=False) == old.apply_chat_template(messages, tokenize=False)
    assert new.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [0, 2]
    assert new("<|im_start|>a<|im_end|>")["input_ids"][::2] == [1, 2]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 2)
    assert model.generation_config.eos_token_id == [2, 0]


def test_rows_without_a_token_go_too(mixed: Path, cut: Any) -> None:
    found = cut.report["vocabulary"]
    _, old = loaded(mixed)
    assert found["unused_rows_dropped"] == ROWS - len(old) > 0
    assert found["rows"]["before"] == ROWS
    assert cut.plan.geometry.vocab == found["rows"]["after"]
    assert cut.plan.reason == f"{cut.plan.geometry.vocab} of {ROWS} rows of the vocabulary"


def test_report_says_what_the_dropped_tokens_had(mixed: Path, cut: Any) -> None:
    from ov_afm.evaluation import text as eval_text

    found = cut.report["vocabulary"]
    assert found["same_tokens"]
    before, old = loaded(mixed)
    ids = old(eval_text.load_text().content)["input_ids"][: eval_text.BLOCK_TOKENS]
    rows = old_rows(mixed)
    with torch.no_grad():
        kept = before(torch.tensor([ids])).logits.softmax(-1)[..., rows].sum(-1)
    # The first of four blocks, of a random model: about as the others.
    assert found["dropped_probability"]["mean"] == pytest.approx(float(1 - kept.mean()), rel=0.1)
    assert 0 < found["dropped_probability"]["mean"] < found["dropped_probability"]["max"] < 1
    assert found["perplexity"] < found["reference_perplexity"]
    assert "pruned" not in cut.report


@pytest.mark.slow
def test_text_with_dropped_letters_is_not_compared(mixed: Path, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(MIXED * 5, encoding="utf-8")
    out = tmp_path / "cut"
    assert main([str(mixed), "--keep-scripts", "latin", "-o", str(out), "--text", str(text)]) == 0
    assert "text.txt has dropped letters: " in capsys.readouterr().err
    found = json.loads((out / "ov_afm_prune.json").read_text())["vocabulary"]
    assert found["perplexity"] is None
    assert found["bytes_per_token"]["after"] < found["bytes_per_token"]["before"]


@pytest.mark.slow
def test_result_exports_and_answers(cut: Any, tmp_path: Path) -> None:
    from ov_afm import Pipeline, export
    from ov_afm.model_dir import manifest
    from ov_afm.runtime.sampling import Params

    made = export(str(cut.path), tmp_path / "int8", recipe="int8").path
    found = manifest.read(made)
    assert found is not None
    assert found.geometry is not None
    assert found.geometry.vocab == cut.plan.geometry.vocab
    with Pipeline(made) as pipeline:
        assert pipeline.generate("Съешь ещё 玻璃", Params(max_new_tokens=8, ignore_eos=True)).text


@pytest.mark.slow
def test_all_three_kinds_of_pruning_together_and_healed(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    found = prune(mixed, out, target_params="80K", keep_scripts=["latin"], kv_heads=1, num_samples=8, heal_minutes=0.02)
    model, tokenizer = loaded(out)
    assert found.report["healing"]["steps"] >= 1
    assert found.report["healed"]["kl_mean"]["value"] > 0
    assert found.plan.reason.startswith(
        f"{found.plan.geometry.vocab} of {ROWS} rows of the vocabulary; 1 of 2 KV heads and "
    )
    assert model.config.num_key_value_heads == 1
    assert model.config.vocab_size == len(tokenizer) == found.plan.geometry.vocab
    assert sum(each.numel() for each in model.parameters() if each.dim() > 1) == found.plan.parameters <= 80_000
    assert tokenizer.decode(tokenizer(DROPPED)["input_ids"]) == DROPPED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert not (out / "whole").exists()


# -- What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to prune; give --target-params, --keep-scripts or --kv-heads"),
        (
            ["--keep-scripts", "latin", "klingon"],
            "no token has a letter of KLINGON; the vocabulary has LATIN, CYRILLIC, GREEK, CJK, HIRAGANA",
        ),
        (["--kv-heads", "3"], "KV heads to keep must be 1 to 2, found 3"),
        (["--kv-heads", "0"], "KV heads to keep must be 1 to 2, found 0"),
        (
            ["--kv-heads", "2"],
            "nothing would go: all rows of the vocabulary and all KV heads stay; ask for fewer, or --target-params",
        ),
        (
            ["--keep-scripts", "latin", "--heal", "1"],
            "rows of the vocabulary alone leave nothing to heal; leave --heal out, or prune more",
        ),
    ],
    ids=["nothing asked", "unknown script", "too many heads", "no heads", "all heads", "healing"],
)
def test_refusal_is_one_line(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main([str(mixed), "-o", str(tmp_path / "out"), *words]) == 1
    assert capsys.readouterr().err == f"ov-afm: error: {message}\n"
    assert not list(tmp_path.iterdir())


def test_other_tokenizers_are_refused(mixed: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(mixed, other)
    fields = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    fields["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    (other / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(CompressionError) as caught:
        prune(other, tmp_path / "out", keep_scripts=["latin"])
    assert str(caught.value) == (
        "--keep-scripts takes byte-level BPE tokenizers (tokenizer.json), which that of other is not"
    )


# -- Ids


def test_ids_of_every_file_are_made_new() -> None:
    new = {0: 0, 5: 1, 7: 2}
    fields = {
        "model": {"vocab": {"a": 0, "ab": 3, "b": 5}, "merges": ["a b", ["a", "a"]]},
        "added_tokens": [{"id": 7, "content": "<s>"}],
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}},
                {"type": "RobertaProcessing", "sep": ["<s>", 7], "cls": ["<s>", 7]},
            ],
        },
        "padding": {"pad_id": 7, "pad_token": "<s>"},
    }
    found = renumber_tokenizer(fields, new)
    assert found["model"] == {"vocab": {"a": 0, "b": 1}, "merges": []}
    assert found["added_tokens"][0]["id"] == found["padding"]["pad_id"] == 2
    template, roberta = found["post_processor"]["processors"]
    assert template["special_tokens"]["<s>"]["ids"] == [2]
    assert roberta["sep"] == roberta["cls"] == ["<s>", 2]
    config = {"vocab_size": 9, "bos_token_id": None, "eos_token_id": [5, 7], "pad_token_id": -1, "hidden_size": 5}
    lists = {"suppress_tokens": [3, 5], "bad_words_ids": [[0, 7], [3]]}
    assert renumber_config({**config, **lists}, new) == {
        "vocab_size": 3,
        "bos_token_id": None,
        "eos_token_id": [1, 2],
        "pad_token_id": -1,
        "hidden_size": 5,
        "suppress_tokens": [1],
        "bad_words_ids": [[0, 2]],
    }


def spelt(text: str) -> str:
    """A text as a byte-level vocabulary has it."""
    from tokenizers import pre_tokenizers

    return "".join(part for part, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))


def test_choice_is_by_whole_letters() -> None:
    whole, letters = "я", list(spelt("яa"))
    tokens = [*letters, spelt(whole), spelt(" a"), spelt("a" + whole), spelt(whole) + letters[0], spelt("123 €"), " "]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens)) if token != " "}
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 20, "content": whole * 2}]}
    cut = choose(tokenizer, 24, ["LATIN"], named=[22])
    kept = {token for token, index in vocabulary.items() if index in cut.rows}
    # Half a letter stays, a letter with half of the next does not.
    assert vocabulary.keys() - kept == {spelt(whole), spelt("a" + whole), spelt(whole) + letters[0]}
    assert cut.dropped == {"CYRILLIC": 3}
    assert cut.rows[-2:] == (20, 22)
    assert cut.unused == 24 - len(vocabulary) - 2


def test_bytes_that_are_no_tokens_are_missed() -> None:
    tokenizer = {"model": {"vocab": {"a": 0, spelt("я"): 1}}, "added_tokens": []}
    with pytest.raises(CompressionError, match="^a byte of the tokens to drop is no token of its own"):
        choose(tokenizer, 2, ["LATIN"])
    with pytest.raises(ConfigError, match="^no token has a letter of HAN; the vocabulary has LATIN, CYRILLIC$"):
        choose(tokenizer, 2, ["Han"])
