"""What a model is to be judged by: one record that travels from the command or the caller to those who judge."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import InvalidOptionError
from secateur.judge.generation import GREEDY, Decoding, check_prompt
from secateur.judge.inference import longest_prompt
from secateur.judge.tasks import check_tokenizer
from secateur.model.handle import Model


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What a model is put through.

    Attributes:
        texts: names or files to take the perplexity on.
        length, samples: windows of each, all of one length; all that a text has if `samples` is None.
        tasks: names of tasks or suites; `limit` documents of each, all if None; `fewshot` and `metric` the suite's own
            if None. See `secateur.judge.tasks.run_tasks`.
        inference: time the prompt and each further token, and count bytes, with `prompt_length`, `new_tokens`, `rounds`
            and `batch_size`. See `secateur.judge.inference`.
        prompts: continued greedily, and by `decodings` too. See `secateur.judge.generation`.

    Raises:
        InvalidOptionError: a number below 1; decodings of no prompt.
    """

    texts: tuple[str, ...] = ()
    length: int = 2048
    samples: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    fewshot: int | None = None
    metric: str | None = None
    inference: bool = False
    prompt_length: int = 256
    new_tokens: int = 16
    rounds: int = 5
    batch_size: int = 1
    prompts: tuple[str, ...] = ()
    decodings: tuple[Decoding, ...] = ()

    def __post_init__(self) -> None:
        for name in ("samples", "limit", "length", "prompt_length", "new_tokens", "rounds", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidOptionError(f"{name} must be at least 1, not {value}")
        if self.decodings and not self.prompts:
            raise InvalidOptionError("there is no prompt to continue; give one as --generate (`prompts`)")

    def check(self, model: Model) -> None:
        """Refuse what this model cannot be put through, which would else be found after hours; reads no weights.

        Raises:
            InvalidOptionError: more new tokens than the model has positions.
            DataError: tasks or prompts for a model without a tokenizer that fits; an empty prompt, or one too long for
                a decoding's limit or the model's positions.
        """
        if self.tasks:
            check_tokenizer(model)
        if self.inference:
            longest_prompt(model, self.new_tokens, self.prompt_length)
        for prompt in self.prompts:
            for decoding in (GREEDY, *self.decodings):
                check_prompt(model, prompt, decoding)
