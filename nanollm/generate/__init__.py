"""Ids in, ids out: sampling and the engine that decodes with the latent cache."""
