"""The model in the programs of others: a folder for transformers, vLLM and SGLang, a GGUF for llama.cpp, and the way back."""
