"""A zoo model as lm-eval knows models (https://github.com/EleutherAI/lm-evaluation-harness, extra `eval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from zoo.decoder import Decoder
from zoo.eval.scoring import Piece, score, windows
from zoo.generate import stream
from zoo.hf.tokenizer import Text


class ZooLM(TemplateLM):
    """Answers lm-eval's three kinds of requests.

    Args:
        seq_len: most tokens that the model reads at once; longer contexts lose their beginning.
        batch_size: requests that are worked on at once.
    """

    def __init__(self, model: Decoder, text: Text, seq_len: int, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.text = model, text
        self.seq_len, self.batch_size = seq_len, batch_size

    @property
    def eot_token_id(self) -> int:
        ends = sorted(self.text.ends)
        return ends[0] if ends else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.text.start
        if start is None:
            raise ValueError("the tokenizer has no token that begins or ends a text")
        return start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode_plain(string) if add_special_tokens is False else self.text.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pieces = []
        for _words, context, targets in requests:
            room = max(1, self.seq_len + 1 - len(targets))
            pieces.append(Piece(context[-room:], targets[-self.seq_len :]))
        return [(found.log_likelihood, found.greedy) for found in score(self.model, pieces, self.batch_size)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            ids = self.text.encode_plain(request.args[0])
            pieces = list(windows(ids, self.prefix_token_id, self.seq_len))
            found.append(sum(one.log_likelihood for one in score(self.model, pieces, self.batch_size)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, wanted: dict[str, Any]) -> str:
        until = wanted.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        longest = int(wanted.get("max_gen_toks", 256))
        ids = self.text.encode(prompt)[-max(1, self.seq_len - longest) :]
        tokens = torch.tensor([ids], device=self.model.embed.weight.device)
        temperature = float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0
        written: list[int] = []
        for newest in stream(self.model, tokens, longest, temperature=temperature, stop=set(self.text.ends)):
            written.append(int(newest[0]))
            text = self.text.decode(written)
            found = [place for stop in stops if (place := text.find(stop)) >= 0]
            if found:
                return text[: min(found)]
            if written[-1] in self.text.ends:
                break
        return self.text.decode(written)
