"""A model directory that answers.

OpenVINO GenAI does the work; this adds what a program needs around it. The engine runs in a worker
thread that hands tokens over a queue, so that text arrives as an ordinary iterator which may be
dropped at any time; prompts are checked against the context before they are run; text is streamed
whole characters at a time; and a device is chosen and warmed up before the first question.

    with Pipeline("models/afm-int4") as pipeline:
        for delta in pipeline.stream("What is OpenVINO?"):
            print(delta.text, end="")
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError, GenerationError, OVAFMError, last_line
from .model_dir.model_directory import ModelDirectory
from .runtime import lora
from .runtime.loading import LoadRequest
from .runtime.model_session import ModelSession
from .runtime.properties import DEFAULT_USE, Use
from .runtime.sampling import Params
from .runtime.stateful import PromptCache, StatefulEngine
from .runtime.streaming import Completion, Delta, FinishReason, Request, streamer

__all__ = ["Completion", "Delta", "FinishReason", "Message", "Params", "Pipeline", "Prompt", "PromptCache", "Use"]

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

POLL_S = 0.1


class Pipeline:
    """A loaded model.

    One request runs at a time: requests from several threads wait for each other, in no fixed order.

    Args:
        model_dir: A model directory, ours or made by `optimum-cli export openvino`.
        device: `CPU`, `GPU`, `GPU.1`, `NPU`, `AUTO` (GPU, then NPU, then CPU, by what can run the model), or
            `NPU-EMULATED` (the NPU's path on CPU, to try limits and shapes without an NPU).
        adapters: LoRA adapters in PEFT's form: files, folders, or either with `:WEIGHT` at the end.
        draft_model: Model directory of a small model of the same tokenizer that drafts tokens.
        prompt_lookup: Draft tokens from the prompt itself: faster where answers quote it.
        num_assistant_tokens: Tokens drafted at a time by either. None takes 5 by a draft model; with prompt lookup it
            takes as many as pay, which follows each answer.
        prompt_cache: Load so that computed prompts can be kept, on the CPU: in a folder that this pipeline and later
            ones look into by themselves, or with `save_prompt` and `load_prompt` alone (`PromptCache()`).
        use: What the model is loaded for: context, threads, cache precision and what else each device takes.
        fallback: When a named GPU or NPU fails to load the model or its self-test, use the next device of `AUTO` and
            log a warning with the reason; False raises `DeviceError`.
        warm_up: Run the first inference while loading, so that the first question does not pay for it; the first
            time on this CPU its answer is compared with the recorded one.
        on_phase: Called when a phase of loading begins, with its name and the seconds it took last time here.
        properties: OpenVINO and GenAI properties, passed as they are (`INFERENCE_PRECISION_HINT="f32"`,
            `MAX_PROMPT_LEN=2048`, `scheduler_config=...`).

    Raises:
        SourceError: The directory is missing, damaged or no model directory.
        DeviceError: The device is absent, cannot run the model, or failed to load it.

    Attributes:
        model_dir: The model directory.
        manifest: Its manifest; None where it has none.
        device: OpenVINO's name of the device in use.
        device_note: How the device was chosen, and whether it is emulated.
        emulated: The NPU's path is run on CPU.
        load_s: Seconds that each phase of loading took.
        context_length: Tokens that prompt and answer may have together.
        max_prompt_tokens: Tokens that a prompt may have.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "CPU",
        *,
        adapters: Sequence[str | Path | lora.Adapter] = (),
        draft_model: str | Path | None = None,
        prompt_lookup: bool = False,
        num_assistant_tokens: int | None = None,
        prompt_cache: PromptCache | None = None,
        use: Use = DEFAULT_USE,
        fallback: bool = True,
        warm_up: bool = True,
        on_phase: Callable[[str, float | None], None] | None = None,
        **properties: Any,
    ) -> None:
        request = LoadRequest(
            ModelDirectory.open(model_dir),
            device,
            use,
            properties,
            draft_model=None if draft_model is None else ModelDirectory.open(draft_model),
            prompt_lookup=prompt_lookup,
            num_assistant_tokens=num_assistant_tokens,
            fallback=fallback,
            adapters=lora.read_all(adapters),
            prompt_cache=prompt_cache,
        )
        self._lock = threading.Lock()
        self._closed = threading.Event()
        session = self._session = ModelSession(request, warm_up=warm_up, on_phase=on_phase)
        self.model_dir, self.manifest = request.model.path, request.model.manifest
        self.device, self.emulated, self.device_note = session.device, session.emulated, session.device_note
        self.context_length, self.max_prompt_tokens = session.context_length, session.max_prompt_tokens
        self.load_s = session.load_s
        self._tokenizer = session.tokenizer
        self.has_chat_template = session.template is not None

    def render(self, prompt: Prompt, *, raw: bool = False, open_turn: bool = True) -> str:
        """The text that the model is given for a prompt: the model's chat template applied, once.

        Args:
            prompt: Text or messages.
            raw: Leave the template out.
            open_turn: End with the beginning of the answer's turn.

        Raises:
            GenerationError: The template is missing or cannot render these messages.
        """
        if isinstance(prompt, str):
            if raw or not self.has_chat_template:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        if raw:
            raise ConfigError("raw takes text, found a list of messages")
        if self._session.template is None:
            raise GenerationError(f"{self.model_dir} has no chat template; give text instead of messages")
        return self._session.template.render([dict(message) for message in prompt], open_turn=open_turn)

    def _encode(self, prompt: Prompt, raw: bool, *, open_turn: bool = True) -> tuple[Any, int]:
        if len(prompt) == 0:
            raise GenerationError("the prompt has 0 tokens; give it some text")
        _check_unicode(prompt)
        text = self.render(prompt, raw=raw, open_turn=open_turn)
        # A template writes its own special tokens; plain text gets the tokenizer's, unless it begins with them.
        templated = self.has_chat_template and not (raw and isinstance(prompt, str))
        begin = self._tokenizer.get_bos_token()
        special = not templated and not (begin and text.startswith(begin))
        inputs = self._tokenizer.encode(text, add_special_tokens=special)
        return inputs, int(inputs.input_ids.shape[1])

    def count_tokens(self, prompt: Prompt, *, raw: bool = False) -> int:
        """Tokens that a prompt has, chat template included."""
        return self._encode(prompt, raw)[1]

    def save_prompt(self, prompt: Prompt, path: str | Path, *, raw: bool = False) -> int:
        """Compute a prompt and write its KV state to a file, for all prompts that begin like it.

        Messages are rendered without the beginning of an answer, so a system message alone can be saved. What is kept
        are whole pieces of 128 tokens.

        Args:
            prompt: Text or messages, as for `stream`.
            path: The file; an older one is replaced, in a single step.
            raw: The text is given to the model without a template.

        Returns:
            Tokens that the file holds.

        Raises:
            ConfigError: The pipeline was loaded without `prompt_cache`.
            GenerationError: The prompt is empty, too long, or shorter than a piece.
            OVAFMError: The file cannot be written.
        """
        engine = self._stateful()
        inputs, count = self._encode(prompt, raw, open_turn=False)
        self._session.check_prompt_length(count)
        target = Path(path)
        with self._lock:
            try:
                return engine.save(inputs.input_ids.data[0], target)
            except OSError as error:
                raise OVAFMError(
                    f"{target} cannot be written: {error.strerror}; choose another place", code="prompt-unwritable"
                ) from error

    def load_prompt(self, path: str | Path) -> int:
        """Take a saved prompt: prompts that begin like it need not compute those tokens, and are answered the same.

        Returns:
            Tokens that the file holds.

        Raises:
            ConfigError: The pipeline was loaded without `prompt_cache`.
            SourceError: The file is missing, damaged, or was written with another model, processor, version or
                precision.
        """
        engine = self._stateful()
        with self._lock:
            return engine.load(Path(path))

    def _stateful(self) -> StatefulEngine:
        if self._closed.is_set():
            raise GenerationError("the pipeline is closed")
        engine = self._session.engine
        if not isinstance(engine, StatefulEngine):
            raise ConfigError(
                "GenAI's engine does not give its KV cache away; load with Pipeline(..., prompt_cache=PromptCache())",
                code="no-prompt-cache",
            )
        return engine

    def stream(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        raw: bool = False,
        cancel: threading.Event | None = None,
    ) -> Iterator[Delta]:
        """Generate an answer piece by piece.

        The prompt is checked at once; generation begins with the first `next`. Closing or dropping the
        iterator stops the engine within one token and leaves the pipeline usable.

        Args:
            prompt: Text, which becomes one user message of the model's chat template, or messages
                (`{"role": ..., "content": ...}`).
            params: Sampling; what is None comes from the model's `generation_config.json`.
            raw: Give the text to the model as it is, without a template.
            cancel: Set it from any thread to end the answer early with finish reason `cancelled`.

        Returns:
            Deltas; the last one carries finish reason and metrics. There is at least one.

        Raises:
            GenerationError: The prompt is empty or too long, or the engine failed.
        """
        begun = time.perf_counter()
        if self._closed.is_set():
            raise GenerationError("the pipeline is closed")
        params = params or Params()
        inputs, count = self._encode(prompt, raw)
        self._session.check_prompt_length(count)
        config = self._session.generation_config(params, prompt_tokens=count)
        text = self._session.assembler(params.stop)
        drafting = self._session.drafting(inputs.input_ids.data[0].tolist(), config)
        request = Request(inputs, count, config, text, cancel or threading.Event(), drafting)
        return self._deltas(request, prepared_s=time.perf_counter() - begun)

    def generate(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        raw: bool = False,
        cancel: threading.Event | None = None,
    ) -> Completion:
        """Generate an answer at once; arguments and errors are those of `stream`."""
        deltas = list(self.stream(prompt, params, raw=raw, cancel=cancel))
        end = deltas[-1]
        assert end.finish_reason is not None
        assert end.metrics is not None
        return Completion("".join(delta.text for delta in deltas), end.finish_reason, end.metrics)

    def _deltas(self, request: Request, prepared_s: float) -> Iterator[Delta]:
        request.start = time.perf_counter() - prepared_s
        threading.Thread(target=self._work, args=(request,), name="ov_afm-generate").start()
        try:
            while True:
                try:
                    event = request.events.get(timeout=POLL_S)
                except queue.Empty:
                    # The engine cannot be stopped before its first token; the caller need not wait for it.
                    if not request.cancel.is_set():
                        continue
                    request.reason = "cancelled"
                    event = None
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    yield Delta("", request.new_tokens, request.reason, request.metrics())
                    return
                yield event
        finally:
            request.dropped.set()

    def _work(self, request: Request) -> None:
        """Run one request in the engine; in a thread of its own."""
        try:
            while not self._lock.acquire(timeout=POLL_S):
                if request.unwanted:
                    break
            else:
                try:
                    self._run(request)
                finally:
                    self._lock.release()
            if request.cancel.is_set() and not request.text.stopped:
                request.reason = "cancelled"
            request.events.put(None)
        except RuntimeError as error:
            failure = GenerationError(f"the engine failed on {self.device}: {last_line(error)}")
            failure.__cause__ = error
            request.events.put(failure)
        except BaseException as error:  # noqa: BLE001 - belongs to the consumer, whatever it is
            request.events.put(error)

    def _run(self, request: Request) -> None:
        if request.unwanted:
            return
        if self._closed.is_set():
            raise GenerationError("the pipeline was closed while the request waited")
        while True:
            sink = streamer(request, self._closed)
            result = self._session.engine.generate(request.inputs, request.config, sink)
            if sink.failure is not None:
                raise sink.failure
            if not request.redrafts or self._closed.is_set():
                break
            request.redraft()
        rest = request.text.finish()
        if request.text.stopped or result.finish_reasons[0].name == "STOP":
            request.reason = "stop"
        if rest:
            request.events.put(Delta(rest, request.new_tokens))

    def close(self) -> None:
        """Stop what is running and free the model; further requests raise `GenerationError`."""
        self._closed.set()
        with self._lock:
            self._session.close()

    def __enter__(self) -> Pipeline:
        """Use the pipeline in a `with` block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Free the model."""
        self.close()


def _check_unicode(prompt: Prompt) -> None:
    # Bytes that are no UTF-8 reach Python as lone surrogates, for example from a command line.
    texts = [prompt] if isinstance(prompt, str) else [str(value) for each in prompt for value in each.values()]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise GenerationError(
                f"the prompt is not valid Unicode: lone surrogate at character {error.start}"
            ) from error
