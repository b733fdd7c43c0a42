"""A loaded model that generates, as `Pipeline`, the server and the benchmarks use it.

`loading` finds a device and makes an engine. A session adds what every request needs after that: the
tokenizer, the limits of prompt and context, the model's defaults for sampling, and the first
inference, whose answer is compared with the one that export recorded.

    session = ModelSession(LoadRequest(ModelDirectory.open("models/afm-int4")))
    config = session.generation_config(Params(max_new_tokens=20), prompt_tokens=5)
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import DeviceError, GenerationError
from ..model_dir.manifest import PACKED_FOLDER, installed_versions
from ..model_dir.tokenizer_files import control_tokens
from ..system import resident
from ..system.interrupt import wait_for
from . import device_cache, kernel_choice, self_test
from .chat_template import ChatTemplate
from .detokenize import Detokenizer, TextAssembler
from .drafting import COSTS, LENGTHS, NGRAM, Drafting
from .generation_config import default_config
from .loading import LoadRequest, OnPhase, PhaseTimer, load, remember_verdict, verdict_key
from .reasoning import reasoning_tags
from .sampling import Params
from .stateful import StatefulEngine
from .stop_tokens import stop_tokens

__all__ = ["ModelSession"]


class ModelSession:
    """A model in memory, with all that a request needs.

    Args:
        request: What to load.
        warm_up: Run the first inference now, in which the CPU repacks weights for seconds. The first time on this CPU
            its answer is compared with the recorded one.
        on_phase: Called when a phase of loading begins, with its name and the seconds it took last time here.

    Raises:
        SourceError: `generation_config.json`, the chat template or an adapter cannot be used.
        DeviceError: No device can run the model, or its first answer is wrong.

    Attributes:
        model: The model directory.
        engine: GenAI's pipeline, or our engine that keeps prompts.
        device: OpenVINO's name of the device.
        device_label: Its name for people.
        device_note: How it was chosen.
        emulated: The NPU's path runs on CPU.
        tokenizer: GenAI's tokenizer.
        template: The chat template; None where the model has none.
        stop_tokens: The tokens that end an answer.
        cache_tokens: Tokens that the KV cache holds; None where nothing bounds it but memory.
        context_length: Tokens that prompt and answer may have together.
        max_prompt_tokens: Tokens that a prompt may have.
        kernels: The model that is packed for the kernels is in use.
        load_s: Seconds that each phase of loading took.
    """

    def __init__(self, request: LoadRequest, *, warm_up: bool = True, on_phase: OnPhase | None = None) -> None:
        self.model = request.model
        self._request = request
        self._stop_strings = default_config(self.model.path).stop_strings
        phases = PhaseTimer(self.model.key, on_phase)
        loaded = load(request, phases)
        self.engine = loaded.engine
        self.device, self.device_label = loaded.choice.device, loaded.choice.label
        self.device_note, self.emulated = loaded.choice.why, loaded.choice.emulated
        self.tokenizer = self.engine.get_tokenizer()
        self.template = ChatTemplate.read(self.model.path, self.tokenizer)
        self.stop_tokens = stop_tokens(self.model.path, self.tokenizer, self.template)
        self._folder, self._kind, self._properties = loaded.folder, loaded.choice.kind, loaded.properties
        self.kernels = self._folder.name == PACKED_FOLDER
        self.cache_tokens = loaded.cache_tokens
        self._locked = loaded.locked
        self.context_length = self.max_prompt_tokens = min(
            self.model.context_length, loaded.cache_tokens or self.model.context_length
        )
        if self._kind == "NPU":
            # Static shapes: fixed sizes for the prompt and for the answer.
            self.max_prompt_tokens = int(loaded.properties["MAX_PROMPT_LEN"])
            both = self.max_prompt_tokens + int(loaded.properties["MIN_RESPONSE_LEN"])
            self.context_length = min(self.context_length, both)
        if warm_up:
            self._warm_up(phases)
        if request.use.lock_memory and loaded.locked is None:
            # Now, because the plugin repacks weights in the first inference.
            resident.lock_own_memory()
        phases.remember()
        self.load_s = phases.elapsed_s

    @functools.cached_property
    def detokenizer(self) -> Detokenizer:
        """From tokens to text; reads the whole vocabulary, which measurements do not need."""
        tokens = control_tokens(self.model.path)
        tags = reasoning_tags(self.template, tokens) or ()
        shown = {tokens[tag]: tag for tag in tags if tag in tokens}
        return Detokenizer(self.tokenizer, {token.id for token in self.stop_tokens}, shown)

    def generation_config(self, params: Params, *, prompt_tokens: int) -> Any:
        """GenAI's configuration of one request.

        The model's own defaults hold where the request says nothing; a request without a seed gets a random one. Stop
        strings are left out, because the engine may stream their beginning before it knows: see `assembler`.

        Args:
            params: Sampling parameters of the request.
            prompt_tokens: Tokens of its prompt.
        """
        config = params.apply(default_config(self.model.path), room=self.context_length - prompt_tokens)
        if ends := [token.id for token in self.stop_tokens]:
            config.eos_token_id, config.stop_token_ids = ends[0], {*ends, *params.stop_tokens}
        if params.seed is None:
            config.rng_seed = secrets.randbits(32)
        config.stop_strings = set()
        return self._with_drafting(config)

    def greedy_config(self, new_tokens: int) -> Any:
        """Plain greedy decoding of exactly so many tokens, without the model's defaults: for measurements."""
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        return self._with_drafting(config)

    def _with_drafting(self, config: Any) -> Any:
        if self._request.drafts:
            config.num_assistant_tokens = self._request.draft_tokens
        if self._request.prompt_lookup:
            config.max_ngram_size = NGRAM
        return config

    def drafting(self, prompt: Sequence[int], config: Any) -> Drafting | None:
        """What adapts the length of drafts to an answer.

        None where the length is fixed, or where the rest of a request cannot be continued as a request of its own.

        Args:
            prompt: Token ids.
            config: The request's configuration.
        """
        request = self._request
        if not request.prompt_lookup or request.num_assistant_tokens is not None:
            return None
        # These penalties count the tokens of the answer alone, of which the first part would become prompt.
        if config.presence_penalty or config.frequency_penalty or request.use.prefix_caching is False:
            return None
        return Drafting(prompt, config.max_new_tokens, self._draft_costs)

    @functools.cached_property
    def _draft_costs(self) -> Mapping[int, float]:
        """What a step with drafts costs, by their length: as measured on this machine, where the model is packed."""
        found = kernel_choice.measured(self.model, self._properties) if self.kernels else None
        if found is None:
            return COSTS
        return {length: kernel_choice.step_ms(found.packed_ms, 1 + length) / found.packed_ms[1] for length in LENGTHS}

    def assembler(self, stop: Iterable[str] = (), whole: tuple[str, str] | None = None) -> TextAssembler:
        """A collector of one answer's text, which ends at a stop string of the request or of the model.

        Args:
            stop: Stop strings of the request.
            whole: Beginning and end of parts that none of them cuts.
        """
        return self.detokenizer.assembler(tuple(sorted({*stop, *self._stop_strings})), whole)

    def check_prompt_length(self, tokens: int) -> None:
        """Refuse a prompt that is empty, or leaves no room for an answer.

        Raises:
            GenerationError: With code `prompt-empty`, `prompt-exceeds-device` or `prompt-exceeds-context`.
        """
        if tokens == 0:
            raise GenerationError("the prompt has 0 tokens; give it some text", code="prompt-empty")
        if self.max_prompt_tokens < self.context_length and tokens > self.max_prompt_tokens:
            raise GenerationError(
                f"the prompt has {tokens} tokens, {self.device_label} was loaded for prompts of up to "
                f"{self.max_prompt_tokens}; shorten it or load with MAX_PROMPT_LEN={-(-tokens // 64) * 64}",
                code="prompt-exceeds-device",
            )
        if tokens >= self.context_length:
            raise GenerationError(
                f"the prompt has {tokens} tokens and leaves no room for an answer: the context is "
                f"{self.context_length} tokens; shorten it",
                code="prompt-exceeds-context",
            )

    def _warm_up(self, phases: PhaseTimer) -> None:
        """The first inference; prefill and decode each have a first time.

        Other devices are tested in a child process before they are used, the CPU and the kernels here.
        """
        self.assembler()  # The first request must not wait for the vocabulary either.
        golden = self._golden()
        key = f"{verdict_key(self.model.key, 'CPU')}/{self._folder.name}/{installed_versions()['ov_afm']}"
        if golden is None or device_cache.read("verdicts").get(key):
            with phases(f"warming up {self.device_label}"):
                wait_for(self._generate_two_tokens)
            return
        with phases("warming up CPU and comparing its first answer"):
            verdict = wait_for(lambda: self_test.judge(golden, [self_test.ask(self.engine, golden["prompts"][0])]))
        if not verdict.passed:
            way = "" if self._folder == self.model.path else "; without the kernels: OV_AFM_NO_KERNELS=1"
            raise DeviceError(
                f"{self.model.path.name} gives wrong answers on this CPU: {verdict.evidence}{way}",
                code="wrong-answers",
            )
        remember_verdict(key, verdict)

    def _golden(self) -> Mapping[str, Any] | None:
        """The short recorded answer, where this engine must give it and has room for it."""
        golden, manifest, request = self.model.checks.get("golden"), self.model.manifest, self._request
        if golden is None or manifest is None or self._kind != "CPU":
            return None
        approximate = manifest.sparsity.get("kernels", {}).get("threshold", 0) > 0
        if approximate or request.adapters or request.drafts:
            return None
        short = golden["prompts"][0]
        if short["prompt_tokens"] + self_test.ANSWER_TOKENS > self.context_length:
            return None
        return {**golden, "prompts": [short]}

    def _generate_two_tokens(self) -> None:
        config = self.greedy_config(2)
        inputs = self.tokenizer.encode("warm up", add_special_tokens=False)
        if self._request.scheduler is None:
            self.engine.generate(inputs, config)
        else:
            self.engine.generate([inputs.input_ids], [config])

    def close(self) -> None:
        """Free the model; nothing may be generated any more."""
        if isinstance(self.engine, StatefulEngine):
            self.engine.close()
        self.engine = None
        if self._locked is not None:
            self._locked.close()
