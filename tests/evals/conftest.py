from tests.stages.conftest import tokenizer_path

__all__ = ["tokenizer_path"]
