"""A bundle answers over HTTP, in the words of OpenAI's API.

From outside to inside: `server` listens, `guard` lets in (as far as `limits` allow), `routes` and `static` are what
there is, `schemas` is what a request may say, `service` makes requests to the engine of it, `worker` owns the engine,
`job` waits for its replies, `choice` makes text of their tokens, `answers` and `stream` write them down, `errors` says
what went wrong, `metrics` counts. `app` puts all that together.
"""
