"""How does a reply travel while it is being written?

As server-sent events. The stream ends with [DONE], or with an error event; when the reader hangs up or never reads on,
the reply is given up.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanollm.serve.answers import Form, Json
from nanollm.serve.choice import Part
from nanollm.serve.errors import ApiError, error_body
from nanollm.serve.job import ClientGone, Job, while_listening

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""After the deadline, how long a reader has to take what is left for it."""


class EventStream(Response):
    """The answer to a request with `stream`; `first` are the parts that have come already."""

    media_type = "text/event-stream"

    def __init__(self, form: Form, job: Job, first: Sequence[Part], *, has_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.form, self.job, self.first, self.has_usage = form, job, first, has_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self.job.deadline + GRACE_S):
                await while_listening(self._write(send), receive)
        except ClientGone:
            log.debug("a reader hung up")
        except TimeoutError:
            log.warning("a reader did not take its reply in time; the connection is closed")
        finally:
            self.job.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        """One event for each chunk; those that are ready together travel together."""
        begun: set[int] = set()
        parts = self.first
        try:
            while True:
                chunks: list[Json] = []
                for part in parts:
                    chunks += self.form.chunks(part, is_first=part.index not in begun)
                    begun.add(part.index)
                yield b"".join(event(self._with_usage(chunk)) for chunk in chunks)
                if not self.job.open:
                    break
                parts = await self.job.next()
            if self.has_usage:
                yield event(self.form.usage_chunk(self.job))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body)
        except Exception:
            log.exception("a reply failed while it was streamed")
            yield event(error_body(500, "the server failed while it was replying"))

    def _with_usage(self, chunk: Json) -> Json:
        return chunk | {"usage": None} if self.has_usage else chunk


def event(message: Json) -> bytes:
    return b"data: " + json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
