"""What does Ollama read beside the GGUF: how a conversation becomes a prompt, and how a reply is drawn?

Ollama renders TEMPLATE, a text/template of Go, with .Messages (each with .Role and .Content, the system's among them)
and gives llama.cpp the text. <s> is not in it: llama.cpp puts it in front (tokenizer.ggml.add_bos_token).

Source: ollama/ollama, docs/modelfile.mdx, template/template.go, parser/parser.go.
"""

from nanollm.generate.sampling import SamplingConfig
from nanollm.text.tokenizer import END

# A chat that ends with the assistant's words asks for more of them: no <|end|> comes after these.
CHAT = """
{{- range $i, $message := .Messages }}
{{- $is_last := eq (len (slice $.Messages $i)) 1 -}}
<|{{ .Role }}|>{{ .Content }}
{{- if not (and $is_last (eq .Role "assistant")) }}<|end|>{{ end }}
{{- if and $is_last (ne .Role "assistant") }}<|assistant|>{{ end }}
{{- end }}"""
BASE = "{{ .Prompt }}"  # a text to be continued


def modelfile(gguf: str, context_length: int, *, is_base: bool) -> str:
    """The Modelfile for the GGUF of this name in the same folder. It says how to draw: Ollama would do it otherwise."""
    sampling = SamplingConfig()
    parameters: dict[str, object] = {
        "num_ctx": context_length,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
    }
    if not is_base:
        parameters["stop"] = f'"{END}"'
    lines = [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join([f"FROM ./{gguf}", f'TEMPLATE """{BASE if is_base else CHAT}"""', *lines, ""])
