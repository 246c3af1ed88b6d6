"""One choice of a request as its client sees it: tokens 0, 1, 2, ... exactly once and in order, then one
ending."""

from array import array
from collections.abc import Sequence

from ..core.messages import TokenOutput
from ..core.request import FinishReason


class ChoiceStream:
    """Puts tokens from any worker in order. Early tokens are held, duplicates are dropped."""

    __slots__ = ("_held", "choice", "finish_reason", "last_token_s", "token_ids")

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.token_ids = array("I")  # the client's tokens; a later attempt starts from here
        self.finish_reason: FinishReason | None = None
        self.last_token_s: float | None = None  # when it last grew, unless its client has made it wait since
        self._held: dict[int, TokenOutput] = {}

    def accept(self, output: TokenOutput) -> tuple[TokenOutput, ...]:
        """Returns the tokens that are due now that `output` has arrived; sets `finish_reason` with the last
        one."""
        due = len(self.token_ids)
        if self.finish_reason is not None or output.index < due:
            return ()
        if output.index > due:
            self._held.setdefault(output.index, output)
            return ()
        if not self._held:
            self._take(output)
            return (output,)
        return self._take_run(output)

    def accept_run(self, outputs: Sequence[TokenOutput]) -> tuple[TokenOutput, ...]:
        """Does the same for many tokens, in the order of their indices."""
        num_tokens = len(self.token_ids)
        if (
            outputs
            and not self._held
            and self.finish_reason is None
            and all(output.index == index for index, output in enumerate(outputs, num_tokens))
            and not any(output.finish_reason for output in outputs[:-1])
        ):
            self.token_ids.extend([output.token_id for output in outputs])
            self.finish_reason = outputs[-1].finish_reason
            return tuple(outputs)
        due: list[TokenOutput] = []
        for output in outputs:
            due += self.accept(output)
        return tuple(due)

    def accept_plain(self, first_index: int, token_ids: "array[int]") -> "array[int] | None":
        """Does the same for consecutive tokens without anything beside them. None: nothing was done, as
        others are held or missing, so that they are to be accepted as outputs."""
        num_known = len(self.token_ids) - first_index
        if self._held or num_known < 0:
            return None
        due = token_ids[num_known:] if self.finish_reason is None else array("I")
        self.token_ids += due
        return due

    def _take_run(self, output: TokenOutput) -> tuple[TokenOutput, ...]:
        run: list[TokenOutput] = []
        following: TokenOutput | None = output
        while following is not None and self.finish_reason is None:
            self._take(following)
            run.append(following)
            following = self._held.pop(len(self.token_ids), None)
        return tuple(run)

    def _take(self, output: TokenOutput) -> None:
        self.token_ids.append(output.token_id)
        self.finish_reason = output.finish_reason

    def end(self, reason: FinishReason) -> None:
        """Ends the choice by decision, not by its last token."""
        assert self.finish_reason is None, f"choice {self.choice} ended already: {self.finish_reason}"
        self.finish_reason = reason
        self._held.clear()

    def forget_held(self) -> None:
        """Drops the held tokens of an attempt that has failed."""
        self._held.clear()
