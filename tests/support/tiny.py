"""Small random checkpoints, made on the fly: real architecture and tokenizer, meaningless weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris. "
    "def add(a, b):\n    return a + b\n0123456789 ünïcödé 你好 🙂 <tag> & more, text; for: pairs! "
)
# What tokenizers disagree about: spaces, digits, scripts, control tokens.
TEXTS = [
    "Hello, world! It's 2026-11-22, isn't it?",
    "def f(x):\n    return x ** 2  # 12345\n\n\n\ttabs  and   runs",
    "Žluťoučký kůň 你好，世界 🙂👩‍👩‍👧 ½ Ⅷ ²",
    "<|im_start|>user\nWhat?<|im_end|>\n",
    " leading and trailing ",
    "  7 \t 12  34\t\t5  x ½ -- $5.00, 1234567",
    "\r\n\r\n windows\r\n",
]
ARCEE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2560,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 20.0,
        "original_max_position_embeddings": 128,
    },
}


def write_tokenizer(path: Path, corpus: str = CORPUS) -> None:
    """A byte-level BPE of 512 entries with ChatML control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([corpus] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(path)


def write_arcee(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random bf16 ArceeForCausalLM checkpoint (0.2 M parameters) with tokenizer and licence."""
    import torch
    from transformers import ArceeConfig, ArceeForCausalLM

    torch.manual_seed(seed)
    model = ArceeForCausalLM(ArceeConfig(**{**ARCEE, **changes})).to(torch.bfloat16)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    write_tokenizer(path)
    (path / "LICENSE").write_text("A licence text that must travel with the model.\n")
    return path


def write_caller(path: Path) -> Path:
    """Write an Arcee checkpoint that begins every answer with the token `<tool_call>` and ends it after the next `>`.

    Its layers add nothing, so a token's logits depend on that token alone.
    """
    tokenizer, last = _with_tokens(path, ["<tool_call>"])
    begin = tokenizer.convert_tokens_to_ids("<tool_call>")
    ends = [index for piece, index in tokenizer.get_vocab().items() if piece.endswith(">") and index > 2]
    follows = [(last, begin), *((each, tokenizer.eos_token_id) for each in ends if each != begin)]
    return _without_layers(path, follows)


def write_thinker(path: Path, chat_template: str) -> Path:
    """Write an Arcee checkpoint that answers `<think>W</think>X`, as `write_caller` does."""
    tokenizer, last = _with_tokens(path, ["<think>", "</think>"], chat_template)
    chain = [last, *map(tokenizer.convert_tokens_to_ids, ["<think>", "W", "</think>", "X"]), tokenizer.eos_token_id]
    return _without_layers(path, list(itertools.pairwise(chain)))


def _with_tokens(path: Path, tokens: list[str], chat_template: str = CHAT_TEMPLATE) -> tuple[Any, int]:
    """Write a checkpoint with more tokens; returns its tokenizer and the last token of a prompt."""
    from transformers import AutoTokenizer

    write_arcee(path, vocab_size=512 + len(tokens))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    chat = [{"role": "user", "content": "hi"}]
    return tokenizer, tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[-1]


def _without_layers(path: Path, follows: list[tuple[int, int]]) -> Path:
    """Change a checkpoint so that its layers add nothing, and that tokens follow others: pairs of ids."""
    import torch
    from transformers import ArceeForCausalLM

    model = ArceeForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = torch.nn.functional.normalize(torch.randn(model.model.embed_tokens.weight.shape), dim=1)
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.copy_(0.1 * torch.randn(rows.shape))
        for token in {following for _, following in follows}:
            befores = [before for before, following in follows if following == token]
            model.lm_head.weight[token] = 10 * rows[befores].sum(0)
    model.save_pretrained(path)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file; None deletes one."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
