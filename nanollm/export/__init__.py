"""Export to transformers, vLLM, SGLang, llama.cpp and Ollama, its proof, and the way back."""
