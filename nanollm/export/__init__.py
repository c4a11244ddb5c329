"""The model in the programs of others (transformers, vLLM, SGLang, llama.cpp, Ollama), and the way back."""
