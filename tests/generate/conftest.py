from tests.model.conftest import rng, tiny_config, tiny_model

__all__ = ["rng", "tiny_config", "tiny_model"]
