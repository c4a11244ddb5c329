"""Which lines does a stranger type to run an exported model, and what does it expect to read?"""

from collections.abc import Iterator
from pathlib import Path

from nanollm.model.config import ModelConfig

VLLM_WIDTHS = (320, 576)
"""Of the cache, for which vLLM has kernels of latent attention (get_supported_head_sizes in its mla_attention.py)."""
MAX_TOKENS = 128

TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForCausalLM.from_pretrained("NAME")
PROMPT
ids = model.generate(**prompt, max_new_tokens=TOKENS)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(ids, skip_special_tokens=True))
```
""".strip()
CHAT_PROMPT = """
messages = [{"role": "user", "content": "Which number comes after 7?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
""".strip()
BASE_PROMPT = 'prompt = tokenizer("Once upon a time", return_tensors="pt")'

VLLM = """
vLLM and SGLang read the same folder, and then answer like OpenAI's API (neither was run when this card was written):

```sh
vllm serve NAME --dtype bfloat16
python -m sglang.launch_server --model-path NAME --dtype bfloat16
```
""".strip()

GGUF = """
With llama.cpp, which then answers like OpenAI's API on port 8080:

```sh
llama-server -m FILE --jinja
```

With Ollama:

```sh
ollama create MODEL -f Modelfile
ollama run MODEL
```
""".strip()

FORMAT = """
```
<s><|system|>Answer briefly.<|end|><|user|>Which number comes after 7?<|end|><|assistant|>8<|end|>
```

The system's message may be left out. `chat_template.jinja` writes this, and refuses a message that spells one of these
marks; the template in an Ollama `Modelfile` cannot refuse, there such a text becomes the mark.
""".strip()


def how_to_run(name: str, form: str, c: ModelConfig, *, is_base: bool, gguf: str) -> Iterator[str]:
    """Paragraphs; `name` is what transformers loads ("." in the folder itself), `gguf` the file of llama.cpp."""
    if form == "gguf":
        yield GGUF.replace("FILE", gguf).replace("MODEL", Path(gguf).stem.lower())
        return
    yield f"With transformers{' 5 or newer' if form == 'compact' else ''}:"
    prompt = BASE_PROMPT if is_base else CHAT_PROMPT
    tokens = min(MAX_TOKENS, c.context_length // 2)
    yield TRANSFORMERS.replace("PROMPT", prompt).replace("TOKENS", str(tokens)).replace("NAME", name)
    if form == "deepseek-v3" and c.cache_width in VLLM_WIDTHS:
        yield VLLM.replace("NAME", name)
    elif form == "deepseek-v3":
        widths = " or ".join(map(str, VLLM_WIDTHS))
        yield f"vLLM's kernels take a cache of {widths} numbers per token and block, this model's has {c.cache_width}."
