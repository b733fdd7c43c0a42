r"""What kind of value each field of a manifest has, as far as anything reads it.

A manifest is JSON that people can edit and disks can damage. It is checked once, when it is read, so that nothing that
uses it meets text where a number is needed. Fields that are missing or unknown are left to the readers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["check"]

NULL = type(None)
NUMBER = (int, float)
SHA256 = re.compile("[0-9a-f]{64}")
# Path → types, or the form of a text; `*` is any key, `[]` each element. docs/model-directory.md describes all fields.
KINDS: dict[str, Any] = {
    "source.kind": (str,),
    "source.id": (str,),
    "source.revision": (str, NULL),
    "source.license": (str, NULL),
    "source.synthetic": (bool,),
    "source.weights": (dict,),
    "source.weights.*": (str,),
    "source.files": (dict,),
    "source.files.*": (str,),
    "source.adapters": (list,),
    "source.adapters[]": (dict,),
    "recipe.name": (str,),
    "recipe.weight_format": (str,),
    "recipe.layers": (dict,),
    "recipe.layers.*": (int,),
    "recipe.notes": (list,),
    "recipe.notes[]": (str,),
    "recipe.calibration": (dict, NULL),
    "recipe.calibration.name": (str,),
    "recipe.calibration.samples": (int,),
    "recipe.calibration.tokens": (int,),
    "versions.*": (str, NULL),
    "files.*": (dict,),
    "files.*.bytes": (int,),
    "files.*.sha256": SHA256,
    "checks.*": (dict,),
    "checks.skipped": (str,),
    "checks.*.skipped": (str,),
    "checks.*.tokens": (int,),
    "checks.*.texts": (int,),
    "checks.*.conversations": (int,),
    "checks.*.matrices": (int,),
    "checks.*.on_sampled_rows": (int,),
    "checks.*.max_logit": NUMBER,
    "checks.*.max_logit_diff": NUMBER,
    "checks.*.top1_agreement": NUMBER,
    "checks.*.kl_mean": NUMBER,
    "checks.*.cosine_min": NUMBER,
    "checks.*.max_diff": NUMBER,
    "checks.*.inputs_sha256": SHA256,
    "checks.*.outputs_sha256": SHA256,
    "checks.golden.prompts": (list,),
    "checks.golden.prompts[]": (dict,),
    "checks.golden.prompts[].name": (str,),
    "checks.golden.prompts[].text": (str,),
    "checks.golden.prompts[].answer": (str,),
    "checks.golden.prompts[].prompt_tokens": (int,),
    "checks.golden.prompts[].tokens": (list,),
    "checks.golden.prompts[].tokens[]": (int,),
    "checks.golden.prompts[].steps": (list,),
    "checks.golden.prompts[].steps[]": re.compile(r"(\d+:-?[\d.]+(e[-+]?\d+)?( |$))*"),
    "generation.added": (dict,),
    "generation.notes": (list,),
    "generation.notes[]": (str,),
    "generation.stop_tokens": (list,),
    "generation.stop_tokens[]": (dict,),
    "generation.stop_tokens[].id": (int,),
    "generation.stop_tokens[].text": (str,),
    "generation.stop_tokens[].named_by": (list,),
    "generation.stop_tokens[].named_by[]": (str,),
    "sparsity.profile": (dict,),
    "sparsity.profile.mean": NUMBER,
    "sparsity.kernels": (dict,),
    "sparsity.kernels.folder": (str,),
    "sparsity.kernels.replaced": (list,),
    "sparsity.kernels.replaced[]": (str,),
    "sparsity.kernels.threshold": NUMBER,
    "sparsity.kernels.active": NUMBER,
}
# What an object has, if it is there at all and was not skipped.
_COMPARED = ("tokens", "max_logit", "max_logit_diff", "top1_agreement")
COMPLETE = {
    "checks.tokenizer": ("tokens", "texts"),
    "checks.weights": ("matrices", "on_sampled_rows"),
    "checks.export_parity": _COMPARED,
    "checks.adapters": _COMPARED,
    "checks.compression": ("tokens", "kl_mean", "top1_agreement"),
    "checks.encoder": ("texts", "max_diff"),
    "checks.encoder_compression": ("texts", "max_diff"),
    "files.*": ("bytes", "sha256"),
    "checks.golden": ("prompts",),
    "checks.golden.prompts[]": ("name", "text", "answer", "prompt_tokens", "tokens", "steps"),
    "sparsity.profile": ("mean",),
    "sparsity.kernels": ("folder", "replaced"),
}
NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def check(fields: dict[str, Any]) -> None:
    """Check all fields of a manifest that are known.

    Raises:
        TypeError: A field has a value of another kind; names both.
        KeyError: Part of an object is missing.
    """
    for path, pattern, value in _walk(fields, "", ""):
        kind = KINDS.get(path, KINDS.get(pattern))
        if kind is not None and not _fits(value, kind):
            raise TypeError(f"{path} is {_shown(value)}, and {_expected(kind)} is needed")
        needed = COMPLETE.get(path, COMPLETE.get(pattern, ()))
        missing = [name for name in needed if isinstance(value, dict) and "skipped" not in value and name not in value]
        if missing:
            raise KeyError(f"{path}.{missing[0]}")
    prompts = fields.get("checks", {}).get("golden", {}).get("prompts")
    if prompts is not None and not prompts:
        raise TypeError("checks.golden.prompts is empty")


def _walk(value: Any, path: str, pattern: str) -> Iterator[tuple[str, str, Any]]:
    """Each value below one, with its path and the pattern of it: list places and names of files do not matter."""
    if isinstance(value, dict):
        for key, each in value.items():
            named, form = f"{path}.{key}".lstrip("."), f"{pattern}.{key}".lstrip(".")
            general = f"{pattern}.*".lstrip(".")
            form = form if form in KINDS or general not in KINDS else general
            # `checks.golden` has rules of its own, and those of every check.
            yield named, form, each
            if path == "checks" and isinstance(each, dict):
                yield from ((f"{named}.{name}", f"checks.*.{name}", inner) for name, inner in each.items())
                yield from _walk(each, named, named)
            else:
                yield from _walk(each, named, form)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield f"{path}[{index}]", f"{pattern}[]", each
            yield from _walk(each, f"{path}[{index}]", f"{pattern}[]")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, re.Pattern):
        return isinstance(value, str) and kind.fullmatch(value) is not None
    # In Python, true is a number.
    return isinstance(value, kind) and (not isinstance(value, bool) or bool in kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _expected(kind: Any) -> str:
    if isinstance(kind, re.Pattern):
        return "a sha256" if kind is SHA256 else f"text of the form {kind.pattern}"
    return " or ".join(NAMES[each] for each in kind if each in NAMES)
