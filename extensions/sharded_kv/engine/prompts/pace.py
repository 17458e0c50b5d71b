"""How quickly a model reads prompts on this machine, and so in how many chunks they are read soonest."""

from __future__ import annotations

# Shorter prompts tell little of how long a token takes, and shorter chunks keep a GPU's units less busy.
_LEAST_TIMED = 1024
_LEAST_CHUNK = 256
# Of a model, or of a GPU, the first prompt takes longer: code is loaded, and memory is got from the driver.
_TIMED_PROMPTS = 2
# What chunks must gain, by the estimate, to be worth it: estimates are rough.
_LEAST_GAIN = 0.05


class Pace:
    """What was measured of one model, and what follows from it.

    The GPUs need W seconds for a whole prompt, and over some stages W (chunks + stages - 1) / (chunks stages) for
    chunks. But one thread launches all kernels of a chunk, in L seconds, before those of the next: so it takes
    chunks L as well, and then the last chunk's last stage, W / (chunks stages).
    """

    def __init__(self) -> None:
        self._launch: float | None = None  # L: the least that was seen
        self._per_token: float | None = None  # W: the least that was seen
        self._timed = 0

    def note_launch(self, seconds: float) -> None:
        """The kernels of a chunk, or of a whole prompt, were launched in this time, on idle GPUs."""
        self._launch = seconds if self._launch is None else min(self._launch, seconds)

    def note_whole(self, tokens: int, seconds: float) -> None:
        """A whole prompt took so long, to its first token."""
        if tokens >= _LEAST_TIMED:
            each = seconds / tokens
            self._per_token = each if self._per_token is None else min(self._per_token, each)
            self._timed += 1

    def chunks(self, tokens: int, stages: int) -> int:
        """In how many chunks so many tokens are read soonest; 1 as long as too little is known."""
        launch, each = self._launch, self._per_token
        if launch is None or each is None or self._timed < _TIMED_PROMPTS or stages < 2:
            return 1
        whole = each * tokens

        def needed(chunks: int) -> float:
            by_gpus = whole * (chunks + stages - 1) / (chunks * stages)
            return max(by_gpus, chunks * launch + whole / (chunks * stages)) if chunks > 1 else whole

        best = min(range(1, max(1, tokens // _LEAST_CHUNK) + 1), key=needed)
        return best if needed(best) <= (1 - _LEAST_GAIN) * whole else 1
