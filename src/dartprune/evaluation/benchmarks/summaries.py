"""Summaries: greedy continuations of a cut document and an instruction that is never cut, judged by ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dartprune.errors import UserError
from dartprune.evaluation.protocol import Protocol, end_tokens
from dartprune.evaluation.stats import standard_error
from dartprune.evaluation.texts import chat_text
from dartprune.model.context import context_length
from dartprune.reporting.progress import Advance

INSTRUCTION = "Summarize the following text.\n\n{document}\n\nSummary:"
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
_MARK = "{document}"


def prompts(documents: Sequence[str], tokenizer: Any, *, most: int = 1024, chat: bool = False) -> list[list[int]]:
    """Tokens of instruction and document, the end of the document cut where the whole would be longer than `most`.

    Args:
        documents: texts.
        tokenizer: of the model.
        most: tokens of a prompt.
        chat: put it into the tokenizer's chat template as the user's message.

    Raises:
        ValueError: no room for the document; `chat` without a template, or with one that does not keep the message.
    """
    text = INSTRUCTION
    if chat:
        text = chat_text(tokenizer, INSTRUCTION)
    if text.count(_MARK) != 1:
        raise UserError("--chat: the chat template does not hold the message as it is, once")
    before, after = text.split(_MARK)
    head = tokenizer(before, add_special_tokens=not chat, verbose=False)["input_ids"]
    tail = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
    room = most - len(head) - len(tail)
    if room < 1:
        raise UserError(f"the instruction takes {len(head) + len(tail)} of {most} tokens: no room for the document")
    cut = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:room] for text in documents]
    return [[*head, *document, *tail] for document in cut]


def rouge(pairs: Sequence[tuple[str, str]]) -> list[dict[str, float]]:
    """F-measures of ROUGE-1, -2 and -L, stemmed, of (reference, text) pairs, each in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in pairs]
    return [{name: float(score[key].fmeasure) for key, name in ROUGE.items()} for score in scores]


def summarise(
    protocol: Protocol,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    most: int = 1024,
    written: int = 128,
    chat: bool = False,
    progress: Advance | None = None,
) -> dict[str, Any]:
    """Summarise documents greedily and compare with their summaries.

    Args:
        protocol: the arm on its model, new.
        tokenizer: of the model.
        pairs: documents and their summaries.
        most: tokens of a prompt, instruction included; less where the model takes less.
        written: tokens of a summary at most.
        chat: put it into the tokenizer's chat template.
        progress: called with the number of documents done.

    Returns:
        scores: means of ROUGE-1, -2 and -L.  errors: their standard errors.  each: of each document.  did: what was
        pruned.  details: for each document its text, scores, realised sparsity, tokens and events.

    Raises:
        ValueError: the model takes too few tokens.
    """
    model = protocol.model
    most = min(most, (context_length(model) or most + written) - written)
    contexts = prompts([document for document, _ in pairs], tokenizer, most=most, chat=chat)
    texts = protocol.write(contexts, written, ends=end_tokens(model, tokenizer), progress=progress)
    decoded = [tokenizer.decode(text.tokens, skip_special_tokens=True).strip() for text in texts]
    scores = rouge([(summary, text) for (_, summary), text in zip(pairs, decoded, strict=True)])
    documents = [
        {
            "text": said,
            **score,
            "prompt_tokens": len(context),
            "tokens": len(text.tokens),
            "realised_sparsity": text.realised_sparsity,
            "dense_tokens": text.dense_tokens,
            "pruned_tokens": text.pruned_tokens,
            "events": text.events,
        }
        for said, score, context, text in zip(decoded, scores, contexts, texts, strict=True)
    ]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in ROUGE.values()}
    return {
        "scores": means,
        "errors": {name: standard_error([score[name] for score in scores]) for name in means},
        "each": {name: [score[name] for score in scores] for name in means},
        "did": protocol.tally.to_dict(),
        "details": {"documents": documents},
    }
