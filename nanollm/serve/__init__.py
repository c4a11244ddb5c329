"""A bundle answers over HTTP, in the words of OpenAI's API.

The path of a chat request: `server` lets it in, `app` checks it against `protocol` and encodes the prompt,
`engine_thread` has it continued, `streaming` turns tokens into text and JSON; `metrics` counts.
"""
