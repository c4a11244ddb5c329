"""PEFT puts our adapter on the export of its base, and says what we say."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanollm.bundle import Bundle
from nanollm.export import hf
from nanollm.export.peft import write_peft
from nanollm.model import lora
from nanollm.model.lora import LoraConfig, add_lora, plain_name
from nanollm.model.transformer import Transformer
from tests.model.conftest import TINY, randomised

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")


@pytest.fixture
def export(tokenizer, tmp_path):
    """export(targets): the folder of a base, with an adapter that has learnt something, and our model with it."""

    def make(targets):
        model, c = randomised(Transformer(TINY).init(0)).eval(), LoraConfig(rank=3, alpha=7.0, targets=targets)
        hf.write_model(tmp_path, Bundle(model, tokenizer, {}), "compact", torch.float32)
        add_lora(model, c, seed=0)
        rng = torch.Generator().manual_seed(2)
        for each in lora.adapters(model):
            torch.nn.init.normal_(each.lora_B, std=0.1, generator=rng)
        weights = {plain_name(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}
        write_peft(tmp_path / "adapter", TINY, c, weights)
        return tmp_path, model

    return make


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # they are parameters
@pytest.mark.parametrize(
    "targets",
    [[*lora.TARGETS], ["experts.up_proj"], ["experts.down_proj", "o_proj"], ["shared.up_proj", "head", "centroids"]],
)
@torch.no_grad()
def test_peft_gives_our_logits(export, targets, rng):
    folder, ours = export(targets)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter").eval()
    tokens = torch.randint(TINY.vocab_size, (2, 33), generator=rng)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=0)
    with lora.without_lora(ours):
        assert not torch.allclose(theirs(tokens).logits, ours(tokens), atol=1e-2)
