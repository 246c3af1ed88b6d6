"""Token sequences that an output may not contain (vLLM's `bad_words`): the last token of one may not come
next where the output ends with the others."""

from collections import defaultdict
from collections.abc import Iterator, Sequence


class BadWords:
    """The words of one request. Its answers depend on the output alone, so a stream that resumes elsewhere is
    the same."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        """Each word has at least one token."""
        self._single = tuple({word[0] for word in words if len(word) == 1})
        # words of several tokens by the last but one: most outputs end with none of these
        self._longer: defaultdict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for word in words:
            if len(word) > 1:
                self._longer[word[-2]].append((list(word[:-1]), word[-1]))

    def forbidden(self, token_ids: list[int], num_prompt_tokens: int) -> Iterator[int]:
        """Yields the tokens that may not come behind `token_ids`, of which the first ones are the prompt."""
        yield from self._single
        num_output = len(token_ids) - num_prompt_tokens
        if num_output:
            for before, last in self._longer.get(token_ids[-1], ()):
                if len(before) <= num_output and token_ids[-len(before) :] == before:
                    yield last
