"""The model class `dart` of lm-evaluation-harness: its tasks, scored with the masks in force.

lm_eval's own model classes run context and answer through one forward, where a mask could never act on an answer of one
token. Here `dartprune.evaluation.protocol` is used instead, for the dense arm too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dartprune.errors import UserError
from dartprune.evaluation.benchmarks.perplexity import windows
from dartprune.evaluation.protocol import Protocol, end_tokens
from dartprune.evaluation.tally import Tally
from dartprune.evaluation.texts import headed, opening
from dartprune.loading import load
from dartprune.model.context import context_length
from dartprune.model.sizes import count, dtype_name
from dartprune.names import unknown
from dartprune.pruner import Pruner, presets
from dartprune.reporting.progress import bar

UNBOUNDED = 2048  # tokens of a context with its answer where the model has no end
TO_WRITE = 256  # tokens of a continuation where the task does not say
WARPERS = {
    "temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper,
}  # fmt: skip


@register_model("dart")
class DartLM(TemplateLM):  # type: ignore[misc]
    """A decoder with a pruner, as lm_eval asks models; every preset of dartprune is a `method`."""

    def __init__(
        self,
        pretrained: Any = None,
        method: str = "dart",
        sparsity: float | None = None,
        *,
        tokenizer: Any = None,
        pruner: Pruner | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        backend: str = "auto",
        silent: bool = False,
        **settings: Any,
    ) -> None:
        """Load a model, or take one that is loaded.

        Args:
            pretrained: folder or name on the Hugging Face hub, `demo` or None for the model inside the package; or a
                model, together with its `tokenizer`.
            method: name of a preset.
            sparsity: of the pruner; None takes the preset's.
            tokenizer: of a model that was loaded before.
            pruner: instead of method, sparsity and settings.
            batch_size: contexts at a time; their answers come on top.
            max_batch_size: of lm_eval's automatic batch sizes, which do not exist here: refused.
            device: where to put the model; None leaves it where it is.
            dtype: of a model that is loaded here.
            max_length: most tokens of a context with its answer; None takes the model's.
            backend: how the pruned FFN is computed.
            silent: show no progress.
            settings: other settings of the pruner, such as `scorer=magnitude`, `refresh=relearn`, `min_traced=8`.

        Raises:
            ValueError: nothing can be loaded, an unknown method or setting, a batch size that is no number.
        """
        super().__init__()
        if max_batch_size is not None:
            raise UserError("max_batch_size bounds an automatic batch size, and there is none here: give batch_size")
        self.pruner = pruner if pruner is not None else pruner_from(method, sparsity, settings)
        if tokenizer is None:
            pretrained, tokenizer = load(pretrained, dtype=dtype, device=device)
        self.model, self.tokenizer = pretrained, tokenizer
        self._device = self.model.device
        self.batch_size = _batch_size(batch_size)
        self.backend_name = backend
        self.silent = silent
        most = context_length(self.model) or UNBOUNDED
        self.max_length = most if max_length is None else int(max_length)
        self.tallies: dict[str, Tally] = {}
        self.head = opening(tokenizer)
        self.rolling = {"tokens_scored": 0, "tokens_as_context": 0}
        self._begin()

    def _begin(self) -> None:
        """Count from nothing."""
        self._shortened: set[tuple[int, ...]] = set()
        self._protocol = Protocol(
            self.model,
            self.pruner,
            padding=self.tokenizer.pad_token_id,
            batch=self.batch_size,
            backend=self.backend_name,
        )

    # ---- what lm_eval asks of a model that tokenizes

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            if token is not None:
                return int(token)
        raise UserError("the tokenizer has no token to begin a text with: set tokenizer.bos_token")

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, by the tokenizer's template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; special ones as the tokenizer adds them, not twice."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    # ---- the three kinds of requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score answers after their contexts."""
        return self._by_task(requests, lambda asked: super(DartLM, self).loglikelihood(asked, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        questions = [(self._cut(context, len(answer)), answer) for _, context, answer in requests]
        with bar(f"{self.pruner.name}: answers", len(requests), silent=self.silent) as advance:
            results = self._protocol.score(questions, advance)
        scores = [(result.logprob, result.greedy) for result in results]
        for (texts, _, _), result in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of the scored halves of each text's windows, see `windows`."""
        return self._by_task(requests, self._rolling)

    def _rolling(self, requests: list[Instance]) -> list[float]:
        questions: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if tokens[:1] != [self.prefix_token_id]:
                tokens = [self.prefix_token_id, *tokens]
            parts = windows(tokens, self.max_length, self.head)
            questions += parts
            owners += [number] * len(parts)
            scored = sum(len(answer) for _, answer in parts)
            self.rolling["tokens_scored"] += scored
            self.rolling["tokens_as_context"] += len(tokens) - scored
        sums = [0.0] * len(requests)
        with bar(f"{self.pruner.name}: windows", len(questions), silent=self.silent) as advance:
            for owner, result in zip(owners, self._protocol.score(questions, advance), strict=True):
                sums[owner] += result.logprob
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, an end token, or as many tokens as asked for."""
        return self._by_task(requests, self._generate)

    def _generate(self, requests: list[Instance]) -> list[str]:
        # texts of one batch share their settings
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        out = [""] * len(requests)
        with bar(f"{self.pruner.name}: texts", len(requests), silent=self.silent) as advance:
            for numbers in alike.values():
                contexts = [requests[number].args[0] for number in numbers]
                texts = self._continue(contexts, requests[numbers[0]].args[1], advance)
                for number, text in zip(numbers, texts, strict=True):
                    out[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return out

    def _continue(self, contexts: list[str], asked: dict[str, Any], progress: Callable[[int], Any]) -> list[str]:
        settings = dict(normalize_gen_kwargs(asked, TO_WRITE))
        stops = [s for s in handle_stop_sequences(settings.pop("until"), eos=None) if s]
        most = settings.pop("max_gen_toks")
        if not 0 < most < self.max_length:
            raise UserError(f"max_gen_toks={most} leaves no room for a context in {self.max_length} tokens")
        written = self._protocol.write(
            [self._cut(self.tok_encode(context), most) for context in contexts],
            most,
            ends=end_tokens(self.model, self.tokenizer),
            stop=(lambda tokens: any(s in self._decode(tokens) for s in stops)) if stops else None,
            choose=chooser(settings),
            progress=progress,
        )
        return [postprocess_generated_text(self._decode(text.tokens), stops, None) for text in written]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    # ---- counting

    def _by_task(self, requests: list[Instance], ask: Callable[[list[Instance]], list[Any]]) -> list[Any]:
        """Ask for each task's requests by themselves, so that what happened is known of each task."""
        of: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            of.setdefault(request.task_name or "requests", []).append(number)
        out: list[Any] = [None] * len(requests)
        for task, numbers in of.items():
            self._begin()
            for number, result in zip(numbers, ask([requests[n] for n in numbers]), strict=True):
                out[number] = result
            self._protocol.tally.contexts_cut = len(self._shortened)
            self.tallies.setdefault(task, Tally()).merge(self._protocol.tally)
        return out

    def _cut(self, context: list[int], room: int) -> list[int]:
        """The end of a context that leaves room for as many tokens."""
        most = self.max_length - room
        if most < 1:
            raise UserError(f"an answer of {room} tokens does not fit the model's {self.max_length}")
        if len(context) > most:
            self._shortened.add(tuple(context))
            return headed(context, self.head, most)
        return context

    def summary(self) -> dict[str, Any]:
        """What was pruned, in all and in each task: plain data."""
        total = Tally()
        for tally in self.tallies.values():
            total.merge(tally)
        out: dict[str, Any] = {"pruner": self.pruner.to_dict(), **total.to_dict()}
        if self.rolling["tokens_scored"]:
            out["rolling"] = self.rolling | {"windows_begin_with": self.head}
        return out | {"tasks": {task: tally.to_dict() for task, tally in self.tallies.items()}}

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into its results about the model."""
        summary = self.summary()
        logging.getLogger("lm_eval.dart").info(
            "%s: realised sparsity %.3f, FFN bytes saved %.3f, %d pruned and %d dense tokens, events %s, "
            "%d of %d contexts too short for a mask",
            self.pruner.name,
            *(summary[name] for name in ("realised_sparsity", "bytes_saved", "pruned_tokens", "dense_tokens")),
            summary["events"] or "none",
            *(summary[name] for name in ("contexts_too_short", "contexts")),
        )
        return {
            "model_num_parameters": count(self.model)[0],
            "model_dtype": dtype_name(self.model),
            "dartprune": summary,
        }


def pruner_from(method: str, sparsity: float | None = None, settings: Mapping[str, Any] | None = None) -> Pruner:
    """A preset with some settings changed.

    Args:
        method: name of the preset.
        sparsity: None for the preset's own; not looked at where the preset does not prune.
        settings: as in `Pruner.to_dict()`; a budget or refresh may be given by its kind alone.

    Raises:
        ValueError: an unknown name or value, with the nearest one that is known.
    """
    cls = presets.get(method)
    data = cls().to_dict()
    if sparsity is not None and cls.prunes:
        data["sparsity"] = sparsity
    for name, value in (settings or {}).items():
        data[name] = {"kind": value} if name in ("budget", "refresh") and isinstance(value, str) else value
    return Pruner.from_dict(data)


def _batch_size(size: int | str | None) -> int:
    try:
        return 1 if size is None else int(size)
    except ValueError:
        raise UserError(f"batch_size must be a number of contexts, got {size!r}: none is found automatically") from None


def chooser(settings: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """How the next token is taken from logits: None for the most probable; ValueError for a setting without effect."""
    for name in settings:
        if name not in ("do_sample", *WARPERS):
            raise unknown("generation setting", name, ("do_sample", *WARPERS, "until", "max_gen_toks"))
    if not settings.get("do_sample"):
        return None
    # 0 is none of a warper but for the temperature, which must not be 0
    values = {name: settings[name] for name in WARPERS if settings.get(name) is not None}
    warpers = LogitsProcessorList(WARPERS[n](value) for n, value in values.items() if value or n == "temperature")

    def draw(logits: Tensor) -> Tensor:
        scores = warpers(torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device), logits.float())
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return draw
