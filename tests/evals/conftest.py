from tests.stages.conftest import prepared, tokenizer_path

__all__ = ["prepared", "tokenizer_path"]
