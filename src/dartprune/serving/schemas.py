"""What requests may say, in OpenAI's words; what is not known here is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_STOPS = 4
MOST_LOGPROBS = 20
MOST_CHOICES = 128


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from None
    return text


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 3.0 is an integer there."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), _WHOLE]


def _given(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of an object that has such a property."""
    return {"required": [name], "properties": {name: schema}}


class Said(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Pruning(Said):
    """How this request is pruned, within the limits of the server."""

    method: Text | None = Field(None, description="The server's method, or dense.")
    sparsity: float | None = Field(None, ge=0, lt=1, description="Share of the FFN to leave out; 0 is dense.")
    watch: bool = Field(False, description="Stream figures of masks and detector with the tokens.")


class StreamOptions(Said):
    """Of a stream."""

    include_usage: bool | None = Field(None, description="End the stream with a chunk that holds the usage.")
    include_obfuscation: bool | None = Field(None, description="Taken, and without effect: nothing is added.")


class Common(Said):
    """What completions and chats share."""

    model: Text = Field(description="The served model's name, see /v1/models.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), _WHOLE] | None = Field(None, description="Choices, 1 by default.")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), _WHOLE] | None = Field(
        None, description="Draw the same tokens again."
    )
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = Field(
        None, description="Strings that end a choice and are not part of it."
    )
    stream: bool | None = Field(None, description="Send tokens as they come, as server-sent events.")
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="1 by default; 0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), _WHOLE] | None = Field(
        None, description="0, the default: all tokens."
    )
    user: Text | None = Field(None, description="Who asks, for the fairness of the queue.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Only 0.")
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(None, description="Only 0.")
    dart: Pruning | None = Field(None, description="How this request is pruned.")

    model_config = Said.model_config | ConfigDict(
        json_schema_extra={
            "allOf": [
                {"if": _given("stream_options", {"type": "object"}), "then": _given("stream", {"const": True})},
                {
                    "if": _given("dart", _given("watch", {"const": True}) | {"type": "object"}),
                    "then": _given("stream", {"const": True}),
                },
                {
                    "if": _given("top_logprobs", {"type": "integer"}),
                    "then": _given("logprobs", {"const": True}),
                },
            ]
        }
    )

    @model_validator(mode="after")
    def _streamed(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true")
        if self.dart is not None and self.dart.watch and not self.stream:
            raise ValueError("dart.watch goes with stream=true")
        return self


class CompletionRequest(Common):
    """`/v1/completions`."""

    prompt: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)]
    ) = Field(description="One prompt or several, as text or as token ids.")
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), _WHOLE] | None = Field(None, description="16 by default.")
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), _WHOLE] | None = None


class TextPart(Said):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Said):
    """Of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @property
    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Common):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), _WHOLE] | None = Field(
        None, description="As max_completion_tokens."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), _WHOLE] | None = Field(
        None, description="As many as fit by default."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), _WHOLE] | None = None

    @model_validator(mode="after")
    def _logged(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        return self


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Problem(BaseModel):
    """An answer that is none."""

    error: ErrorBody


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dartprune"
    dart: dict[str, Any]


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
