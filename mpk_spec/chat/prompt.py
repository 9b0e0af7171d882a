"""From messages to the token ids that a model expects: the checkpoint's chat template, or plain text without one."""

from __future__ import annotations

from mpk_spec.errors import UserError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class ChatTemplate:
    """The checkpoint's own template. `thinking` is None to leave it to the template, else on or off."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self.has_thinking = "enable_thinking" in (template if isinstance(template, str) else str(template))

    def text(self, messages: list[Message], thinking: bool | None) -> str:
        """The whole prompt, up to where the assistant begins to speak."""
        from jinja2.exceptions import TemplateError

        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        except TemplateError as error:  # templates refuse by raise_exception, e.g. Gemma's without system prompts
            raise UserError(f"the checkpoint's chat template refuses this conversation: {error}") from None

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them all


class PlainText:
    """For checkpoints without a template: the conversation is one text that the model continues."""

    has_thinking = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def text(self, messages: list[Message], thinking: bool | None) -> str:
        return "".join(message["content"] for message in messages)

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])


def prompt_for(tokenizer) -> ChatTemplate | PlainText:
    """The template of the checkpoint, or plain text where it has none (the caller says so to the person)."""
    return ChatTemplate(tokenizer) if tokenizer.chat_template else PlainText(tokenizer)
