"""How far a candidate's next-token distributions are from the dense model's, without keeping those.

The search of Týr-the-Pruner (arXiv 2503.09657, equation 6 with beta only) compares logits by KL(dense || candidate). Storing
the dense model's takes hundreds of gigabytes, so the k likeliest tokens of every position are kept, and, unlike in the paper's
code, one more bucket for all other tokens together:

    sum_{i in top k} p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)

Merging outcomes never adds divergence, so this is a lower bound of the full KL; it grows to it with k and is 0 for the dense
model itself. Renormalising both over the top k, as the code does, has neither property: mass that a candidate moves to unlikely
tokens goes unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Logits worked on at a time: 64 MB in float32, twice.
CHUNK = 1 << 24


@dataclass(frozen=True)
class _Window:
    """Of every position but the last: the likeliest tokens, int32, their log-probabilities and the others' joint one."""

    token_TK: Tensor
    log_TK: Tensor
    rest_T: Tensor


@dataclass(frozen=True)
class Teacher:
    """The dense model on the windows of a search pool, each looked at once, when first needed. 8 k + 4 bytes a token.

    Args:
        logits_of: the dense model's logits [T, V] on a window of the pool, any floating type and device, T at least 2.
        k: tokens kept of every position; all, where the vocabulary is smaller.
    """

    logits_of: Callable[[int], Tensor]
    k: int = 512
    _seen: dict[int, _Window] = field(default_factory=dict, init=False, repr=False)

    def look(self, windows: Iterable[int]) -> None:
        """Ask the dense model about windows it has not been asked about."""
        for window in windows:
            if window not in self._seen:
                self._seen[window] = _summary(self.logits_of(window), self.k)

    def kl(self, window: int, logits_TV: Tensor) -> float:
        """The lower bound of KL(dense || candidate) in nats, mean over all positions but the last.

        Args:
            window: of the pool. Asks the dense model if `look` has not.
            logits_TV: the candidate's on this window.

        Returns:
            At least 0 but for rounding. Infinite or NaN where the candidate's logits are.
        """
        self.look([window])
        seen = self._seen[window]
        total = 0.0
        start = 0
        for logits_CV in _chunks(logits_TV):
            at = slice(start, start := start + len(logits_CV))
            log_CK, rest_C = (each[at].to(logits_CV.device) for each in (seen.log_TK, seen.rest_T))
            other_CK, other_rest_C = _log_probabilities(logits_CV, seen.token_TK[at].to(logits_CV.device, torch.int64))
            # A token without any probability costs nothing, whatever the candidate says of it.
            term_CK = torch.where(log_CK > -torch.inf, log_CK.exp() * (log_CK - other_CK), 0.0)
            term_C = term_CK.sum(dim=1) + rest_C.exp() * (rest_C - other_rest_C)
            total += float(term_C.sum(dtype=torch.float64))
        return total / start


def _summary(logits_TV: Tensor, k: int) -> _Window:
    parts = []
    for logits_CV in _chunks(logits_TV):
        token_CK = logits_CV.topk(min(k, logits_CV.shape[1]), dim=1).indices
        parts.append([each.cpu() for each in (token_CK.int(), *_log_probabilities(logits_CV, token_CK))])
    return _Window(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _chunks(logits_TV: Tensor) -> Iterable[Tensor]:
    """All positions but the last, a few at a time."""
    return logits_TV[:-1].split(max(CHUNK // logits_TV.shape[1], 1))


def _log_probabilities(logits_CV: Tensor, token_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Of some tokens each, float32 [C, K], and of all others together, float32 [C].

    The others are summed by themselves: one less the sum of the top k would be mostly rounding. Where nothing is left of them
    in float32 they count as its smallest number, so that the bound stays one.
    """
    logits_CV = logits_CV.float()
    most_C1 = logits_CV.amax(dim=1, keepdim=True)
    mass_CV = (logits_CV - most_C1).exp_()
    top_C1 = mass_CV.gather(1, token_CK).sum(dim=1, keepdim=True)
    rest_C1 = mass_CV.scatter_(1, token_CK, 0.0).sum(dim=1, keepdim=True)
    total_C1 = (top_C1 + rest_C1).log_()
    rest_C1 = rest_C1.clamp_min_(torch.finfo(torch.float32).tiny).log_()
    return logits_CV.gather(1, token_CK) - most_C1 - total_C1, (rest_C1 - total_C1).squeeze(1)
