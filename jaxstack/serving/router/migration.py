"""An answer that outlives its replica: what of it a client has had, and what another replica needs to go on.

A server of ours tells beside its answer which tokens it is made of (`serving/journal_format.py`). `StreamJournal`
passes on no event before its tokens are known and keeps them. When the replica is lost, `resumption` is the request for
another one; its events continue where the client's end, under the same id, so that the client sees one stream.

The tokens are those of the undisturbed answer as long as the model gives the same logits for the same tokens however
they are batched: to the bit in float32 on one kind of device. In bfloat16 a near tie may fall the other way behind the
break; no token is lost or comes twice even then.
"""

import json
import random
import time
from typing import Any

from jaxstack.serving.exchange import encode_json
from jaxstack.serving.journal_format import COMPLETE, HEAD, RESUME_PATH, STATUS, TOKENS, WANT_JOURNAL
from jaxstack.serving.router.upstream import UpstreamError

# Nothing of the engine's: a seed that nobody has asked for need not come again.
_seeds = random.SystemRandom()


class StreamJournal:
    """Of one request, over all the replicas that it takes.

    Attributes:
      seed: for an answer whose request brings none: every replica draws it alike.
      resumptions: how often it has been gone on with.
      complete: the answer has come to its end.
      status: of an answer that is no stream.
    """

    def __init__(self) -> None:
        self.seed = _seeds.getrandbits(63)
        self.resumptions = 0
        self.complete = False
        self.status = 200
        self._began_s = time.monotonic()
        self._head: dict[str, Any] | None = None
        self._choices: dict[int, tuple[list[int], list[Any]]] = {}
        self._ended: set[int] = set()
        self._committed = False
        self.attempt()

    @property
    def headers(self) -> dict[str, str]:
        return {WANT_JOURNAL: str(self.seed)}

    @property
    def kept(self) -> bool:
        """Whether the replica under way keeps a journal; known with the first bytes of a stream."""
        return self._kept is True

    @property
    def resumable(self) -> bool:
        """Whether there is something to go on with, and a way to."""
        return self._committed

    @property
    def tokens(self) -> int:
        """Drawn so far, of all choices."""
        return sum(len(ids) for ids, _ in self._choices.values())

    def attempt(self) -> None:
        """Another replica is asked: what the last one has not committed is forgotten."""
        self._kept: bool | None = None
        self._rest = b""
        self._uncommitted: list[bytes] = []

    def take(self, piece: bytes) -> bytes:
        """Takes what has come of a stream of events; returns what may be passed on of it.

        Raises:
          UpstreamError: the replica's comments cannot be read.
        """
        data = self._rest + piece
        if self._kept is None:
            if len(data) < len(HEAD) and HEAD.startswith(data):
                self._rest = data
                return b""
            self._kept = data.startswith(HEAD)
        if not self._kept:
            self._rest = b""
            return data
        if b"\n\n" not in piece and not self._rest.endswith(b"\n"):
            self._rest = data
            return b""
        *blocks, self._rest = data.split(b"\n\n")
        passed: list[bytes] = []
        try:
            for block in blocks:
                self._take(block, passed)
        except (ValueError, TypeError, KeyError) as error:
            raise UpstreamError(f"its journal cannot be read ({error!r})") from error
        return b"".join(block + b"\n\n" for block in passed)

    def resumption(self, path: str, body: bytes) -> tuple[str, bytes]:
        """Path and body of the request by which another replica goes on."""
        assert self._head is not None
        told = []
        for choice in range(self._head["choices"]):
            ids, entries = self._choices.get(choice, ([], []))
            told.append([ids, choice in self._ended, entries])
        resumed = {**self._head, "choices": told, "elapsed_s": time.monotonic() - self._began_s}
        start = b'{"path":' + encode_json(path) + b',"request":' + body + b',"resumed":'
        return RESUME_PATH, start + encode_json(resumed) + b"}"

    def _take(self, block: bytes, passed: list[bytes]) -> None:
        if not block.startswith(b": "):
            self._uncommitted.append(block)
        elif block.startswith(TOKENS):
            for choice, ids, ended, entries in json.loads(block[len(TOKENS) :]):
                known = self._choices.setdefault(choice, ([], []))
                known[0].extend(ids)
                known[1].extend(entries)
                if ended:
                    self._ended.add(choice)
            self._committed = True
            self._commit(passed)
        elif block.startswith(HEAD):
            if self._head is None:
                self._head = json.loads(block[len(HEAD) :])
        elif block.startswith(STATUS):
            self.status = int(block[len(STATUS) :])
        elif block == COMPLETE:
            self.complete = True
            self._commit(passed)
        else:  # of others: the usage, or only that the stream is open
            self._uncommitted.append(block)
            if len(self._uncommitted) == 1:
                self._commit(passed)

    def _commit(self, passed: list[bytes]) -> None:
        passed += self._uncommitted
        self._uncommitted = []
